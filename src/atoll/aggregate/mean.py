"""The weighted mean, streaming: one total in memory, however many clients.

    update[p] = sum_k w_k[g(p)] update_k[p] / sum_k w_k[g(p)],      g(p): the group of parameter p

Source: McMahan et al. 2017 (arXiv 1602.05629), Algorithm 1, with w_k = n_k; one weight per group as in the survey's
federated multimodal framework, where a client without images has weight 0 for the image connector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from atoll.aggregate.base import ALL, Weights
from atoll.params import Params

WEIGHT = "#weight/"


@dataclass(frozen=True)
class Mean:
    """See `mean`; with a `denominator`, `share`."""

    group_of: Callable[[str], str] = lambda name: ALL
    denominator: float | None = None
    summable = True

    def groups(self, like: Params) -> set[str]:
        """Every group that a parameter is in."""
        return {self.group_of(name) for name in like}

    def init(self, like: Params) -> Params:
        """Zeros, in float32 at least, and a weight of zero per group."""
        total = {
            name: torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for name, x in like.items()
        }
        weights = {WEIGHT + group: torch.zeros((), dtype=torch.float64) for group in self.groups(like)}
        return total | weights

    def add(self, total: Params, vector: Params, weights: Weights) -> Params:
        """total += weight * vector, in place; the weights are summed beside it."""
        for name, x in vector.items():
            total[name].add_(x, alpha=weights[self.group_of(name)])
        for group, weight in weights.items():
            total[WEIGHT + group] += weight
        return total

    def finish(self, total: Params, decode: Callable[[Params], Params]) -> Params:
        """Decodes the sum, then divides it by the summed weights (or the denominator), in place.

        Groups that nobody held are left out.
        """
        weights = {name.removeprefix(WEIGHT): float(w) for name, w in total.items() if name.startswith(WEIGHT)}
        sums = decode({name: x for name, x in total.items() if not name.startswith(WEIGHT)})
        held = {n: x for n, x in sums.items() if weights[self.group_of(n)] > 0}
        return {n: x.div_(self.denominator or weights[self.group_of(n)]) for n, x in held.items()}


def mean() -> Mean:
    """The weighted mean of the updates (FedAvg's aggregation)."""
    return Mean()


def share(population: int) -> Mean:
    """The weighted sum over `population`, whoever answered: clients that did not count as zero.

    What is a mean over all clients for ever stays one, however many take part in a round (SCAFFOLD's control variate).
    """
    return Mean(denominator=float(population))
