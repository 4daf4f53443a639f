"""The operator's connection to a server and its sites: who is there, who is ready for a plan, and coming back."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.cache import Say, home
from atoll.data.sources import ClientData
from atoll.errors import AtollError
from atoll.fleet.flower import quiet
from atoll.fleet.flower.talk import envelope, opened
from atoll.wire import Buffer

if TYPE_CHECKING:
    from atoll.fleet.flower.operator import Operator

AWAY = 180.0
"""Seconds for which a server may be away, and its sites after it, before a run gives up."""

PREPARE = 900.0
"""Seconds that sites have to get ready for a plan: the first time they fetch and convert the model."""


@dataclass
class Federation:
    """A connection to a server, made when it is first needed and shared by all stages of a run."""

    server: str
    keys: Path
    insecure: bool = False
    """Without TLS: on this machine alone."""
    prepared: dict[str, dict[str, ClientData | str]] = field(default_factory=dict)
    """Plan -> what the sites answered."""
    times: int = 0
    """How often a connection was made: messages of the ones before are lost."""
    limit_bytes: int = 1 << 36
    """What a message may take: this until there is a broadcast to go by."""
    say: Say = lambda line: print(line, file=sys.stderr, flush=True)

    @cached_property
    def operator(self) -> Operator:
        """Raises AtollError where no server answers, or does not let us in."""
        quiet(home() / "flower")
        from atoll.fleet.flower.operator import Operator

        self.times += 1
        return Operator(self.server, self.keys, self.limit_bytes, self.insecure)

    def limit(self, size: int) -> None:
        """What a message may take from now on, over this connection and later ones."""
        self.limit_bytes = self.operator.link.limit_bytes = size

    def sites(self) -> dict[str, int]:
        """Who is there: name -> node."""
        from atoll.fleet.flower.calls import Gone

        try:
            return self.operator.sites()
        except Gone as error:
            self.reconnect(str(error))
            return self.operator.sites()

    def reconnect(self, why: str) -> None:
        """A new run at a server that died or was away, with the sites that were there; AtollError if it stays away."""
        from atoll.fleet.flower.calls import Gone

        self.say(f"the server {self.server} is away ({why}); waiting for it")
        end = time.monotonic() + AWAY
        expected = {name for sites in self.prepared.values() for name, one in sites.items() if not isinstance(one, str)}
        self.close()
        while True:
            try:
                if expected <= self.operator.sites().keys() or time.monotonic() > end:
                    self.say(f"back at {self.server}")
                    return
            except (AtollError, Gone):
                self.close()
                if time.monotonic() > end:
                    raise AtollError(
                        "the server stays away", where=self.server, found=why,
                        remedy="start it again; `atoll resume` goes on from the last whole round",
                    ) from None  # fmt: skip
            time.sleep(1.0)

    @property
    def unwilling(self) -> set[str]:
        """Sites that have said why they do not take part."""
        return {name for sites in self.prepared.values() for name, one in sites.items() if isinstance(one, str)}

    def hello(self, wait: float = 10.0) -> dict[str, dict[str, Any]]:
        """What everybody who is there says of itself."""
        heard = self.ask({name: envelope("hello") for name in self.operator.sites()}, wait)
        return {name: said if isinstance(said, dict) else {"silent": said} for name, said in heard.items()}

    def members(self) -> list[dict[str, Any]]:
        """Everybody who is enrolled, by name: whether they are there, when they were last heard of, what they say."""
        said = self.hello()
        return [one | {"said": said.get(one["name"], {})} for one in self.operator.members()]

    def prepare(self, plan: str, tree: Mapping[str, Any]) -> dict[str, ClientData | str]:
        """Has all sites get ready for a plan.

        Those that are come with the numbers of their samples in the place of them, the others with the reason. Who asks for
        more clients than are ready is left out, until all who are left have enough.

        Raises:
            AtollError: nobody is there, or nobody is willing.
        """
        if plan in self.prepared:
            return self.prepared[plan]
        names = list(self.operator.sites())
        if not names:
            raise AtollError(
                "no site is there", where=self.server, remedy="sites come by `atoll join`; see `atoll clients`"
            )
        heard = self.ask({name: invitation(tree, name, names) for name in names}, PREPARE)
        answers = without_too_few({name: counted(said) for name, said in sorted(heard.items())}, heard)
        if all(isinstance(answer, str) for answer in answers.values()):
            raise AtollError(
                "no site is willing to do this plan", where=self.server,
                found="; ".join(f"{name}: {why}" for name, why in answers.items()),
                remedy="change the plan, or ask the site's owner to change the policy",
            )  # fmt: skip
        self.prepared[plan] = answers
        return answers

    def ask(self, messages: Mapping[str, list[Buffer]], wait: float) -> dict[str, dict[str, Any] | str]:
        """Sends an envelope to sites by name; theirs, or why there is none, from all who answer in `wait` seconds."""
        from atoll.fleet.flower.link import NotTaken, Received, part

        there = self.operator.sites()
        asked: dict[str, str] = {}
        heard: dict[str, dict[str, Any] | str] = dict.fromkeys(messages.keys() - there.keys(), "it is not there")
        for name in messages.keys() & there.keys():
            try:
                asked[self.operator.send(there[name], [part(messages[name])])] = name
            except NotTaken as error:
                heard[name] = str(error)
        end = time.monotonic() + wait
        while asked and (left := end - time.monotonic()) > 0:
            for answer in self.operator.answers(asked, min(left, 1.0)):
                name = asked.pop(answer.answers)
                try:
                    heard[name] = opened(answer.parts) if isinstance(answer, Received) else answer.reason
                except ValueError as error:
                    heard[name] = str(error)
        return heard | dict.fromkeys(asked.values(), f"no answer in {wait:g} s")

    def close(self) -> None:
        """Ends the run at the server, if there is one."""
        if "operator" in self.__dict__:
            self.operator.close()
            del self.__dict__["operator"]


def invitation(tree: Mapping[str, Any], name: str, names: Sequence[str]) -> list[Buffer]:
    """A plan for a site, which learns what it is called in it and who else is asked."""
    return envelope("plan", tree=tree, client=name, clients=list(names))


def counted(said: dict[str, Any] | str) -> ClientData | str:
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


def without_too_few(
    answers: dict[str, ClientData | str], heard: Mapping[str, dict[str, Any] | str]
) -> dict[str, ClientData | str]:
    """Puts a reason in the place of sites whose policy asks for more clients than are ready."""
    asked = {name: said["least"] for name, said in heard.items() if isinstance(said, dict) and "least" in said}
    while True:
        ready = [name for name, answer in answers.items() if not isinstance(answer, str)]
        wants = {name: asked[name] for name in ready if isinstance(asked.get(name), int) and asked[name] > len(ready)}
        if not wants:
            return answers
        name, least = max(wants.items(), key=lambda one: one[1])
        answers = {**answers, name: f"asks for {least} clients; {len(ready)} are ready"}


@cache
def federation(server: str, keys: str, insecure: bool) -> Federation:
    """One connection a server for this process; the run at the server ends with it."""
    made = Federation(server, Path(keys).expanduser(), insecure)
    atexit.register(made.close)
    return made
