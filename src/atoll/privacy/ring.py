"""Integers modulo a power of two: what a masked sum is a sum of.

    values -> levels = round(value / scale), stochastically -> words modulo 2^bits -> packed bytes, `bits` to a value

Sums of words are exact as long as the sum of the levels stays within [-2^(bits-1), 2^(bits-1)): `headroom` gives the bits
for a number of clients.
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
            plane = _wide(data[at : at + size], width, count).astype(self.word)
            words |= np.left_shift(plane, self.word.type(shift), out=plane)
            at += size
        return words

    def of(self, levels: NDArray[Any]) -> Words:
        """Signed integers as words: their bits in two's complement, cut off."""
        return levels.astype(self.word)

    def centered(self, words: Words) -> NDArray[Any]:
        """The representative of each word in [-2^(bits-1), 2^(bits-1)): the ring's highest bit is made the sign."""
        unused = 8 * self.word.itemsize - self.bits
        signed: NDArray[Any] = words.view(f"i{self.word.itemsize}")
        return (signed << unused) >> unused

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
    filled = np.zeros(-(-len(values) // each) * each, np.uint8)
    filled[: len(values)] = values
    packed = filled[::each].copy()
    for i in range(1, each):
        packed |= filled[i::each] << np.uint8(i * width)
    return packed


def _wide(data: NDArray[np.uint8], width: int, count: int) -> Words:
    """Back from `_narrow`."""
    if width >= 8:
        return np.frombuffer(data.tobytes(), f"<u{width // 8}")
    each = 8 // width
    values = np.empty(len(data) * each, np.uint8)
    for i in range(each):
        np.bitwise_and(data >> np.uint8(i * width), np.uint8((1 << width) - 1), out=values[i::each])
    return values[:count]
