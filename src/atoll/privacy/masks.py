"""Secure aggregation: the server learns the sum of the updates and nothing of any one of them.

    train -> share -> [mask, unmask: the common range] -> mask -> unmask -> the sum

Source: Bonawitz et al. 2017 (CCS 2017), with the sparse graph of Bell et al. 2020 above 64 clients (graph.py). Departs
from them in that clients train first and agree on masks afterwards: most who will drop out have done so by then, and what
is masked is known when its common scale is agreed on. The threat: a server that follows the protocol and is curious,
clients that collude with it up to `colluding`, and drops in any phase. No two lists of survivors open one client's update,
but a server that invents clients is not held off: that takes signed keys, which this protocol does not have.

This file is the server's side, an exchange of several phases; party.py is the client's.
"""

from __future__ import annotations

import json
import math
import secrets
from base64 import b64decode
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le

from atoll.exchange import (
    DECODING_ERRORS,
    Abandoned,
    Accepted,
    Broadcast,
    Closes,
    Contribution,
    Dropped,
    Exchange,
    Heard,
    MakeExchange,
    Opened,
    Receive,
    Refused,
    Reply,
    Send,
    Task,
    Verdict,
    Wait,
    check_sender,
)
from atoll.metrics import EVALUATION, LARGEST_SUM, LOSS
from atoll.params import Params
from atoll.privacy.crypto import KeyPair, mask
from atoll.privacy.graph import neighbors, threshold
from atoll.privacy.hidden import RING, SCALE, STEPS, Hidden, Range, range_at
from atoll.privacy.party import (
    RANGE_SUM,
    UPDATE_SUM,
    Memory,
    Party,
    Peer,
    Terms,
    commitment,
    hidden,
    own_seed,
    pair_purpose,
    peer,
    range_ring,
    sums_of,
)
from atoll.privacy.ring import MOST_BITS, Ring, Words, headroom
from atoll.privacy.shamir import SHARE_BYTES, combine
from atoll.stream import Stream

Phase = Generator[Send | Wait | Verdict, Heard | None, Any]
"""A part of an exchange; what it comes to is its return value."""

Read = Callable[[Task, Reply], Any]
"""What a reply says, or the verdict on it. May raise one of DECODING_ERRORS."""


@dataclass(frozen=True)
class SecureAggregation:
    """See `secure_aggregation`."""

    bits: int = 16
    survivors: int | None = None
    colluding: int = 0
    phase_seconds: float = 60.0
    metrics: tuple[str, ...] = ()

    def hide(self, stream: Stream, clients: int, public: Range | None = None, noised: bool = False) -> Stream:
        """A stream with its totals in a ring with room for so many clients."""
        assert stream.aggregate.summable
        inner: Any = stream.aggregate
        how = Hidden(inner, self.bits, clients, public, private_rounding=noised)
        return replace(stream, aggregate=how, bound=None)  # nobody can hold a reply to a bound that nobody can read

    def least(self, cohort: int) -> int:
        """The fewest clients whose sum may be opened, of a cohort of this size: no client's update is a sum."""
        return max(self.survivors or threshold(cohort, self.colluding), self.colluding + 2)

    def attempt(self) -> str:
        """A name that no other attempt at a round has."""
        return secrets.token_hex(8)

    def evaluated(self, clients: int) -> tuple[Stream, ...]:
        """What evaluations add up; nothing where the recipe lets the clients' own held-out losses leave.

        Its range is public, for where a client's largest sum stands would tell its loss; and as fine as sums may be.
        """
        if set(LOSS) <= set(self.metrics):
            return ()
        exact = replace(self, bits=MOST_BITS - headroom(clients))
        return (exact.hide(EVALUATION, clients, public=lambda params: LARGEST_SUM),)

    def party(self, name: str, cohort: int, memory: Memory) -> Party:
        """The client's side, of training and of evaluations, which are held to the same terms."""
        return Party(name, Terms(self.least(cohort), self.colluding), self.metrics, memory)

    def exchange(self, streams: Sequence[Stream], cohort: int) -> MakeExchange:
        """The server's side, of a round or of an evaluation."""

        def make(tasks: Sequence[Task], in_flight: Sequence[Task], receive: Receive, closes: Closes) -> Exchange:
            yield from MaskedRound(self, streams, self.least(cohort), {t.client: t for t in tasks}, receive).run(closes)

        return make


