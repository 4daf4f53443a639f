"""Outer optimizers: how the aggregated update moves the shared params.

    init(params) -> state;      step(state, params, update) -> state, params

The update is after - before; the pseudo-gradient of Reddi et al. 2021 ("Adaptive Federated Optimization", arXiv 2003.00295)
is its negation and exists only in this file's papers, never in a sign here. Symbols: our update is their Delta_t, `lr`
their eta, `beta1`, `beta2` and `tau` theirs. Parameters that the update lacks stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from atoll.params import Params, add, nested, under, zeros_like

Rate = Annotated[float, Gt(0)]
Decay = Annotated[float, Ge(0), Lt(1)]


class Outer(NamedTuple):
    """An outer optimizer as two pure functions."""

    init: Callable[[Params], Params]
    step: Callable[[Params, Params, Params], tuple[Params, Params]]
    momentum: bool = False
    """Whether an update moves the params in later rounds too."""


def sgd(lr: Rate = 1.0) -> Outer:
    """params + lr * update. With lr = 1 this is FedAvg (McMahan et al. 2017)."""
    return Outer(lambda params: {}, lambda state, params, update: (state, add(params, update, scale=lr)))


def momentum(lr: Rate = 1.0, momentum: Decay = 0.9) -> Outer:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335): v <- momentum v + update; params + lr v."""
    return _momentum(lr, momentum, nesterov=False)


def nesterov(lr: Rate = 0.7, momentum: Decay = 0.9) -> Outer:
    """DiLoCo's outer step (Douillard et al. 2023, arXiv 2311.08105).

    v <- momentum v + update;  params + lr (update + momentum v).
    """
    return _momentum(lr, momentum, nesterov=True)


def _momentum(lr: float, momentum: float, nesterov: bool) -> Outer:
    def step(state: Params, params: Params, update: Params) -> tuple[Params, Params]:
        velocity = state | {name: momentum * state[name] + x for name, x in update.items()}
        ahead = add(update, velocity, scale=momentum) if nesterov else {name: velocity[name] for name in update}
        return velocity, add(params, ahead, scale=lr)

    return Outer(zeros_like, step, momentum=momentum > 0)


def adam(lr: Rate = 0.01, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: Rate = 1e-3) -> Outer:
    """FedAdam (Reddi et al. 2021, Algorithm 2): v <- beta2 v + (1 - beta2) update^2."""
    return _adaptive(lr, beta1, tau, lambda v, square: beta2 * v + (1 - beta2) * square)


def yogi(lr: Rate = 0.01, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: Rate = 1e-3) -> Outer:
    """FedYogi (Reddi et al. 2021, Algorithm 2): v <- v - (1 - beta2) update^2 sign(v - update^2)."""
    return _adaptive(lr, beta1, tau, lambda v, square: v - (1 - beta2) * square * torch.sign(v - square))


def adagrad(lr: Rate = 0.01, tau: Rate = 1e-3) -> Outer:
    """FedAdagrad (Reddi et al. 2021, Algorithm 2, with their beta1 = 0): v <- v + update^2."""
    return _adaptive(lr, 0.0, tau, lambda v, square: v + square)


def _adaptive(lr: float, beta1: float, tau: float, second: Callable[[Tensor, Tensor], Tensor]) -> Outer:
    """m <- beta1 m + (1 - beta1) update; params + lr m / (sqrt(v) + tau), v starting at tau^2; no bias correction."""

    def init(params: Params) -> Params:
        return nested("m", zeros_like(params)) | nested("v", {n: torch.full_like(x, tau**2) for n, x in params.items()})

    def step(state: Params, params: Params, update: Params) -> tuple[Params, Params]:
        m, v = under("m", state), under("v", state)
        m |= {name: beta1 * m[name] + (1 - beta1) * x for name, x in update.items()}
        v |= {name: second(v[name], x.square()) for name, x in update.items()}
        moved = {name: m[name] / (v[name].sqrt() + tau) for name in update}
        return nested("m", m) | nested("v", v), add(params, moved, scale=lr)

    return Outer(init, step, momentum=beta1 > 0)
