"""The Flower fleet: tasks go to sites as messages, replies come back in whatever order.

Flower delivers a message at most once, and tells nobody of one that was lost on the way. So a site that has not answered
for a while is asked about its task: it answers with the reply (which it keeps), says that it is still at work, or does not
know the task, which is then sent again. However often a task or a reply travels, it counts once: by its id.

Whatever is sent may find the connection gone. Then the pass is given up, the federation connects anew, and whatever has no
answer is sent again over the new connection.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from atoll import messages
from atoll.errors import AtollError
from atoll.exchange import Broadcast, Dropped, Event, Reply, Task
from atoll.fleet.flower.calls import Gone
from atoll.fleet.flower.federation import Federation, Said, asked_for, counted, read_envelope
from atoll.fleet.flower.link import NotTaken, Part, part
from atoll.fleet.flower.operator import Answer, Failed
from atoll.params import Params
from atoll.talk import envelope, opened

LISTEN = 1.0
"""Seconds of waiting for an answer, after which other things are looked at."""

POLL = 0.2
"""Seconds between two looks for sites that are gone."""

ASK = 20.0
"""Seconds after which a site that has not answered is asked about its task."""

RETURN = 20.0
"""Seconds in which a site that Flower takes for gone may come back and be sent its task again."""

FAREWELL = 2.0
"""Seconds for sites to hear that nobody waits for their work any more."""

MOST_AGAIN = 3
"""Times that a site gets ready once more for a task: several runs may take turns in its memory."""

LARGEST_REPLY = 16
"""How many times the broadcast's bytes a message may have: a broadcast may be in four bits, and replies in 32."""


@dataclass
class Pending:
    """A task whose answer nobody has had yet."""

    task: Task
    sent: set[str] = field(default_factory=set)
    """Messages about it over this connection that nothing has come of."""
    ask_at: float = math.inf
    """When to ask what became of it."""
    gone: tuple[float, str] | None = None
    """Its site is not there: until when it may come back, and what Flower said."""
    prepared_again: int = 0
    """How often the site was sent the plan once more."""
    asked: bool = False
    """Whether it was asked what became of it."""
    answer: Event | None = None

    def settle(self, event: Event) -> None:
        """It is answered: whatever else is out about it does not matter any more."""
        self.answer, self.gone, self.ask_at = event, None, math.inf
        self.sent.clear()

    def refuse(self, reason: str) -> None:
        """It comes to nothing, and why."""
        task = self.task
        self.settle(Reply(task.id, task.client, task.plan, task.broadcast.round, refusal=reason))

    def fail(self, reason: str) -> None:
        """A message about it came to nothing. While another is out, that one counts."""
        if self.answer is None and not self.sent:
            self.gone, self.ask_at = (time.monotonic() + RETURN, reason), math.inf

    def forget(self) -> None:
        """The connection is a new one: nothing that was sent over the old one will be answered."""
        self.sent.clear()
        self.gone, self.ask_at = None, math.inf


