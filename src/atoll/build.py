"""Recipe -> plan. A plan is frozen, says what will happen, and is refused here if it cannot work.

What cannot compose is an error with the reason; what merely loses quality is a warning. Nothing here loads a model: the
shapes come from its configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import torch

from atoll import parts, wire
from atoll.aggregate.base import Aggregator
from atoll.aggregate.mean import share
from atoll.errors import AtollError, closest, placed
from atoll.fleet.inprocess import Elsewhere, MakeFleet, inprocess
from atoll.local.corrections import Correction
from atoll.local.optimizers import MakeOptimizer, Rate
from atoll.local.work import BindObjective
from atoll.models.shapes import Shapes
from atoll.models.shapes import shapes as shapes_of_model
from atoll.models.spaces import LoRA, PlannedShapes, Space
from atoll.outer import Outer
from atoll.params import Params
from atoll.recipe import Recipe, Tree
from atoll.round import RoundPlan
from atoll.schedule import Schedule
from atoll.stream import Stream
from atoll.transforms.chain import Chain
from atoll.transforms.noise import GaussianNoise
from atoll.transforms.residual import ErrorFeedback

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
        """Clients whose updates make a round, on average."""
        return self.rounds.schedule.law.answers(len(self.trainers))


def build(recipe: Recipe, tree: Tree, left_out: Collection[str] = (), sources: Mapping[str, Any] | None = None) -> Plan:
    """Makes every part, checks that they go together, and finds out what will train and travel.

    `left_out` are clients that turned out to have no usable data: the plan is checked again without them. `sources` stand
    in the place of the recipe's data: at a site, which has its own.

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
    space: Space = make("space", stage.space)
    objective, optimizer, rate = (make(slot, getattr(stage, slot)) for slot in ("objective", "optimizer", "rate"))
    digest = plan_hash(tree)
    at_a_site = sources is not None  # which makes no fleet and no sinks, whatever the plan names there
    fleet: MakeFleet = inprocess() if at_a_site else parts.make("fleet", recipe.fleet, "fleet")
    for i, one in enumerate([] if at_a_site else recipe.sinks):
        parts.make("sink", one, f"sinks[{i}]")  # what cannot be made is found before hours of training
    refuse_correction(recipe, correction)
    refuse_down(down)
    model = choose_model(recipe.model)
    with placed("model"):
        shapes = None if model.own_factory else shapes_of_model(model.name)
    refuse_context(stage.context, shapes)
    least = 1
    if sources is None and isinstance(fleet, Elsewhere):  # what can be refused here has been, before anybody is asked
        sources, least = clients_elsewhere(recipe, tree, fleet, schedule, shapes)
    elif sources is None:
        sources = sources_of(recipe)
    unwilling = {name: why for name, why in sources.items() if isinstance(why, str)}
    sources = {name: source for name, source in sources.items() if name not in {*left_out, *unwilling}}
    sampled = population(recipe, list(sources))
    if sampled is None and correction.streams and isinstance(fleet, Elsewhere):
        sampled = frozenset(sources)  # its streams are means over the population: sites that come later are not of it
    size = len(sources) if sampled is None else len(sampled)
    refuse_names(list(sources))
    refuse_schedule(schedule, size)
    streams = (
        Stream(up=up, down=down, aggregate=aggregate, outer=outer),
        *extra_streams(correction, size),
    )
    return Plan(
        recipe=recipe,
        tree=tree,
        hash=digest,
        rounds=RoundPlan(digest, recipe.seed, streams, schedule, population=sampled, least=least),
        model=model,
        space=space,
        objective=objective,
        optimizer=optimizer,
        rate=rate,
        correction=correction,
        fleet=fleet,
        sources=sources,
        shapes=shapes,
        trains=space.plan(shapes) if shapes else None,
        warnings=(
            *warnings(up, outer, schedule, space, size),
            *(f"without {n}: {why}" for n, why in unwilling.items()),
        ),
    )


def clients_elsewhere(
    recipe: Recipe, tree: Tree, fleet: Elsewhere, schedule: Schedule, shapes: Shapes | None
) -> tuple[Mapping[str, Any], int]:
    """The clients on machines of their own that are ready for the plan, or why not; and the fewest updates they allow.

    What they hold stays there. A model of the user's own factory has no identity by which they could tell it from another.
    """
    if recipe.baselines:
        raise AtollError(
            "no baselines over a network", where="baselines", found=recipe.baselines, allowed="[]",
            remedy="data stay where they are: pool a sample of your own, or simulate, to measure them",
        )  # fmt: skip
    prepared = fleet.prepare(plan_hash(tree), tree, shapes.identity if shapes else "", schedule.law.answers)
    return prepared.clients, prepared.least


def sources_of(recipe: Recipe) -> dict[str, Any]:
    """The clients' data, unread. A mistake in a path of `clients` is told with the client's key."""
    try:
        found: dict[str, Any] = parts.make("data", recipe.data, "data")
    except AtollError as error:
        paths = parts.spec(recipe.data, "data").arguments.get("paths")
        for name, path in paths.items() if isinstance(paths, Mapping) else ():
            if error.details["where"] == str(Path(str(path)).expanduser()):
                error.details["where"] = f"data.paths.{name}: {path}"
        raise
    return found


