"""A client's side of secure aggregation: it keeps its update, and answers what each phase asks, or refuses.

    train    the work is done and kept; its reply has public keys alone
    share    roster of neighbors -> shares of this attempt's secrets, sealed for each of them
    mask     sealed shares from the others -> the update in the ring, under its masks
    unmask   who came through -> for each neighbor one share of one of its two secrets

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017), Figure 4
without its optional step; our `seed` is their b_u, `mask` their s_u^SK, `sealing` their c_u^SK. All secrets are those of one
attempt at one round and are forgotten with it. A client answers each phase of an attempt once.
"""

from __future__ import annotations

import secrets
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from atoll.aggregate.base import Weights
from atoll.exchange import Task, WorkFailed
from atoll.keys import rng
from atoll.params import Params
from atoll.privacy.crypto import KEY_BYTES, KeyPair, derive, mask, new_key, seal, unseal
from atoll.privacy.graph import degree, threshold
from atoll.privacy.hidden import RING, SCALE, STEPS, Hidden, rung
from atoll.privacy.ring import Ring, Words, headroom
from atoll.privacy.shamir import SHARE_BYTES, share
from atoll.stream import Stream
from atoll.transforms.chain import Payload

UPDATE_SUM, RANGE_SUM = "update", "range"
"""The sums of a round: the updates', and before it that of where the clients' largest values stand."""


def range_ring(clients: int) -> Ring:
    """That of the sum of ranges, where a client adds ones."""
    return Ring(2 + headroom(clients))


class Terms(NamedTuple):
    """What a client holds the server to; both ends read it from the plan."""

    survivors: int
    """The fewest clients whose sum may be opened."""
    colluding: int
    """How many clients may tell the server all they know."""


class Peer(NamedTuple):
    """A neighbor's public part."""

    number: int
    """Where its shares are taken of a polynomial."""
    sealing: bytes
    masks: Mapping[str, bytes]
    """By sum."""
    seeds: Mapping[str, bytes]
    """By sum: the commitment to the seed of its own mask, by which a wrong share shows."""

    def as_data(self) -> list[Any]:
        """For a roster."""
        return [self.number, self.sealing.hex(), *({n: key.hex() for n, key in part.items()} for part in self[2:])]


def peer(written: Any) -> Peer:
    """Back from `as_data`. Raises ValueError or TypeError."""
    number, sealing, *parts = written
    masks, seeds = ({str(sum): bytes.fromhex(key) for sum, key in part.items()} for part in parts)
    found = Peer(int(number), bytes.fromhex(sealing), masks, seeds)
    each = (found.sealing, *masks.values(), *seeds.values())
    if any(len(key) != KEY_BYTES for key in each) or not 1 <= found.number < 2**32:
        raise ValueError(f"keys of {KEY_BYTES} bytes and a number are needed")
    return found


@dataclass
class Secrets:
    """Of one sum in one attempt."""

    mask: KeyPair
    """Agrees with each neighbor on the mask that one of the two adds and the other subtracts."""
    seed: bytes
    """Of the mask that this client adds by itself."""
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """By neighbor: its shares of (seed, mask key)."""
    peers: frozenset[str] = frozenset()
    """Those with whom masks are shared, once the masked input is given."""
    opened: bool = False
    """Whether shares were given away."""


@dataclass
class Attempt:
    """What a client knows of one attempt at a round, or at an evaluation."""

    kind: str
    """Of the work: train or evaluate."""

    totals: dict[str, Params]
    """Per stream: what this client adds to the total."""
    received: Mapping[str, Params]
    """Params per stream, as the broadcast says them."""
    key: int
    streams: Sequence[Stream]
    """What the totals are of."""
    sums: dict[str, Secrets]
    sealing: KeyPair = field(default_factory=new_key)
    roster: dict[str, Peer] = field(default_factory=dict)


@dataclass
class Memory:
    """What a client knows between the phases of a run's rounds, as long as its process lives."""

    attempts: dict[str, Attempt] = field(default_factory=dict)
    """By name."""
    opened: int = -1
    """The last round whose sum of updates it has helped to open."""


