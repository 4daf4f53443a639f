"""The processes fleet: simulated clients in a few worker processes on this machine, each with a warm model of its own.

For models so small that one core is busier than two: a batch of ten images does not fill two cores, two clients do. Time
is virtual as in `inprocess`, and answers come in the same order; workers only do what is due early, ahead of time. What
crosses between processes is what would cross a network: bytes, by messages.py. They are written once, to a file in memory
without a name; the pipe carries its descriptor alone, and tensors are read where they were written.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Annotated, Any

from annotated_types import Ge

from atoll import messages
from atoll.client import Client
from atoll.errors import AtollError
from atoll.exchange import Broadcast, Dropped, Event, Task
from atoll.fleet.base import Fleet
from atoll.fleet.inprocess import MakeFleet, Rebuild, Seconds, Speed, speeds, still_wanted
from atoll.params import Params
from atoll.wire import Buffer

MEMORY = "/dev/shm"
"""Where Linux has files in memory."""


@dataclass
class Worker:
    """A process, the pipe to it, the task it has, the last broadcast it heard, and whether it has what is fixed."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    task: Task | None = None
    round: int | None = None
    has_fixed: bool = False

    def give(self, task: Task) -> None:
        """Hands it a task, and the task's broadcast unless it is the one it heard last."""
        self.task = task
        with contextlib.suppress(ConnectionError):  # it has died: `take` finds out
            if task.broadcast.fixed and not self.has_fixed:
                send(self.pipe, messages.pack_fixed(task.broadcast.fixed))
                self.has_fixed = True
            if self.round != task.broadcast.round:
                send(self.pipe, messages.pack_broadcast(task.broadcast))
                self.round = task.broadcast.round
            send(self.pipe, messages.pack_task(task))

    def take(self) -> Event:
        """Its answer; a worker that died answers with a drop, and is of no more use."""
        assert self.task is not None
        task, self.task = self.task, None
        try:
            return messages.unpack_event(receive(self.pipe))
        except (EOFError, ConnectionError):
            self.process.join()
            return Dropped(task.client, task.id, f"its worker process ended with status {self.process.exitcode}")


@dataclass
class Processes:
    """See the module's text."""

    names: Sequence[str]
    speed: Speed
    clock: float
    workers: list[Worker]
    _due: dict[str, tuple[float, Task]] = field(default_factory=dict)
    _answers: dict[str, Event] = field(default_factory=dict)

    def clients(self) -> list[str]:
        """See `Fleet`."""
        return list(self.names)

    def lanes(self) -> int:
        """One a worker."""
        return len(self.workers)

    def now(self) -> float:
        """Virtual seconds since the start of the run."""
        return self.clock

    def submit(self, tasks: Sequence[Task]) -> None:
        """See `Fleet`. Idle workers begin at once with what is due first."""
        self._due = still_wanted(self._due, tasks) | {task.id: (task.sent + self.speed(task), task) for task in tasks}
        self._answers = {id: event for id, event in self._answers.items() if id in self._due}
        self._assign()

    def receive(self, tasks: Collection[str], until: float = math.inf) -> Event | None:
        """See `Fleet`. The answer that is due first, waited for if its worker is not done."""
        first = min((id for id in self._due if id in tasks), key=lambda id: self._due[id][0])
        if self._due[first][0] > until:
            self.clock = max(self.clock, until)
            return None
        while first not in self._answers:
            self._collect()
            self._assign()
        due, _ = self._due.pop(first)
        self.clock = max(self.clock, due)
        return self._answers.pop(first)

    def reduce(self, total: Params) -> Params:
        """One server hears everybody."""
        return total

    def close(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            worker.pipe.close()
            worker.process.join(timeout=10)
            worker.process.kill()

    def _assign(self) -> None:
        """Gives idle workers the tasks that are due first and that nobody has."""
        taken = {worker.task.id for worker in self.workers if worker.task} | self._answers.keys()
        waiting = sorted((due, i, task) for i, (due, task) in enumerate(self._due.values()) if task.id not in taken)
        for worker in (w for w in self.workers if w.task is None and w.process.is_alive()):
            if not waiting:
                return
            worker.give(waiting.pop(0)[2])

    def _collect(self) -> None:
        """Waits until some worker has answered, or has died."""
        busy = {worker.pipe: worker for worker in self.workers if worker.task}
        if not busy:
            raise AtollError(
                "all worker processes have ended", where="fleet", remedy="`atoll resume` goes on; see its output above"
            )
        for pipe in wait(list(busy)):
            worker = busy[pipe]  # type: ignore[index]
            assert worker.task is not None
            id = worker.task.id
            event = worker.take()
            if id in self._due:
                self._answers[id] = event


def processes(
    workers: Annotated[int, Ge(1)] | None = None,
    seconds: Mapping[str, Seconds] | None = None,
    default_seconds: Seconds = 1.0,
) -> MakeFleet:
    """Simulated clients in `workers` processes of this machine (one a core by default), each with its own model.

    Faster than `inprocess` for small models and memory to spare; `seconds` and `default_seconds` are as there.
    """
    count = workers or os.cpu_count() or 1

    def make(names: Sequence[str], client: Callable[[str], Client], rebuild: Rebuild, clock: float) -> Fleet:
        return Processes(
            names, speeds(seconds or {}, default_seconds), clock, [start(rebuild, count) for _ in range(count)]
        )

    return make


def start(rebuild: Rebuild, count: int) -> Worker:
    """A new worker process; `count` of them share the cores."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(rebuild, theirs, max(1, (os.cpu_count() or 1) // count)), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def serve(rebuild: Rebuild, pipe: Connection, threads: int) -> None:
    """A worker's life: rebuild the clients, then a task at a time until the other end is gone."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    client = rebuild()
    broadcast: Broadcast | None = None
    fixed: Mapping[str, Params] = {}
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            data = receive(pipe)
            if (kind := messages.kind_of(data)) == "fixed":
                fixed = messages.unpack_fixed(data)
                continue
            if kind == "broadcast":
                broadcast = messages.unpack_broadcast(data, fixed)
                continue
            assert broadcast is not None
            task = messages.unpack_task(data, broadcast)
            send(pipe, messages.pack_event(client(task.client).handle(task)))


def send(pipe: Connection, message: Sequence[Buffer]) -> None:
    """Writes a message to a file, in memory where the system has room for such files, and passes its descriptor on."""
    size = sum(map(len, message))
    roomy = os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 2 * size  # a container has 64 MB
    with tempfile.TemporaryFile(dir=MEMORY if roomy else None) as file:
        file.writelines(message)
        file.flush()
        send_handle(pipe, file.fileno(), None)


def receive(pipe: Connection) -> memoryview:
    """The next message, in memory of its own that goes when the last tensor of it does. Raises EOFError at the end."""
    descriptor = recv_handle(pipe)
    try:
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    finally:
        os.close(descriptor)


def end_with(parent: Any) -> None:
    """Ends this process as soon as `parent` has ended, however: a resumed run must not meet workers of the one before."""
    wait([parent.sentinel])
    os._exit(1)
