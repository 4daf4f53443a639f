"""The command line: what each command answers, on which stream, with which status, and how fast it starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import atoll as package
from atoll import recipe
from atoll.cache import quiet
from atoll.cli import COMMANDS
from atoll.data.sources import ClientSource, folders
from atoll.record.folder import RunFolder
from support import Atoll


def test_public_names() -> None:
    assert sorted(package.__all__) == ["AtollError", "plan", "resume", "run"]
    assert all(callable(getattr(package, name)) for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'rum'"):
        _ = package.rum


def test_run_is_a_function_and_a_module(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atoll import run as callable_module
    from atoll.planning import plan
    from atoll.run import run as function

    assert callable_module.run is function
    monkeypatch.chdir(tmp_path)
    with pytest.raises(package.AtollError, match="there is no such recipe"):
        callable_module("no-such")
    assert package.plan(tiny).hash == plan(tiny).hash


def test_import_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, atoll, atoll.cli; assert atoll.cli.call(['--help']) == 0;"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'numpy', 'rich.console') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(atoll: Atoll, name: str) -> None:
    said = atoll(name, "--help")
    assert said.status == 0
    example = " ".join(said.out.split("Example: ")[1].split())
    assert example == COMMANDS[name][1]
    assert example.startswith(f"atoll {name}")


def test_run_prints_the_table_and_what_comes_next(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    said = atoll("run", tiny)
    assert said.status == 0
    lines = said.out.splitlines()
    assert lines[0].split() == ["held-out", "loss", "north", "south", "west", "mean"]
    assert [line.split()[0] for line in lines[1:3]] == ["base", "federated"]
    assert len(re.findall(r"\d\.\d{3} ± \d\.\d{3}", lines[2])) == 4
    assert "atoll chat tiny-1" in said.out
    assert "round 2 done: 3 accepted" in said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "runs/tiny-1/card.md").exists()


def test_plan_runs_nothing_and_foretells_the_bytes(atoll: Atoll, tiny: str, finished: Path, tmp_path: Path) -> None:
    said = atoll("plan", tiny, "--json")
    data = json.loads(said.out)
    assert not (tmp_path / "runs").exists()
    measured = json.loads(atoll("show", str(finished), "--json").out)
    assert data["bytes"]["up_total"] == pytest.approx(measured["bytes_up"], rel=0.03)
    assert data["bytes"]["down_total"] == pytest.approx(measured["bytes_down"], rel=0.03)
    assert data["trains"]["params"] == measured["trains"]
    assert {name: (one["train"], one["held_out"]) for name, one in data["clients"].items()} == dict.fromkeys(
        ("north", "south", "west"), (30, 10)
    )
    assert data["memory"]["total"] == sum(data["memory"][part] for part in ("base", "trained", "server", "activations"))


def test_plan_knows_the_time_after_a_first_run(
    atoll: Atoll, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))
    assert "unknown until a first run" in atoll("plan", tiny).out
    atoll("run", tiny, "--set", "finetune.rounds=1")
    data = json.loads(atoll("plan", tiny, "--json").out)
    assert data["speed"]["run"] == "tiny-1"
    ten = json.loads(atoll("plan", tiny, "--json", "--set", "finetune.rounds=10", "--set", "evaluate.every=0").out)
    one = json.loads(atoll("plan", tiny, "--json", "--set", "finetune.rounds=1", "--set", "evaluate.every=0").out)
    steps = 9 * 3 * 2 * 4  # rounds more, clients, local steps, samples each
    assert ten["seconds"] - one["seconds"] == pytest.approx(steps * data["speed"]["training"])


def test_what_a_plan_fetches_is_told_beside_the_plan(
    atoll: Atoll, tiny: str, sites: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from atoll.planning import plan

    def fetched() -> dict[str, ClientSource]:
        quiet("fetching the sites")  # as a shipped data part does, which is given nobody to tell
        return folders(str(sites))

    monkeypatch.setattr("atoll.data.sources.four_sites", fetched)
    said = atoll("plan", tiny, "--set", "data=four-sites", "--json")
    assert said.err.splitlines() == ["fetching the sites"]
    assert json.loads(said.out)["name"] == "tiny"
    plan(tiny, ["data=four-sites"])
    assert capsys.readouterr().err == "", "from Python nobody listens"


def test_plan_for_people(atoll: Atoll, tiny: str) -> None:
    said = atoll(
        "plan", tiny, "--set", "finetune.up=[int8]", "--set", "finetune.schedule={use: synchronous, cohort: 2}"
    )
    assert "update: down as it is, up int8" in said.out
    assert "2 clients x 2 rounds" in said.out
    assert "activations at most 2,048 tokens x 2 layers" in " ".join(said.out.split())


def test_stopped_run_goes_on(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "stopper.py").write_text(
        "def stop():\n"
        "    def at(folder):\n"
        "        return lambda event: (folder / 'stop').touch() if type(event).__name__ == 'RoundEnded' else None\n"
        "    return at\n"
    )
    said = atoll("run", tiny, "--set", "sinks=['stopper:stop']")
    assert said.status == 130
    assert "stopped as asked; nothing is lost" in said.err
    assert "`atoll resume tiny-1`" in said.err
    assert [(r["state"], r["round"], r["rounds"]) for r in json.loads(atoll("runs", "--json").out)] == [
        ("stopped", 1, 2)
    ]
    assert atoll("stop", "tiny-1").status == 1
    (tmp_path / "stopper.py").write_text("def stop():\n    return lambda folder: lambda event: None\n")
    sys.modules.pop("stopper")
    assert atoll("resume", "tiny-1").status == 0
    assert json.loads(atoll("runs", "--json").out)[0]["state"] == "finished"


def test_crash_leaves_its_traceback_with_the_run(
    atoll: Atoll, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atoll import stage

    def crash(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(stage, "sum_up", crash)
    said = atoll("run", tiny)
    assert said.status == 70
    assert "RuntimeError: boom" in said.err
    assert "Traceback" not in said.err
    (note,) = (tmp_path / "runs/tiny-1").glob("error-*.txt")
    assert str(note) in said.err
    assert "in crash" in note.read_text()


def test_sigterm_names_the_way_back(tiny: str, tmp_path: Path, shared_home: Path) -> None:
    environment = {**os.environ, "ATOLL_HOME": str(shared_home), "ATOLL_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-m", "atoll", "run", tiny, "--set", "finetune.rounds=10000"]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if "round 1 done" in line:
                    process.send_signal(signal.SIGTERM)
                    break
            rest = process.stderr.read()
            assert process.wait(30) == 130
        finally:
            process.kill()
    assert "interrupted; the rounds that are done are kept" in rest
    assert "`atoll resume tiny-1`" in rest
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    "command",
    [["runs"], ["show", "latest"], ["compare", "tiny-1", "tiny-2"], ["methods"], ["parts"], ["parts", "outer"]],
)
def test_listings_as_json_are_nothing_but_json(
    atoll: Atoll, command: list[str], finished: Path, tmp_path: Path
) -> None:
    for name in ("tiny-1", "tiny-2"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    said = atoll(*command, "--json")
    assert said.status == 0
    assert json.loads(said.out)
    assert atoll(*command).out.strip()


def test_show_and_runs_of_a_finished_run(atoll: Atoll, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "tiny-1")
    assert re.search(r"tiny-1\s+finished\s+2 of 2\s+3 .*4 of 4", atoll("runs").out)
    shown = atoll("show").out
    assert [row.split()[0] for row in shown.splitlines()[-6:]] == [
        "base",
        "north",
        "south",
        "west",
        "federated",
        "pooled",
    ]


def test_running_run_is_seen_and_not_run_twice(atoll: Atoll, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "tiny-1")
    with RunFolder(tmp_path / "runs/tiny-1").locked():
        assert json.loads(atoll("runs", "--json").out)[0]["state"] == "running"
        again = atoll("resume", "tiny-1")
        assert again.status == 1
        assert "the run is running already" in again.err
        assert atoll("stop", "tiny-1").status == 0
        assert (tmp_path / "runs/tiny-1/stop").exists()


def test_card_is_made_anew_from_the_record(atoll: Atoll, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "tiny-1")
    card = tmp_path / "runs/tiny-1/card.md"
    before = card.read_text()
    card.unlink()
    assert atoll("card", "tiny-1").out == card.read_text() == before.replace(finished.name, "tiny-1")


def test_data_preview(atoll: Atoll, sites: Path) -> None:
    arguments = ("data", str(sites / "north.jsonl"), "--model", "tiny:llama")
    data = json.loads(atoll(*arguments, "--json", "--show", "1").out)
    assert sum(data["samples"].values()) == 40
    labeled = "".join(text for text, on in data["shown"][0] if on)
    assert re.fullmatch(r"Item \d+ is red\.<\|im_end\|>", labeled)
    everything = json.loads(atoll(*arguments, "--json", "--show", "0", "--objective", "causal-lm").out)
    assert everything["labeled_share"] == 1.0
    assert "40 kept of 40" in atoll(*arguments).out


def test_methods_and_parts_are_listed(atoll: Atoll) -> None:
    names = {row["name"]: row for row in json.loads(atoll("methods", "--json").out)}
    assert "McMahan" in names["fedavg-lora"]["reference"]
    (clip,) = (row for row in json.loads(atoll("parts", "transform", "--json").out) if row["name"] == "clip")
    (norm,) = clip["arguments"]
    assert (norm["name"], norm["type"], norm["bounds"], norm["required"]) == ("norm", "float", "> 0", True)
    assert "beta1: float >= 0, < 1 = 0.9" in atoll("parts", "optimizer").out


def test_init_writes_a_recipe_that_can_be_planned(atoll: Atoll, sites: Path, tmp_path: Path) -> None:
    assert atoll("init", "mine.yaml", "--data", str(sites)).status == 0
    data = json.loads(atoll("plan", "mine.yaml", "--set", "model=tiny:llama", "--json").out)
    assert list(data["clients"]) == ["north", "south", "west"]
    before = (tmp_path / "mine.yaml").read_text()
    again = atoll("init", "mine.yaml")
    assert again.status == 1
    assert "the file is there already" in again.err
    assert (tmp_path / "mine.yaml").read_text() == before


def test_init_of_preferences_aligns_and_of_plain_text_learns_every_token(atoll: Atoll, tmp_path: Path) -> None:
    rows = {
        "likes": {"prompt": "Which?", "chosen": "this one", "rejected": "that one"},
        "texts": {"text": "Some words of a report."},
    }
    for kind, row in rows.items():
        for client in ("north", "south"):
            file = tmp_path / kind / f"{client}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row | {"id": n}) + "\n" for n in range(20)))
        assert atoll("init", f"{kind}.yaml", "--data", f"./{kind}").status == 0
    aligned = [*recipe.staged(recipe.read("likes.yaml")[1]).values()]
    assert [one.get("finetune", {}).get("objective", "sft") for one in aligned] == ["sft", {"use": "dpo", "beta": 0.1}]
    assert atoll("plan", "likes.yaml", "--set", "model=tiny:llama").status == 0
    plain = atoll("plan", "texts.yaml", "--set", "model=tiny:llama")
    assert plain.status == 0
    assert "\n  objective: causal-lm" in (tmp_path / "texts.yaml").read_text()


def test_data_holds_out_what_the_recipe_does(atoll: Atoll, sites: Path, tmp_path: Path) -> None:
    assert atoll("init", "mine.yaml", "--data", str(sites)).status == 0
    text = (tmp_path / "mine.yaml").read_text().replace("held_out: 0.1", "held_out: 0.5")
    (tmp_path / "mine.yaml").write_text(text.replace("model: smollm2-135m", "model: tiny:llama"))
    shown = [
        json.loads(atoll("data", str(sites / "north.jsonl"), "--model", model, "--json").out)["samples"]
        for model in ("tiny:llama", "mine.yaml")
    ]
    few, half = (one["test"] / (one["train"] + one["test"]) for one in shown)
    assert few < 0.3 < half


def test_init_without_data_asks_for_the_users_folders(atoll: Atoll, tmp_path: Path) -> None:
    from atoll.recipe import read

    assert atoll("init").status == 0
    recipe, _ = read(str(tmp_path / "atoll.yaml"))
    assert recipe.name == "atoll"
    said = atoll("plan", "atoll.yaml")
    assert said.status == 1
    assert "data/clinic" in said.err
