"""How well an attack does: numbers from its scores, and from nothing else."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def auc(members: Floats, others: Floats) -> float:
    """The chance that a member scores higher than a non-member; a tie counts half. Shapes [n], [m].

    Source: the rank statistic of Mann and Whitney, as in Hanley and McNeil 1982, Radiology 143(1).

    >>> auc(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    _, place, counts = np.unique(np.concatenate([members, others]), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # ties share the mean of their ranks
    wins = ranks[place[: len(members)]].sum() - len(members) * (len(members) + 1) / 2
    return float(wins / (len(members) * len(others)))


def auc_error(area: float, members: int, others: int) -> float:
    """The standard error of an AUC. Hanley and McNeil 1982, equation 1, with Q1 and Q2 of an exponential model.

    >>> round(auc_error(0.5, 100, 100), 4)
    0.0409
    """
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (members - 1) * (q1 - area**2) + (others - 1) * (q2 - area**2)
    return math.sqrt(max(0.0, spread) / (members * others))


def true_positives(members: Floats, others: Floats, rate: float) -> float | None:
    """The share of members found where at most the share `rate` of non-members is taken for members.

    None where there are too few non-members for one of them to be that share. Source: Carlini et al. 2022
    (arXiv 2112.03570), section 3, who measure attacks by it: an attack that is sure of a few is a breach of theirs.

    >>> true_positives(np.array([5.0, 1.0]), np.arange(100) / 50, 0.01), true_positives(np.ones(2), np.ones(99), 0.01)
    (0.5, None)
    """
    allowed = math.floor(rate * len(others) + 1e-9)
    if not allowed:
        return None
    threshold = np.sort(others)[-1 - allowed] if allowed < len(others) else -math.inf
    return float((members > threshold).mean())


def exposure(rank: float, codes: int) -> float:
    """Bits by which the model helps to guess a canary that it ranks `rank`-th of so many codes.

    Source: Carlini et al. 2019 (arXiv 1802.08232), definition 5, with the space of codes sampled (their section 4.3).

    >>> exposure(1, 512), exposure(512, 512)
    (9.0, 0.0)
    """
    return math.log2(codes) - math.log2(rank)


def expected_exposure(codes: int) -> float:
    """The mean exposure of a code that the model knows nothing of: near log2(e), 1.44 bits.

    >>> round(expected_exposure(4096), 2)
    1.44
    """
    return math.log2(codes) - sum(math.log2(rank) for rank in range(1, codes + 1)) / codes


def rank_of(true: float, others: Floats) -> float:
    """The place of a loss among others, counted from 1 at the lowest; a tie counts half."""
    return float(1 + (others < true).sum() + (others == true).sum() / 2)


def first_of(similarities: Floats, true: int) -> float:
    """1 if the true one is the most similar, 0 if it is not; if several are, each has an even share.

    >>> first_of(np.array([0.2, 0.9, 0.9]), 1), first_of(np.array([0.2, 0.9, 0.9]), 0)
    (0.5, 0.0)
    """
    best = similarities == similarities.max()
    return float(best[true] / best.sum())


def mean_and_error(values: Floats) -> tuple[float, float | None]:
    """A mean and its standard error, of which equal values say nothing.

    >>> mean_and_error(np.array([1.0, 1.0])), mean_and_error(np.array([0.0, 2.0]))
    ((1.0, None), (1.0, 1.0))
    """
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(np.unique(values)) > 1 else None
    return float(values.mean()), error
