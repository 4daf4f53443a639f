"""Gradients that hide single samples: DP-SGD's, for any model.

    each sample i is drawn with probability q = B / n, by itself;     g = (sum_i clip_C(g_i) + N(0, z^2 C^2 I)) / B

Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1; our batch_size * accumulate is their L = B, noise_multiplier
their z, clip their C. g_i is the gradient of a sample's own mean loss over all that trains, from a pass of its own: no
layer needs to be known, which vectorized clipping by hooks (Opacus) does need. Departs from it for a client with less than
B samples, which draws all it has and divides by B still.

What chooses or hides comes from the operating system: batches and noise that the recipe's seed gives would hide nothing.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from atoll.errors import AtollError
from atoll.exchange import WorkFailed
from atoll.local.work import Gradients, Local
from atoll.params import Params, clipped, global_norm, zeros_like
from atoll.privacy.examples import rate
from atoll.privacy.noise import uniform, with_noise


def private(clip: float, noise_multiplier: float) -> Gradients:
    """The gradients of DP-SGD; no loss is told. An empty batch is a step of noise alone."""

    def gradients(local: Local, samples: Sequence[Any], key: int) -> Iterator[None]:
        refuse_memory(local.model)
        batch = local.batch_size * local.accumulate
        trainable = local.space.trainable(local.model)
        while True:
            chosen = [samples[i] for i in poisson(len(samples), rate(batch, len(samples)))]
            total = with_noise(clipped_sum(local, chosen, clip), noise_multiplier * clip)
            for name, parameter in trainable.items():
                parameter.grad = (total[name] / batch).to(parameter.dtype)
            yield None

    return gradients


def poisson(count: int, rate: float) -> list[int]:
    """Each of `count` numbers with probability `rate`, by itself."""
    return [int(i) for i in (uniform(count) < rate).nonzero()[0]]


def clipped_sum(local: Local, samples: Sequence[Any], clip: float) -> Params:
    """The sum of the samples' gradients, each scaled down to a norm of at most `clip`. Leaves no gradients behind.

    One that is not finite counts as zero: to fail would tell of it.
    """
    trainable = local.space.trainable(local.model)
    total = zeros_like({name: parameter.detach().float() for name, parameter in trainable.items()})
    for sample in samples:
        gradient = gradient_of(local, sample, trainable)
        if math.isfinite(global_norm(gradient)):
            for name, x in clipped(gradient, clip).items():
                total[name] += x
    return total


def gradient_of(local: Local, sample: Any, trainable: Mapping[str, nn.Parameter]) -> Params:
    """Of one sample's mean loss; without the parameters that it does not touch, and without any if it has no loss.

    Dropout is drawn anew for each sample: from one sequence for all, who else is in the batch would change it.
    """
    torch.manual_seed(secrets.randbits(63))
    for parameter in trainable.values():
        parameter.grad = None
    with suppress(WorkFailed):  # of a reward, for one: to fail would tell of the sample
        loss, terms = local.objective.loss(local.model, local.objective.collate([sample]))
        if terms:
            (loss / terms).backward()  # type: ignore[no-untyped-call]
    gradient = {name: p.grad for name, p in trainable.items() if p.grad is not None}
    for parameter in trainable.values():
        parameter.grad = None
    return gradient


def refuse_memory(model: nn.Module) -> None:
    """A layer that remembers what passed through it tells of samples beside their gradients."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise AtollError(
                "this layer keeps statistics of samples, which no noise hides", where=f"model: {name}",
                found=type(module).__name__, allowed="layers that keep nothing: LayerNorm, GroupNorm",
                remedy="track_running_stats=False, or finetune.privacy: none",
            )  # fmt: skip
