"""Sweeps: the same number of trials for every method, drawn from a grid by seed, compared by mean held-out loss.

A fair comparison gives every method the same budget, so no method gets more trials than the smallest grid has points, and
the same values of what they share, such as the learning rate, so that none is judged at a worse one. A sweep is named by
what it is made of, the data included: the same command finds its finished trials again and goes on with the rest. The best
loss of a sweep flatters: it was chosen on the held-out data that it is measured on.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atoll import recipe, schema
from atoll.assemble import Assembly, again
from atoll.build import Plan, rebuilt
from atoll.cache import Say, content_hash, quiet, write_file
from atoll.data.sources import digest
from atoll.errors import AtollError
from atoll.identity import base, code, own_files
from atoll.keys import rng
from atoll.local.work import Report, unwatched
from atoll.outcome import outcome
from atoll.planning import planned
from atoll.record.events import Sink
from atoll.record.folder import RunFolder, find, root
from atoll.record.story import read_story
from atoll.run import prepared, write_recipe
from atoll.stage import run_stage
from atoll.wire import content

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """One method with one point of its grid."""

    method: str
    settings: Settings

    @property
    def name(self) -> str:
        """Names its folder: the method, and what the settings are."""
        digest = content_hash(json.dumps(self.settings, sort_keys=True))[:8]
        return f"{self.method.removeprefix('methods/').replace('/', '-')}-{digest}"


@dataclass(frozen=True)
class Tried:
    """What became of a trial. Losses are held out: the mean over clients, and the worst client's."""

    method: str
    settings: Settings
    loss: float
    worst: float
    bytes_up: int
    bytes_down: int
    seconds: float
    run: str


