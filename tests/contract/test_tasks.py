"""The Flower fleet and what becomes of messages: lost, failed, late, doubled, or sent over a connection that broke."""

from __future__ import annotations

from pathlib import Path

import pytest
from post import Office
from toys import SITES, START, fedavg_work, toy_clients, toy_fleet, toy_plan

from atoll.exchange import Dropped, Reply
from atoll.fleet.flower import tasks as fleets
from atoll.fleet.flower.federation import Federation
from atoll.fleet.flower.tasks import Flower
from atoll.fleet.inprocess import Prepared
from atoll.params import equal
from atoll.round import broadcast, initial, run_round
from atoll.stream import UPDATE
from atoll.talk import envelope

NODES = {name: number for number, name in enumerate(SITES, 1)}


def over(plan, office=None, names=tuple(SITES), **more):
    """The toy's sites behind a post office."""
    office = office or Office(toy_clients(plan, fedavg_work()), dict(NODES))
    federation = Federation("nowhere:1", Path(), say=lambda line: None)
    federation.__dict__["operator"] = office
    federation.times = 1
    federation.prepared[plan.hash] = Prepared({})
    federation._plans[plan.hash] = {"tree": {}, "model": ""}
    return Flower(federation, list(names), "run", plan.hash, **more)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    for name in ("ASK", "RETURN", "LISTEN", "POLL", "FAREWELL"):
        monkeypatch.setattr(fleets, name, 0.02)


@pytest.fixture
def fleet():
    return over(toy_plan())


def submitted(fleet):
    plan = toy_plan()
    tasks, _ = broadcast(plan, initial(plan, START), fleet.clients(), 0.0)
    fleet.submit(tasks)
    return [task.id for task in tasks]


def drained(fleet, ids):
    return [fleet.receive(ids) for _ in ids]


def kinds(fleet, site="north"):
    return [kind for to, kind in fleet.federation.operator.sent if to == site]


def test_a_task_that_was_lost_is_asked_about_and_sent_again(fleet):
    office = fleet.federation.operator
    office.lose = {"task"}
    ids = submitted(fleet)
    office.lose = set()
    assert sorted(reply.task for reply in drained(fleet, ids)) == sorted(ids)
    assert kinds(fleet) == ["task", "ask", "task"]


def test_an_answer_that_is_late_is_taken_once_though_the_site_was_asked_meanwhile(fleet):
    office = fleet.federation.operator
    office.hold = {"task"}
    ids = submitted(fleet)
    assert fleet.receive(ids, until=fleet.now() + 0.1) is None
    office.hold = set()
    assert all(isinstance(one, Reply) for one in drained(fleet, ids))
    assert "ask" in kinds(fleet)
    assert fleet.receive(ids, until=fleet.now() + 0.05) is None, "nothing is left of them"


@pytest.mark.parametrize("ordered", [False, True])
def test_of_two_messages_about_a_task_the_one_that_arrives_counts(ordered):
    fleet = over(toy_plan(), ordered=ordered)
    office = fleet.federation.operator
    office.hold, office.fail = {"task"}, {"ask": "Node Unavailable"}
    ids = submitted(fleet)
    assert fleet.receive(ids, until=fleet.now() + 0.1) is None  # asked, and that failed
    office.hold = set()
    assert all(isinstance(one, Reply) for one in drained(fleet, ids))
    assert fleet.receive(ids, until=fleet.now() + 0.1) is None


def test_a_site_that_left_and_comes_back_is_sent_its_task_again(fleet, monkeypatch):
    monkeypatch.setattr(fleets, "RETURN", 60.0)
    office = fleet.federation.operator
    office.fail = {"task": "Node Unavailable"}
    ids = submitted(fleet)
    del office.there["north"]
    assert fleet.receive(ids[:1], until=fleet.now() + 0.1) is None
    office.there["north"], office.fail = 17, {}
    assert isinstance(fleet.receive(ids[:1]), Reply)


def test_a_site_that_stays_away_drops_out(fleet):
    office = fleet.federation.operator
    office.fail = {"task": "Node Unavailable"}
    ids = submitted(fleet)
    office.there.clear()
    heard = drained(fleet, ids)
    assert all(isinstance(one, Dropped) and one.reason == "Node Unavailable" for one in heard)


def test_after_the_connection_broke_everything_unanswered_is_sent_again_and_counts_once(fleet, monkeypatch):
    office = fleet.federation.operator
    office.hold = {"task"}
    ids = submitted(fleet)
    office.broken = True
    monkeypatch.setattr(fleets.Federation, "_reconnect", anew)
    assert sorted(reply.task for reply in drained(fleet, ids)) == sorted(ids)
    assert fleet.federation.times == 2


def anew(federation, why, limit):
    """Another connection to the same sites, which keep their answers."""
    before = federation.operator
    made = Office(before.client, before.there, _done=before._done)
    federation.__dict__["operator"] = made
    federation.times += 1


def test_a_connection_that_breaks_while_tasks_are_sent_loses_none(monkeypatch):
    fleet = over(toy_plan())
    office, plan = fleet.federation.operator, toy_plan()
    tasks, _ = broadcast(plan, initial(plan, START), fleet.clients(), 0.0)
    send = office.send

    def breaks(node, parts):
        name = send(node, parts)
        office.broken = True
        return name

    monkeypatch.setattr(office, "send", breaks)
    monkeypatch.setattr(fleets.Federation, "_reconnect", anew)
    fleet.submit(tasks)
    assert len(drained(fleet, [task.id for task in tasks])) == 3


def test_a_site_that_comes_later_is_asked_to_get_ready_and_takes_part_afterwards():
    fleet = over(toy_plan(), names=["north", "south"])
    assert fleet.clients() == ["north", "south", "west"]
    assert kinds(fleet, "west") == ["plan"]


def test_one_that_asks_for_more_than_the_rounds_keep_to_does_not():
    fleet = over(toy_plan(), names=["north", "south"])
    fleet.federation.operator.answer = lambda *_: [envelope("ready", train=3, test=0, least=3)]
    assert fleet.clients() == ["north", "south"]
    assert fleet.clients() == ["north", "south"]


def test_a_round_of_fewer_than_its_clients_ask_for_changes_nothing():
    plan, heard = toy_plan(least=3), []
    fleet = toy_fleet(plan, fedavg_work(), {name: SITES[name] for name in ("north", "south")})
    state = initial(plan, START)
    after = run_round(plan, state, fleet, heard.append)
    assert equal(after.params[UPDATE], state.params[UPDATE])
    assert heard[-1].reason == "2 updates came; at least 3 are needed"


def test_sites_at_work_are_told_when_nobody_waits_any_more(fleet):
    fleet.federation.operator.hold = {"task"}
    submitted(fleet)
    fleet.close()
    assert [kinds(fleet, site)[-1] for site in SITES] == ["cancel"] * 3
