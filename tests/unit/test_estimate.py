"""What a plan says of clients and of time: split as the files say, timed by all runs of the kind and not by the last."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import atoll
from atoll.build import Plan
from atoll.estimate import RUNS_REMEMBERED, as_data, counts, known_speed, remember_speed, seconds
from atoll.record.events import Evaluated, Replied, RunStarted
from atoll.record.story import Story

RECIPE = """
recipe: 1
name: timed
model: tiny:llama
data: {{use: folders, path: {data}, held_out: 0.25}}
finetune: {{rounds: 2, local_steps: 2, batch_size: 4}}
"""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))


def plan(tmp_path: Path, data: Path) -> Plan:
    path = tmp_path / "timed.yaml"
    path.write_text(RECIPE.format(data=data))
    return atoll.plan(str(path))


@pytest.fixture
def ready(tmp_path: Path, sites: Path) -> Plan:
    return plan(tmp_path, sites)


def story(steps: list[tuple[float, float]], samples: float = 10, evaluation: float = 5) -> Story:
    """Replies as (steps, seconds in them), and one evaluation."""
    replies = [Replied(0, "north", 1.0, 1, s, 0, {"steps": n, "seconds_in_steps": s, "loss": 1.0}) for n, s in steps]
    measured = Evaluated(0, True, {"north": {"loss": 1.0, "standard_error": 0.1, "samples": samples}}, 1, 1, evaluation)
    started = RunStarted("timed", "x", 1, ["north"], {"north": 1}, 1, 1, 0)
    return Story(started, (), [measured], replies, (), (), (), None)


def test_a_small_run_hardly_moves_what_a_large_one_measured(ready: Plan) -> None:
    remember_speed(ready, story([(1, 9), *[(100, 40.0)] * 3]), "large")
    before = known_speed(ready)
    assert before is not None
    assert before.training == pytest.approx(0.1)  # 40 s in 100 steps of 4 samples; the first reply warms up
    remember_speed(ready, story([(1, 6.0)], samples=1, evaluation=3), "small")
    after = known_speed(ready)
    assert after is not None
    assert after.training == pytest.approx((120 + 6) / (300 + 1) / 4)
    assert after.held_out == pytest.approx((5 + 3) / (10 + 1))
    assert after.run == "2 runs, the latest small,"


def test_a_run_is_remembered_once_and_old_ones_go(ready: Plan) -> None:
    for _ in range(2):
        remember_speed(ready, story([(1, 2.0), (1, 4.0)]), "same")
    assert known_speed(ready).run == "same"  # type: ignore[union-attr]
    for number in range(RUNS_REMEMBERED):
        remember_speed(ready, story([(1, 2.0), (1, 8.0)]), f"run-{number}")
    assert known_speed(ready).training == pytest.approx(2.0)  # type: ignore[union-attr]


def test_longer_texts_take_longer(ready: Plan, tmp_path: Path, sites: Path) -> None:
    remember_speed(ready, story([(1, 1.0), (10, 10.0)]), "short")
    doubled = tmp_path / "doubled"
    doubled.mkdir()
    for file in sites.iterdir():
        lines = file.read_text().splitlines()
        (doubled / file.name).write_text("".join(line.ljust(2 * len(line) + 1) + "\n" for line in lines))
    speed = known_speed(ready)
    assert speed is not None
    longer = plan(tmp_path, doubled)
    short, long = (seconds(one, counts(one.sources), speed) for one in (ready, longer))
    assert long == pytest.approx(2 * short)  # type: ignore[operator]
    unknown = {name: replace(one, bytes_each=0.0) for name, one in counts(longer.sources).items() if one}
    assert seconds(longer, unknown, speed) == pytest.approx(short)


def test_a_plan_tells_records_to_train_on_from_those_held_out(tmp_path: Path, sites: Path) -> None:
    from atoll.commands.planned import facts

    data = tmp_path / "data"
    (data / "split").mkdir(parents=True)
    lines = (sites / "north.jsonl").read_text().splitlines(keepends=True)
    (data / "split" / "train.jsonl").write_text("".join(lines[:7]))
    (data / "split" / "test.jsonl").write_text("".join(lines[7:10]))
    (data / "whole.jsonl").write_text("".join(lines))
    (data / "table.csv").write_text("prompt,completion\na,b\n")
    said = as_data(plan(tmp_path, data))
    assert dict(facts(said))["clients"] == (
        "3: split (7 + 3), table, whole (about 30 + 10); records to train on + held out"
    )
    assert json.loads(json.dumps(said["clients"]))["table"] is None
