"""Recipe -> plan. A plan is frozen, says what will happen, and is refused here if it cannot work.

What cannot compose is an error with the reason; what merely loses quality is a warning. Nothing here loads a model: the
shapes come from its configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from atoll import parts, wire
from atoll.aggregate.base import Aggregator
from atoll.errors import AtollError, closest
from atoll.local.corrections import Correction
from atoll.local.optimizers import MakeOptimizer, Rate
from atoll.local.work import BindObjective
from atoll.models.shapes import Shapes
from atoll.models.shapes import shapes as shapes_of_model
from atoll.models.spaces import PlannedShapes, Space
from atoll.outer import Outer, sgd
from atoll.params import Params
from atoll.recipe import Recipe, Tree
from atoll.round import RoundPlan
from atoll.schedule import Schedule
from atoll.stream import Stream
from atoll.transforms.chain import Chain

if TYPE_CHECKING:
    from atoll.fleet.inprocess import MakeFleet

POOLED = "pooled"
"""The client of a pooled run: it holds everybody's samples."""


class ModelChoice(NamedTuple):
    """A named model and how to load it, or a factory of the user's own that makes one."""

    name: str
    options: Mapping[str, Any]
    own_factory: bool


def model_options(
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    gradient_checkpointing: bool = False,
    quantize: Literal["4bit"] | None = None,
) -> dict[str, Any]:
    """What a recipe may say of a named model beside its name; see models/load.py."""
    return {"dtype": dtype, "device": device, "gradient_checkpointing": gradient_checkpointing, "quantize": quantize}


def choose_model(written: object) -> ModelChoice:
    """`model: smollm2-135m`, `model: {use: ./folder, dtype: float32}` or `model: module:factory`."""
    part = parts.spec(written, "model")
    if ":" in part.use and not part.use.startswith("tiny:"):
        return ModelChoice(part.use, part.arguments, own_factory=True)
    return ModelChoice(part.use, model_options(**parts.check(model_options, part, "model")), own_factory=False)


@dataclass(frozen=True)
class Plan:
    """A recipe as resolved and checked."""

    recipe: Recipe
    tree: Tree
    hash: str
    rounds: RoundPlan
    model: ModelChoice
    space: Space
    objective: BindObjective
    optimizer: MakeOptimizer
    rate: Rate
    correction: Correction
    fleet: MakeFleet
    sources: Mapping[str, Any]
    shapes: Shapes | None
    """The model's; None for a model of the user's own factory, which has no configuration to read them from."""
    trains: PlannedShapes | None
    warnings: tuple[str, ...]

    @property
    def clients(self) -> list[str]:
        """Everybody who holds data."""
        return list(self.sources)

    @property
    def trainers(self) -> list[str]:
        """Everybody who may be sampled."""
        return list(self.sources) if self.rounds.population is None else sorted(self.rounds.population)

    @property
    def cohort(self) -> float:
        """Clients that work in a round, on average."""
        law = self.rounds.schedule.law
        return {"everyone": len(self.trainers), "poisson": law.cohort * len(self.trainers)}.get(law.kind, law.cohort)


def build(recipe: Recipe, tree: Tree) -> Plan:
    """Makes every part, checks that they go together, and finds out what will train and travel.

    Raises:
        AtollError: a part is unknown or called wrongly, or the parts cannot work together.
    """
    stage = recipe.finetune

    def make(slot: str, written: object, at: str = "") -> Any:
        return parts.make(slot, written, f"finetune.{at or slot}")

    correction: Correction = make("correction", stage.correction)
    up = Chain(tuple(make("transform", one, f"up[{i}]") for i, one in enumerate(stage.up)))
    down = Chain(tuple(make("transform", one, f"down[{i}]") for i, one in enumerate(stage.down)))
    schedule: Schedule = make("schedule", stage.schedule)
    aggregate: Aggregator = make("aggregate", stage.aggregate)
    outer: Outer = make("outer", stage.outer)
    sources = parts.make("data", recipe.data, "data")
    refuse(recipe, up, down, correction, schedule, list(sources))
    space: Space = make("space", stage.space)
    model = choose_model(recipe.model)
    shapes = None if model.own_factory else shapes_of_model(model.name)
    digest = plan_hash(tree)
    streams = (
        Stream(up=up, down=down, aggregate=aggregate, outer=outer),
        *extra_streams(correction, schedule, len(sources)),
    )
    return Plan(
        recipe=recipe,
        tree=tree,
        hash=digest,
        rounds=RoundPlan(digest, recipe.seed, streams, schedule, population=population(recipe, list(sources))),
        model=model,
        space=space,
        objective=make("objective", stage.objective),
        optimizer=make("optimizer", stage.optimizer),
        rate=make("rate", stage.rate),
        correction=correction,
        fleet=parts.make("fleet", recipe.fleet, "fleet"),
        sources=sources,
        shapes=shapes,
        trains=space.plan(shapes) if shapes else None,
        warnings=tuple(warnings(recipe, up, schedule, len(sources))),
    )