@dataclass
class Flower:
    """See the module's text."""

    federation: Federation
    names: list[str]
    """Sites that are ready for the plan."""
    run: str
    """Names the run to sites: they keep a client's state for each."""
    plan: str
    ordered: bool = False
    """Whether answers are handed out in the order in which tasks were sent."""
    clock: Callable[[], float] = time.time
    _pending: dict[str, Pending] = field(default_factory=dict)
    """By the id of the task, in the order in which they were sent."""
    _invited: dict[str, str] = field(default_factory=dict)
    """Sites that came after the plan was made, and the message that asked them to get ready for it."""
    _last: tuple[Broadcast, Part] | None = None
    _same: tuple[Mapping[str, Params], Part] | None = None
    _times: int = 0
    """Of the connection over which things were sent."""

    def clients(self) -> list[str]:
        """Those who are there now. Sites that have come since are asked to get ready, and are among them once they are."""
        there = self.federation.sites()
        with self.federation.connected():
            self._invite(there)
            self._hear(0.0)
        return [name for name in self.names if name in there]

    def lanes(self) -> int:
        """Every site has its own."""
        return len(self.names)

    def now(self) -> float:
        """The time of day."""
        return self.clock()

    def submit(self, tasks: Sequence[Task]) -> None:
        """See `Fleet`. What cannot be sent for want of a connection is sent over the next one."""
        again = {(task.kind, task.client) for task in tasks}
        kept = {id: one for id, one in self._pending.items() if (one.task.kind, one.task.client) not in again}
        new = {task.id: Pending(task) for task in tasks}
        self._pending = kept | new
        with self.federation.connected():
            self._over_this_connection()
            there = self.federation.operator.sites()
            for one in new.values():
                if one.task.client not in there:
                    one.settle(Dropped(one.task.client, one.task.id, "the site is not there"))
                elif not one.sent:
                    self._send_task(one, there)

    def receive(self, tasks: Collection[str], until: float = math.inf) -> Event | None:
        """See `Fleet`."""
        while True:
            wanted = [one for id, one in self._pending.items() if id in tasks]
            for one in wanted[:1] if self.ordered else wanted:
                if one.answer is not None:
                    del self._pending[one.task.id]
                    return one.answer
            if self.now() >= until:
                return None
            with self.federation.connected(until - self.now()):
                self._over_this_connection()
                self._hear(max(0.0, min(LISTEN, until - self.now())))
                self._await_return()
                self._ask()

    def reduce(self, total: Params) -> Params:
        """One server hears everybody."""
        return total

    def close(self) -> None:
        """Tells sites that are still at work that nobody waits for it. Other stages may go on with the connection."""
        at_work = {one.task.client for one in self._pending.values() if one.answer is None}
        with suppress(Gone, AtollError):
            self.federation.ask({name: envelope("cancel", run=self.run) for name in at_work}, wait=FAREWELL)

    def _over_this_connection(self) -> None:
        """If the connection is another than the last time, sends whatever is not answered over it."""
        if self._times == self.federation.connect():
            return
        self._times = self.federation.times
        self._invited = {name: "" for name in self._invited if name in self.names}
        unanswered = [one for one in self._pending.values() if one.answer is None]
        for one in unanswered:
            one.forget()
        self._send_all(unanswered)

    def _send_all(self, unanswered: Sequence[Pending]) -> None:
        there = self.federation.operator.sites() if unanswered else {}
        for one in unanswered:
            self._send_task(one, there)

    def _send_task(self, one: Pending, there: Mapping[str, int]) -> None:
        """A task with its broadcast, and with what is fixed, which a site that has it does not pull.

        The server is sent it anew in every round: it forgets what nobody is to pull any more.
        """
        head = envelope("task", run=self.run, plan=one.task.plan)
        sent = one.task.broadcast
        self._send(
            one, there, [part(head), self._broadcast(sent), part(messages.pack_task(one.task)), *self._fixed(sent)]
        )

    def _send(self, one: Pending, there: Mapping[str, int], parts: Sequence[Part]) -> None:
        """A message about a task, if its site is there. Raises Gone."""
        if one.task.client not in there:
            one.fail("the site is not there")
            return
        try:
            one.sent.add(self.federation.operator.send(there[one.task.client], parts))
            one.gone, one.ask_at = None, time.monotonic() + ASK
        except NotTaken as error:
            one.fail(str(error))

    def _broadcast(self, broadcast: Broadcast) -> Part:
        """Cut and named once for all who get it."""
        if self._last is None or self._last[0] is not broadcast:
            self._last = (broadcast, part(messages.pack_broadcast(broadcast)))
            if broadcast.payloads:  # later phases of a round carry none, and answer with as much
                self.federation.limit(LARGEST_REPLY * self._last[1].size + (64 << 20))
        return self._last[1]

    def _fixed(self, broadcast: Broadcast) -> list[Part]:
        """What is the same in every round, if anything is: cut and named once for all of them."""
        if not broadcast.fixed:
            return []
        if self._same is None or self._same[0] is not broadcast.fixed:
            self._same = (broadcast.fixed, part(messages.pack_fixed(broadcast.fixed), stays=True))
        return [self._same[1]]

    def _hear(self, wait: float) -> None:
        """Takes in what comes in so many seconds."""
        about = {message: one for one in self._pending.values() for message in one.sent}
        invited = {message: name for name, message in self._invited.items() if message}
        if not (about or invited):
            time.sleep(min(wait, POLL))
            return
        for answer in self.federation.operator.answers([*about, *invited], wait):
            if answer.answers in invited:
                self._welcome(invited[answer.answers], read_envelope(answer))
            else:
                self._take(about[answer.answers], answer)

    def _take(self, one: Pending, answer: Answer) -> None:
        """What came in answer to a message about a task."""
        one.sent.discard(answer.answers)
        if one.answer is not None:
            return
        if isinstance(answer, Failed):
            one.refuse(answer.reason) if answer.unreadable else one.fail(answer.reason)
            return
        try:
            self._read(one, answer.parts)
        except (ValueError, LookupError) as error:
            one.refuse(f"an answer that cannot be read: {error}")

    def _read(self, one: Pending, parts: Sequence[bytearray]) -> None:
        """What a site's message says of a task. Raises ValueError or LookupError for what says nothing."""
        head = opened(parts)
        if head["kind"] == "event":
            one.settle(answer_to(one.task, messages.unpack_event(parts[1])))
        elif head["kind"] == "refused":
            one.refuse(str(head.get("reason")))
        elif head["kind"] == "unready":
            self._prepare_again(one)
        elif head["kind"] == "unknown":
            self._send_task(one, self.federation.operator.sites())

    def _prepare_again(self, one: Pending) -> None:
        """For a site that has started anew since it agreed to the plan: the plan, and after it the task."""
        there = self.federation.operator.sites()
        if one.prepared_again == MOST_AGAIN:
            return one.refuse("the site started anew and did not get ready again")
        if one.task.client in there:
            one.prepared_again += 1
            plan = self.federation.invitation(self.plan, one.task.client, self.names)
            with suppress(NotTaken):
                self.federation.operator.send(there[one.task.client], [part(plan)])
        self._send_task(one, there)

    def _await_return(self) -> None:
        """Sends their task again to sites that were gone and are back; drops those that stay away."""
        away = [(one, *one.gone) for one in self._pending.values() if one.gone is not None]
        there = self.federation.operator.sites() if away else {}
        for one, until, reason in away:
            if one.task.client in there:
                self._send_task(one, there)
            elif time.monotonic() > until:
                one.settle(Dropped(one.task.client, one.task.id, reason))

    def _ask(self) -> None:
        """Asks those who have been silent for long."""
        silent = [one for one in self._pending.values() if time.monotonic() > one.ask_at]
        there = self.federation.operator.sites() if silent else {}
        for one in silent:
            if not one.asked:
                self.federation.say(f"waiting for {one.task.client}: no answer yet to {one.task.id}")
            one.asked = True
            self._send(one, there, [part(envelope("ask", run=self.run, task=one.task.id))])

    def _invite(self, there: Mapping[str, int]) -> None:
        """Asks those who have come since to get ready."""
        for name in there.keys() - {*self.names, *self._invited, *self.federation.unwilling}:
            plan = self.federation.invitation(self.plan, name, [*self.names, name])
            with suppress(NotTaken):
                self._invited[name] = self.federation.operator.send(there[name], [part(plan)])

    def _welcome(self, name: str, said: Said) -> None:
        """What a newcomer answered: it takes part from the next round on, or not at all; if nothing, it is asked again."""
        self._invited[name] = ""
        if isinstance(said, str):
            del self._invited[name]
        answer, least = counted(said), asked_for(said)
        if isinstance(answer, str):
            self.federation.say(f"{name} does not take part: {answer}")
        elif least > self.federation.prepared[self.plan].least:
            self.federation.say(
                f"{name} does not take part: it asks for {least} clients whose updates are put together"
            )
        else:
            self.names.append(name)
            self.federation.say(f"{name} takes part from now on")


def answer_to(task: Task, event: Event) -> Event:
    """An event that a site sent about a task. Raises ValueError for one that speaks of another, or in another's name."""
    if (event.task, event.client) != (task.id, task.client):
        raise ValueError(f"it speaks of {event.task} in the name of {event.client}")
    return event
