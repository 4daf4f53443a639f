"""What stages, and runs, hand to each other: a result to begin with, a judge, what is left of a privacy budget.

What cannot be handed over is refused with the plan, when a stage before may not have run yet (`refuse_handover`); what is
handed over is looked at again when the stage begins, since folders change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from atoll import parts, schema
from atoll.assemble import Assembly, takes
from atoll.build import Plan, choose_model
from atoll.cache import content_hash
from atoll.data.sources import ClientData, check
from atoll.errors import AtollError, placed
from atoll.estimate import counts, known_samples
from atoll.fleet.inprocess import Elsewhere
from atoll.local.judges import Judge
from atoll.models.presets import PRESETS
from atoll.models.ref import resolve
from atoll.models.spaces import draws
from atoll.outcome import Outcome, Progress, base_of, outcome, place, space_of
from atoll.params import Params
from atoll.privacy.protection import entry, epsilon_of
from atoll.record.checkpoint import read_head
from atoll.record.folder import CHECKPOINT, RunFolder, find, root
from atoll.schema import Origin
from atoll.wire import content

Before = Mapping[str, Plan]
"""The stages before one, by name."""


# With the plan.


def starting_from(written: schema.Recipe, tree: schema.Tree) -> schema.Tree:
    """A recipe's tree with the runs that it starts `from`, or has as judge, by their paths.

    `latest` is another one as soon as this run is there.
    """
    found: dict[str, Any] = {}
    with placed("from"):
        if paths := list(map(located, written.starts)):
            found["from"] = paths if written.fuses else paths[0]
    with placed("judge"):
        if written.judged_by:
            found["judge"] = located(written.judged_by)
    return {**tree, **found}


def pinned(written: schema.Recipe, tree: schema.Tree) -> schema.Tree:
    """A recipe's tree with the commit of a model that a hub has: its `main` is another one some day."""
    model = choose_model(written.model)
    if model.own_factory or not isinstance(model.name, str):
        return tree
    with placed("model"):
        ref = resolve(model.name)
    if ref.kind != "hub" or ref.name in PRESETS or "@" in ref.name:
        return tree
    use = f"{ref.name}@{ref.revision}"
    return {**tree, "model": {**tree["model"], "use": use} if isinstance(tree["model"], dict) else use}


def located(one: Origin) -> str:
    """A run by its path, a stage by its name."""
    return one.written if one.stage else str(find(one.run).path.absolute())


def refuse_handover(ready: Plan, before: Before) -> None:
    """Raises AtollError where a stage cannot have what it begins with, is judged by, or may spend."""
    for one in ready.recipe.starts:
        refuse_start(ready, giver(one, "from", before))
    if ready.recipe.fuses:
        refuse_fusing(ready, before)
    if ready.recipe.judged_by:
        refuse_judge(ready, giver(ready.recipe.judged_by, "judge", before))
    refuse_second_budget(ready, before)
    refuse_spent(ready, before)


class Giver(NamedTuple):
    """Whose result is handed over, as it is known with the plan."""

    name: str
    recipe: schema.Recipe


def giver(one: Origin, key: str, before: Before) -> Giver:
    """Of the stages before, or of the runs that are there.

    Raises:
        AtollError: a stage of a recipe that was taken out of it; a run without a result, or that is still learning; a result
            of which a part stayed at clients.
    """
    if one.stage and one.stage not in before:
        raise AtollError(
            "this is one of several stages of a run, and needs what another came to", where=key, found=str(one),
            allowed="a recipe of all stages", remedy=f"run the folder's whole.yaml, or `{key}: RUN/STAGE`",
        )  # fmt: skip
    if one.stage:
        found = Giver(str(one), before[one.stage].recipe)
    else:
        with placed(key):
            came = outcome(find(one.run))
        refuse_learning(came, key)
        found = Giver(one.name, came.recipe)
    if words := found.recipe.finetune.personal:
        raise AtollError(
            "a part of the run's result stayed at its clients", where=key, found=f"{found.name}: personal {words}",
            allowed="a run without finetune.personal",
        )  # fmt: skip
    return found


def refuse_learning(came: Outcome, key: str) -> None:
    """A result that changes while it is read: a run and its baselines would not begin with the same."""
    if came.is_learning:
        name = came.folder.outermost.name
        raise AtollError(
            "the run is still learning", where=key, found=f"{name}, {came.early}", allowed="a run that is at rest",
            remedy=f"wait for it, or `atoll stop {name}` takes what it has come to",
        )  # fmt: skip


