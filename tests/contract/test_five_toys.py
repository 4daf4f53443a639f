"""Proof before width: five methods that strain a driver in five directions, all through `run_round` (architecture.md).

SCAFFOLD; a masked sum in two phases with a dropout; buffered asynchrony with staleness; an all-reduce without replies;
client state that survives a kill between encode and commit.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from toys import SITES, START, descend, fedavg_work, gradient, line, rounds, toy_fleet, toy_plan

from atoll.aggregate.mean import mean, share
from atoll.client import Client, FileStore, MemoryStore
from atoll.exchange import Abandoned, Accepted, Contribution, Done, Dropped, Reply, Send, Wait
from atoll.fleet.faults import FaultFleet
from atoll.fleet.inprocess import InProcess
from atoll.keys import generator
from atoll.outer import sgd
from atoll.params import add, equal, subtract, under, zeros_like
from atoll.record.checkpoint import load_state, save_state
from atoll.round import initial, run_round
from atoll.schedule import buffered, poisson, synchronous
from atoll.stream import UPDATE, Stream
from atoll.transforms.base import Encoded, Stateless, Traits
from atoll.transforms.chain import Chain, Payload
from atoll.transforms.residual import error_feedback
from atoll.transforms.sparsify import topk


def test_fedavg_is_algorithm_1():
    """The plain case first: w <- sum n_k / n w_k, written out."""
    plan = toy_plan()
    state = rounds(plan, toy_fleet(plan, fedavg_work(steps=3, lr=0.1)), 4)
    params, n = START, sum(len(data.x) for data in SITES.values())
    for _ in range(4):
        locally = [descend(params, data, 3, 0.1) for data in SITES.values()]
        shares = [len(data.x) / n for data in SITES.values()]
        params = {name: sum(s * w[name] for s, w in zip(shares, locally, strict=True)) for name in params}
    assert all(torch.allclose(state.params[UPDATE][name], params[name], atol=1e-6) for name in params)


# 1. SCAFFOLD -----------------------------------------------------------------------------------------------------------


def scaffold_work(steps, lr):
    """Karimireddy et al. 2020, Algorithm 1 with option II: two streams, and c_k as client state."""

    def work(params, data, state, task):
        w, c, c_k = params[UPDATE], params["control"], state or zeros_like(params[UPDATE])
        after = w
        for _ in range(steps):
            g = gradient(after, data)
            after = {name: after[name] - lr * (g[name] - c_k[name] + c[name]) for name in after}
        c_new = {name: c_k[name] - c[name] + (w[name] - after[name]) / (steps * lr) for name in w}
        return Done({UPDATE: subtract(after, w), "control": subtract(c_new, c_k)}, {"all": 1.0}, {}, c_new)

    return work


def scaffold_by_hand(count, steps, lr):
    w, c, c_ks = START, zeros_like(START), {name: zeros_like(START) for name in SITES}
    for _ in range(count):
        w_sum, c_sum = zeros_like(w), zeros_like(w)
        for site, data in SITES.items():
            after, c_k = w, c_ks[site]
            for _ in range(steps):
                g = gradient(after, data)
                after = {n: after[n] - lr * (g[n] - c_k[n] + c[n]) for n in w}
            c_ks[site] = {n: c_k[n] - c[n] + (w[n] - after[n]) / (steps * lr) for n in w}
            w_sum, c_sum = add(w_sum, subtract(after, w)), add(c_sum, subtract(c_ks[site], c_k))
        w, c = add(w, w_sum, 1 / len(SITES)), add(c, c_sum, 1 / len(SITES))
    return w, c


def test_scaffold_has_two_streams_and_client_state():
    plan = toy_plan(streams=(Stream(), Stream("control", initial=zeros_like)))
    state = rounds(plan, toy_fleet(plan, scaffold_work(steps=5, lr=0.1)), 6)
    w, c = scaffold_by_hand(6, steps=5, lr=0.1)
    for name in START:
        assert torch.allclose(state.params[UPDATE][name], w[name], atol=1e-6)
        assert torch.allclose(state.params["control"][name], c[name], atol=1e-6)


@pytest.mark.parametrize("schedule", [synchronous(), synchronous(cohort=2), poisson(0.5), buffered(3, 1)])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_the_servers_variate_stays_the_mean_of_the_clients(schedule, drop):
    """Algorithm 1 keeps c = (1/N) sum c_k, whoever takes part, is lost on the way or comes late."""
    control = Stream("control", aggregate=share(len(SITES)), initial=zeros_like, ages=False)
    plan = toy_plan(streams=(Stream(), control), schedule=schedule)
    stores = {name: MemoryStore() for name in SITES}
    fleet = FaultFleet(toy_fleet(plan, scaffold_work(steps=3, lr=0.1), SITES, stores), drop=drop)
    state = rounds(plan, fleet, 12)
    acknowledged = {name: stores[name].settle(state.acknowledged.get(name)) for name in SITES}
    kept = [under("work", one) or zeros_like(START) for one in acknowledged.values()]
    for name in START:
        mean = sum(one[name] for one in kept) / len(SITES)
        assert torch.allclose(state.params["control"][name], mean, atol=1e-6)


def test_scaffold_reaches_the_optimum_that_fedavg_misses():
    """With many local steps on unlike sites FedAvg settles beside the optimum; SCAFFOLD's correction removes the drift."""
    optimum = least_squares(list(SITES.values()))
    drifting = toy_plan()
    fedavg = rounds(drifting, toy_fleet(drifting, uniform(fedavg_work(steps=10, lr=0.3))), 200).params[UPDATE]
    corrected = toy_plan(streams=(Stream(), Stream("control", initial=zeros_like)))
    scaffold = rounds(corrected, toy_fleet(corrected, scaffold_work(steps=10, lr=0.3)), 200).params[UPDATE]
    assert distance(scaffold, optimum) < 1e-3 < 0.01 < distance(fedavg, optimum)