@dataclass(frozen=True)
class Party:
    """See the module's text."""

    name: str
    terms: Terms
    metrics: tuple[str, ...]
    """Its own, that may leave."""
    memory: Memory

    @property
    def phases(self) -> Mapping[str, Callable[[Attempt, Task], dict[str, Any]]]:
        """Kinds of tasks that are answered here, and by what."""
        return {"share": self.share, "mask": self.masked, "unmask": self.unmask}

    def keep(
        self,
        task: Task,
        streams: Sequence[Stream],
        received: Mapping[str, Params],
        payloads: Mapping[str, Payload],
        weights: Weights,
    ) -> Any:
        """Keeps what the work came to until masks are agreed on; gives the public keys."""
        again = task.kind == "train" and task.broadcast.round <= self.memory.opened
        if again and not all(hidden(s).private_rounding for s in streams):
            raise WorkFailed(
                f"the sum of round {task.broadcast.round} was opened before: a second one, of others, would tell them apart"
            )
        totals = {s.name: hidden(s).inner.alone(payloads[s.name].main, weights) for s in streams}
        sums = {sum: Secrets(new_key(), secrets.token_bytes(KEY_BYTES)) for sum in sums_of(streams)}
        attempt = Attempt(task.kind, totals, received, task.key, streams, sums)
        self.memory.attempts = {task.variant: attempt}  # of any other nothing is needed, and nothing shall be known
        masks = {sum: one.mask.public for sum, one in sums.items()}
        seeds = {sum: commitment(one.seed) for sum, one in sums.items()}
        return {"keys": Peer(1, attempt.sealing.public, masks, seeds).as_data()}

    def answer(self, task: Task) -> dict[str, Any]:
        """The fields of a reply. Raises WorkFailed for what is not answered, with the reason."""
        name = task.variant.partition(":")[0]
        attempt = self.memory.attempts.get(name)
        if attempt is None:
            raise WorkFailed(f"the keys of attempt {name} are not here (any more)")
        try:
            return self.phases[task.kind](attempt, task)
        except (ValueError, LookupError, TypeError) as error:
            raise WorkFailed(f"{task.kind}: {error}") from error

    def share(self, attempt: Attempt, task: Task) -> dict[str, Any]:
        """Splits this attempt's secrets among the neighbors."""
        if attempt.roster:
            raise ValueError("shares were given away before")
        roster = {str(name): peer(written) for name, written in task.data["roster"].items()}
        self._check_roster(attempt, roster, int(task.data["clients"]))
        attempt.roster = roster
        points = {name: one.number for name, one in roster.items()}
        needed = threshold(len(roster), self.terms.colluding)
        parts: dict[str, list[bytes]] = {name: [] for name in roster}
        for sum in attempt.sums:
            for secret in (attempt.sums[sum].seed, attempt.sums[sum].mask.private):
                shares = share(secret, list(points.values()), needed)
                for name, x in points.items():
                    parts[name].append(shares[x])
        self._hold(attempt, self.name, b"".join(parts.pop(self.name)))
        sealed = {name: self._seal(attempt, name, b"".join(part)) for name, part in parts.items()}
        return {"data": {"shares": sealed}}

    def _check_roster(self, attempt: Attempt, roster: Mapping[str, Peer], clients: int) -> None:
        """Raises ValueError for a roster under which this client's update would not be hidden."""
        mine = roster.get(self.name)
        own = {sum: one.mask.public for sum, one in attempt.sums.items()}
        if mine is None or (mine.sealing, dict(mine.masks)) != (attempt.sealing.public, own):
            raise ValueError("the roster has other keys of mine than I sent")
        keys = [key for one in roster.values() for key in (one.sealing, *one.masks.values())]
        if len(set(keys)) < len(keys) or len({one.number for one in roster.values()}) < len(roster):
            raise ValueError("the roster has a key or a number twice: somebody replays another's")
        if any(one.masks.keys() != own.keys() for one in roster.values()):
            raise ValueError(f"the roster lacks keys for {' or '.join(own)}")
        if clients < self.terms.survivors or len(roster) != degree(clients) + 1:
            raise ValueError(
                f"a roster of {len(roster)} among {clients} clients; I ask for {degree(clients) + 1} of at least"
                f" {self.terms.survivors}"
            )

    def _seal(self, attempt: Attempt, to: str, shares: bytes) -> str:
        key = attempt.sealing.agree(attempt.roster[to].sealing, f"shares/{self.name}/{to}")
        return b64encode(seal(key, shares, f"{self.name} to {to}")).decode()

    def _hold(self, attempt: Attempt, name: str, shares: bytes) -> None:
        """Keeps a neighbor's shares: of each sum's seed, then of its mask key."""
        if len(shares) != 2 * SHARE_BYTES * len(attempt.sums):
            raise ValueError(f"{len(shares)} bytes of shares from {name}")
        each = [shares[at : at + SHARE_BYTES] for at in range(0, len(shares), SHARE_BYTES)]
        for i, sum in enumerate(attempt.sums):
            attempt.sums[sum].held[name] = (each[2 * i], each[2 * i + 1])

    def masked(self, attempt: Attempt, task: Task) -> dict[str, Any]:
        """This client's input to a sum, hidden by its own mask and by those that it shares with its neighbors."""
        sum, clients = str(task.data["sum"]), int(task.data["clients"])
        own = attempt.sums[sum]
        if own.peers:
            raise ValueError("the masked input was given before")
        for name, sealed in task.data.get("shares", {}).items():
            key = attempt.sealing.agree(attempt.roster[name].sealing, f"shares/{name}/{self.name}")
            self._hold(attempt, name, unseal(key, b64decode(sealed), f"{name} to {self.name}"))
        peers = frozenset(map(str, task.data["peers"]))
        self._check_peers(attempt, own, peers, clients)
        own.peers = peers
        if sum == RANGE_SUM:
            return self._masked_ranges(attempt, peers, clients)
        return self._masked_update(attempt, peers, task.data["scales"])

    def _check_peers(self, attempt: Attempt, own: Secrets, peers: frozenset[str], clients: int) -> None:
        if self.name not in peers or not peers <= own.held.keys():
            raise ValueError("masks are to be shared with clients whose shares I do not hold")
        least = threshold(len(attempt.roster), self.terms.colluding)
        if len(peers) < least or clients < self.terms.survivors:
            raise ValueError(
                f"{len(peers)} neighbors of {clients} clients are left; I ask for at least {least} of"
                f" {self.terms.survivors}"
            )

    def _masked_ranges(self, attempt: Attempt, peers: Collection[str], clients: int) -> dict[str, Any]:
        """A one where the largest value of each stream stands, zeros beside it."""
        ring = range_ring(clients)
        words = ring.of(torch.zeros(STEPS * len(attempt.streams), dtype=torch.int64).numpy())
        for i, stream in enumerate(attempt.streams):
            words[i * STEPS + rung(hidden(stream).largest(attempt.totals[stream.name]))] = 1
        words += self._masks(attempt, RANGE_SUM, RANGE_SUM, peers, len(words), ring)
        return {"payloads": {RANGE_SUM: Payload({RING: torch.from_numpy(ring.pack(words))})}}

    def _masked_update(self, attempt: Attempt, peers: Collection[str], scales: Mapping[str, float]) -> dict[str, Any]:
        payloads = {}
        for stream in attempt.streams:
            how, total, scale = hidden(stream), attempt.totals[stream.name], float(scales[stream.name])
            if how.public is not None and scale != how.scale(how.public(attempt.received)):
                raise ValueError(f"the scale {scale:g} for '{stream.name}' is not the plan's")
            words = how.words(total, scale, rng(attempt.key, "ring", stream.name))
            words += self._masks(attempt, UPDATE_SUM, stream.name, peers, len(words), how.ring)
            main = {RING: torch.from_numpy(how.ring.pack(words)), SCALE: torch.tensor(scale, dtype=torch.float64)}
            payloads[stream.name] = Payload(main)
        attempt.totals.clear()
        return {"payloads": payloads}

    def _masks(self, attempt: Attempt, sum: str, purpose: str, peers: Collection[str], count: int, ring: Ring) -> Words:
        """Its own mask, and with each neighbor one that the first of the two by number adds and the other subtracts."""
        own, mine = attempt.sums[sum], attempt.roster[self.name].number
        total = mask(own_seed(own.seed, purpose), count, ring).copy()
        for name in peers:
            if name != self.name:
                other = attempt.roster[name]
                words = mask(own.mask.agree(other.masks[sum], pair_purpose(purpose)), count, ring)
                (np.add if mine < other.number else np.subtract)(total, words, out=total)
        return total

    def unmask(self, attempt: Attempt, task: Task) -> dict[str, Any]:
        """For each neighbor one share: of its own mask's seed if it came through, of its mask key if it was lost."""
        sum = str(task.data["sum"])
        own = attempt.sums[sum]
        survivors, lost = ({str(name) for name in task.data[key]} for key in ("survivors", "lost"))
        if own.opened:
            raise ValueError("shares were given away before: no list of survivors after the first is answered")
        if survivors & lost:
            raise ValueError("both secrets of a client are asked for")
        if not own.peers or survivors | lost != own.peers or self.name not in survivors:
            raise ValueError("the list of survivors does not fit those with whom I share masks")
        least = threshold(len(attempt.roster), self.terms.colluding)
        if len(survivors) < least or int(task.data["clients"]) < self.terms.survivors:
            raise ValueError(
                f"a sum of {task.data['clients']} clients, {len(survivors)} of them my neighbors; I ask for at least"
                f" {self.terms.survivors} and {least}"
            )
        own.opened = True
        given = {name: own.held[name][0 if name in survivors else 1] for name in own.peers}
        own.held.clear()
        if sum == UPDATE_SUM and attempt.kind == "train":
            self.memory.opened = task.broadcast.round
        return {"data": {"shares": {name: b64encode(one).decode() for name, one in given.items()}}}


def sums_of(streams: Sequence[Stream]) -> tuple[str, ...]:
    """The sums of a conversation: where all ranges are public nobody needs to agree on them."""
    return (UPDATE_SUM,) if all(hidden(stream).public for stream in streams) else (RANGE_SUM, UPDATE_SUM)


def hidden(stream: Stream) -> Hidden:
    """How a stream's totals are hidden, in a plan with secure aggregation."""
    assert isinstance(stream.aggregate, Hidden)
    return stream.aggregate


def own_seed(seed: bytes, purpose: str) -> bytes:
    """Of a client's own mask for one stream of a sum."""
    return derive(seed, f"own/{purpose}")


def commitment(seed: bytes) -> bytes:
    """What a client says of its seed beforehand: it tells nothing, and no other seed fits."""
    return derive(seed, "commitment")


def pair_purpose(purpose: str) -> str:
    """What two clients agree on a key for."""
    return f"pair/{purpose}"
