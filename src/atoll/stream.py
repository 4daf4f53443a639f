"""A stream: one thing that travels in a round. FedAvg has one, SCAFFOLD two (the update and the control variate)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from atoll.aggregate.base import Aggregator
from atoll.aggregate.mean import mean
from atoll.outer import Outer, sgd
from atoll.params import Params
from atoll.transforms.chain import Chain

UPDATE = "update"
"""The stream of the params that train."""

REFERENCE = "reference"
"""What an objective measures the params that train against: it goes down to each client once, and nothing comes up."""


Release = Callable[[Params, Mapping[str, Params]], Params]
"""(opened total, params of all streams as they were broadcast) -> what the server goes on with."""


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
    release: Release = lambda total, params: total
    """What is done to the opened total before anything is divided: noise, under central differential privacy."""
    bound: Callable[[Mapping[str, Params]], float] | None = None
    """Of the Euclidean norm of what one reply may add, from the params of all streams; the server holds replies to it."""
    ages: bool = True
    """Whether an update that started from an old broadcast counts less, as the schedule says."""
