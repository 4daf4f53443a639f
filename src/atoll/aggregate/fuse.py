"""Fusing: one set of params of several results, each of which began with the same base.

    fuse(base, results) -> params

What a result learned is its task vector: results[i] - base. Where an aggregator makes one update of many in every round,
this makes one model of a few at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from atoll.params import Params

Fuse = Callable[[Params, Sequence[Params]], Params]
"""(base, results) -> params."""


def ties(density: Annotated[float, Gt(0), Le(1)] = 0.5, scale: Annotated[float, Gt(0)] = 1.0) -> Fuse:
    """TIES: of each task vector the largest entries; of those the ones whose sign prevails; their mean.

    Source: Yadav et al. 2023 (arXiv 2306.01708), Algorithm 1. Trimmed is each parameter by itself, as PEFT does, since
    LoRA's two factors are of different sizes.

    Args:
        density: the share of each parameter's entries that is kept.
        scale: of the fused task vector (their lambda).
    """
    return _of_vectors(lambda vectors: scale * prevailing(torch.stack([trimmed(one, density) for one in vectors])))


def average() -> Fuse:
    """The mean of the results."""
    return _of_vectors(lambda vectors: torch.stack(list(vectors)).mean(0))


def _of_vectors(fused: Callable[[Sequence[Tensor]], Tensor]) -> Fuse:
    """Fuses parameter by parameter, in float32."""

    def fuse(base: Params, results: Sequence[Params]) -> Params:
        return {name: (x.float() + fused([one[name].float() - x.float() for one in results])).to(x.dtype)
                for name, x in base.items()}  # fmt: skip

    return fuse


def trimmed(vector: Tensor, density: float) -> Tensor:
    """The largest entries by magnitude, and 0 in the place of the others.

    >>> trimmed(torch.tensor([3.0, -1.0, 2.0, -4.0]), 0.5)
    tensor([ 3.,  0.,  0., -4.])
    """
    flat = vector.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(vector)


def prevailing(vectors: Tensor) -> Tensor:
    """The mean of the entries whose sign is that of their sum, over the first dimension; 0 where there are none.

    >>> prevailing(torch.tensor([[3.0, -1.0, 0.0], [-1.0, -3.0, 0.0]]))
    tensor([ 3., -2.,  0.])
    """
    elected = torch.where(vectors.sum(0) >= 0, 1.0, -1.0)
    agree = vectors.sign() == elected
    total: Tensor = (vectors * agree).sum(0) / agree.sum(0).clamp(min=1)
    return total
