"""Params: a flat dict of named tensors, and the few operations that the core needs on it.

Everything that trains, travels or persists is such a dict, so that it can be counted, saved and sent in one way. Several
of them live in one under prefixes: `nested("m", momentum)` and back with `under("m", state)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Params = dict[str, Tensor]


def zeros_like(params: Mapping[str, Tensor]) -> Params:
    """Zeros of the same names, shapes and dtypes."""
    return {name: torch.zeros_like(x) for name, x in params.items()}


def subtract(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Params:
    """The update that leads from `before` to `after`: after - before, by name."""
    return {name: after[name] - x for name, x in before.items()}


def add(params: Mapping[str, Tensor], update: Mapping[str, Tensor], scale: float = 1) -> Params:
    """params + scale * update; names that the update lacks stay as they are.

    >>> add({"w": torch.ones(1), "b": torch.ones(1)}, {"w": torch.ones(1)}, scale=0.5)
    {'w': tensor([1.5000]), 'b': tensor([1.])}
    """
    return {name: torch.add(x, update[name], alpha=scale) if name in update else x for name, x in params.items()}


def global_norm(params: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all tensors, in float64, so that the order of names cannot matter much."""
    return math.sqrt(sum(float(x.double().square().sum()) for x in params.values()))


def clipped(params: Mapping[str, Tensor], norm: float) -> Params:
    """Scaled down to a Euclidean norm of at most `norm` over all tensors; a little below it, as products are rounded.

    Source: Abadi et al. 2016 (arXiv 1607.00133), the clipping step.

    >>> clipped({"w": torch.tensor([3.0, 4.0])}, norm=10.0)
    {'w': tensor([3., 4.])}
    >>> round(global_norm(clipped({"w": torch.tensor([3.0, 4.0])}, norm=1.0)), 3)
    1.0
    """
    size = global_norm(params)
    return dict(params) if size <= norm else {name: x * (norm / size * (1 - 1e-6)) for name, x in params.items()}


def numel(params: Mapping[str, Tensor]) -> int:
    """How many numbers it holds."""
    return sum(x.numel() for x in params.values())


def nbytes(params: Mapping[str, Tensor]) -> int:
    """How many bytes its tensors take."""
    return sum(x.numel() * x.element_size() for x in params.values())


def nested(prefix: str, params: Mapping[str, Tensor]) -> Params:
    """Puts every name under `prefix/`."""
    return {f"{prefix}/{name}": x for name, x in params.items()}


def under(prefix: str, params: Mapping[str, Tensor]) -> Params:
    """What `nested(prefix, ...)` put there.

    >>> under("m", nested("m", {"w": torch.zeros(1)}))
    {'w': tensor([0.])}
    """
    start = prefix + "/"
    return {name[len(start) :]: x for name, x in params.items() if name.startswith(start)}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit the same names, shapes, dtypes and values."""
    return a.keys() == b.keys() and all(x.dtype == b[name].dtype and torch.equal(x, b[name]) for name, x in a.items())
