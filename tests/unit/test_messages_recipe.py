"""Mistakes in a recipe or on the command line are refused before anything runs, and named with who said it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import atoll as package
from atoll import recipe
from atoll.errors import AtollError
from atoll.starter import write_starter
from support import Atoll, Said

RECIPE = "recipe: 1\nname: mine\nextends: runs/four-sites-tiny\n"


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


def refused(said: Said, *says: str) -> None:
    assert (said.status, said.out) == (1, ""), said
    for text in says:
        assert text in said.err, (text, said.err)


def mistake(mine: str, *settings: str) -> AtollError:
    with pytest.raises(AtollError) as told:
        package.plan(mine, settings)
    return told.value


@pytest.mark.parametrize("name", ["../evil", "a b/c", ".hidden", "-x", "''", "x" * 101])
def test_name_that_would_leave_the_folder_of_runs(atoll: Atoll, tiny: str, tmp_path: Path, name: str) -> None:
    for command in ("plan", "run"):
        refused(atoll(command, tiny, "--set", f"name={name}"), "--set name", "letters, digits, _, - and .")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


def test_a_plain_name_is_taken(mine: str) -> None:
    assert package.plan(mine, ["name=Größe_2.b-c"]).recipe.name == "Größe_2.b-c"


@pytest.mark.parametrize("stem", ["-x", "a b", "x" * 200, "..y"])
def test_a_starter_of_any_file_name_has_a_good_name(tmp_path: Path, stem: str) -> None:
    file = write_starter(tmp_path / f"{stem}.yaml", None)
    assert recipe.read(file)[0].name


def test_baselines_over_a_network_are_refused_before_anybody_is_asked(mine: str) -> None:
    told = mistake(mine, "fleet={use: flower, server: 'nowhere.example:1'}", "baselines=[local]")
    assert told.what == "no baselines over a network"
    assert told.details["allowed"] == "[]"


def test_steps_and_epochs_together_are_refused_and_either_can_be_cleared(mine: str) -> None:
    both = mistake(mine, "finetune.local_steps=3", "finetune.epochs=2")
    assert both.what == "local_steps and epochs both say how long local work is"
    assert both.details["found"] == "local_steps: 3, epochs: 2"
    assert "--set finetune.local_steps=null" in both.details["remedy"]
    assert package.plan(mine, ["finetune.local_steps=null", "finetune.epochs=2"]).recipe.finetune.epochs == 2
    cleared = package.plan(mine, ["finetune.local_steps=3", "finetune.epochs=2", "finetune.epochs=null"]).recipe
    assert (cleared.finetune.local_steps, cleared.finetune.epochs) == (3, 1)


def test_who_said_it_is_named(mine: str) -> None:
    assert mistake(mine, "finetune.rounds=x").details["where"] == "--set finetune.rounds"
    assert mistake(mine, "finetune={rounds: x}").details["where"] == "--set finetune: finetune.rounds"
    assert mistake(mine, "finetune.optimizer.lr=-1").details["where"] == "--set finetune.optimizer.lr"
    Path(mine).write_text(RECIPE + "finetune: {optimizer: adamww}\n")
    assert mistake(mine).details["where"] == f"{mine}: finetune.optimizer"
    Path(mine).write_text(RECIPE + "finetune: {ronds: 3}\n")
    assert mistake(mine, "finetune.rounds=3").details["where"] == f"{mine}: finetune.ronds"


@pytest.mark.parametrize(
    ("setting", "found", "allowed", "remedy"),
    [
        ("finetune.rounds=many", "'many'", "a whole number", ""),
        ("finetune.rounds=1.5", "1.5", "a whole number", ""),
        ("finetune.clip_norm=no", "'no'", "a number", ""),
        ("finetune.optimizer.lr=fast", "'fast'", "a number", ""),
        ("evaluate.start=perhaps", "'perhaps'", "true or false", ""),
        ("finetune=3", "3", "a mapping", ""),
        ("finetune.rounds=null", "null", "a whole number", ""),
        ("baselines=local", "'local'", "a list", "write [local]"),
        ("finetune.up=int8", "'int8'", "a list", "write [int8]"),
        ("model=5", "5", "a text or a mapping", ""),
    ],
)
def test_values_are_told_in_a_recipes_words(mine: str, setting: str, found: str, allowed: str, remedy: str) -> None:
    details = mistake(mine, setting).details
    assert (details["found"], details["allowed"], details["remedy"]) == (found, allowed, remedy)


def test_a_place_in_a_list_is_told_as_parts_tell_it(mine: str) -> None:
    assert mistake(mine, "finetune.up=[5]").details["where"] == "--set finetune.up: finetune.up[0]"


def test_files_that_are_no_recipe_are_told_with_a_remedy(atoll: Atoll, mine: str) -> None:
    path = Path(mine)
    path.write_text("a: [1\n")
    refused(atoll("plan", mine), "not YAML", "close what is open")
    path.write_bytes(b"name: Gr\xf6\xdfe\n")
    refused(atoll("plan", mine), "the recipe is not UTF-8", "0xf6", "iconv")
    path.write_text("")
    refused(atoll("plan", mine), "a recipe is a mapping", "found:   nothing", "`atoll init` writes an example")


def test_model_that_is_not_there_is_placed(atoll: Atoll, mine: str, tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    refused(atoll("plan", mine, "--set", "model=./my-modle"), "--set model", "did you mean 'my-model'?")
    refused(atoll("plan", mine, "--set", "model=smollm-135m"), "--set model", "did you mean 'smollm2-135m'?")
    refused(atoll("data", mine.replace("yaml", "jsonl"), "--model", "x"), "no such file")
    (tmp_path / "one.jsonl").write_text('{"text": "x"}\n')
    refused(atoll("data", "one.jsonl", "--model", "smollm-135m"), "where:   --model")


def test_client_whose_path_is_missing_is_named_with_its_key(atoll: Atoll) -> None:
    assert atoll("init").status == 0
    refused(atoll("plan", "atoll.yaml"), "atoll.yaml: data.paths.clinic")


def test_init_with_data_that_are_no_folder_names_the_option(atoll: Atoll, sites: Path) -> None:
    refused(atoll("init", "x.yaml", "--data", "./nope"), "there is no such folder", "--data nope")
    refused(atoll("init", "x.yaml", "--data", str(sites / "north.jsonl")), "this is a file", f"--data {sites}/north")
    assert not Path("x.yaml").exists()


def test_method_is_found_without_its_folder(atoll: Atoll, tiny: str) -> None:
    said = atoll("sweep", tiny, "--method", "fedprx", "--grid", "seed=1")
    refused(said, "did you mean 'methods/fedprox'?")


@pytest.mark.parametrize("trials", ["-1", "0"])
def test_trials_have_a_range(atoll: Atoll, tiny: str, trials: str) -> None:
    said = atoll("sweep", tiny, "--method", "fedprox", "--grid", "seed=1", "--trials", trials)
    assert said.status == 2
    assert f"{trials} is not in the range x>=1" in said.err


def test_context_beyond_the_models_positions(atoll: Atoll, mine: str) -> None:
    said = atoll("plan", mine, "--set", "model=tiny:gpt2", "--set", "finetune.context=257")
    refused(said, "longer than the model's", "--set finetune.context", "257", "8 to 256")
    package.plan(mine, ["model=tiny:gpt2", "finetune.context=256"])
    package.plan(mine, ["model=tiny:bloom", "finetune.context=100000"])  # its positions have no bound


def test_more_memory_than_there_is_gets_a_warning(atoll: Atoll, tiny: str) -> None:
    assert not [w for w in json.loads(atoll("plan", tiny, "--json").out)["warnings"] if "are free" in w]
    said = atoll("plan", tiny, "--set", "finetune.batch_size=100000000", "--json")
    (warning,) = [w for w in json.loads(said.out)["warnings"] if "are free" in w]
    assert "lower finetune.batch_size (100000000)" in warning


# `from:`


def test_start_from_another_model_or_space_is_refused_by_the_plan(atoll: Atoll, tiny: str, finished: Path) -> None:
    start = ("--set", f"from={finished}")
    assert atoll("plan", tiny, *start).status == 0
    refused(atoll("plan", tiny, "--set", "from=tiny-7"), "--set from", "tiny-7")
    refused(
        atoll("plan", tiny, *start, "--set", "model=tiny:gpt2", "--set", "finetune.context=64"),
        "the run has another model", "tiny:llama", "tiny:gpt2", "--set from",
    )  # fmt: skip
    refused(atoll("plan", tiny, *start, "--set", "finetune.space.rank=4"), "the run has another space", "rank=4")


def test_start_from_a_run_without_result_is_refused_by_the_plan(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "runs/tiny-1").mkdir(parents=True)
    (tmp_path / "runs/tiny-1/recipe.yaml").write_text(Path(tiny).read_text())
    refused(atoll("plan", tiny, "--set", "from=tiny-1"), "the run has no result yet", "`atoll resume tiny-1`")


# The Python API.


def test_settings_that_are_one_text_are_refused(mine: str) -> None:
    with pytest.raises(AtollError, match="not a list of settings") as told:
        package.plan(mine, "model=tiny:llama")
    assert told.value.details["found"] == "'model=tiny:llama'"
    with pytest.raises(AtollError, match="not a list of settings"):
        package.plan(mine, [1])  # type: ignore[list-item]


def test_a_mapping_is_no_recipe_and_a_path_is_one(mine: str) -> None:
    with pytest.raises(AtollError, match="not a recipe") as told:
        package.run({"recipe": 1})  # type: ignore[operator]
    assert told.value.details["found"] == "dict"
    assert package.plan(Path(mine)).hash == package.plan(mine).hash


def test_libraries_warnings_of_the_future_are_not_shown(tiny: str, tmp_path: Path, shared_home: Path) -> None:
    (tmp_path / "noisy.py").write_text(
        "import warnings\n\n\ndef sink():\n    def at(folder):\n"
        "        return lambda event: warnings.warn('this goes away', FutureWarning)\n    return at\n"
    )
    code = f"import atoll; atoll.run({tiny!r}, ['sinks=[\"noisy:sink\"]', 'finetune.rounds=1'])"
    said = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"ATOLL_HOME": str(shared_home), "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert "FutureWarning" not in said.stderr


def test_a_path_in_a_recipe_is_read_from_the_recipes_folder(atoll: Atoll, sites: Path, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    shutil.copytree(sites, tmp_path / "study" / "sites")
    assert atoll("init", "study/mine.yaml", "--data", "study/sites").status == 0
    assert 'path: "./sites"' in (tmp_path / "study" / "mine.yaml").read_text()
    plan = json.loads(atoll("plan", "study/mine.yaml", "--set", "model=tiny:llama", "--json").out)
    assert list(plan["clients"]) == ["north", "south", "west"]
    (tmp_path / "study" / "deep").mkdir()
    (tmp_path / "study" / "deep" / "more.yaml").write_text("extends: ../mine.yaml\nname: more\nseed: 3\n")
    again = json.loads(atoll("plan", "study/deep/more.yaml", "--set", "model=tiny:llama", "--json").out)
    assert again["clients"] == plan["clients"]


def test_a_run_that_starts_from_the_latest_does_not_start_from_itself(atoll: Atoll, tiny: str) -> None:
    assert atoll("run", tiny).status == 0
    assert atoll("run", tiny, "--set", "from=latest").status == 0


def test_a_clients_name_that_no_file_can_have_is_refused(atoll: Atoll, tiny: str, sites: Path) -> None:
    text = json.dumps({"x" * 300: str(sites / "north.jsonl")})
    refused(atoll("plan", tiny, "--set", f"data={{use: clients, paths: {text}}}"), "may not be called so", "rename")
