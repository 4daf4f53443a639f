"""What public tasks said of a run's model and of its base, as the run's folder keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from atoll.cache import write_file
from atoll.record.folder import RunFolder


@dataclass(frozen=True)
class Score:
    """A model's accuracy on a task, with its standard error."""

    task: str
    model: str
    """base, or tuned."""
    accuracy: float
    error: float
    chance: float
    questions: int
    loss: float
    """Mean over the questions of the right answer's mean token loss."""


def read_scores(folder: RunFolder) -> list[Score]:
    """What was measured before; nothing if nothing was."""
    if not folder.tasks.exists():
        return []
    return [Score(**one) for one in json.loads(folder.tasks.read_text(encoding="utf-8"))]


def write_scores(folder: RunFolder, scores: Sequence[Score]) -> list[Score]:
    """Keeps scores beside those of other tasks; gives them all."""
    now = {(one.task, one.model) for one in scores}
    kept = [one for one in read_scores(folder) if (one.task, one.model) not in now] + list(scores)
    write_file(folder.tasks, (json.dumps([asdict(one) for one in kept], indent=2) + "\n").encode())
    return kept


COLUMNS = ("task", "chance", "base", "tuned", "questions")


def rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """A line a task, in the columns of `COLUMNS`.

    >>> rows([Score("boolq", "base", 0.5, 0.05, 0.5, 100, 1.0), Score("boolq", "tuned", 0.61, 0.049, 0.5, 100, 0.4)])
    [('boolq', '0.500', '0.500 ± 0.050', '0.610 ± 0.049', '100')]
    """
    found = []
    for task in dict.fromkeys(one.task for one in scores):
        each = {one.model: one for one in scores if one.task == task}
        said = [f"{each[m].accuracy:.3f} ± {each[m].error:.3f}" if m in each else "-" for m in ("base", "tuned")]
        first = next(iter(each.values()))
        found.append((task, f"{first.chance:.3f}", *said, str(first.questions)))
    return found