def refuse_start(ready: Plan, theirs: Giver) -> None:
    """What is begun with must be of the same model and space, and of the same seed where that draws what does not travel."""
    model, space = choose_model(theirs.recipe.model), space_of(theirs.recipe)
    same: dict[str, tuple[object, object]] = {
        "model": (model.name, ready.model.name),
        "finetune.space": (space, ready.space),
    }
    if draws(space):
        same["seed"] = (theirs.recipe.seed, ready.recipe.seed)
    for key, (found, mine) in same.items():
        if found != mine:
            what = key.rpartition(".")[2]
            raise AtollError(
                f"the run has another {what}", where="from", found=f"{theirs.name}: {said(theirs.recipe, key)}",
                allowed=said(ready.recipe, key), remedy=f"use the {key} of that run",
            )  # fmt: skip


def said(written: schema.Recipe, key: str) -> str:
    """What a recipe says at a key, as people read it."""
    values = {"model": written.model, "finetune.space": written.finetune.space}
    return str(parts.spec(values[key], key)) if key in values else str(written.seed)


def refuse_fusing(ready: Plan, before: Before) -> None:
    """Fused are several results that began with the same base."""
    parts.make("fuse", ready.recipe.fuse.by, "fuse.by")
    if len(starts := ready.recipe.starts) < 2:
        raise AtollError(
            "one result alone cannot be fused", where="from", found=", ".join(map(str, starts)) or "nothing",
            allowed="two or more", remedy="fuse.from: [finetune, align], or from: [RUN, RUN]",
        )  # fmt: skip
    for stage in (one.stage for one in starts if one.stage):
        if before[stage].recipe.starts:
            remedy = f"--set {stage}.from=base" if stage != "finetune" else "a recipe without `from`"
            raise AtollError(
                "what is fused must have begun with the base", where="from", found=f"{stage}, which did not",
                allowed="stages beside each other", remedy=remedy,
            )  # fmt: skip


def refuse_judge(ready: Plan, theirs: Giver) -> None:
    """The judge must be one, and ask about records that are here."""
    written = theirs.recipe.finetune.objective
    asked = parts.make("objective", written, "finetune.objective")
    if not isinstance(asked, Judge):
        raise AtollError(
            "this does not judge answers", where="judge", found=f"{theirs.name}: {parts.spec(written, 'objective')}",
            allowed="a run whose objective was reward-model or selector", remedy="--set finetune.objective=selector",
        )  # fmt: skip
    if isinstance(ready.fleet, Elsewhere):
        raise AtollError(
            "a judge is asked where its run is, about data that are here", where="judge", found="sites over a network",
            allowed="a simulation", remedy="--set fleet=inprocess",
        )  # fmt: skip
    check(
        {name: ready.sources[name] for name in ready.learners if name in ready.sources},
        asked.needs.labels,
        takes(ready),
    )


def refuse_second_budget(ready: Plan, before: Before) -> None:
    """Noise that an epsilon asks for is reckoned for one stage, and the budget holds for all: the next would not begin."""
    written = parts.spec(ready.recipe.finetune.privacy, "finetune.privacy").arguments
    if ready.protection and any(one.protection for one in before.values()) and "noise_multiplier" not in written:
        raise AtollError(
            "a budget is for all stages together, and noise is reckoned for one", where="finetune.privacy",
            found=f"epsilon: {written.get('epsilon')}", allowed="a noise_multiplier, beside an epsilon for all stages",
            remedy="--set finetune.privacy.noise_multiplier=1.0; `atoll plan` tells what each stage spends",
        )  # fmt: skip


def refuse_spent(ready: Plan, before: Before) -> None:
    """Of a budget for all stages something must be left when a stage begins."""
    protection, earlier = ready.protection, [one for one in before.values() if one.protection]
    if protection is None or protection.mechanism.epsilon is None or not earlier:
        return
    entries = []
    for one in (*earlier, ready):
        if one.protection and one.protection.noise_multiplier:
            samples, rounds = known_samples(one, counts(one.sources)), 1 if one is ready else one.recipe.finetune.rounds
            entries += [entry(one.protection, "plan", one.hash, number, samples) for number in range(rounds)]
    if (spent := epsilon_of(protection, entries)) > protection.mechanism.epsilon:
        raise AtollError(
            "the stages before it leave nothing of the privacy budget", where="finetune.privacy",
            found=f"epsilon {spent:.4g} after its first round", allowed=f"{protection.mechanism.epsilon:g}, for all stages",
            remedy="more noise, fewer rounds before it, or a larger epsilon",
        )  # fmt: skip


