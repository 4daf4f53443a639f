"""What listings say of runs: from records alone, whatever state the run is in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from atoll.errors import AtollError
from atoll.record import tables, views
from atoll.record.events import ClientLeftOut, Evaluated, Event, Missing, Record, RoundEnded, RunEnded, RunStarted
from atoll.record.folder import RunFolder
from atoll.record.sinks import scalars
from atoll.terminal import console
from support import Atoll


def written(path: Path, events: Sequence[Event], recipe: str = "recipe: 1\n") -> RunFolder:
    """A run's folder with this record."""
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(recipe)
    record = Record(path / "record.jsonl")
    for event in events:
        record(event)
    return RunFolder(path)


def started(baselines: Sequence[str] = ()) -> RunStarted:
    return RunStarted("mine", "abc", 4, ["clinic", "school"], {"clinic": 9, "school": 8}, 10, 100, 0, baselines)


def ended_round(number: int) -> RoundEnded:
    return RoundEnded(number, 2, 0, 0, 1.0, 100, 50, 2.0, 0.0, {"local_steps": 1.5, "outside": 0.5})


def evaluated(number: int, clinic: float, school: float, final: bool = True) -> Evaluated:
    each = {
        name: {"loss": loss, "standard_error": 0.3, "samples": 4.0}
        for name, loss in (("clinic", clinic), ("school", school))
    }
    return Evaluated(number, final, each, (clinic + school) / 2, max(clinic, school), 1.0)


BEGUN: list[Event] = [started(), evaluated(0, 3.0, 4.0), ended_round(0), ended_round(1), evaluated(2, 2.0, 3.0, False)]


def test_run_under_way_and_stopped(tmp_path: Path) -> None:
    folder = written(tmp_path / "mine-1", BEGUN)
    row = views.summarize(folder)
    assert (row.name, row.state, row.round, row.rounds, row.clients) == ("mine-1", "stopped", 2, 4, 2)
    assert (row.base_loss, row.loss) == (3.5, 2.5)
    assert (row.bytes_down, row.bytes_up, row.seconds) == (200, 100, 6.0)
    with folder.locked():
        assert views.summarize(folder).state == "running"


def test_run_is_finished_only_with_its_baselines(tmp_path: Path) -> None:
    end: list[Event] = [evaluated(4, 1.0, 2.0), RunEnded(4, "finished", 9.0)]
    folder = written(tmp_path / "mine-1", [started(["local-clinic", "pooled"]), evaluated(0, 3.0, 4.0), *end])
    assert views.summarize(folder).baselines == {"local-clinic": "waiting", "pooled": "waiting"}
    assert views.summarize(folder).state == "stopped"
    written(folder.path / "baselines/local-clinic", [started(), evaluated(0, 3.0, 4.0), *end])
    written(folder.path / "baselines/pooled", BEGUN)
    assert views.summarize(folder).baselines == {"local-clinic": "finished", "pooled": "stopped"}
    with folder.locked():
        assert tables.baselines(views.summarize(folder).baselines) == "1 of 2, now pooled"
    pooled = folder.baseline("pooled").record
    Record(pooled, keep_bytes=pooled.stat().st_size)(end[1])
    assert views.summarize(folder).state == "finished"


def test_run_without_events(tmp_path: Path) -> None:
    folder = written(tmp_path / "mine-1", [])
    assert views.summarize(folder).state == "empty"
    with pytest.raises(AtollError, match="the run has not begun"):
        views.details(folder)


def test_record_cut_off_in_the_middle_of_a_line(tmp_path: Path) -> None:
    folder = written(tmp_path / "mine-1", BEGUN)
    with folder.record.open("a") as file:
        file.write('{"event": "RoundEn')
    assert views.summarize(folder).round == 2


def test_details_count_rounds_from_one_and_keep_reasons(tmp_path: Path) -> None:
    missing = Missing(1, "school", "the loss is nan at local step 3 of 4", True)
    folder = written(tmp_path / "mine-1", [*BEGUN, missing, ClientLeftOut("ward", "0 of 2 records kept")])
    data = views.details(folder)
    assert data["missing"] == [
        {"round": 2, "client": "school", "reason": "the loss is nan at local step 3 of 4", "refused": True}
    ]
    assert data["left_out"] == {"ward": "0 of 2 records kept"}
    assert data["spans"] == {"local_steps": 3.0, "outside": 1.0}
    text = shown(tables.details(data, None))
    assert "round 2, school: the loss is nan" in text
    assert "ward: 0 of 2 records kept" in text


