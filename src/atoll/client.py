"""A client: task -> work -> payload. The same code in a simulation and behind a hospital's wall.

What persists between rounds (error-feedback residuals, SCAFFOLD's control variates) is client state, kept in two versions:
the committed one, and the pending one that the last task made. The server acknowledges in its next task which reply it has
taken in for good; only then does pending become committed. So a server that dies and starts again from its checkpoint
finds the clients where it left them: no residual is applied twice, none is lost.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from atoll.aggregate.base import ALL, Weights
from atoll.cache import replace_tensors
from atoll.data.media import Unusable
from atoll.exchange import NOT_THE_TASKS_FAULT, Done, Reply, Task, WorkFailed
from atoll.keys import key
from atoll.params import Params, nested, under
from atoll.stream import Stream
from atoll.transforms.chain import Payload

Work = Callable[[Mapping[str, Params], Any, Params, Task], Done]
"""(params per stream, the client's data, its state, the task) -> Done. Pure but for the model it trains in."""


class StateLost(WorkFailed):
    """The state that the server counts on is gone: the server forgets it, and the client starts anew in a later round."""


class Store(Protocol):
    """Keeps a client's state in two versions."""

    def settle(self, acknowledged: str | None) -> Params:
        """Commits the pending version if it is the acknowledged one, drops it otherwise; gives the committed state.

        None says that the server counts on nothing: the state is empty. Raises StateLost for a version that is not here.
        """
        ...

    def pend(self, task: str, state: Params) -> None:
        """Keeps the state that `task` made, until it is acknowledged or not."""
        ...


@dataclass
class MemoryStore:
    """Client state in memory."""

    committed: tuple[str | None, Params] = (None, {})
    pending: tuple[str | None, Params] = (None, {})

    def settle(self, acknowledged: str | None) -> Params:
        """See `Store`."""
        if acknowledged is None:
            self.committed = (None, {})
        elif acknowledged == self.pending[0]:
            self.committed = self.pending
        if acknowledged != self.committed[0]:
            raise StateLost(f"client state is lost: the server counts on {acknowledged}, here is {self.committed[0]}")
        self.pending = (None, {})
        return self.committed[1]

    def pend(self, task: str, state: Params) -> None:
        """See `Store`."""
        self.pending = (task, state)


@dataclass
class FileStore:
    """Client state in one safetensors file, replaced atomically: both versions change together or not at all.

    `settle` writes nothing: until the next `pend` the file decides the same way again.
    """

    path: Path
    versions: MemoryStore = field(default_factory=MemoryStore)

    def settle(self, acknowledged: str | None) -> Params:
        """See `Store`."""
        self.versions = self._read()
        return self.versions.settle(acknowledged)

    def pend(self, task: str, state: Params) -> None:
        """See `Store`."""
        self.versions.pend(task, state)
        flat = nested("committed", self.versions.committed[1]) | nested("pending", state)
        tasks = json.dumps({"committed": self.versions.committed[0], "pending": task})
        replace_tensors(self.path, flat, {"tasks": tasks})

    def _read(self) -> MemoryStore:
        if not self.path.exists():
            return MemoryStore()
        try:
            with safe_open(self.path, framework="pt") as file:
                flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
                tasks = json.loads(file.metadata()["tasks"])
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            self.path.replace(self.path.with_suffix(".damaged"))
            raise StateLost(f"client state is damaged and set aside: {error}") from error
        return MemoryStore(*((tasks[at], under(at, flat)) for at in ("committed", "pending")))


class Side(Protocol):
    """A client's side of an exchange of several phases: it keeps what the work came to, and answers the later phases."""

    @property
    def phases(self) -> Collection[str]:
        """The kinds of tasks that it answers."""
        ...

    @property
    def metrics(self) -> Collection[str]:
        """Of the work, that leave."""
        ...

    def keep(
        self,
        task: Task,
        streams: Sequence[Stream],
        received: Mapping[str, Params],
        payloads: Mapping[str, Payload],
        weights: Weights,
    ) -> dict[str, Any]:
        """Keeps the encoded updates of these streams; gives what leaves in their place. `received` is the broadcast."""
        ...

    def answer(self, task: Task) -> dict[str, Any]:
        """The fields of the reply to a later phase. Raises WorkFailed for what is not answered."""
        ...


@dataclass
class Client:
    """One client: its data, its works by kind of task, and the state it keeps.

    The model that works train in may be shared by many simulated clients: whatever a work needs of it, it writes first.
    """

    name: str
    plan: str
    streams: Sequence[Stream]
    works: Mapping[str, Work]
    data: Any
    store: Store = field(default_factory=MemoryStore)
    side: Side | None = None
    """None: the encoded update is the reply."""
    evaluated: Sequence[Stream] = ()
    """What comes of an evaluation, where that is more than metrics."""
    outward: Callable[[str], str] = lambda reason: reason
    """What the server hears of an error that nobody foresaw: its text may quote data."""

    def handle(self, task: Task) -> Reply:
        """Does the task. Whatever the client cannot do comes back as a reply with a refusal, never as an exception."""
        started = time.perf_counter()
        reply = partial(Reply, task.id, self.name, self.plan, task.broadcast.round)
        try:
            about = self._answer(task)
        except WorkFailed as error:
            about = {"refusal": str(error), "lost_state": isinstance(error, StateLost)}
        except Unusable as error:  # in words that name no path
            about = {"refusal": str(error)}
        except NOT_THE_TASKS_FAULT:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" + "".join(traceback.format_tb(error.__traceback__)[-1:])
            about = {"refusal": self.outward(reason)}
        return reply(**about, seconds=time.perf_counter() - started)

    def _answer(self, task: Task) -> dict[str, Any]:
        """The fields of the reply."""
        if task.plan == self.plan and self.side and task.kind in self.side.phases:
            return self.side.answer(task)
        if task.plan != self.plan or task.kind not in self.works:
            raise WorkFailed(f"no work of kind '{task.kind}' for plan {task.plan} here")
        sent = task.broadcast
        params = {**sent.fixed, **{s.name: s.down.decode(sent.payloads[s.name]) for s in self.streams}}
        streams = self.evaluated if task.kind == "evaluate" else self.streams
        payloads, done = self._work(task, streams, params)
        about = {"metrics": done.metrics, "keeps_state": bool(done.state)}
        if self.side is None:
            return about | {"payloads": payloads, "weights": self._asked(done)}
        about["metrics"] = {name: value for name, value in done.metrics.items() if name in self.side.metrics}
        return about | {"data": self.side.keep(task, streams, params, payloads, done.weights) if payloads else {}}

    def _asked(self, done: Done) -> Weights:
        """The weights that the plan's aggregators ask for."""
        updates = ((stream, done.updates.get(stream.name)) for stream in self.streams)
        groups = {ALL}.union(*(stream.aggregate.groups(update) for stream, update in updates if update is not None))
        return {name: weight for name, weight in done.weights.items() if name in groups}

    def _work(
        self, task: Task, streams: Sequence[Stream], params: Mapping[str, Params]
    ) -> tuple[dict[str, Payload], Done]:
        kept = self.store.settle(task.acknowledged)
        done = self.works[task.kind](params, self.data, under("work", kept), task)
        payloads: dict[str, Payload] = {}
        state = nested("work", done.state)
        for stream in streams:
            before = under(stream.name, kept)
            if (update := done.updates.get(stream.name)) is not None:
                encoder = before or stream.up.init(update)
                before, payloads[stream.name] = stream.up.encode(encoder, update, key(task.key, stream.name))
            state |= nested(stream.name, before)
        if state and payloads:
            self.store.pend(task.id, state)
        return payloads, done._replace(state=state if payloads else {})
