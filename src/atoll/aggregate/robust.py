"""Aggregators that a few bad updates cannot move far: each looks at single updates, and keeps a round's in memory.

    median          of each coordinate (Yin et al. 2018, arXiv 1803.01498, Definition 1)
    trimmed mean    of each coordinate, without a share of the largest and of the smallest (the same, Definition 2)
    Krum            the update that is closest to its neighbors (Blanchard et al. 2017, arXiv 1703.02757, section 3)
    multi-Krum      the mean of the updates that are closest to theirs (the same, section 5)

As published they take no account of weights: who lies about an update would lie about its weight, too. A weight of 0 leaves
an update out. What only some clients hold (the connectors of an assembled model) they would take for still, so that plans
with it are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from atoll.aggregate.base import ALL, Weights, weight_of
from atoll.params import Params, nested, under

Rule = Callable[[Sequence[Params]], Params]
"""Updates of a round, decoded -> the one that is applied."""


@dataclass(frozen=True)
class Robust:
    """A rule over single updates."""

    rule: Rule
    least: int = 1
    """The fewest updates that it works on."""
    summable = False

    def groups(self, like: Params) -> set[str]:
        """One, whose weight says no more than whether an update counts."""
        return {ALL}

    def vector(self, like: Params) -> Params:
        """The params' own names and shapes."""
        return like

    def init(self, like: Params) -> Params:
        """No updates yet."""
        return {}

    def add(self, total: Params, vector: Params, weights: Weights) -> Params:
        """Keeps one update."""
        if not weight_of(weights, ALL):
            return total
        number = len({name.partition("/")[0] for name in total})
        return {**total, **nested(str(number), {name: x.clone() for name, x in vector.items()})}

    def open(self, total: Params) -> Params:
        """Nothing is hidden."""
        return total

    def finish(self, total: Params, decode: Callable[[Params], Params]) -> Params:
        """The rule's result; nothing where too few contributed."""
        numbers = sorted({name.partition("/")[0] for name in total}, key=int)
        return self.rule([decode(under(number, total)) for number in numbers]) if len(numbers) >= self.least else {}


def by_coordinate(rule: Callable[[Tensor], Tensor]) -> Rule:
    """A rule over [updates, ...] tensors, one parameter at a time."""
    return lambda updates: {name: rule(torch.stack([one[name].float() for one in updates])) for name in updates[0]}


def median() -> Robust:
    """The median of each coordinate: of an even number of updates the mean of the two in the middle."""

    def middle(x: Tensor) -> Tensor:
        ranked, half = x.sort(dim=0).values, len(x) // 2
        return ranked[half] if len(x) % 2 else (ranked[half - 1] + ranked[half]) / 2

    return Robust(by_coordinate(middle), least=3)


def trimmed_mean(share: Annotated[float, Ge(0), Lt(0.5)] = 0.25) -> Robust:
    """The mean of each coordinate without the largest and the smallest values.

    Args:
        share: of the updates, left out at each end; rounded down. A round needs as many as make one.
    """

    def trimmed(x: Tensor) -> Tensor:
        out = int(share * len(x))
        return x.sort(dim=0).values[out : len(x) - out].mean(dim=0)

    return Robust(by_coordinate(trimmed), least=math.ceil(1 / share) if share else 1)


def krum(bad: Annotated[int, Ge(0)] = 1) -> Robust:
    """The one update that is closest to others: of the least sum of squared distances to its n - `bad` - 2 nearest.

    Args:
        bad: the most updates that may be bad; a round needs at least 2 `bad` + 3.
    """
    return Robust(lambda updates: updates[ranked(updates, bad)[0]], least=2 * bad + 3)


def multi_krum(bad: Annotated[int, Ge(0)] = 1, kept: Annotated[int, Gt(0)] | None = None) -> Robust:
    """The mean of the updates that Krum likes best.

    Args:
        bad: the most updates that may be bad; a round needs at least 2 `bad` + 3.
        kept: how many are averaged; all but `bad` if not given.
    """

    def rule(updates: Sequence[Params]) -> Params:
        best = ranked(updates, bad)[: len(updates) - bad if kept is None else kept]
        return by_coordinate(lambda x: x.mean(dim=0))([updates[i] for i in best])

    return Robust(rule, least=max(2 * bad + 3, kept or 0))


def ranked(updates: Sequence[Params], bad: int) -> list[int]:
    """Updates from the best to the worst by Krum's score; the first of equal ones first."""
    flat = torch.stack([torch.cat([x.reshape(-1).float() for x in one.values()]) for one in updates])
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = distances.sort(dim=1).values[:, 1 : len(updates) - bad - 1]  # without itself
    return [int(i) for i in nearest.sum(dim=1).argsort(stable=True)]
