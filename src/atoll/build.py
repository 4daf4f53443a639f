"""Recipe -> plan. A plan is frozen, says what will happen, and is refused here if it cannot work.

What cannot compose is an error with the reason; what merely loses quality is a warning. Nothing here loads a model: the
shapes come from its configuration.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from atoll import parts, wire
from atoll.aggregate.base import Aggregator, modality_of
from atoll.aggregate.mean import Mean, share
from atoll.client import Side
from atoll.compatible import (
    refuse_changed_records,
    refuse_clients,
    refuse_context,
    refuse_few,
    refuse_holders,
    refuse_parts,
    refuse_personal,
    refuse_tasks,
    refuse_unlike,
    refuse_unlike_holders,
    warnings,
)
from atoll.errors import AtollError, closest, placed
from atoll.fleet.inprocess import Elsewhere, MakeFleet, inprocess
from atoll.local.corrections import Correction
from atoll.local.optimizers import MakeOptimizer, Rate
from atoll.local.private import private
from atoll.local.work import BindObjective, Gradients, Needs, needs_of, optimizer_steps, plain
from atoll.made import Made, make_parts
from atoll.models.assembled import Assembled, assembled
from atoll.models.shapes import Shapes
from atoll.models.shapes import shapes as shapes_of_model
from atoll.models.spaces import PlannedShapes, Space, split
from atoll.params import Params
from atoll.privacy.accounting import Release
from atoll.privacy.examples import OfExamples
from atoll.privacy.masks import SecureAggregation
from atoll.privacy.mechanisms import Cohorts, OfClients, in_a_ring, protect
from atoll.privacy.party import Memory
from atoll.privacy.protection import Mechanism, Protection, Samples
from atoll.round import RoundPlan
from atoll.schedule import Sample, Schedule, cohort_sizes
from atoll.schema import LOCAL, POOLED, Finetune, Recipe, Tree, validate
from atoll.stream import Stream
from atoll.transforms.chain import Chain


class ModelChoice(NamedTuple):
    """A named model and how to load it, parts of one, or a factory of the user's own that makes one."""

    name: str | Assembled
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
    if part.use == "assembled":
        of_parts, of_all = (list(inspect.signature(one).parameters) for one in (assembled, model_options))
        for name in part.arguments:
            if name not in (*of_parts, *of_all):
                raise parts.no_such_argument(part.use, name, f"model.{name}", (*of_parts, *of_all))
        said, rest = (
            {name: value for name, value in part.arguments.items() if name in names} for names in (of_parts, of_all)
        )
        one = assembled(**parts.check(assembled, parts.Spec(part.use, said), "model"))
        return ModelChoice(one, model_options(**parts.check(model_options, parts.Spec(part.use, rest), "model")), False)
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
    gradients: Gradients
    """Of a local step: plain, or private."""
    exchange: SecureAggregation | None
    """None: the server sees single updates."""
    protection: Protection | None
    """None: no noise."""
    fleet: MakeFleet
    sources: Mapping[str, Any]
    shapes: Shapes | None
    """The model's; None for a model of the user's own factory, which has no configuration to read them from."""
    trains: PlannedShapes | None
    warnings: tuple[str, ...]
    before: Mapping[str, Plan] = field(default_factory=dict)
    """The stages before this one, by name."""
    whole: Tree = field(default_factory=dict)
    """The tree of all stages."""

    @property
    def needs(self) -> Needs:
        """What its objective asks of it."""
        return needs_of(self.objective)

    @property
    def clients(self) -> list[str]:
        """Everybody who holds data."""
        return list(self.sources)

    @property
    def trainers(self) -> list[str]:
        """Everybody who may be sampled."""
        return list(self.sources) if self.rounds.population is None else sorted(self.rounds.population)

    @property
    def learners(self) -> list[str]:
        """Everybody whose samples are trained on: those of all, where they are pooled."""
        return self.clients if self.trainers == [POOLED] else self.trainers

    @property
    def cohort(self) -> float:
        """Clients whose updates make a round, on average."""
        return self.rounds.schedule.law.answers(len(self.trainers))

    @property
    def sends_start(self) -> bool:
        """Whether all that trains goes down as it was before the first round, beside what trains and travels.

        Clients have it by themselves where a run begins anew. They need it where an objective measures against it, or where
        a part of it stays with them. Without a round nothing gains on it: then rewards are told against the base.
        """
        refers = self.needs.reference and self.recipe.finetune.rounds
        needed = refers or self.recipe.finetune.personal
        return bool(needed) and self.recipe.start is not None

    def side(self, client: str, memory: Memory) -> Side | None:
        """The client's side of the plan's conversation; `memory` is what it knows from phase to phase."""
        if self.exchange is None:
            return None
        asked, _ = cohort_sizes(self.rounds.schedule, len(self.trainers))
        return self.exchange.party(client, asked, memory)


