"""The in-process fleet: simulated clients in one process, one after the other, on one warm model. Nothing to set up.

Time is virtual: a client's answer comes when its speed says so, answers come in the order of their virtual times, and the
work itself is done when its answer is due. So asynchronous schedules run as they would on unequal machines, and the same
run gives the same result every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge

from atoll.client import Client
from atoll.exchange import Event, Task
from atoll.fleet.base import Fleet
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
    _due: dict[str, tuple[float, Task]] = field(default_factory=dict)

    def clients(self) -> list[str]:
        """See `Fleet`."""
        return list(self.names)

    def lanes(self) -> int:
        """One after the other."""
        return 1

    def now(self) -> float:
        """Virtual seconds since the start of the run."""
        return self.clock

    def submit(self, tasks: Sequence[Task]) -> None:
        """See `Fleet`. A task is due at the time it was sent plus what the client needs."""
        self._due = still_wanted(self._due, tasks) | {task.id: (task.sent + self.speed(task), task) for task in tasks}

    def receive(self, tasks: Collection[str], until: float = math.inf) -> Event | None:
        """See `Fleet`. Does the work of the task that is due first; of several, the one sent first."""
        first = min((id for id in self._due if id in tasks), key=lambda id: self._due[id][0])
        if self._due[first][0] > until:
            self.clock = max(self.clock, until)
            return None
        due, task = self._due.pop(first)
        self.clock = max(self.clock, due)
        return self.client(task.client).handle(task)

    def reduce(self, total: Params) -> Params:
        """One server hears everybody."""
        return total

    def close(self) -> None:
        """Holds nothing."""


Due = dict[str, tuple[float, Task]]
"""By a task's id: when its answer is due, and the task."""


def still_wanted(due: Due, new: Sequence[Task]) -> Due:
    """Without the tasks whose clients are given others of their kind."""
    again = {(task.kind, task.client) for task in new}
    return {id: (at, task) for id, (at, task) in due.items() if (task.kind, task.client) not in again}


class Rebuild(Protocol):
    """Makes the maker of clients anew, from the plan: for fleets whose clients live elsewhere. Picklable."""

    @property
    def tree(self) -> Mapping[str, Any]:
        """The plan as the recipe says it."""
        ...

    @property
    def plan(self) -> str:
        """Its hash."""
        ...

    @property
    def run(self) -> str:
        """Names the run, or the baseline, among all there are."""
        ...

    def __call__(self) -> Callable[[str], Client]:
        """What `client` is in this process."""
        ...


class MakeFleet(Protocol):
    """What a recipe's `fleet` is: makes the fleet of a run from its clients."""

    def __call__(self, names: Sequence[str], client: Callable[[str], Client], rebuild: Rebuild, clock: float) -> Fleet:
        """`clock` is where virtual time goes on, for a run that is resumed."""
        ...


@dataclass(frozen=True)
class Prepared:
    """Clients on machines of their own, and what they ask for."""

    clients: Mapping[str, Any]
    """What a plan may know of each one's data, or why it will not take part."""
    least: int = 1
    """The fewest updates that may be put together."""


@runtime_checkable
class Elsewhere(Protocol):
    """What a recipe's `fleet` is beside that, where clients have machines and data of their own."""

    def prepare(self, plan: str, tree: Mapping[str, Any], model: str, answers: Callable[[int], float]) -> Prepared:
        """Has them get ready for a plan on the base model of this content, where of so many that many answer a round."""
        ...


Seconds = Annotated[float, Ge(0)]


def inprocess(seconds: Mapping[str, Seconds] | None = None, default_seconds: Seconds = 1.0) -> MakeFleet:
    """Simulated clients in this process. `seconds` are speed profiles: virtual seconds a training task, by client."""
    return lambda names, client, rebuild, clock: InProcess(names, client, speeds(seconds or {}, default_seconds), clock)


def speeds(seconds: Mapping[str, float], default_seconds: float) -> Speed:
    """Virtual seconds of a task: the client's own, or the default, for training; none for anything else."""
    return lambda task: seconds.get(task.client, default_seconds) if task.kind == "train" else 0.0