LORA_AVERAGING = (
    "averaging LoRA's factors is not averaging updates: mean(B) mean(A) loses 7 to 14% of a round's mean(B A), and cost"
    " 0.007 of 0.661 held-out loss on the quickstart (docs/log.md)"
)
"""Measured by experiments/lora_averaging.py."""

LOCAL = "local-"
"""Before the client's name in that of its baseline."""


def baseline_names(plan: Plan) -> list[str]:
    """The baselines that a run will have: `local-clinic`, ..., `pooled`."""
    each = {"local": [LOCAL + name for name in plan.clients], POOLED: [POOLED]}
    return [name for kind in plan.recipe.baselines for name in each[kind]]


def plan_hash(tree: Tree) -> str:
    """Names the plan by what both ends must agree on: everything but its texts, its sinks and where clients run."""
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


def extra_streams(correction: Correction, population: int) -> tuple[Stream, ...]:
    """A method's own streams. They are means over the population, of which those who do not answer change nothing."""
    return tuple(replace(stream, aggregate=share(population)) for stream in correction.streams)


LONGEST_NAME = 200
"""Bytes of a client's name as a file's name."""


def refuse_names(clients: Sequence[str]) -> None:
    """The name of the pooled client is taken: a client of that name would be handed everybody's samples."""
    for name in clients:
        if name == POOLED or len(quote(name, safe="")) > LONGEST_NAME:
            raise AtollError(
                "a client may not be called so", where="data", found=name,
                allowed=f"at most {LONGEST_NAME} bytes, and not '{POOLED}'", remedy="rename its folder or file",
            )  # fmt: skip


def refuse_correction(recipe: Recipe, correction: Correction) -> None:
    """A control variate is the mean gradient (x - y) / (K eta) of one client, and the server's is the mean of those."""
    stage = recipe.finetune
    if not correction.needs_plain_sgd:
        return
    optimizer = parts.spec(stage.optimizer, "finetune.optimizer")
    plain = optimizer.use == "sgd" and not any(optimizer.arguments.get(a) for a in ("momentum", "weight_decay"))
    wrong = {
        "optimizer": (plain, optimizer, "sgd without momentum or weight decay"),
        "clip_norm": (
            stage.clip_norm is None,
            stage.clip_norm,
            "null: a clipped step says nothing of the mean gradient",
        ),
        "weighting": (stage.weighting == "uniform", stage.weighting, "uniform: the server's variate is a plain mean"),
    }
    for key, (fits, found, allowed) in wrong.items():
        if not fits:
            name = parts.spec(stage.correction, "").use
            raise AtollError(
                f"'{name}' needs other local work", where=f"finetune.{key}", found=found, allowed=allowed,
                remedy="its control variates are mean gradients, (x - y) / (K eta), averaged over clients",
            )  # fmt: skip


def refuse_down(down: Chain) -> None:
    """A broadcast carries the params themselves: what a transform drops or scales would be lost to the clients."""
    for i, transform in enumerate(down.transforms):
        if not transform.traits.fixed_support or not (transform.traits.unbiased or transform.traits.client_state):
            raise AtollError(
                "a broadcast must keep every parameter", where=f"finetune.down[{i}]", found=type(transform).__name__,
                allowed="int8, int4", remedy="the broadcast carries the params themselves: what it drops would become zero",
            )  # fmt: skip


def refuse_context(context: int, shapes: Shapes | None) -> None:
    """A longer sample than the model has positions for: an error with learned ones, noise with others."""
    if shapes and shapes.context and context > shapes.context:
        raise AtollError(
            "the context is longer than the model's", where="finetune.context", found=context,
            allowed=f"8 to {shapes.context}", remedy=f"finetune.context: {shapes.context}, or a model with a longer one",
        )  # fmt: skip


def refuse_schedule(schedule: Schedule, population: int) -> None:
    """A cohort cannot be larger than those it is drawn from."""
    if schedule.law.least > population:
        raise AtollError(
            "more clients asked than there are", where="finetune.schedule", found=schedule.law.least,
            allowed=f"1 to {population}", remedy="lower the cohort, or leave it out to ask everybody",
        )  # fmt: skip


def warnings(up: Chain, outer: Outer, schedule: Schedule, space: Space, population: int) -> list[str]:
    """What works and loses quality."""
    asynchronous = schedule.law.kind == "idle"
    rarely = schedule.law.answers(population) < population / 10
    noisy = any(isinstance(one, GaussianNoise) for one in up.transforms)
    forgets = any(not one.traits.fixed_support and not one.traits.client_state for one in up.transforms)
    decays = any(isinstance(one, ErrorFeedback) and one.decay < 1 for one in up.transforms)
    found = {
        "gaussian-noise makes no privacy claim: it is reproducible and no ledger accounts for it": noisy,
        "what the up chain leaves out is lost for good: put that transform inside error-feedback": forgets,
        "error feedback with so small a cohort: a residual returns rarely, and stale": up.traits.client_state
        and rarely,
        "asynchronous rounds with outer momentum are unstable: it counts stale updates again": asynchronous
        and outer.momentum,
        "error feedback with decay acts as momentum already (SparseLoCo); outer momentum comes on top": decays
        and outer.momentum,
        LORA_AVERAGING: isinstance(space, LoRA) and population > 1,
    }
    return [text for text, holds in found.items() if holds]


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
