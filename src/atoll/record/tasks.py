"""What public tasks said of a run's models, as the run's folder keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from atoll.cache import write_file
from atoll.record.folder import RunFolder
from atoll.record.story import read_story
from atoll.schema import Recipe

TUNED = "tuned"
"""What a run's result is called among its models."""


class Mean(NamedTuple):
    """Over questions, with its standard error; None where nobody knows it."""

    value: float
    error: float | None
    questions: int
    chance: float | None = None
    """What a guess comes to."""


@dataclass(frozen=True)
class Score:
    """A mean over a task's questions, with its standard error."""

    task: str
    measure: str
    """accuracy, loss, exact match, or ROUGE-L; of lm-eval's tasks its own."""
    model: str
    """base, after an earlier stage, or tuned."""
    value: float
    error: float | None
    questions: int
    chance: float | None = None
    """What a guess comes to."""
    rounds: int = 0
    """That the run had behind it."""
    most: int = 0
    """Questions that were asked for."""


def read_scores(folder: RunFolder) -> list[Score]:
    """What was measured before; nothing if nothing was."""
    if not folder.tasks.exists():
        return []
    return [Score(**one) for one in json.loads(folder.tasks.read_text(encoding="utf-8"))]


def write_scores(folder: RunFolder, scores: Sequence[Score]) -> list[Score]:
    """Keeps scores beside those of other tasks; gives them all."""
    now = {one.task for one in scores}
    kept = [one for one in read_scores(folder) if one.task not in now] + list(scores)
    write_file(folder.tasks, (json.dumps([asdict(one) for one in kept], indent=2) + "\n").encode())
    return kept


def not_asked(written: Recipe, folder: RunFolder) -> list[str]:
    """The tasks that the recipe names and that the result has not been asked, or not as many questions of."""
    story = read_story(folder)
    rounds = len(story.rounds) if story else 0
    asked = {one.task for one in read_scores(folder) if (one.rounds, one.most) == (rounds, written.evaluate.questions)}
    return [name for name in written.tasks if name not in asked]


def columns(scores: Sequence[Score]) -> list[str]:
    """Of a table of them: the models in the order of their making."""
    models = dict.fromkeys(one.model for one in scores)
    return ["task", "measure", "chance", *models, "questions"]


def cell(score: Score) -> str:
    """`0.610 ± 0.049`, or without an error where there is none."""
    return f"{score.value:.3f}" + ("" if score.error is None else f" ± {score.error:.3f}")


def rows(scores: Sequence[Score]) -> list[list[str]]:
    """A line for each measure of each task.

    >>> each = [Score("boolq", "accuracy", *one, 100, 0.5) for one in (("base", 0.5, 0.05), ("tuned", 0.61, 0.049))]
    >>> columns(each)
    ['task', 'measure', 'chance', 'base', 'tuned', 'questions']
    >>> rows(each)
    [['boolq', 'accuracy', '0.500', '0.500 ± 0.050', '0.610 ± 0.049', '100']]
    """
    models = columns(scores)[3:-1]
    found = []
    for task, measure in dict.fromkeys((one.task, one.measure) for one in scores):
        each = {one.model: one for one in scores if (one.task, one.measure) == (task, measure)}
        said = [cell(each[m]) if m in each else "-" for m in models]
        first = next(iter(each.values()))
        chance = "-" if first.chance is None else f"{first.chance:.3f}"
        found.append([task, measure, chance, *said, str(first.questions)])
    return found
