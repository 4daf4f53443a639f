"""Inner optimizers and learning-rate schedules. An optimizer lives for one task: clients of a round start equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Rate = Callable[[float], float]
"""Share of the run's local steps that are done, in [0, 1) -> factor on the learning rate."""

Lr = Annotated[float, Gt(0)]
Beta = Annotated[float, Ge(0), Lt(1)]


def adamw(
    lr: Lr = 1e-3, beta1: Beta = 0.9, beta2: Beta = 0.999, weight_decay: Annotated[float, Ge(0)] = 0.0
) -> MakeOptimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), torch's."""
    return lambda params: torch.optim.AdamW(params, lr, (beta1, beta2), weight_decay=weight_decay)


def sgd(lr: Lr = 0.1, momentum: Beta = 0.0, weight_decay: Annotated[float, Ge(0)] = 0.0) -> MakeOptimizer:
    """Stochastic gradient descent, torch's."""
    return lambda params: torch.optim.SGD(params, lr, momentum, weight_decay=weight_decay)


def constant() -> Rate:
    """The same learning rate throughout."""
    return lambda done: 1.0


def linear(warmup: Annotated[float, Ge(0), Lt(1)] = 0.0, floor: Annotated[float, Ge(0), Le(1)] = 0.0) -> Rate:
    """Rises over the share `warmup` of all local steps of the run, then falls in a line to `floor`."""
    return lambda done: _warm(done, warmup, lambda left: floor + (1 - floor) * left)


def cosine(warmup: Annotated[float, Ge(0), Lt(1)] = 0.0, floor: Annotated[float, Ge(0), Le(1)] = 0.0) -> Rate:
    """Rises over the share `warmup` of all local steps of the run, then falls along half a cosine to `floor`."""
    return lambda done: _warm(done, warmup, lambda left: floor + (1 - floor) * (1 - math.cos(math.pi * left)) / 2)


def _warm(done: float, warmup: float, fall: Callable[[float], float]) -> float:
    """`fall` maps what is left of the run after the warm-up, 1 to 0, to the factor."""
    if done < warmup:
        return done / warmup
    return fall((1 - done) / (1 - warmup))
