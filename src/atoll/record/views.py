"""What runs say of themselves: a list of them, one in detail, several side by side. As data, which `--json` prints.

Reads records and recipes and nothing else, so that it answers at once, also for a run that is under way elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from atoll.errors import AtollError
from atoll.record.card import records_in_words
from atoll.record.events import Evaluated
from atoll.record.folder import RunFolder
from atoll.record.measured import Cell, Table, measured
from atoll.record.story import Story, read_story
from atoll.record.tasks import TUNED, read_scores


@dataclass(frozen=True)
class Summary:
    """A run in one row. Losses are means over clients, each counting once.

    Bytes and seconds are the rounds' so far, and like epsilon those of all stages.
    """

    name: str
    path: str
    state: str
    """running, finished, failed (it ended, and every round came to nothing), stopped (it can go on), empty (it ended before
    its first event), or damaged (its record is)."""
    round: int
    rounds: int
    clients: int
    base_loss: float | None
    loss: float | None
    """After the last evaluation that had a round before it."""
    bytes_down: int
    bytes_up: int
    seconds: float
    epsilon: float | None
    """Spent so far at `delta`; None where no round was released with noise."""
    delta: float | None
    baselines: Mapping[str, str]
    """Name -> waiting, running, stopped or finished."""
    stage: str = ""
    """Of a run in several stages, the one that rounds and losses are of: the last that has begun."""


def summarize(folder: RunFolder) -> Summary:
    """The run in one row."""
    running = folder.is_running()
    try:
        story = read_story(folder)
    except AtollError:  # `show` says what is wrong; it must not hide the other runs
        return _without_story(folder, "damaged")
    if story is None:
        at_work = [
            replace(summarize(stage), name=folder.name, path=str(folder.path), stage=stage.path.name)
            for stage in folder.stages()
        ]
        begun = [one for one in at_work if one.rounds]  # of several stages the one that is at work
        if not begun:
            return _without_story(folder, "running" if running else "empty")
        failed = begun[-1].state == "failed"  # then the next has not begun
        return replace(begun[-1], state="running" if running else "failed" if failed else "stopped")
    inside = _baselines(story, running)
    stages = [*story.before.values(), story]
    spent = [one for stage in stages for one in stage.spent[-1:]]
    last = spent[-1] if spent else None
    done = story.ended is not None and all(state == "finished" for state in inside.values())
    ended = "failed" if story.fruitless else "finished"
    return Summary(
        name=folder.name,
        path=str(folder.path),
        state="running" if running else ended if done else "stopped",
        round=len(story.rounds),
        rounds=story.started.rounds,
        clients=len(story.started.clients),
        base_loss=_mean(story.base),
        loss=_mean(latest(story)),
        bytes_down=sum(stage.bytes_down for stage in stages),
        bytes_up=sum(stage.bytes_up for stage in stages),
        seconds=sum(map(_seconds, stages)),
        epsilon=last.epsilon if last else None,
        delta=last.delta if last else None,
        baselines=inside,
    )


def _baselines(story: Story, running: bool) -> dict[str, str]:
    """They run one after the other, once the run itself is through."""
    states = {}
    for name in story.started.baselines:
        inner = story.baselines.get(name)
        unfinished = "running" if running else "stopped"
        states[name] = "waiting" if inner is None else "finished" if inner.ended else unfinished
    return states


def _without_story(folder: RunFolder, state: str) -> Summary:
    return Summary(folder.name, str(folder.path), state, 0, 0, 0, None, None, 0, 0, 0.0, None, None, {})


def latest(story: Story) -> Evaluated | None:
    """The last evaluation that had a round before it: the base model's loss is no result."""
    return next((e for e in reversed(story.evaluations) if e.round > 0 or not story.started.rounds), None)


def _mean(evaluated: Evaluated | None) -> float | None:
    return None if evaluated is None or math.isnan(evaluated.mean) else evaluated.mean


def _seconds(story: Story) -> float:
    """With evaluations; from the end's own count, or so far."""
    if story.ended:
        return story.ended.seconds
    return sum(r.seconds for r in story.rounds) + sum(e.seconds for e in story.evaluations)


