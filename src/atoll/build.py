"""Recipe -> plan. A plan is frozen, says what will happen, and is refused here if it cannot work.

What cannot compose is an error with the reason; what merely loses quality is a warning. Nothing here loads a model: the
shapes come from its configuration.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import torch

from atoll import parts, wire
from atoll.aggregate.base import Aggregator
from atoll.aggregate.mean import share
from atoll.client import Side
from atoll.errors import AtollError, closest, placed
from atoll.fleet.inprocess import Elsewhere, MakeFleet, inprocess
from atoll.local.corrections import Correction
from atoll.local.optimizers import MakeOptimizer, Rate
from atoll.local.private import private
from atoll.local.work import BindObjective, Gradients, optimizer_steps, plain
from atoll.models.shapes import Shapes
from atoll.models.shapes import shapes as shapes_of_model
from atoll.models.spaces import LoRA, PlannedShapes, Space
from atoll.outer import Outer
from atoll.params import Params
from atoll.privacy.accounting import Release
from atoll.privacy.examples import OfExamples
from atoll.privacy.graph import degree, threshold
from atoll.privacy.masks import SecureAggregation
from atoll.privacy.mechanisms import Cohorts, OfClients, in_a_ring, protect
from atoll.privacy.party import Memory
from atoll.privacy.protection import Mechanism, Protection, Samples
from atoll.recipe import Finetune, Recipe, Tree
from atoll.round import RoundPlan
from atoll.schedule import Sample, Schedule
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

    def side(self, client: str, memory: Memory) -> Side | None:
        """The client's side of the plan's conversation; `memory` is what it knows from phase to phase."""
        if self.exchange is None:
            return None
        asked, _ = cohort_sizes(self.rounds.schedule, len(self.trainers))
        return self.exchange.party(client, self.rounds.streams, asked, memory)


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
    refuse_correction(recipe, made.correction)
    refuse_down(made.down)
    refuse_under_masks(recipe, made)
    refuse_private(recipe, made)
    model = choose_model(recipe.model)
    with placed("model"):
        shapes = None if model.own_factory else shapes_of_model(model.name)
    refuse_context(recipe.finetune.context, shapes)
    least = 1
    if sources is None and isinstance(fleet, Elsewhere):  # what can be refused here has been, before anybody is asked
        sources, least = clients_elsewhere(recipe, tree, fleet, made.schedule, shapes)
    elif sources is None:
        sources = sources_of(recipe)
    unwilling = {name: why for name, why in sources.items() if isinstance(why, str)}
    sources = {name: source for name, source in sources.items() if name not in {*left_out, *unwilling}}
    sampled = population(recipe, list(sources))
    if sampled is None and isinstance(fleet, Elsewhere) and counts_its_clients(made):
        sampled = frozenset(sources)
    size = len(sources) if sampled is None else len(sampled)
    refuse_names(list(sources))
    refuse_schedule(made.schedule, size)
    refuse_alone(recipe.finetune, made, size)
    refuse_telling_size(made, least)
    trains = made.space.plan(shapes) if shapes else None
    protection = protected(made, recipe.finetune, size, trains)
    bare = [BARE_BASELINES] if recipe.baselines and (made.exchange or made.privacy) else []
    notes = (*warnings(made, size), *bare, *(f"without {name}: {why}" for name, why in unwilling.items()))
    return Plan(
        recipe=recipe,
        tree=tree,
        hash=plan_hash(tree),
        rounds=round_plan(recipe, plan_hash(tree), made, protection, sampled, size, least),
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
        sources=sources,
        shapes=shapes,
        trains=trains,
        warnings=notes,
    )


def counts_its_clients(made: Made) -> bool:
    """Whether the plan's numbers hold for the clients that it begins with: sites that come later are not of it."""
    return bool(made.correction.streams or made.exchange or made.privacy)


def round_plan(
    recipe: Recipe,
    digest: str,
    made: Made,
    protection: Protection | None,
    sampled: frozenset[str] | None,
    size: int,
    least: int,
) -> RoundPlan:
    """What travels, whom to ask, in what conversation; under noise and masks as the plan has them."""
    first = Stream(up=made.up, down=made.down, aggregate=made.aggregate, outer=made.outer)
    streams = (first, *extra_streams(made.correction, size))
    if protection:
        streams = protection.streams(streams)
    schedule = made.schedule
    if isinstance(protection, OfClients) and protection.release.sampling != "everyone":
        schedule = replace(schedule, sample=unforeseen(schedule.sample))
    plan = RoundPlan(digest, recipe.seed, streams, schedule, population=sampled, least=least)
    if made.exchange is None:
        return plan
    asked, most = cohort_sizes(made.schedule, size)
    ranges = [protection.range(s.name) if protection else None for s in streams]
    hidden = tuple(
        made.exchange.hide(s, most, one, noised=one is not None) for s, one in zip(streams, ranges, strict=True)
    )
    return replace(
        plan,
        streams=hidden,
        exchange=made.exchange.exchange(hidden, asked),
        attempt=made.exchange.attempt,
        least=max(least, made.exchange.least(asked)),
    )


