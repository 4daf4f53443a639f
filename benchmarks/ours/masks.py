"""Our secure aggregation on given values: the exchange and the clients of a real round, each end on a clock of its own.

The server's clock runs in the exchange, in the aggregator and nowhere else; a client's while it answers. The update is made
beforehand, the largest value is public as the peer's is, and as many shares open a secret: two clients may collude.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from atoll import wire
from atoll.client import Client, Done
from atoll.exchange import Dropped, Reply, Task
from atoll.privacy.graph import threshold
from atoll.privacy.masks import SecureAggregation
from atoll.round import RoundPlan, broadcast, converse, initial, receive
from atoll.stream import UPDATE, Stream
from benchmarks.masked import Measured, Setting, rounds
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Rounds over the values that all contestants have."""
    return rounds(measure, config)


def measure(values: np.ndarray, setting: Setting) -> Measured:
    """One round over `values`, float32 [clients, n], with new keys: see `benchmarks.masked.Masks`."""
    names = [f"client-{i}" for i in range(len(values))]
    colluding = 2 * setting.threshold - len(values) - 2
    if threshold(len(values), colluding) != setting.threshold:
        raise ValueError(f"a threshold of {setting.threshold} of {len(values)} is none of ours")
    masks = SecureAggregation(setting.bits, survivors=setting.threshold, colluding=max(0, colluding))
    stream = masks.hide(Stream(), len(names), public=lambda params: setting.clip)
    plan = RoundPlan("masks", 0, (stream,), exchange=masks.exchange((stream,), len(names)), attempt=masks.attempt)
    given = {name: {"w": torch.from_numpy(row)} for name, row in zip(names, values, strict=True)}
    return Round(plan, {name: client(plan, masks, name, given) for name in names}, names, setting).run(values.shape[1])


def client(plan: RoundPlan, masks: SecureAggregation, name: str, given: Mapping[str, Any]) -> Client:
    """A client whose work is done already."""

    def work(*_: Any) -> Done:
        return Done({UPDATE: given[name]}, {"all": 1.0}, {}, {})

    return Client(
        name, plan.hash, plan.streams, {"train": work}, None, side=masks.party(name, plan.streams, len(given), {})
    )


class Round:
    """A fleet of clients that answer at once, each timed; what is not theirs is the server's."""

    def __init__(self, plan: RoundPlan, clients: Mapping[str, Client], names: list[str], setting: Setting) -> None:
        self.plan, self.clients, self.setting = plan, clients, setting
        self.dropped = {names[i] for i in setting.dropped}
        self.client_s: dict[str, float] = defaultdict(float)
        self.upload_bytes = 0
        self.out: dict[str, Task] = {}

    def run(self, n: int) -> Measured:
        """The round; raises where it does not come to its end."""
        state = initial(self.plan, {"w": torch.zeros(n)})
        tasks, _ = broadcast(self.plan, state, list(self.clients), 0.0, variant=self.plan.attempt())
        stream = self.plan.streams[0]
        out = {task.id: task for task in tasks}
        began = time.perf_counter()
        totals = {UPDATE: stream.aggregate.init(state.params[UPDATE])}
        accept = partial(receive, self.plan, state, out)
        exchange = self.plan.exchange(tasks, [], accept, lambda came: float("inf"))
        for _ in converse(self, exchange, self.plan.streams, totals):  # type: ignore[arg-type]
            pass
        if not totals:
            raise RuntimeError("the round was abandoned")
        mean = stream.aggregate.finish(stream.aggregate.open(totals[UPDATE]), stream.up.decode_sum)["w"].numpy()
        server_s = time.perf_counter() - began - sum(self.client_s.values())
        survivors = [seconds for name, seconds in self.client_s.items() if name not in self.dropped]
        return Measured(server_s, statistics.median(survivors), self.upload_bytes, mean)

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
