"""What listings say of runs: from records alone, whatever state the run is in."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from atoll.errors import AtollError
from atoll.record import measured, tables, views
from atoll.record.card import human_seconds, markdown, markdown_table
from atoll.record.events import (
    ClientLeftOut,
    Evaluated,
    Event,
    Missing,
    Record,
    RoundEnded,
    RunEnded,
    RunStarted,
    Spent,
)
from atoll.record.folder import RunFolder
from atoll.record.sinks import scalars
from atoll.record.tasks import TUNED, Score, write_scores
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


def test_between_stages_rounds_are_those_of_the_last_that_has_begun(tmp_path: Path) -> None:
    folder = written(tmp_path / "mine-1" / "stages" / "finetune", [*BEGUN, RunEnded(4, "finished", 9.0)]).outermost
    (folder.path / "stages/finetune/recipe.yaml").write_text("name: mine\n")
    with folder.locked():
        row = views.summarize(folder)
        assert (row.name, row.state, row.stage, row.round) == ("mine-1", "running", "finetune", 2)
        assert "finetune: 2 of 4" in shown(tables.runs([row]))
        assert "running, finetune, round 2 of 4" in shown(tables.details(views.details(folder)))


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


def test_what_was_spent_is_in_every_view(tmp_path: Path) -> None:
    private = written(tmp_path / "private-1", [*BEGUN, Spent(1, 4.5, 0.01), Spent(2, 7.6543, 0.01)])
    bare = written(tmp_path / "bare-1", BEGUN)
    rows = [views.summarize(one) for one in (private, bare)]
    assert [(row.epsilon, row.delta) for row in rows] == [(7.6543, 0.01), (None, None)]
    assert "7.65 at 0.01" in shown(tables.runs(rows))
    assert "epsilon" not in shown(tables.runs(rows[1:]))
    assert "7.654 at delta 0.01" in shown(tables.details(views.details(private)))
    compared = views.compare([private, bare]) | {"settings": {}}
    assert next(line for line in shown(tables.comparison(compared)).splitlines() if "epsilon" in line).split()[-4:] == [
        "7.65",
        "at",
        "0.01",
        "-",
    ]


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
    text = shown(tables.details(data))
    assert "round 2, school: the loss is nan" in text
    assert "ward: 0 of 2 records kept" in text


def shown(table: object) -> str:
    screen = console()
    with screen.capture() as printed:
        screen.print(table)
    return printed.get()


def at_width(width: int, table: object) -> str:
    screen = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
    with screen.capture() as printed:
        screen.print(table)
    return printed.get()


def test_base_loss_is_no_result(tmp_path: Path) -> None:
    folder = written(tmp_path / "mine-1", [*BEGUN[:3]])
    row = views.summarize(folder)
    assert (row.base_loss, row.loss) == (3.5, None)
    assert shown(tables.runs([row])).split()[-9:-7] == ["3.500", "-"]
    assert views.compare([folder])["losses"] == {"mine-1": {}}
    assert views.summarize(written(tmp_path / "mine-2", BEGUN)).loss == 2.5


SITES = ["clinic", "desk", "school", "social"]


def wide_table(tmp_path: Path, sites: Sequence[str] = SITES) -> views.LossTable:
    each = {site: {"loss": 0.784, "standard_error": 0.039, "samples": 40.0} for site in sites}
    folder = written(tmp_path / "mine-1", [started(), Evaluated(0, True, each, 0.784, 0.784, 1.0)])
    table = measured.loss_table(views.need_story(folder))
    assert table is not None
    return table


@pytest.mark.parametrize("width", [200, 80, 60, 40, 24])
def test_no_number_is_cut_however_narrow_the_terminal(tmp_path: Path, width: int) -> None:
    text = at_width(width, tables.compared(wide_table(tmp_path)))
    assert "…" not in text
    assert text.count("0.784") == len(SITES) + 1
    assert max(map(len, text.splitlines())) <= width
    assert ("0.784 ± 0.039" in text) == (width == 200)
    assert ("standard errors: --json" in " ".join(text.split())) == (width < 200)


@pytest.mark.parametrize("width", [200, 80, 50])
def test_runs_in_a_narrow_terminal(tmp_path: Path, width: int) -> None:
    text = at_width(width, tables.runs([views.summarize(written(tmp_path / "quickstart-with-a-name-1", BEGUN))]))
    assert "…" not in text
    assert "2.500" in text
    assert "2 of 4" in text
    assert ("down" in text) == (width == 200)
    assert max(map(len, text.splitlines())) <= width


def test_facts_of_a_run_are_not_cut(tmp_path: Path) -> None:
    data = views.details(written(tmp_path / ("long" * 30), BEGUN))
    assert "…" not in at_width(60, tables.details(data))


HELD_OUT = dataclasses.replace(started(), held_out={"clinic": 4, "school": 0})
ONE_SITE = Evaluated(0, True, {"clinic": {"loss": 2.0, "standard_error": 0.0, "samples": 1.0}}, 2.0, 2.0, 1.0)


def test_sites_without_held_out_samples_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "mine-1", [HELD_OUT, ONE_SITE])
    story = views.need_story(folder)
    table = measured.loss_table(story)
    assert table is not None
    note = "school: no held-out sample, not in the mean"
    assert note in shown(tables.compared(table))
    assert note in markdown("mine-1", story)
    assert "clinic (9 + 4), school (8 + 0); samples to train on + held out" in shown(
        tables.details(views.details(folder), table)
    )


def test_one_sample_has_no_standard_error(tmp_path: Path) -> None:
    story = views.need_story(written(tmp_path / "mine-1", [started(), ONE_SITE]))
    table = measured.loss_table(story)
    assert table is not None
    assert markdown_table(table)[2] == "| base | 2.000 ± n/a | 2.000 ± n/a |"
    assert "2.000 ± n/a" in shown(tables.compared(table))


def test_means_over_different_sites_are_not_compared_without_a_word(tmp_path: Path) -> None:
    one = written(tmp_path / "one", [*BEGUN])
    two = written(tmp_path / "two", [HELD_OUT, ended_round(0), dataclasses.replace(ONE_SITE, round=1)])
    assert "the means are over different sites" in shown(tables.comparison(views.compare([one, two])))
    assert "different sites" not in shown(tables.comparison(views.compare([one, one])))


def test_losses_of_unlike_objectives_are_not_compared_without_a_word(tmp_path: Path) -> None:
    folders = [written(tmp_path / name, BEGUN) for name in ("one", "two")]
    compared = views.compare(folders)
    warned = "compare accuracies"
    assert warned not in shown(tables.comparison(compared))
    betas = {"finetune.objective.beta": {"one": 0.1, "two": 0.3}}
    assert warned in shown(tables.comparison(compared | {"settings": betas}))


def test_nothing_held_out_is_said_and_no_number_is_made_up(atoll: Atoll, tiny: str) -> None:
    said = atoll("run", tiny, "--set", "data.held_out=0", "--set", "evaluate.patience=1")
    assert said.status == 0, said.err
    assert "nan" not in said.err + said.out
    for text in (said.err, said.out, atoll("show").out, atoll("card").out):
        assert "nothing is held out, so no loss is measured" in text
    (row,) = json.loads(atoll("runs", "--json").out)
    assert (row["state"], row["round"], row["loss"]) == ("finished", 2, None)
    assert "nan" not in atoll("runs").out


def test_a_site_may_be_called_mean(tmp_path: Path) -> None:
    table = wide_table(tmp_path, ["clinic", "mean"])
    assert markdown_table(table)[0] == "| held-out loss | clinic | mean | mean of sites |"
    assert "mean of sites" in shown(tables.compared(table))


def test_baselines_have_the_names_of_their_clients(tmp_path: Path) -> None:
    name = "local-North Ward #1"
    folder = written(tmp_path / "mine-1", [started([name]), *BEGUN[1:], evaluated(4, 1, 2), RunEnded(4, "finished", 9)])
    written(folder.baseline(name).path, [*BEGUN, evaluated(4, 1, 2), RunEnded(4, "finished", 9)])
    assert views.summarize(folder).baselines == {name: "finished"}
    assert [row["model"] for row in views.details(folder)["losses"]] == ["base", "North Ward #1 alone", "federated"]


def test_card_says_what_the_run_was_made_from(atoll: Atoll, finished: Path) -> None:
    text = atoll("card", str(finished)).out
    for row in (
        "| model | tiny:llama |",
        "| method | McMahan et al. 2017 (arXiv 1602.05629), Algorithm 1; Hu et al. 2021 (arXiv 2106.09685) |",
        "| rounds | 2 |",
        "| local steps | 2 |",
        "| optimizer | adamw (lr: 0.01) |",
        "| space | lora (rank: 8, alpha: 16) |",
    ):
        assert row in text
    assert "| epochs" not in text
    assert "2 of 2 rounds" in text


def test_card_of_one_round(tmp_path: Path) -> None:
    one = dataclasses.replace(started(), rounds=1, clients=["clinic"])
    text = markdown("mine-1", views.need_story(written(tmp_path / "mine-1", [one, ended_round(0)])))
    assert "1 client, 1 of 1 round, seed 0" in text
    assert "in 1 round," in text


def test_mean_over_sites_and_its_error(tmp_path: Path) -> None:
    story = views.need_story(written(tmp_path / "mine-1", [*BEGUN, evaluated(4, 1.0, 2.0), RunEnded(4, "finished", 9)]))
    base, federated = views.as_data(measured.loss_table(story))
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


def test_accuracies_and_tasks_are_compared_and_shown(tmp_path: Path) -> None:
    said = {"loss": 1.0, "standard_error": 0.1, "samples": 9.0}
    sure = said | {"accuracy": 0.75, "accuracy_error": 0.125, "questions": 9.0, "chance": 0.5}
    one, two = (
        written(tmp_path / name, [started(), ended_round(0), Evaluated(1, True, {"clinic": each}, 1.0, 1.0, 1.0)])
        for name, each in (("one", sure), ("two", said))
    )
    write_scores(
        one, [Score("boolq", "accuracy", model, value, 0.05, 100) for model, value in (("base", 0.4), (TUNED, 0.6))]
    )
    data = views.compare([one, two]) | {"settings": {}}
    assert [score["value"] for score in data["tasks"]["one"]] == [0.6]
    lines = {line.split("  ")[0]: line.split()[-4:] for line in shown(tables.comparison(data)).splitlines()}
    assert lines["accuracy clinic"] == ["0.750", "±", "0.125", "-"]
    assert lines["boolq, accuracy"] == ["0.600", "±", "0.050", "-"]
    assert "reward accuracy clinic" not in lines
    text = shown(tables.details(views.details(one)))
    assert "boolq  accuracy" in text
    assert "0.400 ± 0.050" in text


def test_names_from_data_are_shown_as_they_are(tmp_path: Path) -> None:
    """Square brackets are markup to rich, unless it is told otherwise."""
    each = {"[red]ward": {"loss": 1.0, "standard_error": 0.1, "samples": 2.0}}
    folder = written(tmp_path / "mine-1", [started(), Evaluated(0, True, each, 1.0, 1.0, 1.0)])
    table = measured.loss_table(views.need_story(folder))
    assert table is not None
    assert "[red]ward" in shown(tables.compared(table))


def test_many_sites_are_counted_not_squeezed(tmp_path: Path) -> None:
    each = {f"site-{i:03}": {"loss": 1.0, "standard_error": 0.1, "samples": 2.0} for i in range(100)}
    folder = written(tmp_path / "mine-1", [started(), Evaluated(0, True, each, 1.0, 1.0, 1.0)])
    table = measured.loss_table(views.need_story(folder))
    assert table is not None
    text = shown(tables.compared(table))
    assert "and 92 more sites" in text
    assert max(map(len, text.splitlines())) <= 200


def test_table_of_a_finished_run_has_all_models(atoll: Atoll, finished: Path) -> None:
    rows = views.details(RunFolder(finished))["losses"]
    assert [row["model"] for row in rows] == ["base", "north alone", "south alone", "west alone", "federated", "pooled"]
    assert all(set(row["sites"]) == {"north", "south", "west"} for row in rows)
    assert rows[4]["mean"]["loss"] < rows[0]["mean"]["loss"]


def test_times_and_numbers_as_people_read_them() -> None:
    assert [human_seconds(s) for s in (0.4, 59.6, 3600)] == ["0 s", "1 min 00 s", "1 h 00 min"]
    assert tables.loss_cell(None) == "-"


def test_tensorboard_gets_the_curves(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert atoll("run", tiny, "--set", "sinks=[tensorboard]").status == 0
    events = EventAccumulator(str(tmp_path / "runs/tiny-1/tensorboard")).Reload()
    told = views.details(RunFolder(tmp_path / "runs/tiny-1"))["evaluations"]
    curve = {point.step: point.value for point in events.Scalars("held_out_loss/mean")}
    assert curve == pytest.approx({e["round"]: e["mean"] for e in told})
    assert scalars(RunEnded(1, "finished", 1.0)) == {}
