"""A fleet that misbehaves on purpose, around any other: test a recipe against the faults that it will meet.

Faults are drawn by key, so a run with faults repeats exactly. Rates are per task:

    drop       the task never reaches its client
    lose       the client works, its answer never arrives (its state is pending and stays so)
    corrupt    the answer arrives with a flipped byte or a value that is no number
    duplicate  the answer arrives twice
    delay      the task takes `delay_seconds` longer (virtual time)

`scale` names clients whose updates are multiplied by a number: those that would have their way, or, by a negative one,
work against all others.

`kill_at` ends the whole process with SIGKILL right after the client of the named task has worked, before anybody hears of
it: what a power cut does.
"""

from __future__ import annotations

import math
import os
import signal
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from annotated_types import Ge, Le

from atoll.client import Client
from atoll.errors import AtollError, closest
from atoll.exchange import Dropped, Event, Reply, Task
from atoll.fleet.base import Fleet
from atoll.fleet.inprocess import MakeFleet, Rebuild, Seconds, inprocess
from atoll.keys import rng
from atoll.params import Params
from atoll.parts import Slot

Rate = Annotated[float, Ge(0), Le(1)]


@dataclass
class FaultFleet:
    """See the module's text."""

    inner: Fleet
    drop: Rate = 0.0
    lose: Rate = 0.0
    corrupt: Rate = 0.0
    duplicate: Rate = 0.0
    delay: Rate = 0.0
    delay_seconds: float = 10.0
    kill_at: str = ""
    seed: int = 0
    scale: Mapping[str, float] = field(default_factory=dict)
    _dropped: dict[str, Dropped] = field(default_factory=dict)
    _copies: deque[Event] = field(default_factory=deque)

    def clients(self) -> list[str]:
        """The inner fleet's."""
        return self.inner.clients()

    def lanes(self) -> int:
        """The inner fleet's."""
        return self.inner.lanes()

    def now(self) -> float:
        """The inner fleet's."""
        return self.inner.now()

    def submit(self, tasks: Sequence[Task]) -> None:
        """Passes tasks on, but for those it drops or delays."""
        for task in tasks:
            if self._strikes("drop", task.id):
                self._dropped[task.id] = Dropped(task.client, task.id, "fault: the task was dropped")
            else:
                late = self.delay_seconds if self._strikes("delay", task.id) else 0.0
                self.inner.submit([replace(task, sent=task.sent + late)])

    def receive(self, tasks: Collection[str], until: float = math.inf) -> Event | None:
        """The inner fleet's next answer, or what the faults make of it. A second copy comes whether asked for or not."""
        if self._copies:
            return self._copies.popleft()
        if gone := next((task for task in self._dropped if task in tasks), None):
            return self._dropped.pop(gone)
        event = self.inner.receive(tasks, until)
        if event is not None and self.kill_at and f"{event.task}:".startswith(f"{self.kill_at}:"):
            os.kill(os.getpid(), signal.SIGKILL)
        if not isinstance(event, Reply):
            return event
        if event.client in self.scale:
            event = _scaled(event, self.scale[event.client])
        if self._strikes("lose", event.task):
            return Dropped(event.client, event.task, "fault: the answer was lost")
        if self._strikes("duplicate", event.task):
            self._copies.append(event)
        return _corrupted(event, self.seed) if self._strikes("corrupt", event.task) else event

    def reduce(self, total: Params) -> Params:
        """The inner fleet's."""
        return self.inner.reduce(total)

    def close(self) -> None:
        """The inner fleet's."""
        self.inner.close()

    def _strikes(self, fault: str, task: str) -> bool:
        rate: float = getattr(self, fault)
        return rate > 0 and bool(rng(self.seed, fault, task).random() < rate)


def faults(
    inner: Annotated[MakeFleet | None, Slot("fleet")] = None,
    drop: Rate = 0.0,
    lose: Rate = 0.0,
    corrupt: Rate = 0.0,
    duplicate: Rate = 0.0,
    delay: Rate = 0.0,
    delay_seconds: Seconds = 10.0,
    kill_at: str = "",
    seed: int = 0,
    scale: dict[str, float] | None = None,
) -> MakeFleet:
    """Any fleet, misbehaving: rates per task of each fault, and clients whose updates are scaled (see the module's text)."""
    make = inner or inprocess()

    def build(names: Sequence[str], client: Callable[[str], Client], rebuild: Rebuild, clock: float) -> Fleet:
        for name in (scale or {}).keys() - set(names):
            raise AtollError("no such client", where="fleet.scale", found=name, remedy=closest(name, names))
        fleet = make(names, client, rebuild, clock)
        return FaultFleet(fleet, drop, lose, corrupt, duplicate, delay, delay_seconds, kill_at, seed, scale or {})

    return build


def _scaled(reply: Reply, factor: float) -> Reply:
    """The update times a number; what is encoded in integers stays."""
    payloads = dict(reply.payloads)
    for stream, payload in reply.payloads.items():
        main = {name: x * factor if x.is_floating_point() else x for name, x in payload.main.items()}
        payloads[stream] = payload._replace(main=main)
    return replace(reply, payloads=payloads)


def _corrupted(reply: Reply, seed: int) -> Reply:
    """One value of one payload becomes infinite, or, where values are integers, loses its neighbors."""
    draw = rng(seed, "corrupted", reply.task)
    payloads = dict(reply.payloads)
    if not payloads:
        return reply
    stream = sorted(payloads)[draw.integers(len(payloads))]
    main = dict(payloads[stream].main)
    name = sorted(main)[draw.integers(len(main))]
    whole = main[name].flatten()
    main[name] = torch.full_like(whole, torch.inf) if whole.is_floating_point() else whole[: len(whole) // 2]
    payloads[stream] = payloads[stream]._replace(main=main)
    return replace(reply, payloads=payloads)
