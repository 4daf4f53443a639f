"""What goes together in a plan: refusals, each with the reason and the way out, and warnings of what merely loses quality.

`refuse_parts` needs the recipe alone and speaks before anybody is asked; `refuse_clients` needs to know who takes part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from atoll import parts
from atoll.aggregate.base import ALL, Aggregator, modality_of
from atoll.aggregate.robust import Robust
from atoll.data.media import MODALITIES
from atoll.data.prepared_tasks import refuse_unasked
from atoll.errors import AtollError, closest
from atoll.local.corrections import Correction
from atoll.made import Made
from atoll.models.shapes import Shapes
from atoll.models.spaces import LoRA
from atoll.privacy.graph import degree, threshold
from atoll.privacy.protection import Mechanism
from atoll.schedule import Schedule, cohort_sizes
from atoll.schema import POOLED, Finetune, Recipe
from atoll.transforms.chain import Chain
from atoll.transforms.noise import GaussianNoise
from atoll.transforms.residual import ErrorFeedback


def refuse_parts(recipe: Recipe, made: Made) -> None:
    """Parts that cannot work together, whoever takes part."""
    refuse_pooled_twice(recipe)
    refuse_nothing_to_compare(recipe)
    refuse_correction(recipe, made.correction)
    refuse_down(made.down)
    refuse_under_masks(recipe, made)
    refuse_private(recipe, made)


def refuse_clients(made: Made, names: Sequence[str], population: int, least: int) -> None:
    """Clients of whom too few may be sampled for the parts, or who may not be called so."""
    refuse_names(names)
    refuse_schedule(made.schedule, population)
    refuse_alone(made, population)
    refuse_no_holder(made.privacy, population)
    refuse_telling_size(made, least)


def refuse_few(made: Made, least: int, population: int) -> None:
    """A round must wait for as many clients as the aggregator needs updates."""
    asked, _ = cohort_sizes(made.schedule, population)
    asked = math.ceil(made.schedule.quorum * asked)
    if asked < least:
        raise AtollError(
            "a round has too few updates for this aggregator", where="finetune.aggregate", found=f"{asked} clients a round",
            allowed=f"at least {least}", remedy="more clients a round, or another rule: `atoll parts aggregate`",
        )  # fmt: skip
    if least > 1 and made.correction.streams:
        raise AtollError(
            "this correction's own stream is a sum, which one bad client moves as it likes", where="finetune.aggregate",
            allowed="mean", remedy="`correction: none`, or proximal or l1, which send nothing of their own",
        )  # fmt: skip


def refuse_nothing_to_compare(recipe: Recipe) -> None:
    """Baselines train as long as the run does."""
    if recipe.baselines and not recipe.finetune.rounds:
        raise AtollError(
            "without a round there is nothing to compare", where="baselines", found=", ".join(recipe.baselines),
            allowed="[]", remedy="--set baselines=[]",
        )  # fmt: skip


def refuse_tasks(tasks: Sequence[str], shapes: Shapes | None) -> None:
    """Public tasks that there are, and a model which reads them."""
    refuse_unasked(tasks, "evaluate.tasks")
    if tasks and shapes is None:
        raise AtollError(
            "public tasks need a model with a tokenizer", where="evaluate.tasks", found=", ".join(tasks),
            allowed="a named model, a folder, or a hub id", remedy="leave `evaluate` out of stages",
        )  # fmt: skip


def refuse_unlike_holders(planned: Collection[str], aggregate: Aggregator) -> None:
    """Rules over single updates take a client that does not hold a modality for one that moves nothing."""
    held = {modality_of(name) for name in planned} - {ALL}
    if held and isinstance(aggregate, Robust):
        raise AtollError(
            "this aggregator does not know who holds what", where="finetune.aggregate", found=", ".join(sorted(held)),
            allowed="mean", remedy="`space: {modules: []}` trains no connector",
        )  # fmt: skip


LORA_AVERAGING = (
    "averaging LoRA's factors is not averaging updates: mean(B) mean(A) loses 7 to 14% of a round's mean(B A), and cost"
    " 0.007 of 0.661 held-out loss on the quickstart (docs/log.md)"
)
"""Measured by experiments/lora_averaging.py."""


RANDOM_CONNECTORS = (
    "the connectors stay as they were drawn, and tell the language model nothing of what encoders see or hear:"
    " `space: {use: lora, modules: [connectors]}` trains them"
)


def random_connectors(recipe: Recipe, made: Made) -> bool:
    """Whether an assembled model's connectors begin at random, and end so."""
    model = parts.spec(recipe.model, "model")
    connectors = [parts.spec(one["connector"], "") for name in MODALITIES if (one := model.arguments.get(name))]
    drawn = model.use == "assembled" and any("of" not in one.arguments for one in connectors)
    whole = made.space.modules if isinstance(made.space, LoRA) else ("connectors",)
    return drawn and recipe.start is None and not any(name.startswith("connectors") for name in whole)


