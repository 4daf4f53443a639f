"""A run: recipe -> plan -> rounds -> record -> checkpoint -> adapter -> card.

stage.py has the rounds. A baseline is a run of its own inside the run: the same loop over the same data, with another
population.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from atoll import parts, recipe
from atoll.assemble import Assembly, again, assemble, check_data, takes
from atoll.build import LOCAL, Plan, baseline_names, build, choose_model
from atoll.cache import Say, quiet
from atoll.data.sources import check
from atoll.errors import AtollError, placed
from atoll.estimate import counts, known_samples, remember_speed
from atoll.fleet.inprocess import Elsewhere
from atoll.judged import judged
from atoll.local.judges import Judge
from atoll.local.work import Report, unwatched
from atoll.models.presets import no_progress_bars
from atoll.models.spaces import write
from atoll.params import Params
from atoll.privacy.protection import entry, epsilon_of
from atoll.recipe import POOLED
from atoll.record.card import write_card
from atoll.record.events import (
    Sink,
)
from atoll.record.folder import RunFolder, create, find
from atoll.record.story import read_story, refuse_fruitless
from atoll.record.tasks import not_asked
from atoll.stage import done_before, run_stage
from atoll.stream import REFERENCE, UPDATE
from atoll.tasks import evaluate_tasks


def plan(name_or_path: str | Path, settings: Sequence[str] = ()) -> Plan:
    """The plan of a recipe: what `atoll plan` shows. Runs nothing. Of several stages, the last with those `before` it.

    >>> plan("quickstart", ["finetune.rounds=2"]).recipe.finetune.rounds
    2
    """
    with recipe.blamed(str(name_or_path), settings):
        _, tree = starting_from(*recipe.read(name_or_path, settings))
    ready: dict[str, Plan] = {}
    with recipe.blamed(str(name_or_path), settings), quiet_libraries():
        for stage, one in recipe.staged(tree).items():
            with told_of(stage):
                found = build(recipe.validate(one), one)
                refuse_start(found, ready)
                refuse_judge(found, ready)
                refuse_second_budget(found, ready)
                refuse_spent(found, ready)
                check_data(found)
                ready[stage] = replace(found, before=dict(ready), whole=tree)
    return [*ready.values()][-1]


@contextmanager
def told_of(stage: str) -> Iterator[None]:
    """A mistake in a stage's settings is told with its section."""
    try:
        yield
    except AtollError as error:
        where = error.details["where"]
        if where.partition(".")[0] == "finetune":
            error.details["where"] = stage + where.removeprefix("finetune")
        elif where in ("from", "judge") and stage != "finetune":
            error.details["where"] = f"{stage}.{where}"
        error.details["remedy"] = error.details["remedy"].replace("--set finetune.", f"--set {stage}.")
        raise


def plan_again(folder: RunFolder) -> Plan:
    """The plan of a run that is there. What it started `from` lies in its checkpoint, and may be gone."""
    with quiet_libraries():
        written, tree = recipe.read(folder.recipe)
        ready = build(written, tree)
    return replace(ready, before={one.path.name: plan_again(one) for one in folder.earlier()})


def starting_from(written: recipe.Recipe, tree: recipe.Tree) -> tuple[recipe.Recipe, recipe.Tree]:
    """The recipe with the runs that it starts `from`, or has as judge, by their paths.

    `latest` is another one as soon as this run is there.
    """
    with placed("from"):
        paths = [located(one) for one in written.starts]
    with placed("judge"):
        judge = written.judge and located(written.judge)
    start = paths if isinstance(written.start, list) else next(iter(paths), None)
    found = {key: value for key, value in (("from", start), ("judge", judge)) if value}
    return written.model_copy(update={"start": start, "judge": judge}), {**tree, **found}


def located(reference: str) -> str:
    """A run by its path, a stage by its name."""
    return reference if reference.startswith(recipe.STAGE) else str(find(reference).path.absolute())


def refuse_start(ready: Plan, before: Mapping[str, Plan]) -> None:
    """The run that this one starts `from` must be there, with the same model and space; so must the stage `before` it."""
    for start in ready.recipe.starts:
        refuse_one_start(ready, start, before)
    if isinstance(ready.recipe.start, list):
        refuse_fusing(ready, before)


