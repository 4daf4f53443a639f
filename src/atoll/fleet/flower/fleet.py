"""The Flower fleet: tasks go to sites as messages, replies come back in whatever order.

Flower delivers a message at most once, and tells nobody of one that was lost on the way. So a site that has not answered
for a while is asked about its task: it answers with the reply (which it keeps), says that it is still at work, or does not
know the task, which is then sent again. However often a task or a reply travels, it counts once: by its id.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from atoll import messages
from atoll.data.sources import ClientData
from atoll.errors import AtollError
from atoll.exchange import Broadcast, Dropped, Event, Reply, Task
from atoll.fleet.flower.federation import Federation, counted, federation, invitation, without_too_few
from atoll.fleet.flower.talk import envelope, opened
from atoll.fleet.inprocess import Rebuild
from atoll.params import Params

if TYPE_CHECKING:
    from atoll.fleet.flower.link import Part, Received
    from atoll.fleet.flower.operator import Failed

LISTEN = 1.0
"""Seconds of waiting for an answer, after which other things are looked at."""

POLL = 0.2
"""Seconds between two looks for sites that are gone."""

ASK = 20.0
"""Seconds after which a site that has not answered is asked about its task."""

LARGEST_REPLY = 16
"""How many times the broadcast's bytes a message may have: a broadcast may be in four bits, and replies in 32."""

FAREWELL = 2.0
"""Seconds for sites to hear that nobody waits for their work any more."""

NOTHING = ClientData((), ())

RETURN = 20.0
"""Seconds in which a site that Flower takes for gone may come back and be sent its task again."""


def said_by(answer: Received | Failed) -> dict[str, Any] | str:
    """The envelope of an answer, or why there is none."""
    from atoll.fleet.flower.link import Received

    try:
        return opened(answer.parts) if isinstance(answer, Received) else answer.reason
    except ValueError as error:
        return str(error)


def refusal_of(task: Task, reason: str) -> Reply:
    """A task that comes to nothing, and why."""
    return Reply(task.id, task.client, task.plan, task.broadcast.round, refusal=reason)


def answer_to(task: Task, event: Event) -> Event:
    """An event that a site sent about a task. Raises ValueError for one that speaks of another, or in another's name."""
    if (event.task, event.client) != (task.id, task.client):
        raise ValueError(f"it speaks of {event.task} in the name of {event.client}")
    return event