@dataclass
class Member:
    """A client in a masked round, as the server knows it."""

    trained: Reply
    """Without payloads: those are under masks, and come later."""
    public: Peer
    neighbors: list[str] = field(default_factory=list)
    sealed: Mapping[str, str] = field(default_factory=dict)
    """Its shares, by the neighbor who can open them."""


@dataclass
class MaskedRound:
    """The server's side of one round, in the order of `run`."""

    settings: SecureAggregation
    streams: Sequence[Stream]
    least: int
    tasks: Mapping[str, Task]
    """To train, by client."""
    receive: Receive
    now: float = -math.inf
    members: dict[str, Member] = field(default_factory=dict)
    """Those who are with it still."""
    up: int = 0
    down: int = 0
    """Bytes of the phases, beside params and updates."""
    _began: float = -math.inf

    def run(self, closes: Closes) -> Exchange:
        """The phases one after the other; the round is abandoned when too few are left."""
        for phase, did in ((partial(self.train, closes), "trained"), (self.share, "shared their secrets")):
            yield from phase()
            if (yield from self.too_few(did)):
                return
        scales = yield from self.agree()
        if scales is not None:
            yield from self.add_up(scales)

    def too_few(self, did: str) -> Phase:
        """Whether fewer are left than a sum may be opened of."""
        if len(self.members) >= self.least:
            return False
        yield Abandoned(f"{len(self.members)} clients {did}; a sum of fewer than {self.least} is not opened")
        return True

    def train(self, closes: Closes) -> Phase:
        """Everybody's work, until the closing rule says so; replies bring keys."""
        heard = yield from self.gather(self.tasks, self._keys, closes)
        self.members = {name: Member(*heard[name]) for name in self.tasks if name in heard}

    def _keys(self, task: Task, reply: Reply) -> tuple[Reply, Peer]:
        public = peer(reply.data["keys"])
        wanted = set(sums_of(self.streams))
        if public.masks.keys() != wanted or public.seeds.keys() != wanted:
            raise ValueError(f"keys for {sorted(public.masks)}; {sorted(wanted)} are needed")
        return reply, public

    def share(self) -> Phase:
        """Rosters to all; everybody's sealed shares for its neighbors."""
        around = neighbors(list(self.members))
        for number, (name, member) in enumerate(self.members.items(), 1):
            member.public, member.neighbors = member.public._replace(number=number), around[name]
        asked = {
            name: self.ask("share", name, clients=len(self.members), roster=self._roster(name)) for name in self.members
        }
        heard = yield from self.gather(asked, self._sealed)
        for name, sealed in heard.items():
            self.members[name].sealed = sealed
        self._keep(heard)

    def _roster(self, name: str) -> dict[str, list[Any]]:
        """The public keys of a client's neighbors, and its own."""
        return {one: self.members[one].public.as_data() for one in (name, *self.members[name].neighbors)}

    def _sealed(self, task: Task, reply: Reply) -> Mapping[str, str]:
        sealed = {str(name): str(one) for name, one in reply.data["shares"].items()}
        if sealed.keys() != set(self.members[task.client].neighbors):
            raise ValueError("shares for others than its neighbors")
        return sealed

    def _keep(self, heard: Mapping[str, Any]) -> None:
        self.members = {name: member for name, member in self.members.items() if name in heard}

    def agree(self) -> Phase:
        """The scale of each stream, or None. Ranges that are not public are found by a masked sum of where they stand."""
        public = {s.name: how.scale(how.public(self._received())) for s in self.streams if (how := hidden(s)).public}
        if RANGE_SUM not in sums_of(self.streams):
            return public
        before, ring, size = self.members, range_ring(len(self.members)), STEPS * len(self.streams)
        words = yield from self.collect(RANGE_SUM, lambda task, reply: unpacked(reply, ring, size))
        if (yield from self.too_few("came with their ranges")):
            return None
        masks = yield from self.unmask(RANGE_SUM, before)
        if masks is None:
            return None
        total = sum(words.values(), np.zeros(size, ring.word)) - masks.sum(RANGE_SUM, size, ring)
        counts = ring.centered(total).reshape(len(self.streams), STEPS)
        if (counts < 0).any() or (counts.sum(axis=1) != len(words)).any():
            yield Abandoned("the sum of the clients' ranges is not one of counts: one of them sent something else")
            return None
        tops = {s.name: range_at(int(np.flatnonzero(row)[-1])) for s, row in zip(self.streams, counts, strict=True)}
        return {s.name: hidden(s).scale(tops[s.name]) for s in self.streams} | public

    def _received(self) -> dict[str, Params]:
        """The params of each stream, as the broadcast says them to the clients; of one that does not go down, its zeros."""
        sent = next(iter(self.tasks.values())).broadcast.payloads
        return {s.name: s.down.decode(sent[s.name]) if s.name in sent else s.initial({}) for s in self.streams}

    def add_up(self, scales: Mapping[str, float]) -> Phase:
        """What comes under masks is added as it comes; when all are heard, what is left of the masks is taken off."""
        before = self.members
        yield from self.collect(UPDATE_SUM, partial(self._take, scales), scales=scales)
        if (yield from self.too_few("sent their update")):
            return
        masks = yield from self.unmask(UPDATE_SUM, before)
        if masks is None:
            return
        received = self._received()
        off = {s.name: Contribution(_off(s, received[s.name], masks, scales[s.name]), {}) for s in self.streams}
        yield Opened(off, len(self.members), len(before) - len(self.members), self.up, self.down)

    def _take(self, scales: Mapping[str, float], task: Task, reply: Reply) -> Verdict:
        """A masked update, as the reply to the training that it comes from."""
        for name, scale in scales.items():
            if (theirs := float(reply.payloads[name].main[SCALE])) != scale:
                raise ValueError(f"the scale {theirs:g} for '{name}'; {scale:g} was agreed on")
        trained = self.members[task.client].trained
        return self.receive(replace(trained, payloads=reply.payloads, seconds=trained.seconds + reply.seconds))

    def collect(self, purpose: str, read: Read, **terms: Any) -> Phase:
        """Everybody's masked input to a sum, by client. The first sum brings the sealed shares along."""
        first = purpose == sums_of(self.streams)[0]
        asked = {}
        for name, member in self.members.items():
            peers = [one for one in member.neighbors if one in self.members]
            shares = {one: self.members[one].sealed[name] for one in peers if first}
            about = {"sum": purpose, "clients": len(self.members), "peers": [name, *peers], "shares": shares, **terms}
            asked[name] = self.ask("mask", name, purpose, **about)
        heard = yield from self.gather(asked, read)
        self._keep(heard)
        return heard

    def unmask(self, purpose: str, before: Mapping[str, Member]) -> Phase:
        """What masks are left in a sum of the members, of those `before` who had agreed on masks; None: nobody can say."""
        asked = {}
        for name, member in self.members.items():
            peers = [one for one in (name, *member.neighbors) if one in before]
            survivors = [one for one in peers if one in self.members]
            lost = [one for one in peers if one not in self.members]
            about = {"sum": purpose, "clients": len(self.members), "survivors": survivors, "lost": lost}
            asked[name] = self.ask("unmask", name, purpose, **about)
        shares = Shares(
            {name: threshold(1 + len(one.neighbors), self.settings.colluding) for name, one in before.items()}
        )
        yield from self.gather(
            asked, partial(self._shares, shares), lambda came: -math.inf if shares.enough else self.end
        )
        try:
            return Masks(purpose, frozenset(self.members), before, shares)
        except ValueError as error:
            yield Abandoned(f"the masks stay on: {error}")
            return None

    def _shares(self, shares: Shares, task: Task, reply: Reply) -> None:
        asked = {*task.data["survivors"], *task.data["lost"]}
        given = {str(name): b64decode(one) for name, one in reply.data["shares"].items()}
        if given.keys() != asked or any(len(one) != SHARE_BYTES for one in given.values()):
            raise ValueError("not the shares that were asked for")
        shares.add(self.members[task.client].public.number, given)

    def ask(self, kind: str, name: str, step: str = "", **about: Any) -> Task:
        """A phase's task for a client. It carries no params."""
        task = self.tasks[name]
        sent = Broadcast(task.broadcast.round, {})
        variant = f"{task.variant}:{step}" if step else task.variant
        return replace(task, kind=kind, broadcast=sent, sent=self.now, data=about, variant=variant)

    @property
    def end(self) -> float:
        """When a phase that began last is over, by the fleet's clock."""
        return self._began + self.settings.phase_seconds

    def gather(self, asked: Mapping[str, Task], read: Read, closes: Closes | None = None) -> Phase:
        """Sends tasks; what `read` makes of each reply, by client, until all are heard or the closing rule says so.

        Those who fail are told of as clients whose training does not count; while unmasking, theirs counts all the same.
        """
        self._began = self.now
        self.down += sum(_size(task.data) for task in asked.values())
        yield Send(list(asked.values()))
        out, heard, came = {task.id: task for task in asked.values()}, dict[str, Any](), list[float]()
        while out and self.now < (until := closes(came) if closes else self.end):
            answer = yield Wait(frozenset(out), until)
            assert answer is not None
            event, self.now = answer
            if event is None:
                continue
            task = out.pop(event.task, None)
            said = _not_expected(event) if task is None else self._read(task, event, read)
            failed = isinstance(said, Refused | Dropped)
            if not failed:
                came.append(self.now)
                heard[event.client] = None if isinstance(said, Accepted) else said
            if isinstance(said, Accepted) or (failed and event.task.partition(":")[0] != "unmask"):
                yield said
        for task in out.values() if closes is None else ():
            yield Dropped(task.client, self.tasks[task.client].id, f"no answer while clients {task.kind}")
        return heard

    def _read(self, task: Task, event: Reply | Dropped, read: Read) -> Any:
        trained = self.tasks[task.client].id
        phase = "" if task.id == trained else f"{task.kind}: "
        if isinstance(event, Dropped):
            return Dropped(task.client, trained, phase + event.reason)
        self.up += _size(event.data) + (event.nbytes if task.data.get("sum") == RANGE_SUM else 0)
        try:
            check_sender(task, event)
            return read(task, event)
        except DECODING_ERRORS as error:
            reason = str(error) or type(error).__name__
            return Refused(task.client, trained, phase + reason, event.nbytes, event.lost_state)


