"""The weighted mean, streaming: one total in memory, however many clients.

    update[p] = sum_k w_k[g(p)] update_k[p] / sum_k w_k[g(p)],      g(p): the group of parameter p

Source: McMahan et al. 2017 (arXiv 1602.05629), Algorithm 1, with w_k = n_k; one weight per group as in the survey's
federated multimodal framework, where a client without images has weight 0 for the image connector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from atoll.aggregate.base import ALL, WEIGHT, Weights, weight_of
from atoll.params import Params


@dataclass(frozen=True)
class Mean:
    """See `mean`; with a `denominator`, `share`."""

    group_of: Callable[[str], str] = lambda name: ALL
    denominator: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of a fixed denominator, by group; 1 for those that are not named."""
    summable = True

    def groups(self, like: Params) -> set[str]:
        """Every group that a parameter is in."""
        return {self.group_of(name) for name in like}

    def vector(self, like: Params) -> Params:
        """The params' own names and shapes."""
        return like

    def init(self, like: Params) -> Params:
        """Zeros, in float32 at least; without a fixed denominator, a weight of zero per group."""
        total = {
            name: torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for name, x in like.items()
        }
        return total | self._entries(dict.fromkeys(self.groups(like), 0.0))

    def add(self, total: Params, vector: Params, weights: Weights) -> Params:
        """total += weight * vector, in place; the weights are summed beside it."""
        for name, x in vector.items():
            total[name].add_(x, alpha=weight_of(weights, self.group_of(name)))
        for name, weight in self._entries({group: weight_of(weights, group) for group in self.groups(vector)}).items():
            total[name] += weight
        return total

    def alone(self, vector: Params, weights: Weights) -> Params:
        """weight * vector, and the weights."""
        each = {group: weight_of(weights, group) for group in self.groups(vector)}
        weighed = {name: x if (w := each[self.group_of(name)]) == 1 else x * w for name, x in vector.items()}
        return weighed | self._entries(each)

    def _entries(self, weights: Weights) -> Params:
        """A total's entries for weights; by a fixed denominator nobody asks what they sum up to."""
        if self.denominator is not None:
            return {}
        return {WEIGHT + group: torch.tensor(weight, dtype=torch.float64) for group, weight in weights.items()}

    def open(self, total: Params) -> Params:
        """Nothing is hidden."""
        return total

    def finish(self, total: Params, decode: Callable[[Params], Params]) -> Params:
        """Decodes the sum, then divides it in place: by the summed weights, where groups that nobody held are left out.

        By a fixed denominator everything is divided: what nobody contributed to is zero then.
        """
        weights = {name.removeprefix(WEIGHT): float(w) for name, w in total.items() if name.startswith(WEIGHT)}
        sums = decode({name: x for name, x in total.items() if not name.startswith(WEIGHT)})
        if self.denominator is not None:
            return {n: x.div_(self.denominator * self.shares.get(self.group_of(n), 1.0)) for n, x in sums.items()}
        held = {n: x for n, x in sums.items() if weights[self.group_of(n)] > 0}
        return {n: x.div_(weights[self.group_of(n)]) for n, x in held.items()}


def mean() -> Mean:
    """The weighted mean of the updates (FedAvg's aggregation)."""
    return Mean()


def share(population: float) -> Mean:
    """The weighted sum over `population`, whoever answered: clients that did not count as zero.

    What is a mean over all clients for ever stays one, however many take part in a round (SCAFFOLD's control variate).
    """
    return Mean(denominator=float(population))
