"""What every mechanism of differential privacy is to a plan, whatever its unit is: a client, or an example of one.

A mechanism says which releases a round makes, by client; everything else about the account is here: entries for the ledger,
epsilon of what was entered, epsilon of rounds to come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from atoll.params import Params
from atoll.privacy.accounting import Release, worst
from atoll.privacy.ledger import Entry, spent
from atoll.stream import Stream

Where = Literal["central", "local", "distributed", "examples"]
Samples = Mapping[str, int]
"""Training samples by client; empty before data are read."""


@dataclass(frozen=True)
class Mechanism:
    """What a recipe says of privacy; see `central`, `local`, `distributed`, `examples`."""

    where: Where
    clip: float
    delta: float
    epsilon: float | None
    noise_multiplier: float | None
    quantile: float | None = None
    holders: Mapping[str, float] = field(default_factory=dict)
    """By modality, the share of the clients that hold it: public, as the recipe says it."""

    @property
    def unit(self) -> Literal["client", "example"]:
        """Whose presence it hides."""
        return "example" if self.where == "examples" else "client"


class Protection(Protocol):
    """A mechanism in a plan."""

    @property
    def mechanism(self) -> Mechanism:
        """As the recipe says it."""
        ...

    @property
    def noise_multiplier(self) -> float:
        """The noise's standard deviation over what one unit can change."""
        ...

    @property
    def slack(self) -> float:
        """Of delta, what a round takes beside its releases."""
        ...

    def releases(self, samples: Samples) -> Mapping[str, Release]:
        """Of one round, by whose data they are of; nothing where that takes samples that are not known yet."""
        ...

    def fits(self, samples: Samples) -> None:
        """Raises AtollError where the data, once read, do not carry what the recipe asks for."""
        ...

    def streams(self, streams: Sequence[Stream]) -> tuple[Stream, ...]:
        """What travels, with what the server does to sums."""
        ...

    def range(self, stream: str) -> Callable[[Mapping[str, Params]], float] | None:
        """What bounds a client's contribution in a ring, from the broadcast; None: the clients say how large theirs are."""
        ...

    def guarded(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """A client's work, with what the mechanism does to its result."""
        ...


def entry(protection: Protection, run: str, plan: str, round: int, samples: Samples) -> Entry:
    """What the ledger holds of a round."""
    of = protection.releases(samples)
    return Entry(run, plan, round, protection.mechanism.unit, tuple(of.values()), tuple(of))


SLACK_SHARE = 1e-3
"""Of delta, what the rounding of noise may take over a whole run."""


def beside_rounding(protection: Protection, rounds: int, at: Callable[[float], float]) -> float:
    """Epsilon `at` what is left of delta beside rounding, which takes (1 + exp(epsilon)) slack a round; infinite if more."""
    delta = protection.mechanism.delta
    if not protection.slack:
        return at(delta)
    found = at(delta * (1 - SLACK_SHARE))
    taken = rounds * protection.slack * (1 + math.exp(min(found, 700.0)))
    return found if taken <= SLACK_SHARE * delta else math.inf


def epsilon_of(protection: Protection, entries: Sequence[Entry]) -> float:
    """Of what a ledger holds."""
    return beside_rounding(protection, len(entries), lambda delta: spent(entries, delta))


class Promise(NamedTuple):
    """What a number of rounds comes to, for the client whose data are told of most."""

    epsilon: float
    client: str
    """Empty: it is the same for all."""
    release: Release
    """A round's."""


def promise(protection: Protection, rounds: int, samples: Samples) -> Promise | None:
    """The largest epsilon after so many rounds; None before the data that it depends on are known."""
    of = protection.releases(samples)
    if not of:
        return None
    all_rounds = {name: [replace(one, count=rounds * one.count)] for name, one in of.items()}
    client, _ = worst(all_rounds, protection.mechanism.delta)
    largest = beside_rounding(protection, rounds, lambda delta: worst(all_rounds, delta)[1])
    return Promise(largest, client, of[client])