def plan_hash(tree: Tree) -> str:
    """Names the plan by what decides its result; the texts in it do not."""
    decides = {
        k: v for k, v in tree.items() if k not in ("name", "description", "reference", "checked", "sinks", "fleet")
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def population(recipe: Recipe, clients: Sequence[str]) -> frozenset[str] | None:
    """Who may be sampled."""
    chosen = recipe.finetune.population
    if chosen == "all":
        return None
    if chosen == POOLED:
        return frozenset([POOLED])
    for name in chosen:
        if name not in clients:
            raise AtollError("unknown client", where="finetune.population", found=name, remedy=closest(name, clients))
    return frozenset(chosen)


def extra_streams(correction: Correction, schedule: Schedule, clients: int) -> tuple[Stream, ...]:
    """A method's own streams. Their outer rate is the share of clients asked: the others' part of the mean is zero."""
    share = schedule.law.cohort / clients if schedule.law.kind == "uniform" else 1.0
    return tuple(replace(stream, outer=sgd(share)) for stream in correction.streams)


def refuse(
    recipe: Recipe, up: Chain, down: Chain, correction: Correction, schedule: Schedule, clients: Sequence[str]
) -> None:
    """Raises for combinations that cannot work, with the reason and the remedy."""
    stage = recipe.finetune
    if correction.needs_plain_sgd:
        optimizer = parts.spec(stage.optimizer, "finetune.optimizer")
        if optimizer.use != "sgd" or optimizer.arguments.get("momentum") or optimizer.arguments.get("weight_decay"):
            raise AtollError(
                "SCAFFOLD needs plain SGD at the clients",
                where="finetune.optimizer", found=optimizer, allowed="sgd without momentum or weight decay",
                remedy="its control variate is the mean gradient (x - y) / (K eta), which other optimizers do not give",
            )  # fmt: skip
        if stage.clip_norm is not None:
            raise AtollError(
                "SCAFFOLD does not go with gradient clipping", where="finetune.clip_norm", found=stage.clip_norm,
                allowed="null", remedy="a clipped step says nothing of the mean gradient: set clip_norm: null",
            )  # fmt: skip
    for i, transform in enumerate(down.transforms):
        if not transform.traits.fixed_support or transform.traits.bounded:
            raise AtollError(
                "a broadcast must keep every parameter", where=f"finetune.down[{i}]", found=type(transform).__name__,
                allowed="int8, int4", remedy="the broadcast carries the params themselves: what it drops would become zero",
            )  # fmt: skip
    if schedule.law.kind in ("uniform", "idle") and schedule.law.cohort > len(clients) and stage.population == "all":
        raise AtollError(
            "more clients asked than there are", where="finetune.schedule", found=int(schedule.law.cohort),
            allowed=f"1 to {len(clients)} ({', '.join(clients[:6])}{' ...' if len(clients) > 6 else ''})",
        )  # fmt: skip


def warnings(recipe: Recipe, up: Chain, schedule: Schedule, clients: int) -> list[str]:
    """What works and loses quality."""
    stage = recipe.finetune
    names = [parts.spec(one, "up").use.replace("_", "-") for one in stage.up]
    outer = parts.spec(stage.outer, "outer").use
    found = []
    if "gaussian-noise" in names:
        found.append("gaussian-noise makes no privacy claim: it is reproducible and no ledger accounts for it")
    if "topk" in names:
        found.append("topk without error-feedback loses what it leaves out for good: put it inside error-feedback")
    if up.traits.client_state and schedule.law.kind == "uniform" and schedule.law.cohort < clients / 10:
        found.append(
            f"error feedback with {schedule.law.cohort:g} of {clients} clients a round: a residual returns rarely, and stale"
        )
    if schedule.law.kind == "idle" and outer in ("momentum", "nesterov"):
        found.append(
            f"asynchronous rounds with outer {outer} are unstable: stale updates are counted again by the momentum"
        )
    if any(one.get("decay", 1) < 1 for one in stage.up if isinstance(one, dict)) and outer in ("momentum", "nesterov"):
        found.append(
            "error feedback with decay acts as momentum already (SparseLoCo): outer momentum comes on top of it"
        )
    return found


def payload_bytes(chain: Chain, shapes: PlannedShapes) -> int:
    """Bytes of one encoded update, measured on zeros of each shape that occurs."""
    by_shape: dict[tuple[int, ...], int] = {}
    for shape in shapes.values():
        if shape not in by_shape:
            x: Params = {"x": torch.zeros(shape)}
            _, payload = chain.encode(chain.init(x), x, 0)
            by_shape[shape] = sum(v.numel() * v.element_size() for v in wire.flatten(payload).values())
    header = 8 + sum(len(name) + 90 for name in shapes)
    return header + sum(by_shape[shape] for shape in shapes.values())
