"""Shamir's secret sharing: any `threshold` of the shares give the secret, fewer give nothing.

Source: Shamir 1979, "How to share a secret". The field is that of the prime 2^256 + 297, just large enough for a key.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297
"""The smallest prime above 2^256."""

SHARE_BYTES = 33


def share(secret: bytes, points: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Shares of a secret of 32 bytes: the values of a random polynomial of degree threshold - 1 at `points` (from 1 on).

    >>> combine({x: y for x, y in share(b"k" * 32, [1, 2, 3], threshold=2).items() if x != 2})
    b'kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk'
    """
    if not 1 <= threshold <= len(set(points)) or min(points) < 1 or len(secret) != 32:
        raise ValueError(f"a threshold of {threshold} for {len(points)} shares of {len(secret)} bytes")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {x: _value(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in points}


def _value(coefficients: Sequence[int], x: int) -> int:
    """Horner's rule."""
    y = 0
    for coefficient in reversed(coefficients):
        y = (y * x + coefficient) % PRIME
    return y


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from at least `threshold` shares: Lagrange's interpolation at 0.

    Raises ValueError where the shares are not those of one secret of 32 bytes, as far as that shows.
    """
    weights = _at_zero(tuple(shares))
    secret = sum(weight * int.from_bytes(y, "big") for weight, y in zip(weights, shares.values(), strict=True)) % PRIME
    if secret >= 2**256:
        raise ValueError("the shares do not belong together")
    return secret.to_bytes(32, "big")


@lru_cache(1024)
def _at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """What each share counts in the value at 0; the same for all secrets that were shared among the same clients."""
    return tuple(_weight(x, points) for x in points)


def _weight(x: int, points: tuple[int, ...]) -> int:
    above, below = 1, 1
    for other in points:
        if other != x:
            above, below = above * other % PRIME, below * (other - x) % PRIME
    return above * pow(below, -1, PRIME) % PRIME
