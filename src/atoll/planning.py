"""From a recipe to its plan: what it names by a place or a moment is named for good, and every stage is checked."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from atoll import recipe, schema
from atoll.assemble import check_data
from atoll.build import Plan, build
from atoll.errors import AtollError, placed
from atoll.handover import refuse_handover
from atoll.models.ref import is_hub_id, resolve
from atoll.policy import model_names
from atoll.record.folder import RunFolder, find
from atoll.schema import Origin


def plan(name_or_path: str | Path, settings: Sequence[str] = ()) -> Plan:
    """The plan of a recipe: what `atoll plan` shows. Runs nothing. Of several stages, the last with those `before` it.

    >>> plan("quickstart", ["finetune.rounds=2"]).recipe.finetune.rounds
    2
    """
    with recipe.blamed(str(name_or_path), settings), quiet_libraries():
        return planned(*recipe.read(name_or_path, settings))


def planned(written: schema.Recipe, tree: schema.Tree) -> Plan:
    """The plan of a recipe and its merged tree: each of its stages is checked beside those before it."""
    tree = pinned(written, starting_from(written, tree))
    ready: dict[str, Plan] = {}
    for stage, one in recipe.staged(tree).items():
        with told_of(stage, {key for key in ("from", "judge") if one.get(key) == tree.get(key)}):
            found = build(schema.validate(one), one)
            refuse_handover(found, ready)
            check_data(found)
            ready[stage] = replace(found, before=dict(ready), whole=tree)
    return [*ready.values()][-1]


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
    """A recipe's tree with the commits of models that a hub has: a hub's `main` is another one some day.

    A preset that comes from a hub is not: its short name is what people know it by.
    """
    with placed("model"):
        commits = {
            name: f"{name}@{resolve(name).revision}"
            for name in model_names(written.model)
            if is_hub_id(name) and "@" not in name
        }
    return {**tree, "model": renamed(tree["model"], commits)} if commits else tree


def renamed(written: Any, names: Mapping[str, str]) -> Any:
    """What is written, with other names in the place of some, at whatever depth."""
    if isinstance(written, Mapping):
        return {key: renamed(value, names) for key, value in written.items()}
    return names.get(written, written) if isinstance(written, str) else written


def located(one: Origin) -> str:
    """A run by its path, a stage by its name."""
    return one.written if one.stage else str(find(one.run).path.absolute())


@contextmanager
def told_of(stage: str, shared: Collection[str]) -> Iterator[None]:
    """A mistake in a stage's settings is told with its section, but for keys whose values the whole recipe has `shared`."""
    try:
        yield
    except AtollError as error:
        where = error.details["where"]
        if where.partition(".")[0] == "finetune":
            error.details["where"] = stage + where.removeprefix("finetune")
        elif where in ("from", "judge") and stage != "finetune" and where not in shared:
            error.details["where"] = f"{stage}.{where}"
        error.details["remedy"] = error.details["remedy"].replace("--set finetune.", f"--set {stage}.")
        raise


def plan_again(folder: RunFolder) -> Plan:
    """The plan of a run that is there. What it started `from` is kept in its folder, and may be gone elsewhere."""
    with quiet_libraries():
        written, tree = recipe.read(folder.recipe)
        ready = build(written, tree)
    return replace(ready, before={one.path.name: plan_again(one) for one in folder.earlier()})


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Libraries warn each other of what comes; people can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
