"""A run: recipe -> plan -> rounds -> record -> checkpoint -> adapter -> card.

stage.py has the rounds. A baseline is a run of its own inside the run: the same loop over the same data, with another
population.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from atoll import parts, schema
from atoll.assemble import Assembly, again, assemble
from atoll.build import Plan, baseline_names, build, rebuilt
from atoll.cache import Say, quiet
from atoll.estimate import remember_speed
from atoll.handover import begun_with
from atoll.identity import done_before
from atoll.judged import judged
from atoll.local.work import Report, unwatched
from atoll.models.presets import no_progress_bars
from atoll.models.spaces import write
from atoll.params import Params
from atoll.planning import plan, plan_again, quiet_libraries
from atoll.record.card import write_card
from atoll.record.events import Sink
from atoll.record.folder import RunFolder, create, find
from atoll.record.story import read_story, refuse_fruitless
from atoll.record.tasks import not_asked
from atoll.schema import EVALUATE, LOCAL, POOLED
from atoll.stage import run_stage
from atoll.stream import UPDATE
from atoll.tasks import evaluate_tasks


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


def write_tree(path: Path, tree: schema.Tree) -> None:
    """As YAML."""
    from ruamel.yaml import YAML

    with path.open("w", encoding="utf-8") as file:
        YAML().dump(tree, file)


def execute(
    ready: Plan, folder: RunFolder, sinks: Sequence[Sink] = (), say: Say = quiet, report: Report = unwatched
) -> RunFolder:
    """The stages one after the other, the last with its baselines. What is there already is skipped."""
    with folder.outermost.locked(), folder.disk_errors(), quiet_libraries():
        names = [name for name in ready.whole.get("stages", ()) if name != EVALUATE]
        for at, (stage, one) in enumerate(ready.before.items(), 1):
            if not folder.stage(stage).card.exists():  # which is written last
                say(f"stage {stage} ({at} of {len(names)})")
                whole_stage(one, folder.stage(stage), sinks, say, report)
            if story := read_story(folder.stage(stage)):
                refuse_fruitless(folder.stage(stage), story)  # the next would begin with nothing learned
        if names:
            say(f"stage {names[-1]} ({len(names)} of {len(names)})")
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
    ready, things = prepared(ready, folder, say, report)
    begun = begun_with(ready, things, folder)
    if folder.is_stage and not folder.checkpoint.exists() and (same := done_before(ready, things, begun)):
        say(f"as in {same.name}, of the same plan and data from the same params: it is taken over")
        folder.take_over(same)
        return write_card(folder)
    for _ in baselines(ready, things, ready.recipe.finetune.rounds):
        pass  # what they cannot do is found before hours of training
    state = run_stage(ready, things, folder, folder.outermost, sinks)
    save_adapter(ready, things, {**begun, **state.params[UPDATE]}, folder)
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


def prepared(ready: Plan, folder: RunFolder, say: Say, report: Report = unwatched) -> tuple[Plan, Assembly]:
    """A plan as it works: with a judge's choices in its data, its model and samples, without clients that have none."""
    ready = judged(ready, folder, say)
    things = assemble(ready, say, report)
    return rebuilt(ready, ready.tree, things.left_out), things


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
    return build(schema.validate(tree, ready.recipe.name), tree, left_out)


def save_adapter(ready: Plan, things: Assembly, params: Params, folder: RunFolder) -> None:
    """Leaves all that trained in the model, what is personal as it began, and writes it where other tools find it."""
    write(ready.space, things.model, params)
    with no_progress_bars():
        ready.space.save(things.model, folder.adapter)
    if things.tokenizer is not None:
        things.tokenizer.save_pretrained(folder.adapter)


class _Callable(ModuleType):
    """This module and the function `atoll.run` share a name in the package, so the module is called as the function."""

    __call__ = staticmethod(run)


sys.modules[__name__].__class__ = _Callable