def need_story(folder: RunFolder) -> Story:
    """The run's story, which must have begun."""
    begun = [one for stage in folder.stages() if (one := read_story(stage))]
    story = read_story(folder) or next(reversed(begun), None)
    if story is None:
        raise AtollError(
            "the run has not begun: it has no events yet",
            where=str(folder.path),
            remedy=f"`atoll resume {folder.name}`",
        )
    return story


def details(folder: RunFolder) -> dict[str, Any]:
    """One run: its summary, the table of held-out losses, where seconds went, what went wrong."""
    story = need_story(folder)
    found = measured(story)
    spans: dict[str, float] = {}
    for one in story.rounds:
        for name, seconds in one.spans.items():
            spans[name] = spans.get(name, 0.0) + seconds
    return asdict(summarize(folder)) | {
        "plan": story.started.plan,
        "seed": story.started.seed,
        "trains": story.started.trains,
        "of": story.started.of,
        "samples": dict(story.started.samples),
        "held_out": dict(story.started.held_out),
        "seconds_in_baselines": sum(_seconds(inner) for inner in story.baselines.values()),
        "ended": story.ended.reason if story.ended else None,
        "losses": as_data(found.loss),
        "losses_by_modality": as_data(found.loss_by_modality),
        "accuracies": as_data(found.accuracy),
        "reward_accuracies": as_data(found.reward_accuracy),
        "accuracies_by_modality": as_data(found.accuracy_by_modality),
        "tasks": [asdict(one) for one in read_scores(folder)],
        "evaluations": [{"round": e.round, "mean": e.mean, "worst": e.worst} for e in story.evaluations],
        "spans": spans,
        "left_out": {one.client: one.report for one in story.left_out},
        "records_left_out": {one.client: asdict(one) | {"in_words": records_in_words(one)} for one in story.records},
        "missing": [asdict(one) | {"round": one.round + 1} for one in story.missing],
        "warnings": list(story.started.warnings),
    }


def as_data(table: Table | None) -> list[dict[str, Any]]:
    """One row a model: {model, sites: {site: {loss, standard_error}}, mean: {loss, standard_error}}; so for accuracy."""
    if table is None:
        return []
    name = table.measure.value

    def cell(value: Cell | None) -> dict[str, float] | None:
        return None if value is None else {name: value[0], "standard_error": value[1]}

    return [
        {
            "model": row[0],
            "sites": dict(zip(table.columns, map(cell, row[1]), strict=True)),
            "mean": cell(table.mean(row)),
        }
        for row in table.rows
    ]


def compare(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """Runs side by side: settings in which they differ, what was measured last of each, by site and on tasks, and costs."""
    stories = {folder.name: need_story(folder) for folder in folders}
    return {
        "settings": differing({folder.name: dict(flat(read_tree(folder))) for folder in folders}),
        "runs": [asdict(summarize(folder)) for folder in folders],
        "losses": {name: _sites(story) for name, story in stories.items()},
        "tasks": {
            folder.name: [asdict(one) for one in read_scores(folder) if one.model == TUNED] for folder in folders
        },
    }


def _sites(story: Story) -> dict[str, dict[str, float]]:
    last = latest(story)
    return {site: dict(metrics) for site, metrics in last.clients.items()} if last else {}


def read_tree(folder: RunFolder) -> dict[str, Any]:
    """The run's recipe as resolved, of all its stages."""
    from atoll.recipe import load

    return load(folder.whole if folder.whole.exists() else folder.recipe)


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A tree's leaves under dotted paths.

    >>> list(flat({"finetune": {"rounds": 2, "up": ["int8"]}}))
    [('finetune.rounds', 2), ('finetune.up', ['int8'])]
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each run's settings those that are not the same in all: path -> run -> value, None where it says nothing.

    >>> differing({"a": {"seed": 0, "rounds": 2}, "b": {"seed": 1, "rounds": 2}})
    {'seed': {'a': 0, 'b': 1}}
    """
    paths = dict.fromkeys(path for one in settings.values() for path in one)
    found = {path: {name: one.get(path) for name, one in settings.items()} for path in paths}
    return {path: values for path, values in found.items() if len({repr(value) for value in values.values()}) > 1}