def uniform(work):
    return lambda *args: work(*args)._replace(weights={"all": 1.0})


def least_squares(sites):
    """The optimum of the mean over sites of the sites' mean losses."""
    rows = torch.cat([torch.stack((d.x, torch.ones_like(d.x)), 1) / len(d.x) ** 0.5 for d in sites]).double()
    a, b = torch.linalg.lstsq(rows, torch.cat([d.y / len(d.y) ** 0.5 for d in sites]).double().unsqueeze(1)).solution
    return {"a": a.float(), "b": b.float()}


def distance(p, q):
    return max(float((p[name] - q[name]).abs()) for name in p)


# 2. A masked sum in two phases, with a dropout between them ------------------------------------------------------------

RING = 2**16


class FixedPoint(Stateless):
    """x -> round(x RING) as int64: integers add up exactly, so masks cancel exactly."""

    traits = Traits(summable=True, fixed_support=True)

    def encode(self, state, x, key):
        return state, Encoded({name: (value.double() * RING).round().long() for name, value in x.items()}, {})

    def decode(self, encoded):
        return {name: (value.double() / RING) for name, value in encoded.main.items()}


class RingSum:
    """Adds integers; the weight rides inside the vector, as the entry `weight`."""

    summable = True

    def groups(self, like):
        return set()

    def init(self, like):
        return {name: torch.zeros(x.shape, dtype=torch.int64) for name, x in like.items()}

    def vector(self, like):
        return {name: torch.zeros(x.shape, dtype=torch.int64) for name, x in like.items()}

    def add(self, total, vector, weights):
        return add(total, vector)

    def open(self, total):
        return total

    def finish(self, total, decode):
        total = decode(total)
        return {n: (x / total["weight"]).float() if n != "weight" else torch.zeros(1) for n, x in total.items()}


def pair_mask(a, b, like):
    """What the clients a and b agreed on: one adds it, the other subtracts it."""
    draw = generator("pair", *sorted((a, b)))
    sign = 1 if a < b else -1
    return {n: sign * torch.randint(-(2**40), 2**40, x.shape, generator=draw) for n, x in sorted(like.items())}


class MaskingClient(Client):
    """Phase `train`: the weighted update plus the masks with everybody asked. Phase `unmask`: the masks with the lost."""

    def handle(self, task):
        if task.kind == "unmask":
            masks = self._masks(task.data["lost"], START | {"weight": torch.zeros(1)})
            return Reply(task.id, self.name, self.plan, task.broadcast.round, {UPDATE: Payload(masks, ({},))})
        reply = super().handle(task)
        payload = reply.payloads[UPDATE]
        hidden = add(payload.main, self._masks(SITES, payload.main))
        return Reply(reply.task, self.name, self.plan, reply.round, {UPDATE: Payload(hidden, payload.sides)})

    def _masks(self, others, like):
        total = {name: torch.zeros(x.shape, dtype=torch.int64) for name, x in like.items()}
        for other in others:
            total = add(total, pair_mask(self.name, other, like)) if other != self.name else total
        return total


