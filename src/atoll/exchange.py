"""The conversation of one round, written without I/O.

An exchange is a generator. It yields what it wants done and never does it:

    Send(tasks)       hand these to the clients
    Wait(tasks, until) -> Heard: the next Reply or Dropped for one of these, or nothing, and the time
    Accepted(...)     a reply counts: add its contributions to the totals
    Refused(...)      a reply does not count, and why
    Dropped(...)      a client will not answer
    Opened(...)       what hid the contributions is known: add what takes it off the totals
    Abandoned(...)    the round comes to nothing: what was added is not applied

A plain round is one Send and many Waits. Secure aggregation is several of those, one after the other. Both are driven by
`converse` in round.py, in a simulation and over a network alike. (After httpx's auth_flow.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from atoll import wire
from atoll.aggregate.base import Weights
from atoll.errors import AtollError
from atoll.params import Params
from atoll.transforms.chain import Payload


@dataclass(frozen=True)
class Broadcast:
    """What the server sends at the start of a round: a payload per stream, the same for the whole cohort."""

    round: int
    payloads: Mapping[str, Payload]
    fixed: Mapping[str, Params] = field(default_factory=dict)
    """By name: what work needs beside the streams and is the same in every round. A client that has it is not sent it."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes on the wire for one client that has what is fixed."""
        return sum(wire.size(payload) for payload in self.payloads.values())

    @cached_property
    def fixed_nbytes(self) -> int:
        """Bytes on the wire of what is fixed."""
        return sum(wire.size(Payload(params)) for params in self.fixed.values())


@dataclass(frozen=True)
class Task:
    """What a client is asked to do, as plain data. The client rebuilds the work from the plan."""

    kind: str
    client: str
    plan: str
    """Hash of the plan that both ends must have."""
    broadcast: Broadcast
    """The base version: the params that the work starts from."""
    key: int
    sent: float = 0.0
    """When it was sent, on the fleet's clock."""
    acknowledged: str | None = None
    """The client's last task whose reply the server has taken in for good; see client.py."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What a phase of an exchange needs beside the params: public keys, lists of survivors."""
    variant: str = ""
    """Tells tasks of one kind, round and client apart: evaluations by their samples, attempts at a round by a name."""

    @property
    def id(self) -> str:
        """Names the task within its run."""
        return ":".join(filter(None, (self.kind, str(self.broadcast.round), self.client, self.variant)))


@dataclass(frozen=True)
class Reply:
    """What a client answers."""

    task: str
    client: str
    plan: str
    round: int
    """The round of the broadcast that the work started from."""
    payloads: Mapping[str, Payload] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""
    """Why the client did not do the task; empty if it did."""
    lost_state: bool = False
    """The reason of a refusal: the state that the server counts on is not here."""
    keeps_state: bool = False
    """Whether the client made a new version of its state, which it commits when the server acknowledges this task."""
    seconds: float = 0.0
    """How long the work took, on the client's own clock."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return sum(wire.size(payload) for payload in self.payloads.values())


class Done(NamedTuple):
    """What a client's work comes to."""

    updates: Mapping[str, Params]
    weights: Weights
    metrics: Mapping[str, float]
    state: Params


NOT_THE_TASKS_FAULT = (AtollError, OSError, MemoryError)
"""A full disk or too little memory: a message for whoever runs this client, not a reason to go on without it."""


class WorkFailed(Exception):
    """A client cannot do its task: the reason goes to the server as a refusal."""


@dataclass(frozen=True)
class Contribution:
    """What one reply adds to the total of one stream."""

    vector: Params
    weights: Weights


@dataclass(frozen=True)
class Send:
    """Hand these tasks to their clients."""

    tasks: Sequence[Task]


@dataclass(frozen=True)
class Wait:
    """Wait for the next answer to one of these tasks (by id)."""

    tasks: frozenset[str]
    until: float = math.inf
    """On the fleet's clock: the wait is over then, with nothing heard."""


@dataclass(frozen=True)
class Accepted:
    """A reply counts."""

    reply: Reply
    contributions: Mapping[str, Contribution]
    staleness: int = 0


@dataclass(frozen=True)
class Refused:
    """A reply does not count."""

    client: str
    task: str
    reason: str
    nbytes: int = 0
    """What it took on the wire all the same."""
    lost_state: bool = False
    """Whether the client says that the state which the server counts on is gone."""


@dataclass(frozen=True)
class Dropped:
    """A client will not answer this task."""

    client: str
    task: str
    reason: str = "no answer"


@dataclass(frozen=True)
class Opened:
    """What hid the contributions is known now: taking it off the totals makes them readable."""

    contributions: Mapping[str, Contribution]
    clients: int
    """Whose sum it is."""
    lost: int
    """Clients that had agreed on masks and whose updates are not in the sum."""
    bytes_up: int
    bytes_down: int
    """Of all phases beside the params and the updates, on the wire."""


@dataclass(frozen=True)
class Abandoned:
    """The round comes to nothing: its totals are thrown away, and no client's state is acknowledged.

    For exchanges of several phases: masks that nobody can take off any more must not be applied.
    """

    reason: str


class Heard(NamedTuple):
    """What a wait came to: an answer, or None when its time was up; and the fleet's time."""

    event: Reply | Dropped | None
    now: float


Verdict = Accepted | Refused | Dropped | Opened | Abandoned
Event = Reply | Dropped
Exchange = Generator[Send | Wait | Verdict, Heard | None, None]
Receive = Callable[[Reply], Accepted | Refused]
Closes = Callable[[Sequence[float]], float]
"""(when each accepted reply came) -> until when the round waits; a time that has passed: no longer. On the fleet's clock."""


DECODING_ERRORS = (ValueError, RuntimeError, TypeError, LookupError, OverflowError, AttributeError)
"""What our checks, transforms and torch raise on replies that no client of ours makes."""


class MakeExchange(Protocol):
    """What a plan holds: makes the round's exchange from its tasks."""

    def __call__(self, tasks: Sequence[Task], in_flight: Sequence[Task], receive: Receive, closes: Closes) -> Exchange:
        """`in_flight` are tasks of earlier rounds that may still be answered."""
        ...


def check_sender(task: Task, reply: Reply) -> None:
    """Raises ValueError for a refusal, and for a reply that is not the asked client's or does not fit its metrics' type."""
    if reply.refusal:
        raise ValueError(reply.refusal)
    if (reply.client, reply.plan) != (task.client, task.plan):
        raise ValueError(f"from {reply.client} for plan {reply.plan}; {task.client} was asked, for plan {task.plan}")
    for name, value in reply.metrics.items():
        if not isinstance(value, int | float):
            raise ValueError(f"the metric '{name}' is {value!r}, not a number")
        float(value)  # an integer may be too large for one


def plain(tasks: Sequence[Task], in_flight: Sequence[Task], receive: Receive, closes: Closes) -> Exchange:
    """One phase: send the tasks, take the replies as they come, stop when the closing rule says so."""
    yield Send(tasks)
    out = {task.id for task in (*in_flight, *tasks)}
    came: list[float] = []
    now = -math.inf
    while out and now < (until := closes(came)):
        heard = yield Wait(frozenset(out), until)
        assert heard is not None
        event, now = heard
        if event is None:
            continue  # the time is up
        if event.task not in out:
            yield Refused(event.client, event.task, "not expected: answered before, or never asked")
            continue
        out.discard(event.task)
        verdict = receive(event) if isinstance(event, Reply) else event
        if isinstance(verdict, Accepted):
            came.append(now)
        yield verdict
