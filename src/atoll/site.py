"""A site: the long-lived process at an owner of data. It answers what the operator asks, as far as the policy goes.

    message -> policy -> plan, built from its tree with the site's own data -> client -> audit log -> reply

Model, tokens and client state stay warm between rounds and runs. Nothing here knows what network there is: `urgent` and
`answer` take and give parts of bytes (see talk.py).
"""

from __future__ import annotations

import os
import platform
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atoll import messages, parts
from atoll.assemble import Assembly, assemble, clients
from atoll.audit import AuditLog
from atoll.build import Plan, build
from atoll.cache import Say
from atoll.client import Client, Side
from atoll.data.files import rows
from atoll.data.read import open_source
from atoll.data.sources import ClientData, ClientSource, digest
from atoll.errors import AtollError
from atoll.local.work import Tick
from atoll.policy import Policy
from atoll.privacy.accounting import Release
from atoll.privacy.ledger import Entry, Ledger, spent
from atoll.privacy.party import Memory, Party
from atoll.privacy.protection import entry
from atoll.record.folder import RunFolder
from atoll.schema import validate
from atoll.talk import envelope, opened
from atoll.wire import Buffer

Message = list[list[Buffer]]

WARM = 2
"""Plans whose model stays in memory."""

REMEMBERED = 8
"""Runs whose secrets between the phases of a round are kept."""

KEPT = 2
"""Replies that are kept in memory for an operator who asks again."""


class Unwilling(Exception):
    """What is asked is not done here; the text says why, to both ends."""


class NotWanted(AtollError):
    """Nobody waits for this work any more."""


@dataclass
class Ready:
    """A plan that this site has agreed to."""

    name: str
    """What the operator calls this site."""
    plan: Plan
    things: Assembly