def unforeseen(sample: Sample) -> Sample:
    """Cohorts that nobody can work out from the recipe's seed, where it counts that nobody knows who was drawn."""
    return lambda population, busy, key: sample(population, busy, secrets.randbits(63))


def cohort_sizes(schedule: Schedule, population: int) -> tuple[int, int]:
    """How many clients a round asks, on average and at most."""
    asked = max(1, int(schedule.law.answers(population)))
    return asked, asked if schedule.law.kind == "uniform" else population


def protected(made: Made, stage: Finetune, size: int, trains: PlannedShapes | None) -> Protection | None:
    """The plan's privacy with its noise. Raises AtollError where the population or the bits do not carry it."""
    if made.privacy is None:
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
            allowed=f"at most 1 / {size} clients = {1 / size:.3g}; 1 / population^1.1 or less is usual",
            remedy="such a delta would allow to publish one client's data as they are",
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
    if made.privacy.where != "central" or law.kind == "everyone" or law.kind == "idle" or made.schedule.keeps_late:
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


LORA_AVERAGING = (
    "averaging LoRA's factors is not averaging updates: mean(B) mean(A) loses 7 to 14% of a round's mean(B A), and cost"
    " 0.007 of 0.661 held-out loss on the quickstart (docs/log.md)"
)
"""Measured by experiments/lora_averaging.py."""

LORA_NOISE = (
    "noise on both of LoRA's factors is noise on their product squared, and half of it on a factor that need not train:"
    " `space: ffa-lora` trains B alone (Sun et al. 2024)"
)

BARE_BASELINES = (
    "baselines train without masks and noise, and the card tells their losses: measure them on data of your own"
)

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


INSTEAD = {
    "Quantize": "leave it out: finetune.exchange.bits quantizes, with one scale for all clients",
    "TopK": "leave it out, or lower the rank of the space: the clients' largest entries are not the same",
    "ErrorFeedback": "leave it out: what the ring rounds off is random and has mean zero",
}
"""What to do about a transform that cannot work under masks."""


def refuse_under_masks(recipe: Recipe, made: Made) -> None:
    """What is summed before it is read must be summable, and of one round."""
    if made.exchange is None:
        return
    stage = recipe.finetune
    for i, one in enumerate(made.up.transforms):
        if not one.traits.summable or one.traits.client_state:
            raise AtollError(
                "this transform cannot work under masks: payloads are summed before anybody reads them",
                where=f"finetune.up[{i}]", found=str(parts.spec(stage.up[i], "")), allowed="clip",
                remedy=INSTEAD.get(type(one).__name__, "leave it out"),
            )  # fmt: skip
    if not made.aggregate.summable:
        raise AtollError(
            "this aggregator needs single updates, and masks hide them", where="finetune.aggregate",
            found=parts.spec(stage.aggregate, "").use, allowed="mean",
            remedy="`exchange: plain` shows the server single updates",
        )  # fmt: skip
    if made.schedule.law.kind == "idle" or made.schedule.keeps_late:
        raise AtollError(
            "masks are agreed on by the clients of one round: none may answer in a later one", where="finetune.schedule",
            found=str(parts.spec(stage.schedule, "")), allowed="synchronous without `late: take`, or poisson",
            remedy="a quorum and a grace period do not wait for slow clients either",
        )  # fmt: skip
    if "processes" in fleets_of(recipe.fleet):
        raise AtollError(
            "clients of this fleet forget between the phases of a round", where="fleet", found="processes",
            allowed="inprocess, flower", remedy="fleet: inprocess",
        )  # fmt: skip


def waits_for_some(stage: Finetune, schedule: Schedule) -> bool:
    """Whether one client's answer, or its lateness, decides whose else are in a round."""
    quorum = parts.spec(stage.schedule, "").arguments.get("quorum", 1)
    return schedule.law.kind == "idle" or schedule.keeps_late or quorum != 1


def fleets_of(written: Any) -> list[str]:
    """A fleet's name, and those of the fleets inside it."""
    part = parts.spec(written, "fleet")
    return [part.use, *(fleets_of(part.arguments["inner"]) if part.arguments.get("inner") else [])]


def refuse_telling_size(made: Made, least: int) -> None:
    """A round that comes to nothing for want of clients tells how many were drawn, without noise."""
    central = made.privacy is not None and made.privacy.where == "central"
    if central and least > 1 and made.schedule.law.kind == "poisson":
        raise AtollError(
            "a site's minimum_cohort and a cohort of random size tell who was drawn", where="finetune.schedule",
            found="poisson", allowed="synchronous", remedy="a fixed cohort, or `privacy: distributed`",
        )  # fmt: skip