def shown(table: object) -> str:
    screen = console()
    with screen.capture() as printed:
        screen.print(table)
    return printed.get()


def test_mean_over_sites_and_its_error(tmp_path: Path) -> None:
    story = views.need_story(written(tmp_path / "mine-1", [*BEGUN, evaluated(4, 1.0, 2.0), RunEnded(4, "finished", 9)]))
    base, federated = views.losses_as_data(views.loss_table(story))
    assert (base["model"], federated["model"]) == ("base", "federated")
    assert federated["sites"]["school"] == {"loss": 2.0, "standard_error": 0.3}
    assert federated["mean"]["loss"] == 1.5
    assert federated["mean"]["standard_error"] == pytest.approx(math.sqrt(2 * 0.3**2) / 2)


def test_comparison_shows_only_what_differs(tmp_path: Path) -> None:
    recipe = "recipe: 1\nseed: {seed}\nfinetune: {{rounds: 4, optimizer: {{use: adamw, lr: {lr}}}}}\n"
    one = written(tmp_path / "one", BEGUN, recipe.format(seed=0, lr="1e-3"))
    two = written(tmp_path / "two", BEGUN, recipe.format(seed=0, lr="3e-3"))
    data = views.compare([one, two])
    assert data["settings"] == {"finetune.optimizer.lr": {"one": 0.001, "two": 0.003}}
    assert data["losses"]["two"]["school"]["loss"] == 3.0
    text = shown(tables.comparison(data))
    assert "0.003" in text
    assert "rounds: 4" not in text


def test_names_from_data_are_shown_as_they_are(tmp_path: Path) -> None:
    """Square brackets are markup to rich, unless it is told otherwise."""
    each = {"[red]ward": {"loss": 1.0, "standard_error": 0.1, "samples": 2.0}}
    folder = written(tmp_path / "mine-1", [started(), Evaluated(0, True, each, 1.0, 1.0, 1.0)])
    table = views.loss_table(views.need_story(folder))
    assert table is not None
    assert "[red]ward" in shown(tables.losses(table))


def test_many_sites_are_counted_not_squeezed(tmp_path: Path) -> None:
    each = {f"site-{i:03}": {"loss": 1.0, "standard_error": 0.1, "samples": 2.0} for i in range(100)}
    folder = written(tmp_path / "mine-1", [started(), Evaluated(0, True, each, 1.0, 1.0, 1.0)])
    table = views.loss_table(views.need_story(folder))
    assert table is not None
    text = shown(tables.losses(table))
    assert "and 92 more sites" in text
    assert max(map(len, text.splitlines())) <= 200


def test_table_of_a_finished_run_has_all_models(atoll: Atoll, finished: Path) -> None:
    rows = views.details(RunFolder(finished))["losses"]
    assert [row["model"] for row in rows] == ["base", "north alone", "south alone", "west alone", "federated", "pooled"]
    assert all(set(row["sites"]) == {"north", "south", "west"} for row in rows)
    assert rows[4]["mean"]["loss"] < rows[0]["mean"]["loss"]


def test_times_and_numbers_as_people_read_them() -> None:
    assert [tables.human_seconds(s) for s in (0.4, 59.6, 3600)] == ["0 s", "1 min 00 s", "1 h 00 min"]
    assert tables.loss_cell(None) == "-"


def test_tensorboard_gets_the_curves(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert atoll("run", tiny, "--set", "sinks=[tensorboard]").status == 0
    events = EventAccumulator(str(tmp_path / "runs/tiny-1/tensorboard")).Reload()
    told = views.details(RunFolder(tmp_path / "runs/tiny-1"))["evaluations"]
    curve = {point.step: point.value for point in events.Scalars("held_out_loss/mean")}
    assert curve == pytest.approx({e["round"]: e["mean"] for e in told})
    assert scalars(RunEnded(1, "finished", 1.0)) == {}
