"""A total that nobody can read before its masks are off: the words of a ring in the place of numbers.

What one client adds to a total (its weighted update, and its weights) becomes one vector of words:

    [ round(weight x value / scale) for every value | the digits of each weight in fixed point ]        modulo 2^bits

Rounding is stochastic, as in QSGD (Alistarh et al. 2017, arXiv 1610.02132): the mean of a level is value / scale.

The scale is common to all clients of a round, so that words may be summed; it is either public (a clip and noise bound
the values) or agreed upon in the round, by a masked sum of its own (see masks.py). Weights are exact: their digits are so
small that a sum of them cannot overflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.aggregate.base import WEIGHT, Summable, Weights
from atoll.params import Params, nested, under
from atoll.privacy.noise import uniform
from atoll.privacy.ring import Ring, Words, headroom

RING, SCALE, LIKE = "ring", "scale", "like"

Range = Callable[[Mapping[str, Params]], float]
"""What the broadcast says (params per stream) -> the largest value that a client's total has."""

FLOAT_BITS = 16
"""Up to so many bits, float32 has enough digits for a level and its fraction."""

WEIGHT_BITS = 32
WEIGHT_UNIT = 2.0**-8
"""Weights are multiples of this, up to 2^24."""


@dataclass(frozen=True)
class Hidden:
    """An aggregator around another one, whose totals it keeps in a ring until they are opened."""

    inner: Summable
    bits: int
    """Of one client's value, its sign included."""
    clients: int
    """The most that may be summed."""
    public: Range | None = None
    """The largest value that a client's may have; None: agreed upon in each round."""
    private_rounding: bool = False
    """Whether rounding must not be repeatable: it is part of what hides a value."""
    summable = True

    @cached_property
    def ring(self) -> Ring:
        """With room for the sum of all clients."""
        return Ring(self.bits + headroom(self.clients))

    @property
    def top(self) -> int:
        """The largest level of one client."""
        return (1 << (self.bits - 1)) - 1

    @property
    def digits(self) -> int:
        """Words that a weight takes."""
        return -(-WEIGHT_BITS // (self.bits - 1))

    def groups(self, like: Params) -> set[str]:
        """None: weights are in the vector."""
        return set()

    def vector(self, like: Params) -> Params:
        """The ring's words, packed, and the scale."""
        size = self.ring.packed(self.count(self.inner.init(_shapes(like))))
        return {RING: torch.empty(size, dtype=torch.uint8, device="meta"), SCALE: torch.empty((), dtype=torch.float64)}

    def count(self, total: Params) -> int:
        """Words of a total."""
        return sum(self.digits if name.startswith(WEIGHT) else x.numel() for name, x in total.items())

    def init(self, like: Params) -> Params:
        """Words of zero, and the shapes that they stand for."""
        total = self.inner.init(_shapes(like))
        words = torch.from_numpy(np.zeros(self.count(total), self.ring.word).view(_signed(self.ring)))
        return {RING: words, SCALE: torch.zeros((), dtype=torch.float64)} | nested(LIKE, total)

    def add(self, total: Params, vector: Params, weights: Weights) -> Params:
        """Adds words modulo the ring, in place."""
        words = total[RING].numpy().view(self.ring.word)
        words += self.ring.unpack(vector[RING].numpy(), len(words))
        return total | {SCALE: vector[SCALE]}

    def open(self, total: Params) -> Params:
        """The inner aggregator's total, whose masks are off."""
        levels = self.ring.centered(total[RING].numpy().view(self.ring.word))
        like, at, opened = under(LIKE, total), 0, {}
        for name in _in_order(like):
            count = self.digits if name.startswith(WEIGHT) else like[name].numel()
            part = levels[at : at + count]
            opened[name] = self._weight(part) if name.startswith(WEIGHT) else _values(part, total[SCALE], like[name])
            at += count
        return opened

    def finish(self, total: Params, decode: Callable[[Params], Params]) -> Params:
        """The inner aggregator's update, of an opened total."""
        return self.inner.finish(total, decode)

    def largest(self, total: Params) -> float:
        """The largest value of one client's total; its weights are not looked at."""
        return max(
            (float(x.abs().max()) for n, x in total.items() if not n.startswith(WEIGHT) and x.numel()), default=0.0
        )

    def scale(self, largest: float) -> float:
        """What a level stands for, if no value is larger than this."""
        return max(largest, float(np.finfo(np.float32).tiny)) / self.top

    def words(self, total: Params, scale: float, draw: np.random.Generator) -> Words:
        """One client's total as words. Raises ValueError for a value beyond the scale: a sum would be wrong by far."""
        words, at = np.empty(self.count(total), self.ring.word), 0
        for levels in self._levels(total, scale, draw):
            words[at : at + len(levels)] = self.ring.of(levels)
            at += len(levels)
        return words

    def _levels(self, total: Params, scale: float, draw: np.random.Generator) -> Iterator[NDArray[Any]]:
        for name in _in_order(total):
            if name.startswith(WEIGHT):
                yield self._digits(float(total[name]))
                continue
            yield self._rounded(name, _floats(total[name]), scale, draw)

    def _rounded(self, name: str, values: NDArray[Any], scale: float, draw: np.random.Generator) -> NDArray[Any]:
        """Levels: the value over the scale, up with the probability that keeps the mean. Noise is rounded in secret."""
        if self.private_rounding:
            return np.floor(values.astype(np.float64) / scale + uniform(len(values))).astype(np.int64)
        exact = np.float32 if self.bits <= FLOAT_BITS else np.float64
        levels = draw.random(len(values), dtype=exact)
        levels += values * exact(1 / scale)
        np.floor(levels, out=levels)
        if len(levels) and not max(levels.max(), -levels.min()) <= self.top + 1:
            raise ValueError(f"'{name}' has values beyond the scale")
        np.clip(levels, -self.top, self.top, out=levels)  # the largest value itself may be rounded past the last level
        return levels.astype(np.int32 if self.bits < 32 else np.int64)

    def _digits(self, weight: float) -> NDArray[np.int64]:
        """A weight in fixed point, the lowest digit first."""
        fixed, base = round(weight / WEIGHT_UNIT), 1 << (self.bits - 1)
        if not 0 <= fixed < 1 << WEIGHT_BITS or fixed * WEIGHT_UNIT != weight:
            most = WEIGHT_UNIT * 2**WEIGHT_BITS
            raise ValueError(f"a weight that cannot be hidden; multiples of {WEIGHT_UNIT:g} below {most:g} can")
        return np.array([fixed // base**i % base for i in range(self.digits)], np.int64)

    def _weight(self, digits: NDArray[Any]) -> Tensor:
        """The sum of weights, from the sums of their digits."""
        fixed = sum(int(digit) << (i * (self.bits - 1)) for i, digit in enumerate(digits))
        return torch.tensor(fixed * WEIGHT_UNIT, dtype=torch.float64)


def _floats(x: Tensor) -> NDArray[Any]:
    """Flat, in a type that numpy has."""
    flat = x.detach().reshape(-1)
    numbers: NDArray[Any] = (flat if flat.dtype in (torch.float32, torch.float64) else flat.float()).numpy()
    return numbers


def _in_order(total: Params) -> list[str]:
    """Both ends go through a total in this order."""
    return sorted(total)


def _shapes(like: Params) -> Params:
    """The same without memory."""
    return {name: torch.empty_like(x, device="meta") for name, x in like.items()}


def _values(levels: NDArray[Any], scale: Tensor, like: Tensor) -> Tensor:
    exact = torch.promote_types(like.dtype, torch.float64 if levels.itemsize > 4 else torch.float32)
    return torch.from_numpy(levels).to(exact).mul_(float(scale)).reshape(like.shape).to(like.dtype)


def _signed(ring: Ring) -> str:
    """The type that torch has for the ring's words."""
    return f"i{ring.word.itemsize}"


LADDER = 4
"""Steps of the ladder of ranges to a factor of two: a common range is at most a quarter of an octave too large."""

LOWEST, STEPS = -240, 480
"""From 2^-60 to 2^60."""


def rung(largest: float) -> int:
    """Where a client's largest value stands on the ladder of ranges. Raises ValueError for one that is beyond it."""
    if largest <= 2.0 ** (LOWEST / LADDER):
        return 0
    if not largest < 2.0 ** ((STEPS + LOWEST - 1) / LADDER):
        raise ValueError(f"a value that cannot be hidden; those below 2^{(STEPS + LOWEST) // LADDER} can")
    at = math.ceil(LADDER * math.log2(largest)) - LOWEST
    return at


def range_at(at: int) -> float:
    """The largest value that a rung stands for.

    >>> range_at(rung(1.0)), 3.0 <= range_at(rung(3.0)) < 3.6
    (1.0, True)
    """
    return float(2.0 ** ((at + LOWEST) / LADDER))
