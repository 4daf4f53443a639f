"""Sweeps: equal budgets, the same draw every time, finished trials kept, the best first."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from atoll import recipe
from atoll.errors import AtollError
from atoll.sweep import Tried, choose, parse_grid, points, ranked, tree_of, untried
from support import Atoll


def test_grid_for_all_and_for_one_method() -> None:
    grid = parse_grid(["a.lr=1e-3,3e-3", "methods/fedprox:a.mu=0.1,1", "a.name=x"])
    assert points(grid, "methods/fedavg") == [{"a.lr": 0.001, "a.name": "x"}, {"a.lr": 0.003, "a.name": "x"}]
    assert len(points(grid, "fedprox")) == 4
    assert all("a.mu" in point for point in points(grid, "methods/fedprox"))


@pytest.mark.parametrize("wrong", ["a.lr", "=1", "a.lr=", "fedprox:=1"])
def test_malformed_grid(wrong: str) -> None:
    with pytest.raises(AtollError, match="not a grid"):
        parse_grid([wrong])


def test_equal_budgets_drawn_by_seed() -> None:
    grid = parse_grid(["a=1,2,3,4,5,6", "one:b=1,2"])
    chosen = choose(["one", "two"], grid, 4, seed=0)
    assert [trial.method for trial in chosen] == ["one"] * 4 + ["two"] * 4
    assert len({trial.name for trial in chosen}) == 8
    assert chosen == choose(["one", "two"], grid, 4, seed=0)
    assert chosen != choose(["one", "two"], grid, 4, seed=1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("trials", [1, 2, 3, 4])
def test_methods_get_the_same_values_of_what_they_share(seed: int, trials: int) -> None:
    grid = parse_grid(["lr=0.001,0.01", "fedprox:mu=0.01,0.1", "scaffold:k=1,2,3"])
    methods = ["methods/fedprox", "scaffold"]
    chosen = choose(methods, grid, trials, seed)
    assert len({trial.name for trial in chosen}) == 2 * trials
    rates = [sorted(one.settings["lr"] for one in chosen if one.method == method) for method in methods]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == min(trials, 2)


def test_a_key_that_a_method_has_values_of_its_own_for_is_not_shared() -> None:
    grid = parse_grid(["lr=1,2", "seed=0,1", "two:lr=3,4"])
    chosen = choose(["one", "two"], grid, 2, 0)
    assert [{one.settings["seed"] for one in chosen if one.method == method} for method in ("one", "two")] == [
        {0, 1}
    ] * 2
    assert {one.settings["lr"] for one in chosen if one.method == "two"} <= {3, 4}


def test_values_that_no_trial_has_room_for_are_told() -> None:
    grid = parse_grid(["lr=1,2,3", "seed=0,1"])
    assert untried(grid, ["one"], choose(["one"], grid, 6, 0)) == {}
    (trial,) = choose(["one"], grid, 1, 0)
    left = untried(grid, ["one"], [trial])
    assert sorted([*left["lr"], trial.settings["lr"]]) == [1, 2, 3]
    assert len(left["seed"]) == 1


def test_fewer_trials_than_one_are_refused_with_the_range() -> None:
    with pytest.raises(AtollError, match="no trials") as told:
        choose(["one"], parse_grid(["lr=1,2"]), -1, 0)
    assert told.value.details["allowed"] == "1 to 2"


def test_budget_is_bounded_by_the_smallest_grid() -> None:
    grid = parse_grid(["a=1,2", "one:b=1,2"])
    assert len(choose(["one", "two"], grid, None, 0)) == 4
    with pytest.raises(AtollError, match="more trials than the grid has points") as told:
        choose(["one", "two"], grid, 3, 0)
    assert told.value.details["where"] == "--trials, two"
    with pytest.raises(AtollError, match="not swept"):
        choose(["two"], grid, 1, 0)


def test_method_is_laid_over_the_recipe_and_settings_over_both(tmp_path: Path) -> None:
    for name, text in {
        "first": "recipe: 1\nname: first\nfinetune: {correction: {use: proximal, mu: 0.5}, optimizer: sgd}\n",
        "mine": "extends: methods/fedavg-lora\nname: mine\nfinetune: {rounds: 2}\nbaselines: [pooled]\n",
        "over": "extends: {folder}/mine.yaml\nseed: 3\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path) if name == "over" else text)
    grid = parse_grid(["finetune.optimizer.lr=0.5"])
    (trial,) = choose([str(tmp_path / "first.yaml")], grid, None, 0)
    tree = tree_of(str(tmp_path / "over.yaml"), trial)
    assert tree["finetune"] == {
        **recipe.resolve("methods/fedavg-lora")["finetune"],
        "correction": {"use": "proximal", "mu": 0.5},
        "optimizer": {"use": "sgd", "lr": 0.5},
        "rounds": 2,
    }
    assert (tree["name"], tree["seed"], tree["baselines"]) == ("mine", 3, [])


def test_what_is_no_number_comes_last() -> None:
    losses = [math.nan, 2.0, 1.0]
    found = ranked([Tried("m", {}, loss, loss, 0, 0, 0.0, "") for loss in losses])
    assert [one.loss for one in found[:2]] == [1.0, 2.0]
    assert math.isnan(found[2].loss)


def test_sweep_goes_on_where_it_was_cut_off(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    command = ["sweep", tiny, "--method", "methods/fedavg-lora", "--grid", "finetune.optimizer.lr=1e-4,1e-2"]
    command += ["--json"]
    first = atoll(*command)
    assert first.status == 0
    assert first.err.count("loading tiny:llama") == 1  # one model for both trials
    data = json.loads(first.out)
    folder = Path(data["path"])
    assert [one["settings"] for one in data["trials"]] == [{"finetune.optimizer.lr": lr} for lr in (1e-2, 1e-4)]
    assert data["trials"][0]["loss"] < data["trials"][1]["loss"]
    assert json.loads((folder / "sweep.json").read_text()) == data["trials"]

    records = {path: path.read_bytes() for path in folder.glob("*/record.jsonl")}
    slower = Path(data["trials"][1]["run"])
    for name in ("record.jsonl", "checkpoint.safetensors"):
        (slower / name).unlink()
    again = json.loads(atoll(*command).out)
    assert [one["loss"] for one in again["trials"]] == [one["loss"] for one in data["trials"]]
    kept = folder / Path(data["trials"][0]["run"]).name / "record.jsonl"
    assert kept.read_bytes() == records[kept]
    table = atoll(*command[:-1]).out
    assert table.index("lr=0.01") < table.index("lr=0.0001")


def test_changed_data_make_another_sweep(atoll: Atoll, tiny: str, sites: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(sites, tmp_path / "mine")
    (tmp_path / "mine.yaml").write_text(f"extends: {tiny}\nname: mine\ndata: {{path: {mine}}}\n")
    command = ["sweep", "mine.yaml", "--method", "fedavg-lora", "--grid", "finetune.optimizer.lr=1e-2,1e-4"]
    command += ["--trials", "1"]
    first = atoll(*command)
    assert "no trial of any method has finetune.optimizer.lr = 0.01" in first.err or "lr = 0.0001" in first.err
    with (mine / "north.jsonl").open("a") as file:
        file.write('{"prompt": "One more?", "completion": "Yes."}\n')
    atoll(*command)
    assert len(list((tmp_path / "runs/sweeps").iterdir())) == 2


def test_sweep_needs_held_out_data(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: {tiny}\nname: mine\ndata: {{held_out: 0}}\n")
    said = atoll("sweep", "mine.yaml", "--method", "fedavg-lora", "--grid", "finetune.optimizer.lr=1e-4,1e-2")
    assert said.status == 1
    assert "nothing is held out" in said.err


def test_mistake_in_any_trial_is_found_before_the_first_runs(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    said = atoll("sweep", tiny, "--method", "fedavg-lora", "--grid", "finetune.optimizer.lr=1e-3,-1")
    assert said.status == 1
    assert "finetune.optimizer.lr" in said.err
    assert not (tmp_path / "runs").exists()
