"""A stream: one thing that travels in a round. FedAvg has one, SCAFFOLD two (the update and the control variate)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from atoll.aggregate.base import Aggregator
from atoll.aggregate.mean import mean
from atoll.outer import Outer, sgd
from atoll.params import Params
from atoll.transforms.chain import Chain

UPDATE = "update"
"""The stream of the params that train."""


@dataclass(frozen=True)
class Stream:
    """One thing that travels: how it is encoded each way, aggregated, and applied at the server."""

    name: str = UPDATE
    up: Chain = field(default_factory=Chain)
    down: Chain = field(default_factory=Chain)
    aggregate: Aggregator = field(default_factory=mean)
    outer: Outer = field(default_factory=sgd)
    initial: Callable[[Params], Params] = lambda params: params
    """Its value before the first round, from the params that train: themselves, or zeros for a control variate."""
    ages: bool = True
    """Whether an update that started from an old broadcast counts less, as the schedule says."""
