"""The in-process fleet: simulated clients in one process, one after the other, on one warm model. Nothing to set up.

Time is virtual: a client's answer comes when its speed says so, answers come in the order of their virtual times, and the
work itself is done when its answer is due. So asynchronous schedules run as they would on unequal machines, and the same
run gives the same result every time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from atoll.client import Client
from atoll.exchange import Event, Task
from atoll.params import Params

Speed = Callable[[Task], float]
"""How long a task takes, in virtual seconds."""


@dataclass
class InProcess:
    """Simulated clients by name; `client` makes one when it is asked, so that a thousand cost no more than ten."""

    names: Sequence[str]
    client: Callable[[str], Client]
    speed: Speed = lambda task: 1.0
    clock: float = 0.0
    _due: list[tuple[float, int, Task]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)

    def clients(self) -> list[str]:
        """See `Fleet`."""
        return list(self.names)

    def now(self) -> float:
        """Virtual seconds since the start of the run."""
        return self.clock

    def submit(self, tasks: Sequence[Task]) -> None:
        """See `Fleet`. A task is due at the time it was sent plus what the client needs."""
        for task in tasks:
            heapq.heappush(self._due, (task.sent + self.speed(task), next(self._order), task))

    def receive(self) -> Event:
        """See `Fleet`. Does the work of the task that is due first."""
        due, _, task = heapq.heappop(self._due)
        self.clock = max(self.clock, due)
        return self.client(task.client).handle(task)

    def reduce(self, total: Params) -> Params:
        """One server hears everybody."""
        return total

    def close(self) -> None:
        """Holds nothing."""


def profiles(seconds: dict[str, float], default: float = 1.0) -> Speed:
    """Speeds by client name: virtual seconds a task, `default` for those not named."""
    return lambda task: seconds.get(task.client, default)
