"""What stages, and runs, hand to each other: a result to begin with, a judge, what is left of a privacy budget.

What cannot be handed over is refused with the plan, when a stage before may not have run yet (`refuse_handover`); what is
handed over is looked at again when the stage begins, since folders change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from atoll import parts, schema
from atoll.assemble import Assembly, takes
from atoll.budget import refuse_second_budget, refuse_spent
from atoll.build import Plan, choose_model
from atoll.data.sources import check
from atoll.errors import AtollError, placed
from atoll.fleet.inprocess import Elsewhere
from atoll.identity import base, before_first
from atoll.local.judges import Judge
from atoll.models.spaces import draws
from atoll.outcome import Outcome, outcome, place, space_of
from atoll.params import Params
from atoll.record.checkpoint import load_start, save_start
from atoll.record.folder import RunFolder, find
from atoll.schema import Origin

Before = Mapping[str, Plan]
"""The stages before one, by name."""


# With the plan.


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
            allowed="a run or stage whose objective is reward-model or selector",
            remedy=f"let {theirs.name} learn to judge, by its `objective: selector`, or name another",
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


# When the stage begins.


def begun_with(ready: Plan, things: Assembly, folder: RunFolder) -> Params:
    """All that trains, before the first round: kept in the run's folder, whatever becomes of those that it starts `from`.

    A baseline begins with what its run began with. Raises as `start_of` does, the first time.
    """
    if not ready.recipe.starts:
        return things.start
    if not folder.start.exists():
        save_start(folder.start, start_of(ready, things, folder))
    return {name: x.to(things.start[name].device) for name, x in load_start(folder.start).items()}


def start_of(ready: Plan, things: Assembly, folder: RunFolder) -> Params:
    """What the runs or stages that this one starts `from` have come to, fused where they are several.

    Raises:
        AtollError: what it begins with has no result, or was trained on something else.
    """
    given = [outcome(place(one, folder)) for one in ready.recipe.starts]
    for one in given:
        refuse_learning(one, "from")
        refuse_unlike(one, things.start, base(ready))
    results = [{name: x.to(things.start[name].device) for name, x in one.params.items()} for one in given]
    if not ready.recipe.fuses:
        return results[0]
    refuse_another_start(given, before_first(ready, things, things.start).start)
    fused: Params = parts.make("fuse", ready.recipe.fuse.by, "fuse.by")(things.start, results)
    return fused


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
