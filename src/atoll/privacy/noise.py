"""Randomness that nobody can repeat: uniform and Gaussian numbers from keys of the operating system.

Noise that protects somebody must not be foreseen, nor come twice when a run is resumed, so it does not come from the
recipe's seed. A key of 32 random bytes is stretched by AES-256 in counter mode, to uniform numbers of 53 bits, and those by
Box and Muller's transform in float64. The result is rounded, to a ring or to a grid, so that the last bits of a float tell
nothing (Mironov 2012, "On significance of the least significant bits for differential privacy", CCS 2012).
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from atoll.params import Params

Floats = NDArray[np.float64]


def uniform(count: int) -> Floats:
    """`count` numbers in [0, 1)."""
    stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    words: Any = np.frombuffer(stream.update(bytes(8 * count)), np.uint64)
    numbers: Floats = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def gaussian(count: int) -> Floats:
    """`count` numbers of mean 0 and variance 1 (Box and Muller 1958)."""
    half = -(-count // 2)
    radius = np.sqrt(-2.0 * np.log1p(-uniform(half)))
    angle = 2 * np.pi * uniform(half)
    numbers: Floats = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return numbers


GRID = 2.0**-12
"""Of the noise's standard deviation (rounded to a power of two): what noisy numbers are rounded to where no ring does it."""


def with_noise(params: Params, std: float, snap: bool = True) -> Params:
    """Independent Gaussian noise of this standard deviation on every number; the types stay.

    With `snap` the result is rounded to a grid that depends on `std` alone, which is post-processing.
    """
    if std == 0:
        return params
    grid = 2.0 ** math.floor(math.log2(std)) * GRID
    noisy = {
        n: x.double() + std * torch.from_numpy(gaussian(x.numel())).reshape(x.shape).to(x.device)
        for n, x in params.items()
    }
    return {name: (x.div(grid).round() * grid if snap else x).to(params[name].dtype) for name, x in noisy.items()}