def refuse_fusing(ready: Plan, before: Mapping[str, Plan]) -> None:
    """Fused are several results that began with the same base."""
    parts.make("fuse", ready.recipe.fuse.by, "fuse.by")
    if len(starts := ready.recipe.starts) < 2:
        raise AtollError(
            "one result alone cannot be fused", where="from", found=", ".join(starts) or "nothing", allowed="two or more",
            remedy="fuse.from: [finetune, align], or from: [RUN, RUN]",
        )  # fmt: skip
    for stage in (one.removeprefix(recipe.STAGE) for one in starts if one.startswith(recipe.STAGE)):
        if before[stage].recipe.starts:
            raise AtollError(
                "what is fused must have begun with the base", where="from", found=f"{stage}, which did not",
                allowed="stages beside each other", remedy=f"--set {stage}.from=base",
            )  # fmt: skip


def refuse_second_budget(ready: Plan, before: Mapping[str, Plan]) -> None:
    """Noise that an epsilon asks for is reckoned for one stage, and the budget holds for all: the next would not begin."""
    said = parts.spec(ready.recipe.finetune.privacy, "finetune.privacy").arguments
    if ready.protection and any(one.protection for one in before.values()) and "noise_multiplier" not in said:
        raise AtollError(
            "a budget is for all stages together, and noise is reckoned for one", where="finetune.privacy",
            found=f"epsilon: {said.get('epsilon')}", allowed="a noise_multiplier, beside an epsilon for all stages",
            remedy="--set finetune.privacy.noise_multiplier=1.0; `atoll plan` tells what each stage spends",
        )  # fmt: skip


def refuse_spent(ready: Plan, before: Mapping[str, Plan]) -> None:
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


def refuse_judge(ready: Plan, before: Mapping[str, Plan]) -> None:
    """The judge must be one, and ask about records that are here."""
    judge = ready.recipe.judge
    if judge is None:
        return
    refuse_lone_stage(judge, "judge", before)
    if judge.startswith(recipe.STAGE):
        theirs = before[judge.removeprefix(recipe.STAGE)].recipe
    else:
        with placed("judge"):
            other = find(judge)
        refuse_no_result(other, "judge")
        theirs = recipe.read(other.recipe)[0]
    refuse_personal(theirs, judge, "judge")
    said = theirs.finetune.objective
    asked = parts.make("objective", said, "finetune.objective")
    if not isinstance(asked, Judge):
        raise AtollError(
            "this does not judge answers", where="judge", found=f"{judge}: {parts.spec(said, 'objective')}",
            allowed="a run whose objective was reward-model or selector", remedy="--set finetune.objective=selector",
        )  # fmt: skip
    if isinstance(ready.fleet, Elsewhere):
        raise AtollError(
            "a judge is asked where its run is, about data that are here", where="judge", found="sites over a network",
            allowed="a simulation", remedy="--set fleet=inprocess",
        )  # fmt: skip
    check({name: ready.sources[name] for name in ready.trainers if name in ready.sources}, asked.labels, takes(ready))


def refuse_no_result(other: RunFolder, key: str) -> None:
    """A run that has not come to anything yet."""
    if not other.checkpoint.exists():
        raise AtollError(
            "the run has no result to start from", where=key, found=other.name, remedy=f"`atoll resume {other.name}`"
        )


def refuse_personal(theirs: recipe.Recipe, name: str, key: str) -> None:
    """What stayed at clients is not in a run's result."""
    if words := theirs.finetune.personal:
        raise AtollError(
            "a part of the run's result stayed at its clients", where=key, found=f"{name}: personal {words}",
            allowed="a run without finetune.personal",
        )  # fmt: skip


def refuse_lone_stage(reference: str, key: str, before: Mapping[str, Plan]) -> None:
    """A stage of several, by itself, has no others to refer to."""
    if reference.startswith(recipe.STAGE) and reference.removeprefix(recipe.STAGE) not in before:
        raise AtollError(
            "this is one of several stages of a run, and needs what another came to", where=key, found=reference,
            allowed="a recipe of all stages", remedy=f"run the folder's whole.yaml, or `{key}: RUN/STAGE`",
        )  # fmt: skip