def _not_expected(event: Reply | Dropped) -> Refused:
    return Refused(event.client, event.task, "not expected: answered before, or never asked")


def _size(data: Mapping[str, Any]) -> int:
    """Bytes of what a task or a reply says beside its tensors."""
    return len(json.dumps(data)) if data else 0


def unpacked(reply: Reply, ring: Ring, count: int) -> Words:
    """The masked ranges of a client. Raises one of DECODING_ERRORS."""
    return ring.unpack(reply.payloads[RANGE_SUM].main[RING].numpy(), count)


def _off(stream: Stream, received: Params, masks: Masks, scale: float) -> Params:
    """A vector that takes the masks off a stream's total."""
    how = hidden(stream)
    count = how.count(how.inner.init(received))
    words = np.zeros(count, how.ring.word) - masks.sum(stream.name, count, how.ring)
    return {RING: torch.from_numpy(how.ring.pack(words)), SCALE: torch.tensor(scale, dtype=torch.float64)}


class Shares:
    """Shares of secrets, as they come in: `needed` of each client's give its secret."""

    def __init__(self, needed: Mapping[str, int]) -> None:
        self.needed = needed
        self.held: dict[str, dict[int, bytes]] = {name: {} for name in needed}
        self._missing = len(needed)

    @property
    def enough(self) -> bool:
        """Whether every secret can be put together."""
        return self._missing == 0

    def add(self, number: int, given: Mapping[str, bytes]) -> None:
        """What one client gave: for each neighbor a share."""
        for name, one in given.items():
            self.held[name][number] = one
            self._missing -= len(self.held[name]) == self.needed[name]

    def secret(self, name: str, fits: Callable[[bytes], bool]) -> bytes:
        """A client's secret. Some of the shares may be wrong as long as enough right ones follow each other.

        Raises ValueError if it cannot be put together.
        """
        held, needed = list(self.held[name].items()), self.needed[name]
        if len(held) < needed:
            raise ValueError(f"{len(held)} clients gave their share of what hides {name}; {needed} are needed")
        for first in range(len(held)):
            chosen = dict(islice(held[first:] + held[:first], needed))
            try:
                if fits(secret := combine(chosen)):
                    return secret
            except ValueError:
                continue
        raise ValueError(f"the shares of what hides {name} do not belong together: a client sent a wrong one")


