"""An aggregator: how the updates of a round become one.

    init(like) -> total      add(total, vector, weights) -> total      finish(total, decode) -> update

The total is a flat dict of tensors. For a sum it can be added to another total (an all-reduce, a relay), masked by secure
aggregation, or noised before anything is divided, because the weights ride inside it as entries of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from atoll.data.media import MODALITIES
from atoll.params import Params

Weights = Mapping[str, float]
"""An aggregation weight per group of parameters, that of `ALL` for groups without one; 0 for what a client does not hold."""

WEIGHT = "#weight/"
"""Before the group's name: the entry of a total in which its weights are summed."""

ALL = "all"
"""The group of the parameters that everybody holds."""


def modality_of(name: str) -> str:
    """The group of a parameter, by its name: the modality that it is for, or `all` for what everybody holds.

    What stands in for missing media is everybody's: those learn it who have none.

    >>> modality_of("base_model.model.connectors.image.norm.weight"), modality_of("connectors.image.null")
    ('image', 'all')
    """
    for modality in MODALITIES:
        if f"connectors.{modality}." in name and not name.endswith(".null"):
            return modality
    return ALL


def weight_of(weights: Weights, group: str) -> float:
    """Of a group: its own, or that of all."""
    return weights[group] if group in weights else weights[ALL]


class Aggregator(Protocol):
    """How the updates of a round become one. `converse` in round.py is the only caller of `add`."""

    @property
    def summable(self) -> bool:
        """Whether totals may be added to each other: by an all-reduce, a relay, or behind a mask."""
        ...

    def groups(self, like: Params) -> set[str]:
        """The groups for which a reply must bring a weight."""
        ...

    def vector(self, like: Params) -> Params:
        """What an update for params like these must look like: names, shapes, and the types of integers."""
        ...

    def init(self, like: Params) -> Params:
        """An empty total for updates of the names and shapes of `like`."""
        ...

    def add(self, total: Params, vector: Params, weights: Weights) -> Params:
        """Takes one update in. May reuse the tensors of `total`."""
        ...

    def open(self, total: Params) -> Params:
        """The total as sums of numbers, whatever form they were added in: what noise is put on, before any division."""
        ...

    def finish(self, total: Params, decode: Callable[[Params], Params]) -> Params:
        """The aggregated update, of an opened total; parameters that nobody contributed to are left out.

        `decode` undoes, once and on the sum, what the chain did to the vectors (see Chain.decode_sum).
        """
        ...


class Summable(Aggregator, Protocol):
    """An aggregator whose totals are sums, so that what one update adds to them can be summed by others, and hidden."""

    def alone(self, vector: Params, weights: Weights) -> Params:
        """The total of one update: that of `add` to an empty one."""
        ...