def masked(tasks, in_flight, receive, closes):
    """Phase one: masked updates. Phase two: the survivors name the masks they shared with those who dropped out."""
    yield Send(tasks)
    survivors, lost = [], []
    out = {task.id for task in tasks}
    while out:
        event, _ = yield Wait(frozenset(out))
        out.discard(event.task)
        verdict = event if isinstance(event, Dropped) else receive(event)
        (survivors if isinstance(verdict, Accepted) else lost).append(event.client)
        yield verdict
    ask = [
        type(t)("unmask", t.client, t.plan, t.broadcast, t.key, data={"lost": lost})
        for t in tasks
        if t.client in survivors
    ]
    yield Send(ask)
    out = {task.id for task in ask}
    while out:
        reply, _ = yield Wait(frozenset(out))
        out.discard(reply.task)
        if isinstance(reply, Dropped):  # its masks cannot be taken off any more, and the sum is worth nothing
            yield Abandoned(f"{reply.client} was lost before it had named its masks")
            return
        correction = {n: -x for n, x in reply.payloads[UPDATE].main.items()}
        yield Accepted(reply, {UPDATE: Contribution(correction, {})})


def weighed(work):
    """The weight rides inside the vector, and nothing else leaves in the clear."""

    def masked_work(params, data, state, task):
        done = work({UPDATE: {n: params[UPDATE][n] for n in START}}, data, state, task)
        weight = done.weights["all"]
        inside = {n: weight * x for n, x in done.updates[UPDATE].items()} | {"weight": torch.tensor([weight])}
        return Done({UPDATE: inside}, {}, {}, {})

    return masked_work


@pytest.mark.parametrize("dropped", [[], ["south"]])
def test_a_masked_sum_in_two_phases_with_a_dropout(dropped):
    plan = toy_plan(streams=(Stream(up=Chain((FixedPoint(),)), aggregate=RingSum()),), exchange=masked)
    seen = []

    def observe(verdict):
        if isinstance(verdict, Accepted) and verdict.reply.task.startswith("train"):
            seen.append(verdict.contributions[UPDATE].vector["a"])

    class Dropping(InProcess):
        def receive(self, tasks, until=math.inf):
            event = super().receive(tasks, until)
            drop = event.client in dropped and event.task.startswith("train")
            return Dropped(event.client, event.task) if drop else event

    fleet = Dropping(
        list(SITES),
        lambda name: MaskingClient(name, plan.hash, plan.streams, {"train": weighed(fedavg_work())}, SITES[name]),
    )
    state = rounds(plan, fleet, 1, initial(plan, START | {"weight": torch.zeros(1)}), observe)
    clear = toy_plan()
    kept = {name: data for name, data in SITES.items() if name not in dropped}
    expected = rounds(clear, toy_fleet(clear, fedavg_work(), kept), 1).params[UPDATE]
    for name in START:
        assert torch.allclose(state.params[UPDATE][name], expected[name], atol=2 / RING)
    assert all(abs(int(x)) > 2**30 for x in seen), "what one client sends must look nothing like its update"


def test_a_masked_round_that_loses_a_client_while_unmasking_is_abandoned():
    plan = toy_plan(streams=(Stream(up=Chain((FixedPoint(),)), aggregate=RingSum()),), exchange=masked)

    class Dropping(InProcess):
        def receive(self, tasks, until=math.inf):
            event = super().receive(tasks, until)
            return Dropped(event.client, event.task) if event.task == "unmask:0:west" else event

    start, heard = START | {"weight": torch.zeros(1)}, []
    fleet = Dropping(
        list(SITES),
        lambda name: MaskingClient(name, plan.hash, plan.streams, {"train": weighed(fedavg_work())}, SITES[name]),
    )
    state = rounds(plan, fleet, 1, initial(plan, start), heard.append)
    assert equal(state.params[UPDATE], start), "masks must not be applied"
    assert isinstance(heard[-1], Abandoned)
    assert state.round == 1
    assert not equal(rounds(plan, fleet, 1, state).params[UPDATE], start), "the next round goes on"


# 3. Buffered asynchrony with staleness ---------------------------------------------------------------------------------


def test_buffered_asynchrony_with_staleness():
    """Speeds 1 : 2 : 5, two updates a round. The slow client's update arrives stale and is discounted."""
    plan = toy_plan(schedule=buffered(concurrency=3, buffer=2, exponent=0.5))
    fleet = toy_fleet(plan, fedavg_work(), speed=lambda task: {"north": 1.0, "south": 2.0, "west": 5.0}[task.client])
    heard = []
    state = rounds(plan, fleet, 5, observe=lambda verdict: heard.append(verdict))
    accepted = [(v.reply.client, v.reply.round, v.staleness) for v in heard if isinstance(v, Accepted)]
    # Round 0 asks all; north answers at 1, south at 2. Round 1 asks those two again at 2: north at 3, south at 4. ...
    assert accepted[:5] == [("north", 0, 0), ("south", 0, 0), ("north", 1, 0), ("south", 1, 0), ("west", 0, 2)]
    west = next(v for v in heard if isinstance(v, Accepted) and v.reply.client == "west")
    assert west.contributions[UPDATE].weights["all"] == 6.0
    local = descend(START, SITES["west"], 3, 0.1)
    assert float(west.contributions[UPDATE].vector["a"]) == pytest.approx(float(local["a"]) * 3**-0.5)
    assert state.round == 5
    assert {task.client for task in state.in_flight} <= set(SITES)


