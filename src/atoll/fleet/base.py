"""A fleet: where clients run, and how tasks get there. All I/O of a round is behind these seven functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Protocol

from atoll.exchange import Event, Task
from atoll.params import Params


class Fleet(Protocol):
    """Where clients run."""

    def clients(self) -> list[str]:
        """Who may be asked now, in a fixed order."""
        ...

    def lanes(self) -> int:
        """How many clients work side by side: the round takes what the busiest lane takes."""
        ...

    def now(self) -> float:
        """The fleet's clock in seconds: the time of day over a network, virtual in a simulation."""
        ...

    def submit(self, tasks: Sequence[Task]) -> None:
        """Hands tasks to their clients; does not wait."""
        ...

    def receive(self, tasks: Collection[str], until: float = math.inf) -> Event | None:
        """Waits for the next answer to one of `tasks` (ids), or word that none will come. Answers to others keep.

        None if the clock is at `until` before there is one. A task is forgotten once its client has another of its kind.
        """
        ...

    def reduce(self, total: Params) -> Params:
        """Sums a total over all processes that drive this run: itself where one server hears everybody."""
        ...

    def close(self) -> None:
        """Lets go of whatever it holds. Tasks that are out stay unanswered."""
        ...
