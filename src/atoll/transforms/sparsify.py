"""Top-k: of each tensor only the entries of largest magnitude travel, with their positions.

Biased on its own; inside `error_feedback` what was left out returns in later rounds (Stich et al. 2018, arXiv 1809.07599).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from atoll.params import Params
from atoll.transforms.base import Encoded, Stateless, Traits


@dataclass(frozen=True)
class TopK(Stateless):
    """See `topk`."""

    fraction: float
    traits = Traits()

    def encode(self, state: Params, x: Params, key: int) -> tuple[Params, Encoded]:
        """Main: the kept values [k] of each tensor; side: their flat positions [k] (ascending) and the shape."""
        main, side = {}, {}
        for name, value in x.items():
            flat = value.flatten()
            at = self._largest(flat)
            main[name] = flat[at]
            side[f"{name}#at"] = at.to(torch.int32 if flat.numel() < 2**31 else torch.int64)
            side[f"{name}#shape"] = torch.tensor(value.shape, dtype=torch.int64)
        return state, Encoded(main, side)

    def _largest(self, flat: Tensor) -> Tensor:
        k = min(flat.numel(), max(1, math.ceil(self.fraction * flat.numel())))
        return flat.abs().topk(k, sorted=False).indices.sort().values

    def decode(self, encoded: Encoded) -> Params:
        """Zeros with the kept values in their places."""
        return {name: self._scatter(name, values, encoded.side) for name, values in encoded.main.items()}

    def _scatter(self, name: str, values: Tensor, side: Params) -> Tensor:
        at, shape = side.get(f"{name}#at"), side.get(f"{name}#shape")
        if at is None or shape is None or at.shape != values.shape:
            raise ValueError(f"top-k of '{name}' lacks its positions")
        size = math.prod(sizes := shape.tolist())
        # The size is bounded by what k values can stand for, so that a forged shape cannot ask for all memory.
        if any(n < 0 for n in sizes) or size > math.ceil((values.numel() + 1) / self.fraction):
            raise ValueError(f"top-k of '{name}' claims the shape {sizes} for {values.numel()} values")
        if at.numel() and not (int(at.min()) >= 0 and int(at.max()) < size):
            raise ValueError(f"top-k of '{name}' has positions outside its shape {sizes}")
        return values.new_zeros(size).index_put_((at.long(),), values).reshape(sizes)


def topk(fraction: Annotated[float, Gt(0), Le(1)]) -> TopK:
    """Keeps the `fraction` of entries of largest magnitude in each tensor (at least one).

    Source: Aji and Heafield 2017 (arXiv 1704.05021); with error feedback, Stich et al. 2018 (arXiv 1809.07599).
    """
    return TopK(fraction)