def test_buffered_with_everyone_and_no_discount_is_synchronous():
    together = toy_plan(schedule=buffered(concurrency=3, buffer=3, exponent=0.0))
    synchronous = toy_plan()
    a = rounds(together, toy_fleet(together, fedavg_work()), 4)
    b = rounds(synchronous, toy_fleet(synchronous, fedavg_work()), 4)
    assert equal(a.params[UPDATE], b.params[UPDATE])


# 4. An all-reduce without a server: every process drives the same plan, nobody sends a reply to another ----------------


class AllReduce(InProcess):
    """Each rank hears its own client alone; totals are summed over the ranks."""

    def reduce(self, total):
        for name in sorted(total):
            torch.distributed.all_reduce(total[name])
        return total


def replica(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=len(SITES))
    plan = toy_plan()
    name = list(SITES)[rank]
    fleet = toy_fleet(plan, fedavg_work(), {name: SITES[name]})
    state = rounds(plan, AllReduce(fleet.names, fleet.client), 3)
    torch.save(state.params[UPDATE], Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_an_all_reduce_without_replies(tmp_path, free_port):
    mp.spawn(replica, (free_port, str(tmp_path)), nprocs=len(SITES))
    replicas = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SITES))]
    plan = toy_plan()
    server = rounds(plan, toy_fleet(plan, fedavg_work()), 3).params[UPDATE]
    assert all(equal(replicas[0], other) for other in replicas[1:])
    assert all(torch.allclose(replicas[0][name], server[name], atol=1e-6) for name in server)


# 5. Client state that survives a kill between encode and commit --------------------------------------------------------

KILLED = """
    import sys; sys.path.insert(0, {here!r})
    from test_five_toys import drive
    drive({folder!r}, rounds_to={rounds}, kill_at={kill_at!r})
"""


def drive(folder, rounds_to, kill_at=""):
    """Top-k with error feedback; the server's state is checkpointed after every round, the clients' by themselves."""
    folder = Path(folder)
    plan = toy_plan(streams=(Stream(up=Chain((error_feedback([topk(0.5)]),)), outer=sgd(0.5)),))
    sites = SITES | {"east": line(3.0, 3.0)}
    stores = {name: FileStore(folder / f"{name}.safetensors") for name in sites}
    fleet = FaultFleet(toy_fleet(plan, wide_work(), sites, stores), kill_at=kill_at)
    saved = folder / "checkpoint.safetensors"
    state = load_state(saved) if saved.exists() else initial(plan, {"w": torch.zeros(2)})
    while state.round < rounds_to:
        state = run_round(plan, state, fleet)
        save_state(saved, state)
    return state


def wide_work():
    """The two parameters as one tensor, so that top-k has something to leave out."""
    inner = fedavg_work()

    def work(params, data, state, task):
        w = params[UPDATE]["w"]
        done = inner({UPDATE: {"a": w[:1], "b": w[1:]}}, data, state, task)
        return done._replace(updates={UPDATE: {"w": torch.cat(list(done.updates[UPDATE].values()))}})

    return work


@pytest.mark.parametrize("kill_at", ["train:2:north", "train:2:west", "train:0:north"])
def test_client_state_survives_a_kill_between_encode_and_commit(tmp_path, kill_at):
    """The client has encoded and kept its new residual; nobody has heard of it when the process dies."""
    (tmp_path / "killed").mkdir()
    (tmp_path / "calm").mkdir()
    code = textwrap.dedent(
        KILLED.format(here=str(Path(__file__).parent), folder=str(tmp_path / "killed"), rounds=5, kill_at=kill_at)
    )
    died = subprocess.run([sys.executable, "-c", code], check=False)
    assert died.returncode == -signal.SIGKILL
    resumed = drive(tmp_path / "killed", 5)
    undisturbed = drive(tmp_path / "calm", 5)
    assert equal(resumed.params[UPDATE], undisturbed.params[UPDATE])
    for site in (*SITES, "east"):
        assert (tmp_path / "killed" / f"{site}.safetensors").read_bytes() == (
            tmp_path / "calm" / f"{site}.safetensors"
        ).read_bytes()


def test_aggregate_add_has_one_caller():
    source = Path(__file__).parents[2] / "src" / "atoll"
    callers = [p.name for p in source.rglob("*.py") if re.search(r"aggregat\w*(\[\w+\])?\.add\(", p.read_text())]
    assert callers == ["round.py"]
    assert mean().summable
