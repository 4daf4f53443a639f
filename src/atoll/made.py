"""The parts that a recipe names, made: what a plan is built of, before anybody's data are looked at."""

from __future__ import annotations

from typing import Any, NamedTuple

from atoll import parts
from atoll.aggregate.base import Aggregator
from atoll.local.corrections import Correction
from atoll.local.optimizers import MakeOptimizer, Rate
from atoll.local.work import BindObjective
from atoll.models.spaces import Space
from atoll.outer import Outer
from atoll.privacy.masks import SecureAggregation
from atoll.privacy.protection import Mechanism
from atoll.schedule import Schedule
from atoll.schema import Finetune
from atoll.transforms.chain import Chain


class Made(NamedTuple):
    """The parts that a recipe names, made, before anybody's data is looked at."""

    correction: Correction
    up: Chain
    down: Chain
    schedule: Schedule
    aggregate: Aggregator
    outer: Outer
    space: Space
    objective: BindObjective
    optimizer: MakeOptimizer
    rate: Rate
    exchange: SecureAggregation | None
    privacy: Mechanism | None


def make_parts(stage: Finetune) -> Made:
    """Every part of a stage. Raises AtollError for one that is unknown, or called wrongly."""

    def make(slot: str, written: object, at: str = "") -> Any:
        return parts.make(slot, written, f"finetune.{at or slot}")

    def chain(key: str) -> Chain:
        return Chain(tuple(make("transform", one, f"{key}[{i}]") for i, one in enumerate(getattr(stage, key))))

    made: dict[str, Any] = {"up": chain("up"), "down": chain("down")}
    return Made(**made, **{slot: make(slot, getattr(stage, slot)) for slot in Made._fields if slot not in made})
