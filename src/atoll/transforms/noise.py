"""Gaussian noise on an update. It makes NO privacy claim: its key is reproducible, and no ledger accounts for it.

It exists to study how training bears noise. Noise that protects somebody comes from the operating system, is entered in a
ledger first, and is not a transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge

from atoll.keys import generator
from atoll.params import Params
from atoll.transforms.base import Encoded, Stateless, Traits


@dataclass(frozen=True)
class GaussianNoise(Stateless):
    """See `gaussian_noise`."""

    std: float
    traits = Traits(summable=True, fixed_support=True, unbiased=True)

    def encode(self, state: Params, x: Params, key: int) -> tuple[Params, Encoded]:
        """Adds independent noise to every coordinate."""
        draw = generator(key)
        noisy = {n: v + self.std * torch.randn(v.shape, generator=draw, dtype=v.dtype) for n, v in sorted(x.items())}
        return state, Encoded(noisy, {})

    def decode(self, encoded: Encoded) -> Params:
        """Nothing to undo."""
        return encoded.main


def gaussian_noise(std: Annotated[float, Ge(0)]) -> GaussianNoise:
    """Adds Gaussian noise of standard deviation `std` to every coordinate. No privacy claim."""
    return GaussianNoise(std)
