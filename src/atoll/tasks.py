"""A finished run on public tasks: what it has learned beside its own data, and what it has forgotten.

Every question has choices; the model's answer is the likeliest of them (local/choices.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atoll.cache import Counting, Say, quiet
from atoll.data.collate import Sample
from atoll.data.prepared_tasks import TASKS, task
from atoll.data.tokenize import prepare
from atoll.errors import AtollError
from atoll.local.language import sft
from atoll.local.work import EVALUATION_BATCH, Objective, answered, told
from atoll.record.card import write_card
from atoll.record.folder import RunFolder
from atoll.record.tasks import Score, write_scores
from atoll.result import Result, load_result

CONTEXT = 1024
"""Tokens of a question with its longest choice; longer ones are left out and counted."""


def evaluate_tasks(folder: RunFolder, names: Sequence[str], most: int, say: Say = quiet) -> list[Score]:
    """Measures a run's model and its base on tasks, and keeps the scores beside its record; the card has them, too.

    Args:
        folder: the run's.
        names: of tasks.
        most: questions of each task, at most: the first in the order of their hashes.
        say: told before each slow step.

    Raises:
        AtollError: there is no such task, or the run has no result.
    """
    for name in names:
        if name not in TASKS:
            task(name)  # which says so
    if not names:
        raise AtollError(
            "no task is named", where="--tasks", allowed=", ".join(TASKS), remedy="--tasks boolq,openbookqa"
        )
    result = load_result(folder, say)
    objective = sft().bind(result.model, result.tokenizer)
    found = [score for name in names for score in scores(result, objective, name, most, say)]
    write_scores(folder, found)
    write_card(folder)
    return found


def scores(result: Result, objective: Objective, name: str, most: int, say: Say) -> list[Score]:
    """Of the base and of the tuned model."""
    samples = prepare(task(name, say), result.tokenizer, CONTEXT, "sft", say=say).test[:most]
    found = []
    for model in ("base", "tuned"):
        result.use(base=model == "base")
        say(f"{name}: {len(samples)} questions to the {model} model")
        of = measured(result, objective, samples, Counting(say, f"{name}, {model}", len(samples)))
        accuracy, error, chance = (of[key] for key in ("accuracy", "accuracy_error", "chance"))
        found.append(Score(name, model, accuracy, error, chance, int(of["questions"]), of["loss"]))
    return found


@torch.no_grad()
def measured(result: Result, objective: Objective, samples: Sequence[Sample], count: Counting) -> dict[str, float]:
    """Loss and accuracy of the model as it is, with their standard errors."""
    result.model.eval()
    losses, answers = [], []
    for at in range(0, len(samples), EVALUATION_BATCH):
        batch = samples[at : at + EVALUATION_BATCH]
        found = objective.measure(result.model, batch)
        losses.append(found.losses.cpu())
        answers += answered(batch, found)
        count.more(len(batch))
    return told(torch.cat(losses).double(), answers)
