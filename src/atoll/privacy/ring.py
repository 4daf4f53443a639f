"""Integers modulo a power of two: what a masked sum is a sum of.

    values -> levels = round(value / scale), stochastically -> words modulo 2^bits -> packed bytes, `bits` to a value

Sums of words are exact as long as the sum of the levels stays within [-2^(bits-1), 2^(bits-1)): `headroom` gives the bits
for a number of clients. Stochastic rounding as in QSGD (Alistarh et al. 2017, arXiv 1610.02132): E[level] = value / scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]
"""Unsigned integers, of which the lowest bits of the ring count."""

MOST_BITS = 48
"""Of a ring: the sums stay exact in float64."""


def headroom(clients: int) -> int:
    """The bits that a sum over so many clients takes beside those of one value: ceil(log2 n).

    >>> headroom(1), headroom(4), headroom(10)
    (0, 2, 4)
    """
    return (clients - 1).bit_length()


@dataclass(frozen=True)
class Ring:
    """The integers modulo 2^bits."""

    bits: int

    @property
    def word(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds them; its own overflow does no harm."""
        return np.dtype(f"u{next(size for size in (2, 4, 8) if 8 * size >= self.bits)}")

    def packed(self, count: int) -> int:
        """Bytes of `count` packed words: each of the planes is filled up to a whole byte."""
        return sum(-(-count * width // 8) for width, _ in self._planes())

    def pack(self, words: Words) -> NDArray[np.uint8]:
        """Words [n] -> bytes: planes of 32, 16, 8, 4, 2 and 1 bits, as many as the ring's bits take, the lowest first."""
        planes = [_narrow((words >> shift) & ((1 << width) - 1), width) for width, shift in self._planes()]
        return np.concatenate(planes) if planes else np.zeros(0, np.uint8)

    def unpack(self, data: NDArray[np.uint8], count: int) -> Words:
        """Back from `pack`. Raises ValueError for another number of bytes."""
        if len(data) != self.packed(count):
            raise ValueError(
                f"{len(data)} bytes for {count} values of {self.bits} bits; {self.packed(count)} are needed"
            )
        words, at = np.zeros(count, self.word), 0
        for width, shift in self._planes():
            size = -(-count * width // 8)
            words |= _wide(data[at : at + size], width, count).astype(self.word) << self.word.type(shift)
            at += size
        return words

    def of(self, levels: NDArray[np.int64]) -> Words:
        """Signed integers as words: their bits in two's complement, cut off."""
        return levels.astype(self.word)

    def centered(self, words: Words) -> NDArray[np.int64]:
        """The representative of each word in [-2^(bits-1), 2^(bits-1))."""
        lowest = words.astype(np.uint64) & np.uint64((1 << self.bits) - 1)
        return (lowest.astype(np.int64) ^ (1 << (self.bits - 1))) - (1 << (self.bits - 1))

    def _planes(self) -> Iterator[tuple[int, int]]:
        """(width, shift) of each plane."""
        shift = 0
        for width in (32, 16, 8, 4, 2, 1):
            if self.bits & width:
                yield width, shift
                shift += width


def _narrow(values: Words, width: int) -> NDArray[np.uint8]:
    """Values below 2^width -> bytes."""
    if width >= 8:
        return values.astype(f"<u{width // 8}").view(np.uint8)
    each = 8 // width
    rows = np.zeros(-(-len(values) // each) * each, np.uint8)
    rows[: len(values)] = values
    columns = rows.reshape(-1, each) << (np.arange(each, dtype=np.uint8) * width)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(columns, axis=1)
    return packed


def _wide(data: NDArray[np.uint8], width: int, count: int) -> Words:
    """Back from `_narrow`."""
    if width >= 8:
        return np.frombuffer(data.tobytes(), f"<u{width // 8}")
    each = 8 // width
    columns = (data[:, None] >> (np.arange(each, dtype=np.uint8) * width)) & ((1 << width) - 1)
    return columns.reshape(-1)[:count]


def stochastic(values: NDArray[np.float64], scale: float, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Each value over `scale`, rounded to one of its two neighbors; up with the probability that keeps the mean."""
    return np.floor(values / scale + uniform).astype(np.int64)