class Masks:
    """What hides a sum still when all members' inputs are in: their own masks, and those shared with who was lost."""

    def __init__(self, purpose: str, members: frozenset[str], before: Mapping[str, Member], shares: Shares) -> None:
        """Raises ValueError where the shares do not give the secrets."""
        self.members, self.before, self.purpose = members, before, purpose
        self.seeds = {name: shares.secret(name, partial(self._is_seed, name)) for name in members}
        self.keys = {name: shares.secret(name, partial(self._is_key, name)) for name in before.keys() - members}

    def _is_seed(self, name: str, secret: bytes) -> bool:
        return commitment(secret) == self.before[name].public.seeds[self.purpose]

    def _is_key(self, name: str, secret: bytes) -> bool:
        return KeyPair(secret).public == self.before[name].public.masks[self.purpose]

    def sum(self, stream: str, count: int, ring: Ring) -> Words:
        """All of them together, for one stream: words modulo the ring."""
        total = np.zeros(count, ring.word)
        for seed in self.seeds.values():
            total += mask(own_seed(seed, stream), count, ring)
        for name, key in self.keys.items():
            lost, pair = self.before[name], KeyPair(key)
            for other in self.members.intersection(lost.neighbors):
                public = self.before[other].public
                words = mask(pair.agree(public.masks[self.purpose], pair_purpose(stream)), count, ring)
                (np.add if public.number < lost.public.number else np.subtract)(total, words, out=total)
        return total


def in_the_clear() -> None:
    """The server sees every update by itself."""


def secure_aggregation(
    bits: Annotated[int, Ge(4), Le(32)] = 16,
    survivors: Annotated[int, Ge(2)] | None = None,
    colluding: Annotated[int, Ge(0)] = 0,
    phase_seconds: Annotated[float, Gt(0)] = 60.0,
    metrics: Sequence[str] = (),
) -> SecureAggregation:
    """The server learns the sum of a round's updates and nothing of any one; clients may drop out in any phase.

    Source: Bonawitz et al. 2017 (CCS 2017); above 64 clients the sparse graph of Bell et al. 2020 (CCS 2020).

    Args:
        bits: of one client's value in the sum, with one scale for all clients; a sum of n takes ceil(log2 n) more.
        survivors: the fewest clients whose sum is opened; by default just over half of those who are asked.
        colluding: how many clients may tell the server all they know without harm to the others.
        phase_seconds: how long a phase after the training waits for those who do not answer.
        metrics: of a client by itself, that may leave all the same: none by default. With `loss`, `standard_error` and
            `samples` among them, evaluations are told client by client, and no longer summed under masks.
    """
    return SecureAggregation(bits, survivors, colluding, phase_seconds, tuple(metrics))