@dataclass
class Flower:
    """See the module's text."""

    federation: Federation
    names: list[str]
    """Sites that are ready for the plan."""
    run: str
    """Names the run to sites: they keep a client's state for each."""
    tree: Mapping[str, Any]
    """The plan, for sites that start anew."""
    ordered: bool = False
    """Whether answers are handed out in the order in which tasks were sent."""
    _out: dict[str, Task] = field(default_factory=dict)
    """Messages that are not answered, by name, and the tasks they are about."""
    _ask_at: dict[str, float] = field(default_factory=dict)
    """When to ask about a task that is not answered, by its id."""
    _order: dict[str, None] = field(default_factory=dict)
    """Ids of the tasks below, in the order in which they were sent."""
    _gone: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Tasks whose site Flower takes for gone, by id: until when it may come back, and what Flower said."""
    _tasks: dict[str, Task] = field(default_factory=dict)
    """Tasks whose answer nobody has had yet, by id."""
    _answers: dict[str, Event] = field(default_factory=dict)
    """By the id of the task."""
    _prepared_again: set[str] = field(default_factory=set)
    """Ids of tasks for which a site was sent the plan once more."""
    _invited: dict[str, str] = field(default_factory=dict)
    """Sites that came after the plan was made, and the message that asked them to get ready for it."""
    _last: tuple[Broadcast, Part] | None = None
    _times: int = 0
    """Of the connection that `_out` was sent over."""

    def clients(self) -> list[str]:
        """Those who are there now. Sites that have come since are asked to get ready, and are among them once they are."""
        there = self.federation.sites()
        known = {*self.names, *self._invited, *self.federation.unwilling}
        self._invite({name: node for name, node in there.items() if name not in known})
        self._hear(0.0)
        return [name for name in self.names if name in there]

    def _invite(self, newcomers: Mapping[str, int]) -> None:
        from atoll.fleet.flower.link import NotTaken, part

        for name, node in newcomers.items():
            with suppress(NotTaken):
                plan = invitation(self.tree, name, [*self.names, name])
                self._invited[name] = self.federation.operator.send(node, [part(plan)])

    def _welcome(self, name: str, said: dict[str, Any] | str) -> None:
        """What a newcomer answered: it takes part from the next round on, or not at all."""
        answer = without_too_few({**dict.fromkeys(self.names, NOTHING), name: counted(said)}, {name: said})[name]
        if isinstance(answer, str):
            self.federation.say(f"{name} does not take part: {answer}")
        else:
            self.names.append(name)
            self.federation.say(f"{name} takes part from now on")

    def lanes(self) -> int:
        """Every site has its own."""
        return len(self.names)

    def now(self) -> float:
        """The time of day."""
        return time.time()

    def submit(self, tasks: Sequence[Task]) -> None:
        """See `Fleet`. A site that has left in the meantime drops out."""
        self._forget({(task.kind, task.client) for task in tasks})
        for task in tasks:
            self._tasks[task.id] = task
            self._order[task.id] = None
        self._times = self._times or self.federation.times
        self._send_all(tasks)

    def _send_all(self, tasks: Sequence[Task]) -> None:
        """Tasks with their broadcast. If the connection is lost meanwhile, `_hear` sends them over the next one."""
        there = self.federation.sites()
        for task in tasks:
            if self._times != self.federation.times:
                return
            self._send(task, there.get(task.client), full=True)

    def _forget(self, again: set[tuple[str, str]]) -> None:
        """Tasks whose clients are given others of their kind; what still comes of them is not read."""
        gone = {id for id, task in self._tasks.items() if (task.kind, task.client) in again}
        self._out = {name: task for name, task in self._out.items() if task.id not in gone}
        kept: dict[str, Any]
        for kept in (self._tasks, self._order, self._ask_at, self._answers, self._gone):
            for id in gone & kept.keys():
                kept.pop(id)

    def receive(self, tasks: Collection[str], until: float = math.inf) -> Event | None:
        """See `Fleet`."""
        while True:
            wanted = [id for id in self._order if id in tasks]
            for id in wanted[:1] if self.ordered else wanted:
                if id in self._answers:
                    del self._order[id], self._tasks[id]
                    return self._answers.pop(id)
            if time.time() >= until:
                return None
            self._hear(max(0.0, min(LISTEN, until - time.time())))
            self._await_return()
            self._ask()

    def reduce(self, total: Params) -> Params:
        """One server hears everybody."""
        return total

    def close(self) -> None:
        """Tells sites that are still at work that nobody waits for it. Other stages may go on with the connection."""
        from atoll.fleet.flower.calls import Gone

        at_work = {self._tasks[id].client for id in self._tasks.keys() - self._answers.keys()}
        with suppress(Gone, AtollError):
            self.federation.ask({name: envelope("cancel", run=self.run) for name in at_work}, wait=FAREWELL)

    def _send(self, task: Task, node: int | None, full: bool) -> None:
        """A task with its broadcast, or the question what became of it."""
        from atoll.fleet.flower.calls import Gone
        from atoll.fleet.flower.link import NotTaken, part

        if node is None:
            self._gone[task.id] = (time.monotonic() + RETURN, "the site is not there")
            return
        if full:
            head = envelope("task", run=self.run, plan=task.plan)
            parts = [part(head), self._broadcast(task.broadcast), part(messages.pack_task(task))]
        else:
            parts = [part(envelope("ask", run=self.run, task=task.id))]
        try:
            self._out[self.federation.operator.send(node, parts)] = task
            self._ask_at[task.id] = time.monotonic() + ASK
        except NotTaken as error:
            self._settle(task, Dropped(task.client, task.id, str(error)))
        except Gone as error:
            self.federation.reconnect(str(error))  # `_hear` sends again whatever is not answered

    def _settle(self, task: Task, event: Event) -> None:
        """A task is answered; whatever else is out about it does not matter any more."""
        self._answers[task.id] = event
        self._ask_at.pop(task.id, None)
        self._out = {name: other for name, other in self._out.items() if other.id != task.id}

    def _broadcast(self, broadcast: Broadcast) -> Part:
        """Cut and named once for all who get it."""
        from atoll.fleet.flower.link import part

        if self._last is None or self._last[0] is not broadcast:
            self._last = (broadcast, part(messages.pack_broadcast(broadcast)))
            self.federation.limit(LARGEST_REPLY * self._last[1].size + (64 << 20))
        return self._last[1]

    def _hear(self, wait: float) -> None:
        """Takes in what comes in so many seconds. After a connection was lost, whatever is not answered is sent again."""
        from atoll.fleet.flower.calls import Gone
        from atoll.fleet.flower.operator import Failed

        if self._times != self.federation.times:
            self._times = self.federation.times
            self._out.clear()
            self._gone.clear()
            self._invited = {name: "" for name in self._invited if name in self.names}
            self._send_all([task for id, task in self._tasks.items() if id not in self._answers])
        invited = {message: name for name, message in self._invited.items() if message}
        if not (self._out or invited):
            time.sleep(min(wait, POLL))
            return
        try:
            heard = list(self.federation.operator.answers([*self._out, *invited], wait))
        except Gone as error:
            self.federation.reconnect(str(error))
            return
        for answer in heard:
            if answer.answers in invited:
                self._welcome(invited[answer.answers], said_by(answer))
                self._invited[invited[answer.answers]] = ""
            elif (task := self._out.pop(answer.answers, None)) is None:
                pass  # a second answer to a task that is settled
            elif isinstance(answer, Failed) and answer.unreadable:
                self._settle(task, refusal_of(task, answer.reason))
            elif isinstance(answer, Failed):
                self._gone[task.id] = (time.monotonic() + RETURN, answer.reason)
                self._ask_at.pop(task.id, None)
            else:
                self._read(task, answer.parts)

    def _await_return(self) -> None:
        """Sends their task again to sites that were gone and are back; drops those that stay away."""
        if not self._gone:
            return
        there = self.federation.sites()
        for id, (until, reason) in list(self._gone.items()):
            task = self._tasks[id]
            if task.client in there:
                del self._gone[id]
                self._send(task, there[task.client], full=True)
            elif time.monotonic() > until:
                del self._gone[id]
                self._settle(task, Dropped(task.client, id, reason))

    def _read(self, task: Task, parts: Sequence[bytearray]) -> None:
        """What a site's message says of a task."""
        try:
            head = opened(parts)
            if head["kind"] == "event":
                self._settle(task, answer_to(task, messages.unpack_event(parts[1])))
            elif head["kind"] == "refused":
                self._settle(task, refusal_of(task, str(head.get("reason"))))
            elif head["kind"] == "unready":
                self._prepare_again(task)
            elif head["kind"] == "unknown":
                self._send(task, self.federation.sites().get(task.client), full=True)
        except (ValueError, LookupError) as error:
            self._settle(task, refusal_of(task, f"an answer that cannot be read: {error}"))

    def _prepare_again(self, task: Task) -> None:
        """For a site that has started anew since it agreed to the plan: the plan, and after it the task."""
        from atoll.fleet.flower.link import NotTaken, part

        node = self.federation.sites().get(task.client)
        if node is not None and task.id not in self._prepared_again:
            self._prepared_again.add(task.id)
            plan = invitation(self.tree, task.client, self.names)
            with suppress(NotTaken):
                self.federation.operator.send(node, [part(plan)])
                return self._send(task, node, full=True)
        self._settle(task, Dropped(task.client, task.id, "the site started anew and did not get ready again"))

    def _ask(self) -> None:
        """Asks those who have been silent for long."""
        late = {id for id, at in self._ask_at.items() if time.monotonic() > at}
        if not late:
            return
        there = self.federation.sites()
        for task in [self._tasks[id] for id in late]:
            self._send(task, there.get(task.client), full=False)


@dataclass(frozen=True)
class OverNetwork:
    """See `flower`."""

    server: str
    keys: str
    ordered: bool
    insecure: bool

    def prepare(self, plan: str, tree: Mapping[str, Any]) -> Mapping[str, ClientData | str]:
        """Has the sites get ready; see `Federation.prepare`."""
        return federation(self.server, self.keys, self.insecure).prepare(plan, tree)

    def __call__(self, names: Sequence[str], client: object, rebuild: Rebuild, clock: float) -> Flower:
        """The fleet of a stage: its clients are made by the sites, its clock is the time of day."""
        there = federation(self.server, self.keys, self.insecure)
        return Flower(there, list(names), rebuild.run, rebuild.tree, self.ordered)


def flower(server: str, keys: str = "certs/operator", ordered: bool = False, insecure: bool = False) -> OverNetwork:
    """Sites on machines of their own, which join a server by `atoll join`.

    Args:
        server: HOST:PORT of `atoll server`.
        keys: the operator's folder that `atoll certs init` made.
        ordered: add replies in the order in which clients were asked, as a simulation does: the same bits in every run, at
            the cost of keeping early replies in memory.
        insecure: without TLS, to a server on this machine alone.
    """
    return OverNetwork(server, keys, ordered, insecure)
