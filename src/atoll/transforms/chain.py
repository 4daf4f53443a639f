"""A chain of transforms, which is what a stream has up and down.

The sender encodes front to back, the receiver decodes back to front. The chain splits where its transforms stop being
summable: the tail is decoded reply by reply, the summable head once on the sum (architecture: that split is where secure
aggregation stands).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from atoll.keys import key as derive
from atoll.params import Params, nested, under
from atoll.transforms.base import Encoded, Traits, Transform


class Payload(NamedTuple):
    """An encoded update: the last transform's main part, and each transform's side part in order."""

    main: Params
    sides: tuple[Params, ...] = ()


@dataclass(frozen=True)
class Chain:
    """Transforms in the order of encoding. `Chain()` sends values as they are.

    >>> import torch
    >>> from atoll.transforms.clip import clip
    >>> chain = Chain((clip(norm=1.0),))
    >>> state, payload = chain.encode({}, {"w": torch.tensor([3.0, 4.0])}, key=0)
    >>> chain.decode(payload)
    {'w': tensor([0.6000, 0.8000])}
    """

    transforms: tuple[Transform, ...] = ()

    @property
    def split(self) -> int:
        """How many transforms at the front are summable: these are decoded on the sum."""
        return len(list(takewhile(lambda transform: transform.traits.summable, self.transforms)))

    @property
    def traits(self) -> Traits:
        """What the whole chain preserves."""
        each = [transform.traits for transform in self.transforms]
        return Traits(
            linear=all(t.linear for t in each),
            summable=all(t.summable for t in each),
            fixed_support=all(t.fixed_support for t in each),
            unbiased=all(t.unbiased for t in each),
            client_state=any(t.client_state for t in each),
            bounded=any(t.bounded for t in each),
        )

    def init(self, like: Params) -> Params:
        """The sender's state before the first round: each transform's, under its position."""
        state: Params = {}
        key = 0
        for i, transform in enumerate(self.transforms):
            state |= nested(str(i), transform.init(like))
            if i + 1 < len(self.transforms):
                _, (like, _) = transform.encode(transform.init(like), like, key)
        return state

    def encode(self, state: Params, x: Params, key: int) -> tuple[Params, Payload]:
        """At the sender: the state to keep if accepted, and the payload."""
        after: Params = {}
        sides: list[Params] = []
        for i, transform in enumerate(self.transforms):
            kept, (x, side) = transform.encode(under(str(i), state), x, derive(key, i))
            after |= nested(str(i), kept)
            sides.append(side)
        return after, Payload(x, tuple(sides))

    def decode_reply(self, payload: Payload) -> Params:
        """Undoes the tail: what must be undone before payloads are summed."""
        return self._undo(payload.main, payload.sides, range(len(self.transforms) - 1, self.split - 1, -1))

    def decode_sum(self, total: Params) -> Params:
        """Undoes the summable head, once, on the sum."""
        return self._undo(total, ({},) * self.split, range(self.split - 1, -1, -1))

    def decode(self, payload: Payload) -> Params:
        """Undoes the whole chain, for a receiver that sums nothing."""
        return self.decode_sum(self.decode_reply(payload))

    def _undo(self, x: Params, sides: Sequence[Params], order: range) -> Params:
        if len(sides) < len(order):
            raise ValueError(f"{len(sides)} side parts for {len(self.transforms)} transforms")
        for i in order:
            x = self.transforms[i].decode(Encoded(x, sides[i]))
        return x
