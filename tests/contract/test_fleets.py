"""One contract for every fleet, and what a round makes of faults."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_tasks import over
from toys import SITES, START, fedavg_work, remade, rounds, toy_clients, toy_fleet, toy_plan

from atoll.exchange import Done, Dropped, Refused, Reply
from atoll.fleet.faults import FaultFleet
from atoll.fleet.processes import processes
from atoll.outer import sgd
from atoll.params import equal
from atoll.round import broadcast, initial, receive
from atoll.schedule import poisson, synchronous
from atoll.stream import UPDATE, Stream
from atoll.transforms.chain import Chain
from atoll.transforms.quantize import int4, int8
from atoll.transforms.sparsify import topk


def simulated(plan):
    return toy_fleet(plan, fedavg_work())


def worked(plan):
    return processes(workers=2)(list(SITES), toy_clients(plan, fedavg_work()), remade, clock=0.0)


EVERY = {
    "inprocess": simulated,
    "faults": lambda plan: FaultFleet(simulated(plan)),
    "processes": worked,
    "flower": lambda plan: over(plan, ordered=True),
}
"""Each makes FedAvg's fleet over the toy's sites."""


@pytest.fixture(params=EVERY.values(), ids=EVERY.keys())
def make_fleet(request):
    made = []

    def make(plan):
        made.append(request.param(plan))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def test_answers_every_task_once(make_fleet):
    plan = toy_plan()
    fleet = make_fleet(plan)
    tasks, _ = broadcast(plan, initial(plan, START), fleet.clients(), fleet.now())
    fleet.submit(tasks)
    replies = [fleet.receive({task.id}) for task in reversed(tasks)]
    assert sorted(reply.task for reply in replies) == sorted(task.id for task in tasks)
    assert all(reply.nbytes > 0 and reply.weights for reply in replies)


def test_gives_the_result_of_the_first_fleet(make_fleet):
    plan = toy_plan(schedule=synchronous(cohort=2))
    first = rounds(plan, toy_fleet(plan, fedavg_work()), 4)
    other = rounds(plan, make_fleet(plan), 4)
    assert equal(first.params[UPDATE], other.params[UPDATE])


def test_its_clock_does_not_go_back(make_fleet):
    plan = toy_plan()
    fleet = make_fleet(plan)
    times = [fleet.now()]
    state = None
    for _ in range(3):
        state = rounds(plan, fleet, 1, state)
        times.append(fleet.now())
    assert times == sorted(times)


def test_an_answer_that_nobody_waits_for_yet_is_kept(make_fleet):
    plan = toy_plan()
    fleet = make_fleet(plan)
    tasks, _ = broadcast(plan, initial(plan, START), fleet.clients(), fleet.now())
    fleet.submit(tasks)
    last = fleet.receive({tasks[-1].id})
    others = {fleet.receive({task.id for task in tasks[:-1]}).task, fleet.receive({tasks[1].id, tasks[0].id}).task}
    assert {last.task, *others} == {task.id for task in tasks}


def test_says_how_many_work_side_by_side(make_fleet):
    assert 1 <= make_fleet(toy_plan()).lanes() <= len(SITES)


def with_faults(plan=None, work=None, **faults):
    plan, heard = plan or toy_plan(), []
    fleet = FaultFleet(toy_fleet(plan, work or fedavg_work()), **faults)
    return rounds(plan, fleet, 6, observe=heard.append), heard


def test_a_dropped_client_leaves_the_mean_of_the_others():
    state, heard = with_faults(drop=0.4)
    assert any(isinstance(verdict, Dropped) for verdict in heard)
    assert state.round == 6
    assert all(torch.isfinite(x).all() for x in state.params[UPDATE].values())


def test_a_duplicate_counts_once():
    twice, heard = with_faults(duplicate=1.0)
    once, _ = with_faults()
    assert equal(twice.params[UPDATE], once.params[UPDATE])
    assert sum(isinstance(verdict, Refused) for verdict in heard) > 0
    assert all("answered before" in verdict.reason for verdict in heard if isinstance(verdict, Refused))


@pytest.mark.parametrize("up", [Chain(), Chain((int8(4),))], ids=["float", "int8"])
def test_a_corrupt_update_is_refused_with_the_reason_and_the_round_goes_on(up):
    plan = toy_plan(streams=(Stream(up=up),))
    state, heard = with_faults(plan, corrupt=1.0)
    assert all(isinstance(verdict, Refused) and verdict.reason for verdict in heard)
    assert equal(state.params[UPDATE], START), "nobody contributed, so nothing moved"


def test_a_client_whose_every_answer_is_lost_changes_nothing_but_time():
    state, heard = with_faults(lose=1.0)
    assert equal(state.params[UPDATE], START)
    assert all(isinstance(verdict, Dropped) for verdict in heard)


def test_a_delay_takes_virtual_time():
    calm, late = with_faults()[0], with_faults(delay=1.0, delay_seconds=7.0)[0]
    assert late.clock == calm.clock + 6 * 7.0
    assert equal(calm.params[UPDATE], late.params[UPDATE])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: d._replace(updates={UPDATE: {"a": torch.tensor([torch.nan]), "b": torch.zeros(1)}}), "not finite"),
        (lambda d: d._replace(updates={UPDATE: {"a": torch.zeros(1)}}), "names do not match"),
        (lambda d: d._replace(updates={UPDATE: {"a": torch.zeros(2), "b": torch.zeros(1)}}), "has the shape"),
        (lambda d: d._replace(updates={}), "lacks the stream"),
        (lambda d: d._replace(weights={"all": -1.0}), "a number from"),
        (lambda d: d._replace(weights={"all": 1e39}), "a number from"),
        (lambda d: d._replace(weights={"all": "many"}), "could not convert"),
        (lambda d: d._replace(weights=None), "no attribute"),
        (lambda d: d._replace(metrics={"loss": "low"}), "not a number"),
        (lambda d: d._replace(updates={UPDATE: {n: x.double() + 1e300 for n, x in START.items()}}), "too large"),
        (lambda d: d._replace(weights={"all": float("nan")}), "a number from"),
        (lambda d: d._replace(weights={"al": 1.0}), "are needed"),
        (lambda d: d._replace(weights={"all": 1e-46}), "a number from"),
        (lambda d: d._replace(metrics={"loss": 10**400}), "too large"),
    ],
)
def test_what_a_wrong_reply_gets(spoil, reason):
    inner = fedavg_work()

    def work(params, data, state, task):
        done: Done = inner(params, data, state, task)
        return spoil(done) if task.client == "south" else done

    state, heard = with_faults(work=work)
    refused = [verdict for verdict in heard if isinstance(verdict, Refused)]
    assert len(refused) == 6
    assert all(verdict.client == "south" and reason in verdict.reason for verdict in refused)
    kept = {name: data for name, data in SITES.items() if name != "south"}
    plan = toy_plan()
    expected = rounds(plan, toy_fleet(plan, fedavg_work(), kept), 6)
    assert equal(state.params[UPDATE], expected.params[UPDATE])


def test_a_reply_for_another_plan_is_refused():
    plan = toy_plan()
    fleet = toy_fleet(replace(plan, hash="other"), fedavg_work())
    heard = []
    rounds(plan, fleet, 1, observe=heard.append)
    assert all(isinstance(verdict, Refused) for verdict in heard)


def test_poisson_sampling_takes_each_client_at_its_rate():
    clients = [f"c{i}" for i in range(40)]
    sample = poisson(0.3).sample
    taken = [sample(clients, [], key) for key in range(500)]
    sizes = [len(cohort) for cohort in taken]
    assert abs(sum(sizes) / 500 - 12) < 1
    assert len(set(sizes)) > 5, "the size of a Poisson cohort varies"


def test_a_round_with_nobody_changes_nothing():
    plan = toy_plan(schedule=poisson(1e-9))
    heard = []
    state = rounds(plan, toy_fleet(plan, fedavg_work()), 2, observe=heard.append)
    assert not heard
    assert equal(state.params[UPDATE], START)


def test_uniform_sampling_draws_without_replacement_and_by_key():
    clients = [f"c{i}" for i in range(10)]
    sample = synchronous(cohort=4).sample
    cohorts = [sample(clients, [], key) for key in range(200)]
    assert all(len(set(cohort)) == 4 for cohort in cohorts)
    assert sample(clients, [], 5) == sample(clients, [], 5)
    counts = {client: sum(client in cohort for cohort in cohorts) for client in clients}
    assert max(counts.values()) < 2 * min(counts.values())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda r: replace(r, client="west"), "was asked"),
        (lambda r: replace(r, payloads={}), "lacks the stream"),
        (lambda r: replace(r, round=99), None),
        (lambda r: replace(r, round=-5), None),
        (lambda r: hostile(r, {"a": torch.zeros(1, dtype=torch.complex64), "b": torch.zeros(1)}), "has the type"),
        (lambda r: hostile(r, {}), "names do not match"),
    ],
    ids=["another client", "no payload", "from the future", "from the past", "complex", "empty"],
)
def test_a_hostile_reply_is_refused_and_its_claims_are_not_believed(spoil, reason):
    """`reason` None: the claim is ignored, for the server knows better."""

    class Hostile(FaultFleet):
        def receive(self, tasks, until=math.inf):
            event = super().receive(tasks, until)
            return spoil(event) if event.client == "south" else event

    plan, heard = toy_plan(), []
    state = rounds(plan, Hostile(toy_fleet(plan, fedavg_work())), 2, observe=heard.append)
    refused = [verdict for verdict in heard if isinstance(verdict, Refused)]
    assert [reason in verdict.reason for verdict in refused] == ([True, True] if reason else [])
    assert all(torch.isfinite(x).all() for x in state.params[UPDATE].values())


def hostile(reply, main):
    return replace(reply, payloads={UPDATE: reply.payloads[UPDATE]._replace(main=main)})


@pytest.mark.parametrize("side", [{"w#shape": torch.tensor([2.5])}, {"w#shape": torch.tensor([-1])}, {}])
@pytest.mark.parametrize("up", [int8(4), int4(4), topk(0.5)], ids=["int8", "int4", "topk"])
def test_hostile_sides_are_refused_too(up, side):
    plan = toy_plan(streams=(Stream(up=Chain((up,))),))
    state = initial(plan, {"w": torch.zeros(4)})
    tasks, _ = broadcast(plan, state, ["south"], 0.0)
    _, payload = plan.streams[0].up.encode({}, {"w": torch.randn(4)}, 0)
    forged = payload._replace(sides=({**payload.sides[0], **side} if side else {},))
    reply = Reply(tasks[0].id, "south", plan.hash, 0, {UPDATE: forged}, {"all": 1.0})
    verdict = receive(plan, state, {tasks[0].id: tasks[0]}, reply)
    assert isinstance(verdict, Refused)


def test_a_step_that_would_leave_the_numbers_is_not_taken():
    """Integers of a masked sum cannot be bounded one by one; what comes of them can."""
    plan = toy_plan(streams=(Stream(outer=sgd(1e38)), Stream("other", outer=sgd(1.0))))
    inner = fedavg_work()

    def work(params, data, state, task):
        done = inner({UPDATE: START}, data, state, task)
        return done._replace(updates={UPDATE: {n: x + 10.0 for n, x in START.items()}, "other": done.updates[UPDATE]})

    heard = []
    state = rounds(plan, toy_fleet(plan, work), 1, observe=heard.append)
    assert "infinite" in heard[-1].reason
    assert all(equal(state.params[name], START) for name in (UPDATE, "other"))
    assert state.round == 1