def build(recipe: Recipe, tree: Tree, left_out: Collection[str] = (), sources: Mapping[str, Any] | None = None) -> Plan:
    """Makes every part, checks that they go together, and finds out what will train and travel.

    `left_out` are clients that turned out to have no usable data: the plan is checked again without them. `sources` stand
    in the place of the recipe's data: at a site, which has its own.

    Raises:
        AtollError: a part is unknown or called wrongly, or the parts cannot work together.
    """
    made = make_parts(recipe.finetune)
    at_a_site = sources is not None  # which makes no fleet and no sinks, whatever the plan names there
    fleet: MakeFleet = inprocess() if at_a_site else parts.make("fleet", recipe.fleet, "fleet")
    for i, one in enumerate([] if at_a_site else recipe.sinks):
        parts.make("sink", one, f"sinks[{i}]")  # what cannot be made is found before hours of training
    refuse_parts(recipe, made)
    model = choose_model(recipe.model)
    with placed("model"):
        shapes = None if model.own_factory else shapes_of_model(model.name)
    refuse_tasks(recipe.tasks, shapes)
    refuse_context(recipe.finetune.context + needs_of(made.objective).more_tokens, shapes)
    everyone = population(recipe, tree, made, fleet, shapes, left_out, sources)
    refuse_clients(made, list(everyone.sources), everyone.size, everyone.least)
    refuse_few(made, fewest(made.aggregate), everyone.size)
    trains = travelling(made.space.plan(shapes), recipe.finetune.personal, made) if shapes else None
    protection = protected(made, recipe.finetune, everyone.size, trains)
    unwilling = tuple(f"without {name}: {why}" for name, why in everyone.unwilling.items())
    return Plan(
        recipe=recipe,
        tree=tree,
        hash=plan_hash(tree),
        rounds=round_plan(recipe, plan_hash(tree), made, protection, everyone),
        model=model,
        space=made.space,
        objective=made.objective,
        optimizer=made.optimizer,
        rate=made.rate,
        correction=made.correction,
        gradients=gradients(protection),
        exchange=made.exchange,
        protection=protection,
        fleet=fleet,
        sources=everyone.sources,
        shapes=shapes,
        trains=trains,
        warnings=(*warnings(recipe, made, everyone.size), *unwilling),
    )


def rebuilt(plan: Plan, tree: Tree, left_out: Collection[str] = ()) -> Plan:
    """The plan of another tree in the same place: after the same stages."""
    return replace(build(validate(tree), tree, left_out), before=plan.before, whole=plan.whole)


def travelling(planned: PlannedShapes, personal: Sequence[str], made: Made) -> PlannedShapes:
    """Of what trains, what is sent."""
    refuse_unlike(list(planned), made.correction)
    refuse_holders(list(planned), made.privacy)
    refuse_unlike_holders(list(planned), made.aggregate)
    refuse_personal(list(planned), personal, made.correction)
    return split(planned, personal)[0]


