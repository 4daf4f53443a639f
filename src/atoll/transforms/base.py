"""A transform: one step of the chain that an update (or a broadcast) passes on its way.

    init(like)                 -> state          what the sender keeps between rounds; {} for most
    encode(state, x, key)      -> state, Encoded main: what the next transform goes on with; side: what it leaves alone
    decode(encoded)            -> x              at the receiver; needs nothing but what travelled

Functions of explicit state: the sender decides when a new state counts (see client.py), nothing is kept inside. Traits say
what a transform preserves; plans that would break on them are refused when they are built. (After optax, whose
GradientTransformation is the same idea on one machine.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from atoll.params import Params


@dataclass(frozen=True)
class Traits:
    """What a transform preserves. The contract suite checks each claim by experiment (tests/contract)."""

    linear: bool = False
    """encode(a x + b y) = a encode(x) + b encode(y), key held fixed."""
    summable: bool = False
    """decode(sum of payloads) = sum of decoded payloads: the server may decode once, on the sum."""
    fixed_support: bool = False
    """Every client sends the same coordinates."""
    unbiased: bool = False
    """The mean of decode(encode(x)) over keys is x."""
    client_state: bool = False
    """The sender keeps state between rounds."""
    bounded: bool = False
    """The Euclidean norm of what leaves is bounded by a public constant."""


class Encoded(NamedTuple):
    """What one transform makes: `main` goes on through the chain, `side` travels as it is."""

    main: Params
    side: Params


class Transform(Protocol):
    """One step of a chain. Implementations are small frozen dataclasses, one factory each."""

    @property
    def traits(self) -> Traits:
        """What it preserves."""
        ...

    def init(self, like: Params) -> Params:
        """The state before the first round, for values of the names and shapes of `like`."""
        ...

    def encode(self, state: Params, x: Params, key: int) -> tuple[Params, Encoded]:
        """At the sender. Returns the state to keep if the receiver accepts, and what travels."""
        ...

    def decode(self, encoded: Encoded) -> Params:
        """At the receiver. Raises ValueError for a payload that no sender of this transform makes."""
        ...


class Stateless:
    """For transforms that keep nothing."""

    def init(self, like: Params) -> Params:
        """Nothing."""
        return {}