@dataclass
class Site:
    """See the module's text. `folder` holds client state and the audit log."""

    data: Path
    policy: Policy
    folder: Path
    say: Say
    _ready: OrderedDict[str, Ready] = field(default_factory=OrderedDict)
    _working: set[tuple[str, str]] = field(default_factory=set)
    """(run, task) that are being worked on, or wait for it."""
    _not_wanted: set[tuple[str, str]] = field(default_factory=set)
    """Those of them that nobody waits for any more."""
    _now: tuple[str, str] = ("", "")
    """The one that is being worked on."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Messages are looked at in one thread and worked on in another."""
    _memories: OrderedDict[str, dict[str, Memory]] = field(default_factory=OrderedDict)
    """By run: what its client knows between the phases of a round."""
    _done: OrderedDict[tuple[str, str], list[Buffer]] = field(default_factory=OrderedDict)

    @cached_property
    def audit(self) -> AuditLog:
        """Raises AtollError for a damaged log: nothing leaves that cannot be noted."""
        return AuditLog(self.folder / "audit.jsonl")

    @cached_property
    def records(self) -> int:
        """How many records there are, whether or not they can be used."""
        return sum(1 for file, _ in open_source(self.data, 0.0).files for _ in rows(file))

    def urgent(self, message: Sequence[Buffer]) -> Message | None:
        """Answers at once what needs no work; None for what does."""
        try:
            head = opened(message)
            if head["kind"] == "hello":
                return [self.hello()]
            if head["kind"] == "ask":
                return self.became(str(head.get("run")), str(head.get("task")))
            if head["kind"] == "cancel":
                with self._lock:
                    self._not_wanted |= {task for task in self._working if task[0] == head.get("run")}
                return [envelope("cancelled")]
            if head["kind"] == "task":
                return self.queued((str(head.get("run")), messages.task_id(message[2])))
            return None
        except (ValueError, LookupError) as error:
            return [refusal(str(error))]
        except Exception as error:
            return [refusal(self.kept_here(f"{type(error).__name__}: {error}"))]

    def queued(self, task: tuple[str, str]) -> Message | None:
        """A task that has come: None if it is to be worked on, which takes the place of older ones of its kind."""
        with self._lock:
            self._not_wanted.discard(task)
            if task in self._done or task in self._working:
                return self.became(*task)
            self._not_wanted |= {other for other in self._working if replaced(other, by=task)}
            for other in [other for other in self._done if replaced(other, by=task)]:
                del self._done[other]
            self._working.add(task)
        return None

    def answer(self, message: Sequence[Buffer]) -> Message:
        """Does what takes time: gets ready for a plan, works on a task. Whatever is wrong comes back as a refusal."""
        try:
            head = opened(message)
            if head["kind"] == "plan":
                return [self.prepare(head)]
            if head["kind"] == "task":
                return self.work(head, opened_task(message))
            raise Unwilling(f"this site does not know what '{head['kind']}' is")
        except (Unwilling, NotWanted) as error:
            self.say(f"refused: {error}")
            return [refusal(str(error))]
        except AtollError as error:  # what was found, and where, may be the owner's data and files
            self.say(f"failed: {error}")
            return [refusal(error.what)]
        except Exception as error:
            return [refusal(self.kept_here(f"{type(error).__name__}: {error}"))]
        finally:
            self._no_longer_working(message)

    def _no_longer_working(self, message: Sequence[Buffer]) -> None:
        """A task that was worked on or could not be read: whoever asks is told what became of it, or that it is unknown."""
        with suppress(ValueError, LookupError):
            task = (str(opened(message).get("run")), messages.task_id(message[2]))
            with self._lock:
                self._working.discard(task)
                self._not_wanted.discard(task)

    def kept_here(self, reason: str) -> str:
        """Says what went wrong to this site's owner; the operator hears of what kind it was, for its text may quote data."""
        self.say(f"failed: {reason}")
        return f"{reason.partition(':')[0]}; the site's own log says more"

    def hello(self) -> list[Buffer]:
        """What this site says of itself to whoever may start runs."""
        versions = {"version": version("atoll"), "torch": version("torch")}
        return envelope("hello", **versions, **hardware(), records=self.records, policy=self.policy.model_dump())

    def became(self, run: str, task: str) -> Message:
        """What became of a task."""
        if (done := self._done.get((run, task))) is not None:
            return [envelope("event"), done]
        return [envelope("working" if (run, task) in self._working else "unknown")]

    def prepare(self, head: Mapping[str, Any]) -> list[Buffer]:
        """Builds the plan and loads what it needs, unless that is warm. Raises Unwilling for what the policy forbids."""
        name, names, tree = str(head["client"]), [str(one) for one in head["clients"]], dict(head["tree"])
        recipe = validate(tree, "the operator's plan")
        self._allow(self.policy.broken_by(recipe))  # before anything that the plan names is imported
        plan = build(recipe, tree, sources={one: ClientData((), ()) for one in names})
        self._allow(self.policy.too_few(plan.cohort))
        if head.get("model") and plan.shapes and plan.shapes.identity != head["model"]:
            raise Unwilling(f"another base model: {plan.model.name} is not the same here as at the operator's")
        source = ClientSource(open_source(self.data, held_out(tree)))
        warm = self._ready.get(plan.hash)
        if warm is not None and warm.plan.clients != plan.clients:  # whose number decides how sums are hidden
            warm = self._ready[plan.hash] = replace(warm, plan=plan)
        if warm is None or warm.name != name or warm.things.digests[name] != digest(source):
            self.say(f"getting ready for plan {plan.hash} ({recipe.name}), as {name}")
            self.__dict__.pop("records", None)  # counted again when somebody asks
            things = assemble(replace(plan, sources={name: source}), self.say, self._still_wanted)
            self._ready[plan.hash] = Ready(name, plan, things)
            while len(self._ready) > WARM:
                self._ready.popitem(last=False)
        self._ready.move_to_end(plan.hash)
        data = self._ready[plan.hash].things.data[name]
        return envelope("ready", train=len(data.train), test=len(data.test), least=self.policy.minimum_cohort)

    def _allow(self, broken: Sequence[str]) -> None:
        if broken:
            raise Unwilling("the site's policy does not allow: " + "; ".join(broken))

    def work(self, head: Mapping[str, Any], task: Any) -> Message:
        """A task of a plan that this site has agreed to."""
        run = str(head["run"])
        ready = self._ready.get(task.plan)
        if ready is None:
            return [envelope("unready")]
        if task.client != ready.name:
            raise Unwilling(f"a task of {task.client}; this site is {ready.name}")
        self._ready.move_to_end(task.plan)
        self._now = (run, task.id)
        self._still_wanted()
        if task.broadcast.payloads and bool(task.broadcast.fixed) != ready.plan.sends_start:
            raise Unwilling("the task comes without what the plan begins with, or with what the plan does not ask for")
        self.say(f"round {task.broadcast.round}: {task.kind}")
        if task.kind == "train":
            self.spend(run, ready, task.broadcast.round)
        reply = self.client(run, ready).handle(task)
        event = messages.pack_event(replace(reply, metrics=self.policy.may_leave(reply.metrics)))
        self.audit.wrote(run, task.plan, task.id, event)
        with self._lock:
            self._done[run, task.id] = event
            while len(self._done) > KEPT:
                self._done.popitem(last=False)
        return [envelope("event"), event]

    @property
    def ledger(self) -> Ledger:
        """What was spent of the privacy of this site's data, by all runs together."""
        return Ledger(self.folder / "ledger.jsonl")

    def spend(self, run: str, ready: Ready, round: int) -> None:
        """Enters a private release before the work for it. Raises Unwilling where it would pass the owner's budget."""
        protection, budget = ready.plan.protection, self.policy.privacy
        if protection is None:  # the policy has said whether that may be
            return
        if not protection.noise_multiplier:
            if budget:
                raise Unwilling(
                    "a mechanism without noise: its epsilon is infinite, and this site's policy has a budget"
                )
            return
        samples = {ready.name: len(ready.things.data[ready.name].train)}
        comes = for_one_who_was_asked(entry(protection, run, ready.plan.hash, round, samples))
        if budget and (would := spent([*self.ledger, comes], budget.delta)) > budget.epsilon:
            raise Unwilling(
                f"this site's privacy budget is spent: another round would make epsilon {would:.4g} at delta"
                f" {budget.delta:g}; its policy allows {budget.epsilon:g}"
            )
        self.ledger.enter(comes)

    def _still_wanted(self, tick: Tick | None = None) -> None:
        """Asked before work and at each of its steps: what nobody waits for is not gone on with."""
        if self._now in self._not_wanted:
            raise NotWanted("nobody waits for this any more")

    def client(self, run: str, ready: Ready) -> Client:
        """This site's client in a run, with the state that it keeps for it."""
        if not run.isalnum():
            raise Unwilling(f"a run named {run!r}")
        folder = RunFolder(self.folder / "runs" / run)
        memories = self._memories.setdefault(run, {})
        while len(self._memories) > REMEMBERED:
            self._memories.popitem(last=False)
        made = clients(ready.plan, ready.things, folder, memories, self.policy.may_leave)(ready.name)
        return replace(made, outward=self.kept_here, side=self.careful(made.side))

    def careful(self, side: Side | None) -> Side | None:
        """Under masks the owner's minimum cohort is the site's own to keep: it gives no share for a sum of fewer."""
        if not isinstance(side, Party):
            return side
        least = max(side.terms.survivors, self.policy.minimum_cohort)
        return replace(side, terms=side.terms._replace(survivors=least))