class Population(NamedTuple):
    """Who takes part in a plan."""

    sources: Mapping[str, Any]
    """Everybody's data, unread."""
    sampled: frozenset[str] | None
    """Who may be sampled; None: whoever the fleet has, also those who come later."""
    unwilling: Mapping[str, str]
    """Who will not take part, and why."""
    least: int
    """The fewest updates of which any of them lets an average be made."""

    @property
    def size(self) -> int:
        """How many may be sampled."""
        return len(self.sources) if self.sampled is None else len(self.sampled)


def population(
    recipe: Recipe,
    tree: Tree,
    made: Made,
    fleet: MakeFleet,
    shapes: Shapes | None,
    left_out: Collection[str],
    given: Mapping[str, Any] | None,
) -> Population:
    """Who takes part: those whose data are `given`, or on machines of their own, or as the recipe says; less `left_out`."""
    elsewhere, least = given is None and isinstance(fleet, Elsewhere), 1
    if elsewhere:
        assert isinstance(fleet, Elsewhere)
        refuse_changed_records(recipe)
        given, least = clients_elsewhere(recipe, tree, fleet, made.schedule, shapes)
    found = sources_of(recipe) if given is None else given
    unwilling = {name: why for name, why in found.items() if isinstance(why, str)}
    sources = {name: source for name, source in found.items() if name not in {*left_out, *unwilling}}
    chosen = sampled(recipe, list(sources))
    if chosen is None and elsewhere and counts_its_clients(made):
        chosen = frozenset(sources)
    return Population(sources, chosen, unwilling, least)


def counts_its_clients(made: Made) -> bool:
    """Whether the plan's numbers hold for the clients that it begins with: sites that come later are not of it."""
    return bool(made.correction.streams or made.exchange or made.privacy)


def round_plan(
    recipe: Recipe,
    digest: str,
    made: Made,
    protection: Protection | None,
    everyone: Population,
) -> RoundPlan:
    """What travels, whom to ask, in what conversation; under noise and masks as the plan has them."""
    first = Stream(up=made.up, down=made.down, aggregate=by_modality(made.aggregate), outer=made.outer)
    streams = (first, *extra_streams(made.correction, everyone.size))
    if protection:
        streams = protection.streams(streams)
    schedule = made.schedule
    if isinstance(protection, OfClients) and protection.release.sampling != "everyone":
        schedule = replace(schedule, sample=unforeseen(schedule.sample))
    least = max(everyone.least, fewest(made.aggregate))
    plan = RoundPlan(digest, recipe.seed, streams, schedule, population=everyone.sampled, least=least)
    if made.exchange is None:
        return plan
    asked, most = cohort_sizes(made.schedule, everyone.size)
    ranges = [protection.range(s.name) if protection else None for s in streams]
    hidden = tuple(
        made.exchange.hide(s, most, one, noised=one is not None) for s, one in zip(streams, ranges, strict=True)
    )
    evaluated = made.exchange.evaluated(len(everyone.sources))
    return replace(
        plan,
        streams=hidden,
        exchange=made.exchange.exchange(hidden, asked),
        attempt=made.exchange.attempt,
        evaluated=evaluated,
        evaluation=made.exchange.exchange(evaluated, asked),
        least=max(everyone.least, made.exchange.least(asked)),
    )


def fewest(aggregate: Aggregator) -> int:
    """The fewest updates that an aggregator works on."""
    return int(getattr(aggregate, "least", 1))


def by_modality(aggregate: Aggregator) -> Aggregator:
    """A mean with a weight for each modality; aggregators of the user's own have one for everything."""
    return replace(aggregate, group_of=modality_of) if isinstance(aggregate, Mean) else aggregate


def unforeseen(sample: Sample) -> Sample:
    """Cohorts that nobody can work out from the recipe's seed, where it counts that nobody knows who was drawn."""
    return lambda population, busy, key: sample(population, busy, secrets.randbits(63))


