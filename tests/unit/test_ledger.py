"""The ledger through real runs: budgets are kept, crashes count, and a damaged account stops a run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from atoll import run
from atoll.errors import AtollError
from atoll.params import equal
from atoll.privacy.accounting import Release, epsilon
from atoll.privacy.ledger import Entry, Ledger, spending, spent_together
from atoll.record.checkpoint import load_state
from atoll.record.events import Record, RunEnded, RunStarted, Spent, read_events
from atoll.record.folder import RunFolder
from atoll.stage import refuse_short_ledger

PRIVATE = """
recipe: 1
name: {name}
model: tiny:llama
data: {{use: folders, path: {data}}}
finetune:
  rounds: 4
  local_steps: 1
  batch_size: 2
  space: {{use: ffa-lora, rank: 2}}
  weighting: uniform
  privacy: {{use: central, clip: 0.1, delta: 0.01, {noise}}}
evaluate: {{start: false, samples: 2, final_samples: 2}}
fleet: {{use: faults, kill_at: "{kill_at}"}}
"""

ENTRY = Entry("a-run", "a-plan", 0, "client", (Release(2.0),))


@pytest.fixture
def recipe(tmp_path, monkeypatch, sites, shared_home):
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))

    def write(name: str, noise: str, kill_at: str = "") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(PRIVATE.format(name=name, data=sites, noise=noise, kill_at=kill_at))
        return str(path)

    return write


def killed_in_round(recipe, round: int, noise: str) -> RunFolder:
    """The folder of a run that died by SIGKILL while its last client worked, ready to be resumed."""
    written = recipe("killed", noise, f"train:{round}:west")
    died = subprocess.run([sys.executable, "-c", f"from atoll import run; run.run({written!r})"], check=False)
    assert died.returncode == -signal.SIGKILL, "the fault did not strike"
    folder = RunFolder(Path(written).parent / "runs" / "killed-1")
    folder.recipe.write_text(folder.recipe.read_text().replace(f"train:{round}:west", "nobody"))
    return folder


def ended(folder: RunFolder) -> RunEnded:
    return next(event for event in read_events(folder.record) if isinstance(event, RunEnded))


def spent(folder: RunFolder) -> list[float]:
    return [event.epsilon for event in read_events(folder.record) if isinstance(event, Spent)]


def test_a_run_stops_before_it_passes_its_budget_and_says_so(recipe):
    budget = epsilon([Release(2.0, count=2)], 0.01) + 0.01
    folder = run.run(recipe("spends", f"noise_multiplier: 2, epsilon: {budget}"))
    assert ended(folder).rounds == 2
    third = epsilon([Release(2.0, count=3)], 0.01)
    assert ended(folder).reason == f"the privacy budget of {budget:g} is spent: another round would make it {third:.4g}"
    assert spent(folder) == pytest.approx([epsilon([Release(2.0, count=n)], 0.01) for n in (1, 2)])
    assert len(list(Ledger(folder.ledger))) == 2


def test_a_budget_alone_carries_all_rounds(recipe):
    folder = run.run(recipe("carries", "epsilon: 3"))
    assert (ended(folder).rounds, ended(folder).reason) == (4, "finished")
    assert 2.95 < spent(folder)[-1] <= 3


def test_a_round_that_a_crash_cut_off_counts_and_the_run_ends_a_round_earlier(recipe, atoll):
    folder = killed_in_round(recipe, 1, "epsilon: 3")
    assert [entry.round for entry in Ledger(folder.ledger)] == [0, 1]
    assert load_state(folder.checkpoint).round == 1, "it was entered, and never released"
    assert atoll("resume", str(folder.path)).status == 0
    assert [entry.round for entry in Ledger(folder.ledger)] == [0, 1, 1, 2]
    assert ended(folder).rounds == 3
    assert "the privacy budget of 3 is spent" in ended(folder).reason
    release = next(iter(Ledger(folder.ledger))).releases[0]
    assert spent(folder)[-1] == pytest.approx(epsilon([replace(release, count=4)], 0.01))


@pytest.mark.parametrize(("noise", "again"), [("noise_multiplier: 2", False), ("noise_multiplier: 0", True)])
def test_a_round_that_is_done_again_draws_other_noise_and_without_noise_the_same_bits(recipe, noise, again):
    folder = killed_in_round(recipe, 3, noise)
    twin = RunFolder(shutil.copytree(folder.path, folder.path.with_name("killed-2")))
    ends = []
    for one in (folder, twin):
        run.resume(str(one.path))
        ends.append(load_state(one.checkpoint).params["update"])
        assert (ended(one).rounds, ended(one).reason) == (4, "finished")
        assert spent(one)[-1:] == ([] if again else [pytest.approx(epsilon([Release(2.0, count=5)], 0.01))])
    assert equal(*ends) is again
    assert ("no differential privacy" in folder.card.read_text()) is again


def test_a_run_whose_ledger_has_lost_entries_is_not_resumed(tmp_path):
    folder = RunFolder(tmp_path)
    for count in range(3):
        with pytest.raises(AtollError, match="fewer entries than the run has rounds") as told:
            refuse_short_ledger(3, folder)
        details = told.value.details
        assert (details["where"], details["allowed"]) == (str(folder.ledger), "3, one entry each or more")
        assert details["found"] == f"{count} rounds, without round {count + 1}"
        Ledger(folder.ledger).enter(replace(ENTRY, round=count))
    refuse_short_ledger(3, folder)


# The file ---------------------------------------------------------------------------------------------------------------


def test_entries_come_back_as_they_were_entered(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "ledger.jsonl")
    assert list(ledger) == []
    releases = (Release(1 / 3), Release(0.7, "poisson", 0.1), Release(2.0, "uniform", 0.2, 50, 3))
    entries = [replace(ENTRY, round=i, releases=releases[: i + 1]) for i in range(3)]
    for entry in entries:
        ledger.enter(entry)
    assert list(ledger) == entries


def test_a_release_that_stands_in_two_ledgers_counts_once_and_twice_in_one_twice():
    first, other = [replace(ENTRY, round=0)], [replace(ENTRY, round=0), replace(ENTRY, round=1)]
    assert spent_together([first, other], 0.1) == spent_together([other], 0.1)
    assert spent_together([first, first], 0.1) == spent_together([first], 0.1)
    again = [*first, *first]
    assert (
        spent_together([again, other], 0.1) == spent_together([[*again, other[1]]], 0.1) > spent_together([other], 0.1)
    )
    assert spending({"a": first, "b": other}, 0.1)[-1]["releases"] == 2


@pytest.mark.parametrize("cut", range(1, 120, 17))
def test_a_last_line_that_a_crash_cut_off_is_no_entry_and_gives_way_to_the_next(tmp_path, cut):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for round in range(2):
        ledger.enter(replace(ENTRY, round=round))
    ledger.path.write_bytes(ledger.path.read_bytes()[: -1 - cut])
    assert [entry.round for entry in ledger] == [0]
    ledger.enter(replace(ENTRY, round=2))
    assert [entry.round for entry in ledger] == [0, 2]
    ledger.enter(replace(ENTRY, round=3))
    assert [entry.round for entry in ledger] == [0, 2, 3]


def test_a_whole_last_line_without_its_end_counts(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.enter(ENTRY)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-1])
    assert list(ledger) == [ENTRY]
    ledger.enter(replace(ENTRY, round=1))
    assert [entry.round for entry in ledger] == [0, 1]


@pytest.mark.parametrize("line", [b"{", b"3", b"[1]", b"{}", b'{"time": 1}', b"\xff\xfe", b"null", b'{"releases": 5}'])
def test_another_damaged_line_is_told_of_with_its_place(tmp_path, line):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.enter(ENTRY)
    good = ledger.path.read_bytes()
    ledger.path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(AtollError, match="a line of the ledger is damaged") as told:
        list(ledger)
    assert told.value.details["where"] == f"{ledger.path}:2"
    assert "put the file back" in told.value.details["remedy"]


def test_an_entry_is_one_line_of_plain_json(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.enter(ENTRY)
    (line,) = ledger.path.read_text().splitlines()
    said = json.loads(line)
    assert said["unit"] == "client"
    assert said["releases"][0]["noise_multiplier"] == 2.0


def test_the_command_says_epsilon_at_the_runs_own_delta(atoll, tmp_path):
    run, ledger = tmp_path / "runs" / "noised-1", tmp_path / "ledger.jsonl"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("recipe: 1\n")
    record = Record(run / "record.jsonl")
    record(RunStarted("noised", "abc", 4, ["north"], {"north": 9}, 10, 100, 0, ()))
    record(Spent(0, 1.0, 0.02))
    for path in (run / "ledger.jsonl", ledger):
        Ledger(path).enter(ENTRY)
    assert json.loads(atoll("ledger", "noised-1", "--json").out)[0]["delta"] == 0.02
    assert json.loads(atoll("ledger", "noised-1", str(ledger), "--delta", "0.1", "--json").out)[0]["delta"] == 0.1
    said = atoll("ledger", "noised-1", str(ledger))
    assert said.status == 1
    assert "no one delta" in said.err
    assert "noised-1: 0.02" in said.err
    assert "--delta 1e-5" in said.err
