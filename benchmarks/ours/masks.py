"""Our secure aggregation on given values: the exchange and the clients of a real round, each end on a clock of its own.

The server's clock runs in the exchange, in the aggregator and nowhere else; a client's while it answers. The update is made
beforehand, the largest value is public as the peer's is, and as many shares open a secret: two clients may collude.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from atoll import wire
from atoll.client import Client
from atoll.exchange import Done, Dropped, Opened, Reply, Task
from atoll.privacy import graph
from atoll.privacy.graph import threshold
from atoll.privacy.masks import SecureAggregation
from atoll.privacy.party import Memory
from atoll.round import RoundPlan, broadcast, converse, initial, receive
from atoll.stream import UPDATE, Stream
from benchmarks.masked import Measured, Setting, report, rounds, updates
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Rounds over the values that all contestants have; with `complete`, many clients of ours alone."""
    return many(config) if "complete" in config else rounds(measure, config)


def many(config: Mapping[str, Any]) -> Measure:
    """Many clients, of whom a twentieth vanish; bytes of one client by what they are for, and how many neighbors it has."""
    clients, complete = config["clients"], config["complete"]
    if complete:
        graph.COMPLETE = clients
    dropped = list(range(0, clients, 20))
    setting = Setting(dropped, threshold(graph.degree(clients) + 1, 0), config["bits"], 8.0, 0)
    values = updates(clients, config["values"], setting)

    def run() -> Mapping[str, Any]:
        done = measure(values, setting)
        phases = {"phase_bytes_up": done.phases_up / clients, "phase_bytes_down": done.phases_down / clients}
        return {**report(values, setting, done), "neighbors": graph.degree(clients), **phases}

    return run


def measure(values: np.ndarray, setting: Setting) -> Ours:
    """One round over `values`, float32 [clients, n], with new keys: see `benchmarks.masked.Masks`."""
    names = [f"client-{i}" for i in range(len(values))]
    holders = graph.degree(len(values)) + 1
    colluding = max(0, 2 * setting.threshold - holders - 2)
    if threshold(holders, colluding) != setting.threshold:
        raise ValueError(f"a threshold of {setting.threshold} of {holders} is none of ours")
    masks = SecureAggregation(setting.bits, survivors=setting.threshold, colluding=colluding)
    stream = masks.hide(Stream(), len(names), public=lambda params: setting.clip)
    plan = RoundPlan("masks", 0, (stream,), exchange=masks.exchange((stream,), len(names)), attempt=masks.attempt)
    given = {name: {"w": torch.from_numpy(row)} for name, row in zip(names, values, strict=True)}
    return Round(plan, {name: client(plan, masks, name, given) for name in names}, names, setting).run(values.shape[1])


def client(plan: RoundPlan, masks: SecureAggregation, name: str, given: Mapping[str, Any]) -> Client:
    """A client whose work is done already."""

    def work(*_: Any) -> Done:
        return Done({UPDATE: given[name]}, {"all": 1.0}, {}, {})

    return Client(
        name, plan.hash, plan.streams, {"train": work}, None, side=masks.party(name, plan.streams, len(given), Memory())
    )


@dataclass(frozen=True)
class Ours(Measured):
    """With the bytes of the phases, of all clients."""

    phases_up: int
    phases_down: int


class Round:
    """A fleet of clients that answer at once, each timed; what is not theirs is the server's."""

    def __init__(self, plan: RoundPlan, clients: Mapping[str, Client], names: list[str], setting: Setting) -> None:
        self.plan, self.clients, self.setting = plan, clients, setting
        self.dropped = {names[i] for i in setting.dropped}
        self.client_s: dict[str, float] = defaultdict(float)
        self.upload_bytes = 0
        self.out: dict[str, Task] = {}

    def run(self, n: int) -> Ours:
        """The round; raises where it does not come to its end."""
        state = initial(self.plan, {"w": torch.zeros(n)})
        tasks, _ = broadcast(self.plan, state, list(self.clients), 0.0, variant=self.plan.attempt())
        stream = self.plan.streams[0]
        out = {task.id: task for task in tasks}
        began = time.perf_counter()
        totals = {UPDATE: stream.aggregate.init(state.params[UPDATE])}
        accept = partial(receive, self.plan, state, out)
        exchange = self.plan.exchange(tasks, [], accept, lambda came: float("inf"))
        *_, opened = converse(self, exchange, self.plan.streams, totals)  # type: ignore[arg-type]
        if not isinstance(opened, Opened):
            raise RuntimeError(f"the round came to nothing: {opened}")
        mean = stream.aggregate.finish(stream.aggregate.open(totals[UPDATE]), stream.up.decode_sum)["w"].numpy()
        server_s = time.perf_counter() - began - sum(self.client_s.values())
        survivors = [seconds for name, seconds in self.client_s.items() if name not in self.dropped]
        seconds = server_s, statistics.median(survivors)
        return Ours(*seconds, self.upload_bytes, mean, opened.bytes_up, opened.bytes_down)

    def submit(self, tasks: list[Task]) -> None:
        """Nothing is sent: tasks are answered when somebody waits for them."""
        self.out |= {task.id: task for task in tasks}

    def receive(self, tasks: frozenset[str], until: float) -> Reply | Dropped:
        """The next answer."""
        task = self.out.pop(next(id for id in self.out if id in tasks))
        if task.kind == "mask" and task.client in self.dropped:
            return Dropped(task.client, task.id)
        answer: Callable[[Task], Reply] = self.clients[task.client].handle
        began = time.perf_counter()
        reply = answer(task)
        self.client_s[task.client] += time.perf_counter() - began
        if task.kind == "mask":
            self.upload_bytes = sum(wire.size(payload) for payload in reply.payloads.values())
        return reply

    def now(self) -> float:
        """Time is of no matter here."""
        return 0.0


if __name__ == "__main__":
    serve(prepare, ("atoll", "numpy", "cryptography"))