# When the stage begins.


def start_of(ready: Plan, things: Assembly, folder: RunFolder) -> Params:
    """All that trains, before the first round.

    Raises:
        AtollError: what it begins with has no result, or was trained on something else.
    """
    given = [outcome(place(one, folder)) for one in ready.recipe.starts]
    if not given:
        return things.start
    for one in given:
        refuse_learning(one, "from")
        refuse_unlike(one, things.start, base(ready))
    results = [{name: x.to(things.start[name].device) for name, x in one.params.items()} for one in given]
    if not ready.recipe.fuses:
        return results[0]
    refuse_another_start(given, before_first(ready, things, things.start).start)
    fused: Params = parts.make("fuse", ready.recipe.fuse.by, "fuse.by")(things.start, results)
    return fused


def base(ready: Plan) -> str:
    """What a plan's params are laid on, by content."""
    return base_of(identity(ready), ready.space, ready.recipe.seed)


def identity(ready: Plan) -> str:
    """The model's; empty for one of the user's own factory."""
    return ready.shapes.identity if ready.shapes else ""


def refuse_unlike(given: Outcome, mine: Params, base: str) -> None:
    """Params mean something beside what they were trained on alone."""
    shapes = {name: x.shape for name, x in mine.items()}
    if given.progress.base != base or {name: x.shape for name, x in given.params.items()} != shapes:
        raise AtollError(
            "the run trained on another model, or in another space", where="from", found=given.folder.name,
            remedy="use the model, as it was then, and the finetune.space of that run",
        )  # fmt: skip


def refuse_another_start(given: list[Outcome], mine: str) -> None:
    """Fused are results that began with the same params as this run would."""
    for one in given:
        if one.progress.start != mine:
            raise AtollError(
                "what is fused must have begun with this run's base", where="from",
                found=f"{one.folder.name}, which did not",
                allowed="runs from the same model, space and seed, none of them `from` another",
            )  # fmt: skip


def before_first(ready: Plan, things: Assembly, start: Params) -> Progress:
    """What decides the result of a stage, and nothing done."""
    return Progress(
        ready.hash,
        things.digests,
        start=content_hash(identity(ready), content(start)),
        base=base(ready),
        beside={"fleet": str(parts.spec(ready.recipe.fleet, "fleet")), "code": code(), **versions()},
    )


def versions() -> dict[str, str]:
    """Of Atoll, and of what it trains with."""
    return {name: version(name) for name in ("atoll", "torch", "transformers", "peft")}


@cache
def code() -> str:
    """This package's source by content: between releases, too, other code comes to something else."""
    folder = Path(str(resources.files("atoll")))
    return content_hash(*sorted(folder.rglob("*.py")))


def done_before(ready: Plan, things: Assembly, folder: RunFolder) -> RunFolder | None:
    """A finished stage, of whatever run here, of the same plan on the same data that began with the same params.

    None is looked for where not all that decides the result is known by content: data at sites or of the user's own source,
    a model or a part of the user's own, a fleet that misbehaves.
    """
    own = any(isinstance(source, ClientData) for source in ready.sources.values()) or names_own_code(ready.tree)
    if own or isinstance(ready.fleet, Elsewhere) or parts.spec(ready.recipe.fleet, "fleet").use == "faults":
        return None
    wanted = before_first(ready, things, start_of(ready, things, folder))
    for checkpoint in sorted((*root().glob(f"*/{CHECKPOINT}"), *root().glob(f"*/stages/*/{CHECKPOINT}"))):
        other = RunFolder(checkpoint.parent)
        if other.card.exists() and is_same(wanted, checkpoint):
            return other
    return None


def is_same(wanted: Progress, checkpoint: Path) -> bool:
    """Whether a checkpoint is the end of what begins as wanted."""
    try:
        found = Progress(**read_head(checkpoint).extra)
    except (AtollError, TypeError):  # damaged, or of another version
        return False
    same = all(getattr(found, name) == getattr(wanted, name) for name in ("plan", "data", "start", "base", "beside"))
    return same and bool(found.ended)


def names_own_code(tree: Any) -> bool:
    """Whether a recipe names `module:factory` anywhere; `tiny:` is a preset of ours, `stage:` a stage."""
    if isinstance(tree, Mapping):
        return any(map(names_own_code, tree.values()))
    if isinstance(tree, list):
        return any(map(names_own_code, tree))
    return isinstance(tree, str) and re.fullmatch(r"(?!tiny:|stage:)[\w.]+:\w+", tree) is not None