LORA_NOISE = (
    "noise on both of LoRA's factors is noise on their product squared, and half of it on a factor that need not train:"
    " `space: ffa-lora` trains B alone (Sun et al. 2024)"
)


TWO_UNDER_MASKS = (
    "a sum of two is opened: each of the two can take its own update off it and has the other's;"
    " `survivors: 3` or more hides them from each other too"
)

BARE_BASELINES = (
    "baselines train without masks and noise, and the card tells their losses: measure them on data of your own"
)


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


def refuse_changed_records(recipe: Recipe) -> None:
    """Over a network the sites' own records count, as they are."""
    data = parts.spec(recipe.data, "data")
    if "inner" in data.arguments:
        raise AtollError(
            "sites train on their own records, as they are", where="data", found=data.use,
            allowed="a part that changes no records", remedy="simulate it: --set fleet=inprocess",
        )  # fmt: skip


def refuse_personal(planned: Collection[str], personal: Sequence[str], correction: Correction) -> None:
    """What stays at its client must be there, must leave something that travels, and is in no control variate."""
    endings = sorted({".".join(name.split(".")[-2:]) for name in planned})
    for i, word in enumerate(personal):
        if not any(word in name for name in planned):
            raise AtollError(
                "no parameter has this in its name", where=f"finetune.personal[{i}]", found=word,
                allowed=f"a part of a trained parameter's name, such as {', '.join(endings[:6])}",
                remedy=closest(word, endings),
            )  # fmt: skip
    if personal and all(any(word in name for word in personal) for name in planned):
        raise AtollError(
            "nothing travels: all parameters are personal", where="finetune.personal", found=list(personal),
            remedy="`extends: methods/local-only` trains each client by itself",
        )  # fmt: skip
    if personal and correction.streams:
        raise AtollError(
            "this correction is about all that trains", where="finetune.personal", found=list(personal),
            allowed="correction: none, proximal, or l1", remedy="leave out `personal`, or the correction",
        )  # fmt: skip


def refuse_unlike(planned: Collection[str], correction: Correction) -> None:
    """A control variate is a mean over all clients; of a modality that some lack, theirs would be of nothing."""
    unlike = sorted({modality_of(name) for name in planned} - {ALL})
    if correction.streams and unlike:
        raise AtollError(
            "this correction is a mean over all clients, and not all hold what this model takes",
            where="finetune.correction", found=f"connectors of {', '.join(unlike)}", allowed="none, proximal, or l1",
            remedy="leave the correction out, or `modules: [connectors]`",
        )  # fmt: skip


def refuse_holders(planned: Collection[str], privacy: Mechanism | None) -> None:
    """Who holds a modality is said of those that train here."""
    trained = {modality_of(name) for name in planned} - {ALL}
    for name in privacy.holders if privacy else ():
        if name not in trained:
            raise AtollError(
                "holders of a modality for which nothing trains here", where=f"finetune.privacy.holders.{name}", found=name,
                allowed=", ".join(sorted(trained)) or "none: no connector trains", remedy="leave it out",
            )  # fmt: skip