def refuse_private(recipe: Recipe, made: Made) -> None:
    """What would break the bound on a unit's part in a sum, or show what noise is to hide."""
    if made.privacy is None:
        return
    unit = made.privacy.unit
    wrong = wrong_for_clients(recipe.finetune, made) if unit == "client" else wrong_for_examples(recipe.finetune)
    for key, (fits, found, allowed) in wrong.items():
        if not fits:
            found = found if isinstance(found, list) else str(parts.spec(found, key))
            raise AtollError(
                f"this does not go with differential privacy of {unit}s", where=f"finetune.{key}", found=found,
                allowed=allowed, remedy=f"--set finetune.{key}={allowed.split(':')[0].split(',')[0]}",
            )  # fmt: skip


Wrong = dict[str, tuple[bool, object, str]]
"""By key of the stage: whether it fits, what it says, and what would do, with the reason."""


def wrong_for_examples(stage: Finetune) -> Wrong:
    """All else that a stage may say works on what is private already, streams of a correction's own too."""
    return {
        "weighting": (
            stage.weighting == "uniform",
            stage.weighting,
            "uniform: a weight by examples is their number, told without noise",
        ),
    }


def wrong_for_clients(stage: Finetune, made: Made) -> Wrong:
    """One client changes a sum by no more than the clip, and everything that leaves it has noise."""
    assert made.privacy is not None
    return {
        "correction": (
            not made.correction.streams,
            stage.correction,
            "none, proximal: a stream of its own would leave without noise",
        ),
        "weighting": (
            stage.weighting == "uniform",
            stage.weighting,
            "uniform: under differential privacy every client counts 1",
        ),
        "aggregate": (
            parts.spec(stage.aggregate, "").use == "mean",
            stage.aggregate,
            "mean: noise is fitted to a sum with a public denominator",
        ),
        "exchange": (
            made.privacy.where != "distributed" or made.exchange is not None,
            stage.exchange,
            "secure-aggregation: a share of the noise protects nobody whose update is seen by itself",
        ),
        "privacy": (
            made.privacy.where != "central" or made.exchange is None,
            stage.privacy,
            "distributed, local: before a server's noise, rounding to a ring would add to what one client changes",
        ),
        "schedule": (
            made.privacy.where != "central" or not waits_for_some(stage, made.schedule),
            stage.schedule,
            "synchronous, poisson: without quorum and late replies, whom a round takes hangs on nobody's speed",
        ),
        "up": (
            made.privacy.where != "distributed" or all(one.traits.linear for one in made.up.transforms),
            stage.up,
            "[]: what one client does to its noised update is not done to the sum (privacy.clip clips it before)",
        ),
    }


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


def refuse_alone(stage: Finetune, made: Made, population: int) -> None:
    """A sum that may be opened needs more clients than a round can have: every round would come to nothing."""
    if made.exchange is None:
        return
    asked, most = cohort_sizes(made.schedule, population)
    least, quorum = made.exchange.least(asked), parts.spec(stage.schedule, "").arguments.get("quorum", 1)
    if math.ceil(quorum * asked) < least <= most:
        raise AtollError(
            "a quorum of fewer clients than a sum needs to be opened", where="finetune.schedule.quorum", found=quorum,
            allowed=f"{least / asked:.2g} to 1: {least} of {asked} clients", remedy="a larger quorum, or fewer survivors",
        )  # fmt: skip
    if threshold(degree(asked) + 1, made.exchange.colluding) > degree(asked) + 1:
        raise AtollError(
            "more colluding clients than the others can hold off", where="finetune.exchange.colluding",
            found=made.exchange.colluding, allowed=f"0 to {degree(asked)}", remedy="fewer, or more clients in a round",
        )  # fmt: skip
    if least > most or (made.schedule.law.kind == "poisson" and least > made.schedule.law.answers(population)):
        wanted = {".survivors": made.exchange.survivors or 0, ".colluding": made.exchange.colluding + 2}
        blamed = next((key for key, value in wanted.items() if value > max(most, 2)), "")
        raise AtollError(
            "no round has so many clients as a sum needs to be opened", where=f"finetune.exchange{blamed}", found=least,
            allowed=f"2 to {most}, the clients of a round" if most > 1 else "plain: a round has one client",
            remedy="a larger cohort, fewer survivors, or `exchange: plain`, which shows the server single updates",
        )  # fmt: skip


def warnings(made: Made, population: int) -> list[str]:
    """What works and loses quality."""
    up, outer, schedule = made.up, made.outer, made.schedule
    averages = isinstance(made.space, LoRA) and not made.space.freeze_a
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
        LORA_AVERAGING: averages and population > 1,
        LORA_NOISE: averages and made.privacy is not None,
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
