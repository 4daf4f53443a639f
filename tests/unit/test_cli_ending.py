"""How runs end, and what is done with their results: what did not count is said, and nobody takes half a run for a whole."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from atoll.commands.ending import not_counted
from atoll.errors import AtollError
from atoll.record.events import EVERYBODY, ClientLeftOut, Missing, Record
from atoll.record.folder import RunFolder
from atoll.record.story import read_story, refuse_fruitless
from atoll.record.views import summarize
from support import Atoll


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "runs" / "tiny-1")))


@pytest.fixture
def halfway(copied: RunFolder) -> RunFolder:
    """A run as it is when it was stopped after round 1 of 5, at the same params."""
    told = [json.loads(line) for line in copied.record.read_text().splitlines()]
    kept = [one for one in told if one["event"] != "RunEnded"]
    kept[0]["rounds"] = 5
    copied.record.write_text("".join(json.dumps(one) + "\n" for one in kept))
    return copied


def test_what_did_not_count_is_told_by_client(copied: RunFolder) -> None:
    record = Record(copied.record, keep_bytes=copied.record.stat().st_size)
    record(ClientLeftOut("odd", "0 of 3 records kept\n3 left out: no answer"))
    for number in (0, 1):
        record(Missing(number, "north", f"the loss is nan at local step {number + 1}", refused=True))
    record(Missing(1, "south", "no reply in 2 s", refused=False))
    story = read_story(copied)
    assert story is not None
    assert [*not_counted(story)] == [
        "odd was left out: 0 of 3 records kept; 3 left out: no answer",
        "north: 2 replies refused, first in round 1: the loss is nan at local step 1",
        "south: 1 reply dropped, first in round 2: no reply in 2 s",
    ]
    refuse_fruitless(copied, story)  # others were accepted


def test_run_that_lost_every_reply_is_told_as_dropped(copied: RunFolder) -> None:
    kept = [line for line in copied.record.read_text().splitlines() if json.loads(line)["event"] != "Replied"]
    copied.record.write_text("\n".join(kept) + "\n")
    Record(copied.record, keep_bytes=copied.record.stat().st_size)(Missing(0, "north", "no reply in 2 s", False))
    story = read_story(copied)
    assert story is not None
    with pytest.raises(AtollError, match="nothing was learned") as told:
        refuse_fruitless(copied, story)
    assert told.value.details["found"] == "1 replies dropped, the first north's: no reply in 2 s"
    assert "atoll show tiny-1" in told.value.details["remedy"]


def test_run_whose_every_round_was_abandoned_has_learned_nothing(copied: RunFolder) -> None:
    record = Record(copied.record, keep_bytes=copied.record.stat().st_size)
    record(Missing(0, EVERYBODY, "4 updates came; at least 5 are needed", refused=False))
    story = read_story(copied)
    assert story is not None
    refuse_fruitless(copied, story)  # the other round was not
    record(Missing(1, EVERYBODY, "4 updates came; at least 5 are needed", refused=False))
    story = read_story(copied)
    assert story is not None
    with pytest.raises(AtollError, match="nothing was learned: every round was abandoned") as told:
        refuse_fruitless(copied, story)
    assert told.value.details["found"] == "2 rounds, the first: 4 updates came; at least 5 are needed"
    assert summarize(copied).state == "failed"


def test_refused_replies_stand_below_the_table(atoll: Atoll, tiny: str) -> None:
    said = atoll("run", tiny, "--set", "finetune.optimizer.lr=1e30", "--set", "finetune.local_steps=3")
    assert said.status == 1
    assert "north: 2 replies refused, first in round 1: the loss is nan" in said.out
    assert "atoll chat" not in said.out
    assert "nothing was learned" in said.err


def test_resume_of_a_finished_run_answers_at_once(atoll: Atoll, copied: RunFolder) -> None:
    card = copied.card.stat().st_mtime_ns
    said = atoll("resume", "tiny-1")
    assert (said.status, said.out) == (0, "")
    assert said.err == "tiny-1 has finished already, after 2 of 2 rounds\n"
    assert copied.card.stat().st_mtime_ns == card
    assert json.loads(atoll("resume", "tiny-1", "--json").out)["state"] == "finished"


def test_resume_writes_a_card_that_is_missing(atoll: Atoll, copied: RunFolder) -> None:
    copied.card.unlink()
    assert "has finished already" not in atoll("resume", "tiny-1").err
    assert copied.card.exists()


def test_result_of_a_run_that_is_not_finished_says_so(atoll: Atoll, halfway: RunFolder, tmp_path: Path) -> None:
    said = atoll("chat", "tiny-1", "hello", "--max-tokens", "1")
    assert "tiny-1 is not finished: this is the model after round 2 of 5, stopped" in said.err
    told = atoll("export", "tiny-1", "--out", str(tmp_path / "out"))
    assert "this is its result after round 2 of 5, stopped" in told.err
    assert "this is its result after round 2 of 5, stopped." in (tmp_path / "out/README.md").read_text()


def test_result_of_a_finished_run_says_nothing_of_it(atoll: Atoll, copied: RunFolder, tmp_path: Path) -> None:
    assert "not finished" not in atoll("chat", "tiny-1", "hello", "--max-tokens", "1").err
    assert "not finished" not in atoll("export", "tiny-1", "--out", str(tmp_path / "out")).err
    assert "not finished" not in (tmp_path / "out/README.md").read_text()


def test_compare_tells_settings_as_they_took_effect(atoll: Atoll, copied: RunFolder, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "tiny-2"
    shutil.copytree(copied.path, other)
    text = (other / "recipe.yaml").read_text()
    assert "seed" not in text
    assert "lr: 0.01" in text or "lr: 1e-2" in text
    (other / "recipe.yaml").write_text(
        text.replace("recipe: 1\n", "recipe: 1\nseed: 0\nfleet: {use: inprocess}\n", 1)
        .replace("lr: 0.01", "lr: 0.01\n    weight_decay: 0")
        .replace("lr: 1e-2", "lr: 1e-2\n    weight_decay: 0")
        .replace("rounds: 2", "rounds: 3")
    )
    assert json.loads(atoll("compare", "tiny-1", "tiny-2", "--json").out)["settings"] == {
        "finetune.rounds": {"tiny-1": 2, "tiny-2": 3}
    }


def test_compare_wants_two(atoll: Atoll, copied: RunFolder) -> None:
    said = atoll("compare", "tiny-1")
    assert said.status == 1
    assert "`atoll show tiny-1`" in said.err


def test_version(atoll: Atoll) -> None:
    said = atoll("--version")
    assert (said.status, said.out) == (0, f"atoll {version('atoll')}\n")
    assert "--version" in atoll("--help").out


def test_run_prints_no_bars_of_libraries(atoll: Atoll, tiny: str) -> None:
    said = atoll("run", tiny, "--set", "finetune.space=full", "--set", "finetune.rounds=1")
    assert said.status == 0
    assert "Writing model" not in said.err
