"""Planted mistakes through the real command line: each is told with its place, what was found, what would do, and how to
mend it; the exit status is not zero, there is no traceback, and no folder is left behind."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support import Atoll, Said


class Mistake(NamedTuple):
    """Settings that plant it, and what the message must say."""

    settings: list[str]
    says: list[str]


MISTAKES = {
    "unknown key": Mistake(["finetune.ronds=3"], ["unknown key", "finetune.ronds", "did you mean 'rounds'?"]),
    "unknown part": Mistake(["finetune.outer=nestrov"], ["unknown outer", "nestrov", "did you mean 'nesterov'?"]),
    "unknown argument": Mistake(
        ["finetune.optimizer.lrr=1"], ["'adamw' has no such argument", "finetune.optimizer.lrr", "did you mean 'lr'?"]
    ),
    "wrong type": Mistake(["finetune.rounds=many"], ["finetune.rounds", "'many'", "a whole number"]),
    "out of range": Mistake(["finetune.optimizer.lr=-1"], ["finetune.optimizer.lr", "-1", "greater than 0"]),
    "missing folder": Mistake(["data.path=./nowhere"], ["there is no such folder", "data.path", "/nowhere"]),
    "missing model": Mistake(["model=./no-model"], ["there is no such folder", "no-model"]),
    "misspelt model": Mistake(["model=smollm-135m"], ["there is no such model", "did you mean 'smollm2-135m'?"]),
    "setting without a value": Mistake(["finetune.rounds"], ["not a setting", "path.to.key=value"]),
    "setting that is not YAML": Mistake(["finetune.up=[int8"], ["not YAML", "--set finetune.up"]),
    "cohort too large": Mistake(
        ["finetune.schedule={use: synchronous, cohort: 9}"], ["more clients asked than there are", "9", "1 to 3"]
    ),
    "scaffold with adamw": Mistake(
        ["finetune.correction=scaffold"], ["'scaffold' needs other local work", "adamw", "sgd without momentum"]
    ),
    "topk down": Mistake(
        ["finetune.down=[{use: topk, fraction: 0.1}]"],
        ["a broadcast must keep every parameter", "finetune.down[0]", "int8"],
    ),
    "unknown client": Mistake(["finetune.population=[nort]"], ["unknown client", "nort", "did you mean 'north'?"]),
    "wrong version": Mistake(["recipe=7"], ["a recipe needs its version", "7", "recipe: 1"]),
    "nothing to adapt": Mistake(
        ["finetune.space={use: lora, targets: [q_prj]}"], ["q_prj", "space.targets", "did you mean 'q_proj'?"]
    ),
    "own module missing": Mistake(["sinks=['nowhere:sink']"], ["cannot import the module", "sinks[0]", "nowhere:sink"]),
    "start from no run": Mistake(["from=tiny-7"], ["tiny-7"]),
}


def expect_clean(said: Said, says: list[str], status: int = 1) -> None:
    assert said.status == status
    assert said.out == ""
    assert "Traceback" not in said.err
    for text in says:
        assert text in said.err, (text, said.err)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_in_a_recipe(atoll: Atoll, tiny: str, tmp_path: Path, name: str) -> None:
    settings = [word for setting in MISTAKES[name].settings for word in ("--set", setting)]
    expect_clean(atoll("run", tiny, *settings), MISTAKES[name].says)
    assert not list((tmp_path / "runs").glob("*"))


def write_recipe(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.yaml").write_text(text)
    return str(tmp_path / "mine.yaml")


def test_unknown_recipe(atoll: Atoll, tmp_path: Path) -> None:
    expect_clean(atoll("run", "quickstrat"), ["there is no such recipe", "quickstrat", "did you mean 'quickstart'?"])
    expect_clean(atoll("run", "mine.yaml"), ["there is no such recipe file", "mine.yaml", "atoll init"])
    write_recipe(tmp_path, "recipe: 1\n")
    expect_clean(atoll("run", "mnie.yaml"), ["there is no such recipe file", "did you mean 'mine.yaml'?"])


def test_a_recipe_extends_the_file_beside_it_wherever_one_stands(atoll: Atoll, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "base.yaml").write_text("recipe: 1\nname: base\nextends: runs/four-sites-tiny\n")
    (tmp_path / "study" / "mine.yaml").write_text("extends: base.yaml\nname: mine\n")
    expect_clean(atoll("plan", "study/mine.yaml", "--set", "finetune.ronds=3"), ["finetune.ronds"])
    expect_clean(atoll("plan", "study/other.yaml"), ["no such recipe file", "study/other.yaml"])


def test_recipes_in_a_circle(atoll: Atoll, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    expect_clean(atoll("run", "a.yaml"), ["extend each other in a circle", "a.yaml -> b.yaml -> a.yaml"])


def test_recipe_that_is_not_yaml(atoll: Atoll, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "recipe: 1\nname: [x\n")
    expect_clean(atoll("run", recipe), ["not YAML", f"{recipe}: line 3"])


def test_recipe_without_data(atoll: Atoll, tmp_path: Path) -> None:
    expect_clean(atoll("run", write_recipe(tmp_path, "recipe: 1\nname: x\n")), ["'data' is missing", "add `data:`"])


def test_recipe_without_version(atoll: Atoll, tmp_path: Path) -> None:
    expect_clean(atoll("run", write_recipe(tmp_path, "name: x\n")), ["a recipe needs its version", "recipe: 1"])


def test_extending_a_recipe_that_is_not_there(atoll: Atoll, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "extends: methods/krumm\nrecipe: 1\n")
    expect_clean(atoll("run", recipe), ["no such recipe", f"{recipe}: extends", "did you mean 'methods/krum'?"])


def test_extending_a_number(atoll: Atoll, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "extends: 5\nrecipe: 1\n")
    expect_clean(atoll("run", recipe), ["not a recipe to extend", "extends", "5"])


def test_unknown_run(atoll: Atoll, tiny: str) -> None:
    expect_clean(atoll("show", "latest"), ["there are no runs yet", "atoll run quickstart"])
    atoll("run", tiny, "--set", "finetune.rounds=1", "--set", "finetune.local_steps=1")
    for command in ("show", "resume", "card", "chat", "export", "stop"):
        expect_clean(atoll(command, "tinny-1"), ["there is no such run", "tinny-1", "did you mean 'tiny-1'?"])


def test_wrong_usage_names_the_option(atoll: Atoll) -> None:
    expect_clean(atoll("run"), ["Missing argument 'RECIPE'"], status=2)
    expect_clean(atoll("chat", "--max-tokens", "0"), ["--max-tokens", "0 is not in the range x>=1"], status=2)
    expect_clean(atoll("export", "x", "--to", "gguf"), ["'gguf'", "adapter"], status=2)


def test_unknown_slot_of_parts(atoll: Atoll) -> None:
    expect_clean(atoll("parts", "transfrom"), ["unknown slot", "transfrom", "did you mean 'transform'?"])


# What is wrong in the data.


def with_client(sites: Path, tmp_path: Path, content: bytes) -> list[str]:
    """Three sites, and a fourth with this content."""
    folder = tmp_path / "with"
    folder.mkdir()
    for file in sites.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "odd.jsonl").write_bytes(content)
    return ["--set", f"data.path={folder}"]


def record(number: int, **more: Any) -> bytes:
    return json.dumps({"prompt": f"Why {number}?", "completion": f"Since {number}.", **more}).encode() + b"\n"


def test_line_that_is_not_json(atoll: Atoll, tiny: str, sites: Path, tmp_path: Path) -> None:
    said = atoll("run", tiny, *with_client(sites, tmp_path, record(1) + b'{"prompt": \n'))
    expect_clean(said, ["a line is not JSON", f"{tmp_path}/with/odd.jsonl:2", "one JSON object a line"])
    assert not list((tmp_path / "runs").glob("*"))


def test_file_that_is_not_utf8(atoll: Atoll, tiny: str, sites: Path, tmp_path: Path) -> None:
    said = atoll("run", tiny, *with_client(sites, tmp_path, record(1) + "Größe".encode("latin-1") + b"\n"))
    expect_clean(said, ["the file is not UTF-8", "odd.jsonl:2", "byte 0xf6", "iconv"])
    assert not list((tmp_path / "runs").glob("*"))


def test_records_without_an_answer_are_counted(atoll: Atoll, sites: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_bytes(record(1) + record(2, completion="") + record(3, completion=" ") + record(4))
    said = atoll("data", str(file), "--model", "tiny:llama", "--json")
    ((_, (count, place)),) = json.loads(said.out)["report"]["left_out"].items()
    assert (count, place) == (2, "some.jsonl:2")


def test_client_without_usable_data_is_named_and_left_out(atoll: Atoll, tiny: str, sites: Path, tmp_path: Path) -> None:
    said = atoll("run", tiny, *with_client(sites, tmp_path, record(1, completion="") * 3), "--json")
    assert said.status == 0
    assert "odd is left out, it has no usable data" in said.err
    assert "odd.jsonl:1" in said.err
    data = json.loads(said.out)
    assert set(data["left_out"]) == {"odd"}
    assert set(data["samples"]) == {"north", "south", "west"}


def test_no_client_has_usable_data(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "odd.jsonl").write_bytes(record(1, completion=""))
    said = atoll("run", tiny, "--set", f"data.path={folder}")
    expect_clean(said, ["no client has usable data", "odd", "atoll data PATH"])
    assert not list((tmp_path / "runs").glob("*"))


# What goes wrong on the way.


def test_run_that_accepted_no_update_fails_and_the_rounds_go_on(atoll: Atoll, tiny: str) -> None:
    said = atoll("run", tiny, "--set", "finetune.optimizer.lr=1e30", "--set", "finetune.local_steps=3", "--json")
    assert said.status == 1
    assert "nothing was learned: no update was ever accepted" in said.err
    assert "6 replies refused, the first north's: the loss is nan" in said.err
    assert "--set finetune.optimizer.lr" in said.err
    data = json.loads(said.out)
    assert (data["state"], data["round"]) == ("failed", 2)
    assert "nothing was learned" in (Path(data["path"]) / "card.md").read_text()
    assert {(one["round"], one["client"]) for one in data["missing"]} == {
        (number, client) for number in (1, 2) for client in ("north", "south", "west")
    }
    assert all(one["refused"] and "the loss is nan at local step" in one["reason"] for one in data["missing"])
    assert "round 1: north refused: the loss is nan at local step" in said.err
    assert data["losses"][0]["mean"]["loss"] == data["losses"][1]["mean"]["loss"]  # nothing was aggregated


def test_full_disk_loses_nothing(atoll: Atoll, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from atoll.record import checkpoint

    written, save = [], checkpoint.replace_tensors

    def full_at_second(*arguments: Any, **options: Any) -> None:
        written.append(arguments[0])
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **options)

    monkeypatch.setattr(checkpoint, "replace_tensors", full_at_second)
    said = atoll("run", tiny)
    expect_clean(said, ["no space on disk", "runs/tiny-1", "free some space, then `atoll resume tiny-1`"])
    assert json.loads(atoll("runs", "--json").out)[0]["state"] == "stopped"
    assert atoll("resume", "tiny-1").status == 0
    assert json.loads(atoll("show", "--json").out)["round"] == 2


def test_full_disk_as_tensor_files_tell_it(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    from atoll.errors import AtollError
    from atoll.record.folder import RunFolder

    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(AtollError, match="no space on disk"), RunFolder(tmp_path).disk_errors():
        raise SafetensorError(told)
    with pytest.raises(SafetensorError, match="header"), RunFolder(tmp_path).disk_errors():
        raise SafetensorError("invalid header")