def refuse_no_holder(privacy: Mechanism | None, population: int) -> None:
    """A share of less than one client divides a sum of one by less than one: its connector would leap."""
    for name, share in privacy.holders.items() if privacy else ():
        if share * population < 0.9:  # a share is written with few digits
            raise AtollError(
                "fewer holders than one client", where=f"finetune.privacy.holders.{name}", found=share,
                allowed=f"{1 / population:.2g} to 1: one of {population} clients, or more",
                remedy="the share of the clients that hold it",
            )  # fmt: skip


def refuse_pooled_twice(recipe: Recipe) -> None:
    """A run on everybody's data is its own pooled baseline, and has no single clients."""
    if recipe.finetune.population == POOLED and recipe.baselines:
        raise AtollError(
            "a pooled run has no baselines", where="baselines", found=recipe.baselines, allowed="[]",
            remedy="leave `population: pooled` out: `baselines: [pooled]` measures it beside the federated run",
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


def waits_for_some(schedule: Schedule) -> bool:
    """Whether one client's answer, or its lateness, decides whose else are in a round."""
    return schedule.law.kind == "idle" or schedule.keeps_late or schedule.quorum != 1


def fleets_of(written: Any) -> list[str]:
    """A fleet's name, and those of the fleets inside it."""
    part = parts.spec(written, "fleet")
    return [part.use, *(fleets_of(part.arguments["inner"]) if part.arguments.get("inner") else [])]


def refuse_telling_size(made: Made, least: int) -> None:
    """A round that comes to nothing for want of clients tells how many were drawn, without noise."""
    central = made.privacy is not None and made.privacy.where == "central"
    if central and least > 1:
        raise AtollError(
            "a round that comes to nothing tells, without noise, how many took part", where="finetune.privacy",
            found=f"central, and a site that asks for {least} clients", allowed="distributed, local, examples",
            remedy="another mechanism, or a policy without minimum_cohort",
        )  # fmt: skip


def refuse_private(recipe: Recipe, made: Made) -> None:
    """What would break the bound on a unit's part in a sum, or show what noise is to hide."""
    if made.privacy is None:
        return
    unit = made.privacy.unit
    wrong = wrong_for_clients(recipe.finetune, made) if unit == "client" else wrong_for_examples(recipe.finetune)
    for key, (fits, found, allowed) in wrong.items():
        if not fits:
            at = f"finetune.{key}" + (".use" if isinstance(found, Mapping) else "")
            found = found if isinstance(found, list) else str(parts.spec(found, key))
            raise AtollError(
                f"this does not go with differential privacy of {unit}s", where=f"finetune.{key}", found=found,
                allowed=allowed, remedy=f"--set {at}={allowed.split(':')[0].split(',')[0]}",
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
            "none, proximal, l1: a stream of its own would leave without noise",
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
            made.privacy.where != "central" or not waits_for_some(made.schedule),
            stage.schedule,
            "synchronous, poisson: without quorum and late replies, whom a round takes hangs on nobody's speed",
        ),
        "up": (
            made.exchange is None or all(one.traits.linear for one in made.up.transforms),
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
    """A longer sample than the model has positions for: an error with learned ones, noise with others.

    The `context` is that of samples, and what is drawn after them.
    """
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


def refuse_alone(made: Made, population: int) -> None:
    """A sum that may be opened needs more clients than a round can have: every round would come to nothing."""
    if made.exchange is None:
        return
    asked, most = cohort_sizes(made.schedule, population)
    least, quorum = made.exchange.least(asked), made.schedule.quorum
    if quorum < 1 and math.ceil(quorum * asked) < least <= most:
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


def warnings(recipe: Recipe, made: Made, population: int) -> list[str]:
    """What works and loses quality, or hides less than one may think."""
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
        RANDOM_CONNECTORS: random_connectors(recipe, made),
        LORA_AVERAGING: averages and population > 1,
        LORA_NOISE: averages and made.privacy is not None,
        TWO_UNDER_MASKS: made.exchange is not None and made.exchange.least(cohort_sizes(schedule, population)[0]) < 3,
        BARE_BASELINES: bool(recipe.baselines) and bool(made.exchange or made.privacy),
    }
    return [text for text, holds in found.items() if holds]
