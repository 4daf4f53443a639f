"""Randomness by name: key(seed, round, client, purpose).

A key depends on what it is for and on nothing else, so a resumed run, another fleet or another order of clients draws the
same numbers. Privacy noise and masks never come from here: they must not repeat (see privacy/).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(*parts: object) -> int:
    """A 63-bit integer for the given parts.

    >>> key(0, 3, "clinic", "batches") == key(0, 3, "clinic", "batches")
    True
    >>> key(0, 3, "clinic", "batches") == key(0, 3, "clinic", "quantize")
    False
    """
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A torch generator on the CPU for the given parts."""
    return torch.Generator().manual_seed(key(*parts))


def rng(*parts: object) -> np.random.Generator:
    """A numpy generator for the given parts."""
    return np.random.default_rng(key(*parts))