def refuse_one_start(ready: Plan, start: str, before: Mapping[str, Plan]) -> None:
    """See `refuse_start`."""
    refuse_lone_stage(start, "from", before)
    if start.startswith(recipe.STAGE):
        theirs, name = before[start.removeprefix(recipe.STAGE)].recipe, f"the stage {start.removeprefix(recipe.STAGE)}"
    else:
        with placed("from"):
            other = find(start)
        refuse_no_result(other, "from")
        theirs, name = recipe.read(other.recipe)[0], other.name
    model, space = choose_model(theirs.model), parts.make("space", theirs.finetune.space, "finetune.space")
    same = {
        "model": (model.name, ready.model.name),
        "finetune.space": (space, ready.space),
    }
    refuse_personal(theirs, name, "from")
    for key, (found, mine) in same.items():
        if found != mine:
            raise AtollError(
                f"the run has another {key.rpartition('.')[2]}", where="from", found=f"{name}: {_said(theirs, key)}",
                allowed=_said(ready.recipe, key), remedy=f"use the {key} of that run",
            )  # fmt: skip


def _said(written: recipe.Recipe, key: str) -> str:
    return str(parts.spec(written.model if key == "model" else written.finetune.space, key))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Libraries warn each other of what comes; people can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def run(
    name_or_path: str | Path,
    settings: Sequence[str] = (),
    sinks: Sequence[Sink] = (),
    say: Say = quiet,
    report: Report = unwatched,
) -> RunFolder:
    """Runs a recipe to its end; returns the folder with all that came of it.

    Args:
        name_or_path: a shipped recipe by name, or a path.
        settings: `finetune.rounds=10` and the like, laid over the recipe.
        sinks: hear every event beside the record.
        say: told before each slow step of the preparation.
        report: told after each local step.

    Raises:
        AtollError: the recipe cannot be run; nothing is left behind but the folder of a run that had begun.
    """
    ready = plan(name_or_path, settings)
    with begun(ready) as folder:
        return execute(ready, folder, sinks, say, report)


@contextmanager
def begun(ready: Plan) -> Iterator[RunFolder]:
    """A new run's folder with its recipe; gone again if something ends the run before its first event."""
    folder = create(ready.recipe.name)
    for stage, one in ready.before.items():
        folder.stage(stage).path.mkdir(parents=True)
        write_recipe(folder.stage(stage), one)
    if ready.before:
        write_tree(folder.whole, ready.whole)
    write_recipe(folder, ready)
    try:
        yield folder
    except BaseException:
        if not folder.has_begun:
            shutil.rmtree(folder.path)
        raise


def resume(reference: str, sinks: Sequence[Sink] = (), say: Say = quiet, report: Report = unwatched) -> RunFolder:
    """Goes on with a run from its last whole round; a finished one is left as it is."""
    folder = find(reference)
    return execute(plan_again(folder), folder, sinks, say, report)


def write_recipe(folder: RunFolder, ready: Plan) -> None:
    """The merged tree. It needs no other file to run again, but for a stage after another: `whole.yaml` has them all."""
    write_tree(folder.recipe, ready.tree)


def write_tree(path: Path, tree: recipe.Tree) -> None:
    """As YAML."""
    from ruamel.yaml import YAML

    with path.open("w", encoding="utf-8") as file:
        YAML().dump(tree, file)


def execute(
    ready: Plan, folder: RunFolder, sinks: Sequence[Sink] = (), say: Say = quiet, report: Report = unwatched
) -> RunFolder:
    """The stages one after the other, the last with its baselines. What is there already is skipped."""
    with folder.outermost.locked(), folder.disk_errors(), quiet_libraries():
        for stage, one in ready.before.items():
            if not folder.stage(stage).card.exists():  # which is written last
                say(f"stage {stage}")
                whole_stage(one, folder.stage(stage), sinks, say, report)
            if story := read_story(folder.stage(stage)):
                refuse_fruitless(folder.stage(stage), story)  # the next would begin with nothing learned
        whole_stage(ready, folder, sinks, say, report)
        ask_tasks(ready, folder, say)
    return folder