def protected(made: Made, stage: Finetune, size: int, trains: PlannedShapes | None) -> Protection | None:
    """The plan's privacy with its noise. Raises AtollError where the population or the bits do not carry it."""
    if made.privacy is None or not stage.rounds:  # then nothing is released
        return None
    if made.privacy.unit == "client":
        return of_clients(made, made.privacy, stage.rounds, size, trains)
    assert made.privacy.noise_multiplier is not None
    batch = stage.batch_size * stage.accumulate
    steps = partial(optimizer_steps, local_steps=stage.local_steps, epochs=stage.epochs, samples_a_step=batch)
    return OfExamples(made.privacy, made.privacy.noise_multiplier, batch, steps)


def gradients(protection: Protection | None) -> Gradients:
    """How local steps get their gradients."""
    if protection is None or protection.mechanism.unit == "client":
        return plain
    return private(protection.mechanism.clip, protection.noise_multiplier)


def samples(plan: Plan, counts: Mapping[str, int]) -> Samples:
    """How many those train on who may be asked, from how many everybody has."""
    known = {**counts, POOLED: sum(counts.values())} if counts else {}
    return {name: known[name] for name in plan.trainers if name in known}


def of_clients(made: Made, mechanism: Mechanism, rounds: int, size: int, trains: PlannedShapes | None) -> Protection:
    """The privacy of whole clients. Raises AtollError where the population or the bits do not carry it."""
    asked, _ = cohort_sizes(made.schedule, size)
    if mechanism.delta > 1 / size:
        raise AtollError(
            "delta is larger than 1 / population", where="finetune.privacy.delta", found=mechanism.delta,
            allowed=f"at most 1 / {size} clients = {1 / size:.3g}: a larger one allows to publish a client's data",
            remedy=f"--set finetune.privacy.delta={size**-1.1:.1g}, which is 1 / population^1.1",
        )  # fmt: skip
    noisy = made.exchange.least(asked) - made.exchange.colluding if made.exchange else 1
    expected = made.schedule.law.answers(size)
    cohorts = Cohorts(seen(made, size), expected, noisy, rounds)
    protection = protect(mechanism, cohorts)
    if made.exchange is None:
        return protection
    coordinates = sum(math.prod(shape) for shape in trains.values()) if trains else UNKNOWN_SIZE
    return in_a_ring(protection, coordinates, made.exchange.bits)


UNKNOWN_SIZE = 10**10
"""Coordinates of a model whose shapes are not known before it is made: more than it has."""


def seen(made: Made, population: int) -> Release:
    """A round's release as those see it from whom it protects: the server knows whom it asked, so sampling hides nobody.

    Only where the server is trusted, and adds the noise itself, does the sampling count, to all who see what comes of it;
    and not where a reply may count in another round than the one that its client was drawn for.
    """
    law = made.schedule.law
    assert made.privacy is not None
    if made.privacy.where != "central" or law.kind == "everyone" or law.kind == "idle":
        return Release(1.0)
    rate = law.answers(population) / population
    return Release(1.0, law.kind, rate, population if law.kind == "uniform" else 0)


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


def baseline_names(plan: Plan) -> list[str]:
    """The baselines that a run will have: `local-clinic`, ..., `pooled`."""
    each = {"local": [LOCAL + name for name in plan.clients], POOLED: [POOLED]}
    return [name for kind in plan.recipe.baselines for name in each[kind]]


def plan_hash(tree: Tree) -> str:
    """Names the plan by what both ends must agree on: everything but its texts, its sinks and where clients run."""
    decides = {
        k: v for k, v in tree.items() if k not in ("name", "description", "reference", "checked", "sinks", "fleet")
    }
    if tree.get(
        "judge"
    ):  # what it chose lies in the run's folder, wherever that is; clients' data are known by content
        decides.pop("data", None)
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def sampled(recipe: Recipe, clients: Sequence[str]) -> frozenset[str] | None:
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
    return tuple(replace(stream, aggregate=by_modality(share(population))) for stream in correction.streams)


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