def parse_grid(written: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """`finetune.optimizer.lr=1e-3,3e-3` for every method, `fedprox:finetune.correction.mu=0.1,1` for one.

    >>> parse_grid(["seed=0,1", "fedprox:finetune.correction.mu=0.1,1"])
    {'': {'seed': [0, 1]}, 'fedprox': {'finetune.correction.mu': [0.1, 1]}}
    """
    grid: dict[str, dict[str, list[Any]]] = {}
    for one in written:
        head, equals, values = one.partition("=")
        method, _, path = head.rpartition(":")
        parsed = recipe.parse(f"[{values}]", f"--grid {head}") if equals and values.strip() else None
        if not (path.strip() and isinstance(parsed, list)):
            raise AtollError(
                "not a grid", found=one, allowed="[METHOD:]path.to.key=value,value",
                remedy="--grid finetune.optimizer.lr=1e-3,3e-3",
            )  # fmt: skip
        grid.setdefault(method.removeprefix("methods/"), {})[path.strip()] = parsed
    return grid


Grid = Mapping[str, Mapping[str, Sequence[Any]]]


def points(grid: Grid, method: str) -> list[Settings]:
    """Every combination that a method may take, its own values over those for all."""
    return combinations({**grid.get("", {}), **own(grid, method)})


def combinations(values: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Every choice of one value for each key, the last key changing fastest."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def own(grid: Grid, method: str) -> Mapping[str, Sequence[Any]]:
    """The keys that a method alone is given values for."""
    return grid.get(method.removeprefix("methods/"), {})


def shared(grid: Grid, methods: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The keys for which all methods have the same values."""
    taken = {key for method in methods for key in own(grid, method)}
    return {key: values for key, values in grid.get("", {}).items() if key not in taken}


def choose(methods: Sequence[str], grid: Grid, trials: int | None, seed: int) -> list[Trial]:
    """As many trials for each method, drawn without replacement, and with the same values of what methods share.

    Raises:
        AtollError: more trials than the smallest grid has points; a grid for a method that is not swept.
    """
    for named in grid.keys() - {"", *(method.removeprefix("methods/") for method in methods)}:
        raise AtollError("a grid for a method that is not swept", found=named, allowed=", ".join(methods))
    each = {method: points(grid, method) for method in methods}
    most = min(len(found) for found in each.values())
    count = most if trials is None else trials
    if not 1 <= count <= most:
        smallest = min(each, key=lambda method: len(each[method]))
        raise AtollError(
            "no trials" if count < 1 else "more trials than the grid has points", where=f"--trials, {smallest}",
            found=count, allowed=f"1 to {most}",
            remedy="give more values by --grid: every method gets the same number of trials",
        )  # fmt: skip
    pairs = draw_shared(grid, methods, count, seed)
    return [Trial(method, point) for method in methods for point in draw(each[method], pairs, seed, method)]


def draw_shared(grid: Grid, methods: Sequence[str], count: int, seed: int) -> list[Settings]:
    """What the trials of each method have in common, one for each trial: every shared point once before any comes again."""
    whole = combinations(shared(grid, methods))
    order = rng(seed, "sweep").permutation(len(whole))
    return [whole[order[trial % len(whole)]] for trial in range(count)]


def draw(every: Sequence[Settings], pairs: Sequence[Settings], seed: int, method: str) -> list[Settings]:
    """For each of `pairs` a point of the method's grid that agrees with it, no point twice; in the order of the grid."""
    left = [int(i) for i in rng(seed, "sweep", method).permutation(len(every))]
    chosen = []
    for pair in pairs:
        chosen.append(next(i for i in left if pair.items() <= every[i].items()))
        left.remove(chosen[-1])
    return [every[i] for i in sorted(chosen)]


def untried(grid: Grid, methods: Sequence[str], trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """Values that all methods share and that so few trials had no room for: no method tried them."""
    keys = shared(grid, methods)
    tried = {key: [trial.settings[key] for trial in trials] for key in keys}
    return {key: left for key, values in keys.items() if (left := [one for one in values if one not in tried[key]])}


def tree_of(name_or_path: str, trial: Trial) -> schema.Tree:
    """The recipe with the trial's method laid over it, then the trial's settings; without baselines."""
    tree = recipe.with_method(recipe.resolve(name_or_path), trial.method)
    for path, value in trial.settings.items():
        tree = recipe.put(tree, path, value)
    return tree | {"baselines": []}


def sweep(
    name_or_path: str,
    methods: Sequence[str],
    grid: Grid,
    trials: int | None = None,
    seed: int = 0,
    sinks: Sequence[Sink] = (),
    say: Say = quiet,
    report: Report = unwatched,
) -> tuple[Path, list[Tried]]:
    """Runs every trial that has not finished yet. Returns the sweep's folder and what became of the trials, the best first.

    Raises:
        AtollError: a trial cannot be planned; this is found before the first one runs.
    """
    drawn = choose(methods, grid, trials, seed)
    chosen = [(trial, plan_of(name_or_path, trial)) for trial in drawn]
    for key, values in untried(grid, methods, drawn).items():
        say(f"no trial of any method has {key} = {', '.join(map(str, values))}: more trials would")
    held: dict[str, dict[str, str]] = {}
    for _, plan in chosen:
        if (of := json.dumps(plan.tree["data"], sort_keys=True)) not in held:  # trials mostly have their data in common
            held[of] = {name: digest(source) for name, source in plan.sources.items()}
    name = content_hash(*(made_of(plan) for _, plan in chosen), json.dumps(held, sort_keys=True))[:8]
    folder = root() / "sweeps" / f"{chosen[0][1].recipe.name}-{name}"
    warm: dict[str, Assembly] = {}
    found: list[Tried] = []
    for number, (trial, plan) in enumerate(chosen, 1):
        inner = RunFolder(folder / trial.name)
        say(f"trial {number} of {len(chosen)}: {trial.method} {json.dumps(trial.settings)}")
        run_trial(plan, inner, warm, sinks, say, report)
        found.append(tried(trial, inner))
        save(folder, found)
    return folder, ranked(found)


def plan_of(name_or_path: str, trial: Trial) -> Plan:
    """The trial's plan. Raises AtollError for a recipe of several stages: a trial is a stage."""
    tree = tree_of(name_or_path, trial)
    stages = recipe.staged(tree)
    if len(stages) > 1:
        raise AtollError(
            "a sweep tunes one stage", where="stages", found=", ".join(stages), allowed="one",
            remedy="a copy of the recipe with `stages: [align]`, and `from` a run that was fine-tuned",
        )  # fmt: skip
    return planned(schema.validate(tree, f"{name_or_path} with {trial.method}"), tree)


def made_of(plan: Plan) -> str:
    """A trial but for its data, by content: its plan, model and code, and what the runs that it stands on have come to."""
    given = [content(outcome(find(one.run)).params) for one in plan.recipe.stands_on]
    return content_hash(plan.hash, base(plan), code(), *own_files(plan), *given)


def run_trial(
    plan: Plan, folder: RunFolder, warm: dict[str, Assembly], sinks: Sequence[Sink], say: Say, report: Report
) -> None:
    """Runs a trial to its end, or goes on with it. Trials on the same model, data and space share what was loaded."""
    with folder.locked(), folder.disk_errors():
        story = read_story(folder)
        if story and story.ended:
            return
        write_recipe(folder, plan)
        work = plan.recipe.finetune
        of_tree = [plan.tree.get(key) for key in ("model", "data", "seed")]
        kind = json.dumps([*of_tree, repr(plan.space), work.objective, work.context], sort_keys=True)
        if plan.recipe.judge or kind not in warm:  # a judge's choices are the trial's own, and lie in its folder
            warm.clear()  # one model in memory at a time
            ready, warm[kind] = prepared(plan, folder, say, report)
        else:
            ready = rebuilt(plan, plan.tree, warm[kind].left_out)
        refuse_nothing_held_out(warm[kind])
        run_stage(ready, again(warm[kind], ready), folder, folder, sinks)


def refuse_nothing_held_out(things: Assembly) -> None:
    """A sweep chooses by held-out loss."""
    if not any(len(data.test) for data in things.data.values()):
        raise AtollError(
            "nothing is held out, so trials cannot be compared", where="data.held_out",
            remedy="hold out a share, such as 0.1, or name files for it",
        )  # fmt: skip


def tried(trial: Trial, folder: RunFolder) -> Tried:
    """What the record says of a finished trial."""
    story = read_story(folder)
    assert story is not None
    assert story.ended is not None
    last = story.final or story.evaluations[-1]
    return Tried(
        method=trial.method,
        settings=trial.settings,
        loss=last.mean,
        worst=last.worst,
        bytes_up=story.bytes_up,
        bytes_down=story.bytes_down,
        seconds=story.ended.seconds,
        run=str(folder.path),
    )


def ranked(each: Sequence[Tried]) -> list[Tried]:
    """The lowest mean loss first; what is not a number last."""
    return sorted(each, key=lambda one: (math.isnan(one.loss), one.loss))


def save(folder: Path, each: Sequence[Tried]) -> None:
    """sweep.json: what became of the trials so far, the best first."""
    write_file(folder / "sweep.json", json.dumps([asdict(one) for one in ranked(each)], indent=1).encode())