def ask_tasks(ready: Plan, folder: RunFolder, say: Say) -> None:
    """The stage `evaluate`: public tasks, but for those that were asked before."""
    if names := not_asked(ready.recipe, folder):
        say("stage evaluate")
        evaluate_tasks(folder, names, ready.recipe.evaluate.questions, say, where="evaluate.tasks")


def whole_stage(ready: Plan, folder: RunFolder, sinks: Sequence[Sink], say: Say, report: Report) -> None:
    """Rounds, baselines, the adapter and the card."""
    ready = judged(ready, folder, say)
    things = assemble(ready, say, report)
    ready = replace(build(ready.recipe, ready.tree, left_out=things.left_out), before=ready.before)
    if folder.is_stage and not folder.checkpoint.exists() and (same := done_before(ready, things, folder)):
        say(f"as in {same.name}, of the same plan and data from the same params: it is taken over")
        folder.take_over(same)
        return write_card(folder)
    for _ in baselines(ready, things, ready.recipe.finetune.rounds):
        pass  # what they cannot do is found before hours of training
    state = run_stage(ready, things, folder, folder.outermost, sinks)
    save_adapter(ready, things, {**state.fixed.get(REFERENCE, {}), **state.params[UPDATE]}, folder)
    if story := read_story(folder):
        remember_speed(ready, story, folder.name)
    for name, variant in baselines(ready, things, state.round) if state.round else ():
        say(f"baseline {name}")
        inner = folder.baseline(name)
        inner.path.mkdir(parents=True, exist_ok=True)
        write_recipe(inner, variant)
        run_stage(variant, again(things, variant), inner, folder, sinks)
    say("writing the card")
    write_card(folder)


def baselines(ready: Plan, things: Assembly, rounds: int) -> Iterator[tuple[str, Plan]]:
    """What the federated result is measured against: one client alone, or everybody's data pooled.

    One client does its own steps in every round; the pooled one does those of a round's whole cohort.
    """
    steps = [things.local.steps(len(things.data[name].train)) for name in ready.trainers if name in things.data]
    for name in baseline_names(ready):
        if name == POOLED:
            all_steps = round(ready.cohort * sum(steps) / len(steps))
            yield (
                name,
                variant(ready, {"population": POOLED, "local_steps": all_steps, "epochs": None, "rounds": rounds}),
            )
        else:
            yield name, variant(ready, {"population": [name.removeprefix(LOCAL)], "rounds": rounds})


ALONE: dict[str, Any] = {
    "schedule": "synchronous",
    "correction": "none",
    "outer": "sgd",
    "up": [],
    "down": [],
    "aggregate": "mean",
    "exchange": "plain",
    "privacy": "none",
    "personal": [],
}
"""What one client that trains by itself has no use for: sampling, correction, compression, masks, a server's step."""


def variant(ready: Plan, finetune: dict[str, Any]) -> Plan:
    """The plan for one client that trains by itself. With these parts a round is nothing but its local steps."""
    tree = {
        **ready.tree,
        "finetune": {**ready.tree.get("finetune", {}), **ALONE, **finetune},
        "evaluate": {**ready.tree.get("evaluate", {}), "start": False, "every": 0, "patience": None},
        "baselines": [],
        "fleet": "inprocess",
    }
    left_out = set(parts.make("data", ready.recipe.data, "data")) - set(ready.sources)
    return build(recipe.validate(tree, ready.recipe.name), tree, left_out)


def save_adapter(ready: Plan, things: Assembly, params: Params, folder: RunFolder) -> None:
    """Leaves the federated params in the model, and writes what trained where the ecosystem's tools find it."""
    write(ready.space, things.model, {**things.start, **params})  # what stays at clients as it was at the start
    with no_progress_bars():
        ready.space.save(things.model, folder.adapter)
    if things.tokenizer is not None:
        things.tokenizer.save_pretrained(folder.adapter)


class _Callable(ModuleType):
    """This module and the function `atoll.run` share a name in the package, so the module is called as the function."""

    __call__ = staticmethod(run)


sys.modules[__name__].__class__ = _Callable