def for_one_who_was_asked(comes: Entry) -> Entry:
    """An entry of a round in a site's own ledger: it holds the rounds that it is asked in, so being drawn hides nothing."""
    if comes.unit == "client":
        comes = replace(comes, releases=tuple(Release(one.noise_multiplier, count=one.count) for one in comes.releases))
    return replace(comes, clients=())


def replaced(task: tuple[str, str], by: tuple[str, str]) -> bool:
    """Whether a newer task of the same kind in the same run takes this one's place: a server forgets a task so."""
    return task[0] == by[0] and task[1].partition(":")[0] == by[1].partition(":")[0]


def refusal(reason: str) -> list[Buffer]:
    """What is not done, and why."""
    return envelope("refused", reason=reason, version=version("atoll"))


def held_out(tree: Mapping[str, Any]) -> float:
    """The share of records that the plan holds out, where it says one."""
    written = parts.spec(tree["data"], "data").arguments.get("held_out", 0.1)
    return float(written)


def opened_task(message: Sequence[Buffer]) -> Any:
    """The task of a message, with its broadcast and what is fixed, if anything is. Raises ValueError."""
    if len(message) not in (3, 4):
        raise ValueError(f"a task of {len(message)} parts, 3 or 4 are needed")
    fixed = messages.unpack_fixed(message[3]) if len(message) == 4 else {}
    return messages.unpack_task(message[2], messages.unpack_broadcast(message[1], fixed))


def hardware() -> dict[str, Any]:
    """What this machine has."""
    return {"cores": os.cpu_count(), "machine": platform.machine(), "system": platform.system()}
