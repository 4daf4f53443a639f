"""The record of a run: one typed event a line of JSON. Of a run the card, the plots and every listing read nothing else.

An event is written when it has happened and is flushed at once. A resumed run cuts the record back to where its checkpoint
was made, so that what a lost round had written is not told twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atoll.errors import AtollError


@dataclass(frozen=True)
class RunStarted:
    """What is going to happen. `trains` and `of` count parameters."""

    name: str
    plan: str
    rounds: int
    clients: Sequence[str]
    samples: Mapping[str, int]
    trains: int
    of: int
    seed: int
    baselines: Sequence[str] = ()
    """Names of the runs inside this one that it is measured against."""
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    held_out: Mapping[str, int] = field(default_factory=dict)
    """Held-out samples of each client; `samples` are those to train on."""
    privacy: Mapping[str, Any] = field(default_factory=dict)
    """What the server sees, and what is promised; see statement.py."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """What decides the result, with all defaults: model, data, finetune, evaluate; and the method's reference."""
    data: Mapping[str, str] = field(default_factory=dict)
    """What each client holds, by content."""


@dataclass(frozen=True)
class ClientLeftOut:
    """A client without usable data."""

    client: str
    report: str


@dataclass(frozen=True)
class RecordsLeftOut:
    """What became of the records of a client that goes on without some: reason -> (how many, the first one's place).

    Simulated clients that share one source share the event: `client` is then `EVERYBODY`.
    """

    client: str
    read: int
    kept: int
    reasons: Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class Replied:
    """A reply that counts."""

    round: int
    client: str
    loss: float
    bytes_up: int
    seconds: float
    staleness: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Missing:
    """A reply that was refused, or that will not come."""

    round: int
    client: str
    reason: str
    refused: bool


@dataclass(frozen=True)
class Spent:
    """A round's release was entered in the ledger, before it: the run's epsilon from then on, at its delta."""

    round: int
    epsilon: float
    delta: float


@dataclass(frozen=True)
class SumOpened:
    """A masked sum was opened: of how many clients, how many were lost on the way, and the bytes of the masks' phases."""

    round: int
    clients: int
    lost: int
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class RoundEnded:
    """A round's sum. `spans` tells where its seconds went; `clock` is the fleet's time."""

    round: int
    accepted: int
    refused: int
    dropped: int
    loss: float
    bytes_down: int
    bytes_up: int
    seconds: float
    clock: float
    spans: Mapping[str, float]


@dataclass(frozen=True)
class Evaluated:
    """Held-out loss after `round` rounds (0: before the first), per client: loss, standard_error, samples.

    `absent` clients were asked too, and told nothing: why.
    """

    round: int
    final: bool
    clients: Mapping[str, Mapping[str, float]]
    mean: float
    worst: float
    seconds: float
    bytes_down: int = 0
    absent: Mapping[str, str] = field(default_factory=dict)
    bytes_fixed: int = 0
    """Sent on this occasion, and for training as well: what the run began with, to clients that did not have it."""


@dataclass(frozen=True)
class RunEnded:
    """`reason`: finished, or why it ended early."""

    rounds: int
    reason: str
    seconds: float


EVERYBODY = "everybody"
"""Stands for all clients of a run."""

Event = (
    RunStarted
    | ClientLeftOut
    | RecordsLeftOut
    | Replied
    | Missing
    | Spent
    | SumOpened
    | RoundEnded
    | Evaluated
    | RunEnded
)
Sink = Callable[[Event], None]
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in Event.__args__}


class Record:
    """Writes events to `path` and hands them to sinks."""

    def __init__(self, path: Path, sinks: Sequence[Sink] = (), keep_bytes: int = 0) -> None:
        self.path, self.sinks = path, tuple(sinks)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(min(keep_bytes, file.tell()))  # a power cut may have taken the end of it

    @property
    def position(self) -> int:
        """Bytes written so far, and on disk; a checkpoint keeps it."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def __call__(self, event: Event) -> None:
        """Writes an event."""
        line = {"event": type(event).__name__, "time": round(time.time(), 3), **_without_nan(asdict(event))}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for sink in self.sinks:
            sink(event)


def read_events(path: Path) -> Iterator[Event]:
    """The events of a record, in order. A last line that was cut off by a crash is passed over.

    Raises:
        AtollError: a line before the last is damaged, or no event that this version knows.
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            event = _event(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            if not any(lines[number:]):
                return
            raise AtollError(
                "a line of the record is damaged", where=f"{path}:{number}", found=line[:80].decode(errors="replace"),
                allowed="an event as JSON, as this version of atoll writes it",
                remedy="put the file back from a copy, or run again",
            ) from None  # fmt: skip
        yield event


def _event(line: bytes) -> Event:
    data = json.loads(line)
    kind = _KINDS[data.pop("event")]
    data.pop("time")
    event: Event = kind(**(data if kind is RunStarted else _with_nan(data)))  # a recipe may say null
    return event


def _with_nan(value: Any) -> Any:
    """Back from `_without_nan`."""
    if isinstance(value, dict):
        return {name: _with_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    """JSON has no numbers that are not finite: they are written as null, and read as not a number."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
