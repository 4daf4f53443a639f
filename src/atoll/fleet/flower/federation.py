"""The operator's connection to a server and its sites: who is there, who is ready for a plan, and coming back."""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from atoll.cache import Say
from atoll.data.sources import ClientData
from atoll.errors import AtollError
from atoll.fleet.flower.calls import Gone, unreachable
from atoll.fleet.flower.link import NotTaken, Received, part
from atoll.fleet.flower.operator import DENIED, Answer, Operator
from atoll.fleet.inprocess import Prepared
from atoll.talk import envelope, opened
from atoll.wire import Buffer

AWAY = 180.0
"""Seconds for which a server may be away, and its sites after it, before a run gives up."""

PREPARE = 900.0
"""Seconds that sites have to get ready for a plan: the first time they fetch and convert the model."""

Said = dict[str, Any] | str
"""The envelope that a site answered with, or why there is none."""


@dataclass
class Federation:
    """A connection to a server, made when it is first needed and shared by all stages of a run."""

    server: str
    keys: Path
    insecure: bool = False
    """Without TLS: on this machine alone."""
    prepared: dict[str, Prepared] = field(default_factory=dict)
    """By plan."""
    unwilling: set[str] = field(default_factory=set)
    """Sites that have refused a plan."""
    times: int = 0
    """How often a connection was made: messages of the ones before are lost."""
    limit_bytes: int = 1 << 36
    """What a message may take: this until there is a broadcast to go by."""
    say: Say = lambda line: print(line, file=sys.stderr, flush=True)
    _plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What an invitation says of a plan, by its hash."""
    _seen: set[str] = field(default_factory=set)
    """Who was there when we last looked."""

    @cached_property
    def operator(self) -> Operator:
        """Raises AtollError where no server answers, or does not let us in."""
        made = Operator(self.server, self.keys, self.limit_bytes, self.insecure)
        self.times += 1
        return made

    def connect(self) -> int:
        """Connects, unless that is done; says how often that has been."""
        return self.times if self.operator else 0

    def limit(self, size: int) -> None:
        """What a message may take from now on, over this connection and later ones."""
        self.limit_bytes = self.operator.link.limit_bytes = size

    def sites(self) -> dict[str, int]:
        """Who is there: name -> node. A server that is away is waited for."""
        while True:
            with self.connected():
                found = self.operator.sites()
                self._seen = set(found)
                return found

    @contextmanager
    def connected(self, limit: float = math.inf) -> Iterator[None]:
        """If the connection is lost inside, the rest is given up, and there is a new one afterwards, or `limit` s are over.

        Raises:
            AtollError: the server stays away; or there has never been a connection.
        """
        try:
            yield
        except Gone as error:
            self._reconnect(str(error), limit)
        except AtollError as error:
            if not self.times or "operator" in self.__dict__:
                raise
            self._reconnect(str(error.details["found"]), limit)  # was lost before, and not made anew in time

    def _reconnect(self, why: str, limit: float) -> None:
        """A new run at a server that died or was away, with the sites that were there."""
        self.say(f"the server {self.server} is away ({why}); waiting for it")
        self.close()
        ends = time.monotonic() + min(AWAY, limit)
        while True:
            try:
                if self._seen <= self.operator.sites().keys() or time.monotonic() > ends:
                    self.say(f"back at {self.server}")
                    return
            except (AtollError, Gone):
                self.close()
                if time.monotonic() > ends:
                    if limit < AWAY:
                        return
                    raise AtollError(
                        "the server stays away", where=self.server, found=why,
                        remedy="start it again; `atoll resume` goes on from the last whole round",
                    ) from None  # fmt: skip
            time.sleep(1.0)

    def hello(self, wait: float = 10.0) -> dict[str, dict[str, Any]]:
        """What everybody who is there says of itself."""
        heard = self.ask({name: envelope("hello") for name in self.operator.sites()}, wait)
        return {name: said if isinstance(said, dict) else {"silent": said} for name, said in heard.items()}

    def members(self) -> list[dict[str, Any]]:
        """Everybody who is enrolled, by name: whether they are there, when they were last heard of, what they say."""
        said = self.hello()
        return [one | {"said": said.get(one["name"], {})} for one in self.operator.members()]

    def prepare(self, plan: str, tree: Mapping[str, Any], model: str, answers: Callable[[int], float]) -> Prepared:
        """Has all sites get ready for a plan, on the base model of this content.

        Those that are come with the numbers of their samples in the place of them, the others with the reason. Who asks for
        more clients than answer a round is left out, until all who are left have enough: `answers` says how many do, on
        average, of so many.

        Raises:
            AtollError: nobody is there, or nobody is willing.
        """
        if plan in self.prepared:
            return self.prepared[plan]
        names = list(self.sites())
        if not names:
            raise AtollError(
                "no site is there", where=self.server, remedy="sites come by `atoll join`; see `atoll clients`"
            )
        self._plans[plan] = {"tree": tree, "model": model}
        heard: dict[str, Said] = {}
        asked: list[str] = []
        while asked != names:
            with self.connected():  # whoever was ready before the server died says so at once
                heard |= self._asked({name: self.invitation(plan, name, names) for name in names}, PREPARE)
                asked = names
            if asked:
                ready = without_too_few({name: counted(said) for name, said in sorted(heard.items())}, heard, answers)
                names = [name for name in names if not isinstance(ready[name], str)]  # who are told how many they are
        self.unwilling |= {
            name for name, why in ready.items() if isinstance(why, str) and isinstance(heard[name], dict)
        }
        if all(isinstance(answer, str) for answer in ready.values()):
            raise AtollError(
                "no site is willing to do this plan", where=self.server,
                found="; ".join(f"{name}: {why}" for name, why in ready.items()),
                remedy="change the plan, or ask the site's owner to change the policy; the site's own log may say more",
            )  # fmt: skip
        least = max(asked_for(heard[name]) for name, answer in ready.items() if not isinstance(answer, str))
        self.prepared[plan] = Prepared(ready, least)
        return self.prepared[plan]

    def invitation(self, plan: str, name: str, names: Sequence[str]) -> list[Buffer]:
        """A plan for a site, which learns what it is called in it and who else is asked."""
        return envelope("plan", **self._plans[plan], client=name, clients=list(names))

    def ask(self, messages: Mapping[str, list[Buffer]], wait: float) -> dict[str, Said]:
        """Sends an envelope to sites by name; what they said, of all who answer in `wait` seconds.

        Raises:
            AtollError: the connection is lost meanwhile.
        """
        try:
            return self._asked(messages, wait)
        except Gone as error:
            raise unreachable(self.server, error, DENIED) from error

    def _asked(self, messages: Mapping[str, list[Buffer]], wait: float) -> dict[str, Said]:
        there = self.operator.sites()
        asked: dict[str, str] = {}
        heard: dict[str, Said] = dict.fromkeys(messages.keys() - there.keys(), "it is not there")
        for name in messages.keys() & there.keys():
            try:
                asked[self.operator.send(there[name], [part(messages[name])])] = name
            except NotTaken as error:
                heard[name] = str(error)
        end = time.monotonic() + wait
        while asked and (left := end - time.monotonic()) > 0:
            for answer in self.operator.answers(asked, min(left, 1.0)):
                heard[asked.pop(answer.answers)] = read_envelope(answer)
        return heard | dict.fromkeys(asked.values(), f"no answer in {wait:g} s")

    def close(self) -> None:
        """Ends the run at the server, if there is one."""
        if "operator" in self.__dict__:
            self.operator.close()
            del self.__dict__["operator"]


def read_envelope(answer: Answer) -> Said:
    """The envelope of an answer, or why there is none."""
    try:
        return opened(answer.parts) if isinstance(answer, Received) else answer.reason
    except ValueError as error:
        return str(error)


def counted(said: Said) -> ClientData | str:
    """A site's answer to a plan: how many samples it has, or why it will not take part."""
    if isinstance(said, str):
        return said
    try:
        if said["kind"] != "ready":
            return str(said["reason"])
        train, test = range(int(said["train"])), range(int(said["test"]))
        return ClientData(train[: len(train)], test[: len(test)])  # a length that Python has none for raises
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        return f"an answer that cannot be read: {error!r}"


def asked_for(said: Said) -> int:
    """The fewest clients that a site's policy asks for, of what it answered to a plan."""
    least = said.get("least") if isinstance(said, dict) else None
    return least if isinstance(least, int) else 1


def without_too_few(
    answers: dict[str, ClientData | str], heard: Mapping[str, Said], cohort: Callable[[int], float]
) -> dict[str, ClientData | str]:
    """Puts a reason in the place of sites whose policy asks for more clients than answer a round, on average."""
    while True:
        ready = [name for name, answer in answers.items() if not isinstance(answer, str)]
        enough = cohort(len(ready)) if ready else 0
        wants = {name: asked_for(heard[name]) for name in ready if asked_for(heard[name]) > enough}
        if not wants:
            return answers
        name, least = max(wants.items(), key=lambda one: one[1])
        answers = {
            **answers,
            name: f"asks for {least} clients a round; {enough:g} answer, of {len(ready)} that are ready",
        }


@cache
def federation(server: str, keys: str, insecure: bool) -> Federation:
    """One connection a server for this process; the run at the server ends with it."""
    made = Federation(server, Path(keys).expanduser(), insecure)
    atexit.register(made.close)
    return made
