"""Held-out metrics: their names, and what becomes of them where nobody's own may leave: sums over everybody.

A measure is told as a mean, its standard error and the number of samples. Those three say as much as three sums, which may
be added to other clients' and read back:

    n,    sum x = n mean,    sum x^2 = (n - 1) n error^2 + n mean^2
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

import torch

from atoll.aggregate.mean import share
from atoll.data.media import MODALITIES
from atoll.params import Params
from atoll.stream import Stream


class Named(NamedTuple):
    """The metrics in which a measure is told."""

    value: str
    error: str
    counted: str


LOSS = Named("loss", "standard_error", "samples")
ACCURACY = Named("accuracy", "accuracy_error", "questions")
REWARD_ACCURACY = Named("reward_accuracy", "reward_accuracy_error", "preferences")
CHANCE = "chance"
"""What a guess among a question's choices comes to, on average over questions."""

TEXT = "text"
"""In the place of a modality: samples of text alone."""

OF = ("", *(f"/{name}" for name in (TEXT, *MODALITIES)))
"""Behind a metric's name: of which samples it is; nothing for all of them."""

MEASURES = (LOSS, ACCURACY, REWARD_ACCURACY)
SUMS = "sums"


def zeros() -> Params:
    """The sums over nobody: of samples' kinds by measures by three, and of chances by kinds."""
    return {
        SUMS: torch.zeros(len(OF), len(MEASURES), 3, dtype=torch.float64),
        CHANCE: torch.zeros(len(OF), dtype=torch.float64),
    }


def sums(metrics: Mapping[str, float]) -> Params:
    """One client's metrics as sums; what it does not tell is zero, as if it had no such samples."""
    found = zeros()
    for (i, of), (j, measure) in product(enumerate(OF), enumerate(MEASURES)):
        value, error, count = (metrics.get(f"{name}{of}") for name in measure)
        if value is not None and error is not None and count is not None:
            squares = (count - 1) * count * error**2 + count * value**2
            found[SUMS][i, j] = torch.tensor([count, count * value, squares], dtype=torch.float64)
    for i, of in enumerate(OF):
        if (chance := metrics.get(f"{CHANCE}{of}")) is not None and (questions := float(found[SUMS][i, 1, 0])):
            found[CHANCE][i] = questions * chance
    return found


def read_back(found: Params) -> dict[str, float]:
    """Sums over clients as metrics: every sample of everybody counts once.

    >>> one, two = ({"loss": x, "standard_error": 0.0, "samples": 1.0} for x in (1.0, 3.0))
    >>> read_back({name: x + sums(two)[name] for name, x in sums(one).items()})
    {'loss': 2.0, 'standard_error': 1.0, 'samples': 2.0}
    """
    metrics: dict[str, float] = {}
    for (i, of), (j, measure) in product(enumerate(OF), enumerate(MEASURES)):
        count, total, squares = found[SUMS][i, j].tolist()
        if (n := round(count)) > 0:
            mean = total / n
            error = math.sqrt(max(0.0, squares - n * mean**2) / (n - 1) / n) if n > 1 else 0.0
            metrics |= zip((f"{name}{of}" for name in measure), (mean, error, float(n)), strict=True)
            if measure is ACCURACY and float(found[CHANCE][i]):
                metrics[f"{CHANCE}{of}"] = float(found[CHANCE][i]) / n
    return metrics


LARGEST_SUM = 2.0**24
"""The largest that one client's may be: of the squares of 10,000 losses of 40, say. One beyond it is no part of a sum."""

EVALUATION = Stream("evaluation", aggregate=share(1.0), initial=lambda params: zeros())
"""What an evaluation's replies are made of where sums alone may leave."""
