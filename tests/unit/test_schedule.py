"""When a round closes: by everybody, by a deadline, by a quorum and grace; and what becomes of those who are late."""

from __future__ import annotations

import math

import pytest
from toys import SITES, START, fedavg_work, rounds, toy_fleet, toy_plan

from atoll.exchange import Accepted, Dropped
from atoll.fleet.inprocess import speeds
from atoll.params import equal
from atoll.round import initial, run_round
from atoll.schedule import buffered, synchronous
from atoll.stream import UPDATE

SECONDS = {"north": 1.0, "south": 2.0, "west": 10.0}


def story(schedule, count=3):
    """The final state, who was heard in each round with its staleness, and who was dropped."""
    plan = toy_plan(schedule=schedule)
    fleet = toy_fleet(plan, fedavg_work(), speed=speeds(SECONDS, 1.0))
    state, heard, dropped = initial(plan, START), [], []
    for _ in range(count):
        verdicts = []
        state = run_round(plan, state, fleet, verdicts.append)
        heard.append([(v.reply.client, v.staleness) for v in verdicts if isinstance(v, Accepted)])
        dropped.append([v.client for v in verdicts if isinstance(v, Dropped)])
    return state, heard, dropped


def test_without_a_deadline_everybody_is_waited_for():
    state, heard, _ = story(synchronous())
    assert [len(one) for one in heard] == [3, 3, 3]
    assert state.clock == 30.0


def test_a_deadline_closes_a_round_whoever_is_missing():
    state, heard, dropped = story(synchronous(deadline=4.0))
    assert heard == [[("north", 0), ("south", 0)]] * 3
    assert dropped == [["west"]] * 3
    assert state.clock == 12.0
    assert not state.in_flight


def test_a_deadline_before_anybody_answers_changes_nothing():
    state, heard, dropped = story(synchronous(deadline=0.5))
    assert heard == [[], [], []]
    assert sorted(dropped[0]) == sorted(SITES)
    assert equal(state.params[UPDATE], START)


def test_a_quorum_waits_for_grace_and_no_longer():
    state, heard, _ = story(synchronous(quorum=0.3, grace=1.5), 1)
    assert heard == [[("north", 0), ("south", 0)]]
    assert state.clock == 2.5
    state, heard, _ = story(synchronous(quorum=0.3, grace=0.5), 1)
    assert heard == [[("north", 0)]]
    assert state.clock == 1.5


def test_a_late_reply_is_taken_in_a_later_round_and_counts_less():
    _, heard, dropped = story(synchronous(deadline=4.0, late="take"), 4)
    assert ("west", 2) in heard[2]
    assert not any(dropped)
    weak, strong = (story(synchronous(deadline=4.0, late="take", exponent=e), 4)[0] for e in (0.0, 3.0))
    assert not equal(weak.params[UPDATE], strong.params[UPDATE])


def test_who_is_late_and_taken_is_not_asked_again_before():
    plan = toy_plan(schedule=synchronous(deadline=4.0, late="take"))
    fleet = toy_fleet(plan, fedavg_work(), speed=speeds(SECONDS, 1.0))
    state = rounds(plan, fleet, 1)
    assert [task.client for task in state.in_flight] == ["west"]
    state = rounds(plan, fleet, 1, state)
    assert [(task.client, task.broadcast.round) for task in state.in_flight] == [("west", 0)]


def test_a_buffer_closes_by_count_alone():
    waits = buffered(3, 2).waits
    assert waits([], 3) == math.inf
    assert waits([1.0], 3) == math.inf
    assert waits([1.0, 2.0], 3) == -math.inf


@pytest.mark.parametrize("late", ["drop", "take"])
def test_a_run_that_is_cut_off_between_rounds_goes_on_alike(late):
    schedule = synchronous(deadline=4.0, late=late)
    whole, _, _ = story(schedule, 5)
    plan = toy_plan(schedule=schedule)
    state = None
    for _ in range(5):
        fleet = toy_fleet(plan, fedavg_work(), speed=speeds(SECONDS, 1.0), clock=state.clock if state else 0.0)
        if state:
            fleet.submit(state.in_flight)
        state = rounds(plan, fleet, 1, state)
    assert equal(whole.params[UPDATE], state.params[UPDATE])
    assert whole.clock == state.clock
