"""What a run says while it runs: every event has a line, no silence while clients work, no flood either."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import get_args

import pytest
from rich.console import Console

from atoll.local.work import Tick
from atoll.record.events import (
    ClientLeftOut,
    Evaluated,
    Event,
    Missing,
    RecordsLeftOut,
    Replied,
    RoundEnded,
    RunEnded,
    RunStarted,
    Spent,
    SumOpened,
)
from atoll.terminal import Live, Plain, at_work, counted, told

CLINIC = {"loss": 1.5, "standard_error": 0.1, "samples": 8.0}
EVENTS: list[tuple[Event, str]] = [
    (
        RunStarted("mine", "abc", 3, ["clinic"], {"clinic": 9}, 1200, 50000, 0),
        "mine: 1 client, 3 rounds; 1,200 of 50,000 parameters train; plan abc",
    ),
    (ClientLeftOut("ward", "0 of 2\n2 empty"), "ward is left out, it has no usable data: 0 of 2; 2 empty"),
    (
        RunStarted("mine", "abc", 3, ["a", "b"], {"a": 9, "b": 9}, 12, 500, 0, held_out={"a": 3, "b": 0}),
        "mine: 2 clients, 3 rounds; 12 of 500 parameters train; plan abc; b: no held-out sample, not in the mean",
    ),
    (
        RunStarted("mine", "abc", 3, ["a"], {"a": 9}, 12, 500, 0, held_out={"a": 0}),
        "mine: 1 client, 3 rounds; 12 of 500 parameters train; plan abc; "
        "nothing is held out, so no loss is measured: set data.held_out, or name files for it",
    ),
    (
        RecordsLeftOut("ward", 3, 1, {"no answer": (1, "ward.jsonl:2"), "no prompt": (1, "ward.jsonl:3")}),
        "ward: 1 of 3 records used: 1 no answer, first at ward.jsonl:2; 1 no prompt, first at ward.jsonl:3",
    ),
    (
        Evaluated(0, True, {}, math.nan, math.nan, 2.0),
        "held-out loss before the first round: no client has measured one, 2.0 s",
    ),
    (Replied(0, "clinic", 2.25, 5000, 1.25, 0, {}), "round 1: clinic: loss 2.250, 5.0 kB up, 1.2 s"),
    (Replied(4, "clinic", 2.25, 5000, 1.25, 2, {}), "round 5: clinic: loss 2.250, 5.0 kB up, 1.2 s, 2 rounds late"),
    (Missing(0, "clinic", "the loss is nan", True), "round 1: clinic refused: the loss is nan"),
    (Missing(0, "clinic", "no answer", False), "round 1: clinic dropped: no answer"),
    (
        RoundEnded(1, 2, 1, 0, 0.5, 2000, 1000, 3.0, 0.0, {}),
        "round 2 done: 2 accepted, 1 refused; loss 0.500, 2.0 kB down, 1.0 kB up, 3.0 s",
    ),
    (
        Evaluated(0, True, {"clinic": CLINIC}, 1.5, 1.5, 2.0),
        "held-out loss before the first round: mean 1.500, worst 1.500 (clinic), 2.0 s",
    ),
    (
        Evaluated(2, False, {"clinic": CLINIC, "ward": CLINIC | {"loss": 2.5}}, 2.0, 2.5, 2.0),
        "held-out loss after round 2: mean 2.000, worst 2.500 (ward), 2.0 s",
    ),
    (Spent(1, 2.345, 1e-5), "round 2: epsilon 2.35 at delta 1e-05 once it is released"),
    (SumOpened(1, 4, 0, 100, 200), "round 2: the sum of 4 clients is open"),
    (SumOpened(1, 1, 2, 100, 200), "round 2: the sum of 1 client is open, 2 lost on the way"),
    (Replied(0, "clinic", math.nan, 5000, 1.25, 0, {}), "round 1: clinic: 5.0 kB up, 1.2 s"),
    (RunEnded(3, "finished", 61.0), "finished: 3 rounds in 61 s"),
]
REPLY, ROUND = (next(one for one in EVENTS if isinstance(one[0], kind)) for kind in (Replied, RoundEnded))


@pytest.mark.parametrize(("event", "line"), EVENTS)
def test_every_event_in_a_line(event: Event, line: str) -> None:
    assert told(event) == line


def test_no_kind_of_event_is_forgotten() -> None:
    assert {type(event) for event, _ in EVENTS} == set(get_args(Event))


def tick(done: int, kind: str = "train", loss: float = 0.5) -> Tick:
    return Tick(kind, "clinic", 1, 4, done, 9, loss)


def test_where_a_client_is() -> None:
    assert at_work(tick(3)) == "round 2 of 4 · clinic · local step 3 of 9 · loss 0.500"
    assert at_work(tick(0, loss=math.nan)) == "round 2 of 4 · clinic · local step 0 of 9"
    assert at_work(tick(3, "evaluate")) == "evaluation after 1 of 4 rounds · clinic · batch 3 of 9 · loss 0.500"
    assert (counted(1, "round"), counted(0, "round")) == ("1 round", "0 rounds")


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_plain_log_breaks_silence_after_two_seconds() -> None:
    clock, lines = Clock(), list[str]()
    with Plain(lines.append, clock) as plain:
        for second in range(10):
            clock.time = second
            plain.report(tick(second))
    assert [line.split(" of 9")[0][-1] for line in lines] == ["0", "3", "6", "9"]


def test_plain_log_of_a_long_run_is_no_flood() -> None:
    clock, lines = Clock(), list[str]()
    plain = Plain(lines.append, clock)
    for second in range(3600):
        clock.time = second
        plain.report(tick(second))
    assert 100 < len(lines) < 300


def test_plain_log_counts_every_line_as_a_sign_of_life() -> None:
    clock, lines = Clock(), list[str]()
    plain = Plain(lines.append, clock)
    for second in range(8):
        clock.time = second
        plain.event(REPLY[0])
        plain.report(tick(second))
    assert lines == [REPLY[1], at_work(tick(0)), *[REPLY[1]] * 7]


def test_plain_log_names_the_client_before_slow_work() -> None:
    clock, lines = Clock(), list[str]()
    plain = Plain(lines.append, clock)
    for client, seconds in (("quick", 0.1), ("slow", 5.0), ("next", 0.1), ("last", 0.1)):
        for done in (0, 1):
            clock.time += seconds * done
            plain.report(tick(done)._replace(client=client))
    assert [line.split(" · ")[1:3] for line in lines] == [
        ["quick", "local step 0 of 9"], ["slow", "local step 1 of 9"], ["next", "local step 0 of 9"]
    ]  # fmt: skip


def test_rounds_tell_the_time_that_is_left() -> None:
    clock, lines = Clock(), list[str]()
    plain = Plain(lines.append, clock)
    for time, event in (
        (0, RunStarted("mine", "abc", 4, ["clinic"], {"clinic": 9}, 1200, 50000, 0)),
        (50, Evaluated(0, True, {"clinic": CLINIC}, 1.5, 1.5, 50.0)),  # the base's, of which there is one
        (80, replace(ROUND[0], round=0)),
        (150, replace(ROUND[0], round=1)),
        (200, replace(ROUND[0], round=3)),
    ):
        clock.time = time
        plain.event(event)
    assert [line.partition(" up, 3.0 s")[2] for line in lines[2:]] == [
        "; 3 rounds left, about 1 min 30 s",
        "; 2 rounds left, about 1 min 40 s",
        "",
    ]


def test_a_run_that_goes_on_tells_the_time_that_is_left() -> None:
    clock, lines = Clock(), list[str]()
    plain = Plain(lines.append, clock)
    plain.report(tick(0))  # of 4 rounds the second
    clock.time = 10
    plain.event(ROUND[0])
    assert lines[-1] == f"{ROUND[1]}; 2 rounds left, about 20 s"


def test_live_line_shows_the_step_and_keeps_rounds() -> None:
    clock, screen = Clock(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False)
    with Live(console, clock) as live:
        live.say("loading")
        clock.time = 75
        live.report(tick(3))
        live._display.refresh()
        live.event(REPLY[0])
        live.event(ROUND[0])
    shown = screen.getvalue()
    assert "1:15  round 2 of 4 · clinic · local step 3 of 9 · loss 0.500" in shown
    assert ROUND[1] in shown
    assert REPLY[1] not in shown


def test_a_run_reports_every_step(
    tiny: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch, shared_home: object
) -> None:
    from atoll.run import run

    monkeypatch.setenv("ATOLL_HOME", str(shared_home))
    monkeypatch.setenv("ATOLL_RUNS", f"{tmp_path}/runs")
    heard: list[Tick] = []
    run(tiny, ["finetune.rounds=1", "evaluate.every=0"], report=heard.append)
    north = [t for t in heard if t.client == "north"]
    assert [(t.kind, t.round, t.done, t.of) for t in north] == [
        ("evaluate", 0, 0, 1), ("evaluate", 0, 1, 1),
        ("train", 0, 0, 2), ("train", 0, 1, 2), ("train", 0, 2, 2),
        ("evaluate", 1, 0, 1), ("evaluate", 1, 1, 1),
    ]  # fmt: skip
    assert all(math.isnan(t.loss) == (t.done == 0) for t in north)
