"""What a run's releases tell about one unit of its data: epsilon at a delta, by Google's dp-accounting.

    a release: Gaussian noise of `noise_multiplier` times the most that one unit can change,
    among those whom the sampling law draws, `count` times

Releases of everybody are together one Gaussian mechanism, whose epsilon is exact (Balle and Wang 2018, arXiv 1805.06530);
those of Poisson samples are composed by privacy loss distributions (PLD). Both hold under add-or-remove-one. Cohorts of a
fixed size are composed by Renyi differential privacy (Wang et al. 2019, arXiv 1808.00087) under replace-one, where one unit
changes a sum by twice the clip; that bound is loose at large rates, and where it says more than the same releases of
everybody, theirs counts. An account holds releases of one adjacency.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from atoll.errors import AtollError

Sampling = Literal["everyone", "poisson", "uniform"]


@dataclass(frozen=True)
class Release:
    """One or several releases of the same kind."""

    noise_multiplier: float
    """Standard deviation of the noise over what one unit can change (add or remove)."""
    sampling: Sampling = "everyone"
    rate: float = 1.0
    """Chance of a unit to be drawn; of a fixed-size cohort, its share of the population."""
    population: int = 0
    """Where cohorts have a fixed size."""
    count: int = 1

    @property
    def adjacency(self) -> str:
        """What two neighboring data sets differ by."""
        return "replace-one" if self.sampling == "uniform" else "add-or-remove-one"


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """The epsilon of all these releases together. Infinite where one of them has no noise.

    >>> round(epsilon([Release(1.0, count=4)], delta=1e-5), 2)
    10.0

    Raises:
        AtollError: releases of unlike adjacency, which no number describes.
    """
    counts = Counter[Release]()
    for one in releases:
        counts[replace(one, count=1)] += one.count
    kinds = {one.adjacency for one in counts}
    if len(kinds) > 1:
        raise AtollError(
            "these releases cannot be put into one account", found=" and ".join(sorted(kinds)),
            allowed="releases whose cohorts are all of a fixed size, or none", remedy="account for them one by one",
        )  # fmt: skip
    return _epsilon(tuple(sorted(counts.items(), key=repr)), delta)


def worst(histories: Mapping[str, Sequence[Release]], delta: float) -> tuple[str, float]:
    """Whose data are told of most, and their epsilon; a history is the releases of one client's data, in order.

    One whose every release draws as rarely or rarer than another's, as often or less, under the same noise, cannot be the
    worst and costs no computation.
    """
    front: dict[tuple[Release, ...], str] = {}
    names = {tuple(history): name for name, history in histories.items()}
    for history in sorted(names, key=lambda h: [(-one.rate, -one.count) for one in h]):
        if not any(_within(history, other) for other in front):
            front[history] = names[history]
    return max(
        ((name, epsilon(one, delta)) for one, name in front.items()), key=lambda pair: pair[1], default=("", 0.0)
    )


def _within(history: Sequence[Release], other: Sequence[Release]) -> bool:
    """Whether each release tells no more than the other history's in its place."""
    return len(history) == len(other) and all(
        a == replace(b, rate=a.rate, count=a.count) and a.rate <= b.rate and a.count <= b.count
        for a, b in zip(history, other, strict=True)
    )


@lru_cache(256)
def _epsilon(counts: tuple[tuple[Release, int], ...], delta: float) -> float:
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    if not counts:
        return 0.0
    if any(one.noise_multiplier == 0 and one.rate > 0 for one, _ in counts):
        return math.inf
    gaussian = math.fsum(count / one.noise_multiplier**2 for one, count in counts)
    if counts[0][0].sampling == "uniform":  # two releases of everybody that differ in one unit are two clips apart
        account: Any = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        of_everybody = float(dp.get_epsilon_gaussian(gaussian**-0.5 / 2, delta))
    elif all(one.sampling == "everyone" for one, _ in counts):
        return float(dp.get_epsilon_gaussian(gaussian**-0.5, delta))
    else:
        account = PLDAccountant(value_discretization_interval=_interval(counts))
        of_everybody = math.inf
    for one, count in counts:
        account.compose(_event(one), count)
    return max(0.0, min(float(account.get_epsilon(delta)), of_everybody))


def _interval(counts: tuple[tuple[Release, int], ...]) -> float:
    """The grid of privacy losses, whose range grows by 1 / z^2: below z = 1/2 a coarser one, which says too much at most."""
    least = min(one.noise_multiplier for one, _ in counts)
    return 1e-4 * max(1.0, (0.5 / least) ** 2)


def _event(one: Release) -> Any:
    """A release in the terms of dp-accounting."""
    import dp_accounting as dp

    if one.sampling == "uniform":
        half = dp.GaussianDpEvent(one.noise_multiplier / 2)
        return dp.SampledWithoutReplacementDpEvent(one.population, round(one.rate * one.population), half)
    noise = dp.GaussianDpEvent(one.noise_multiplier)
    return noise if one.sampling == "everyone" else dp.PoissonSampledDpEvent(one.rate, noise)


LEAST_NOISE = 1e-3
"""Of a noise multiplier: with less, numbers overflow and nothing is hidden."""

MOST_NOISE = 1e4
"""The largest noise multiplier that a recipe may name, or that is tried."""


@lru_cache(64)
def noise_for(wanted: float, delta: float, like: Release) -> float:
    """The least noise multiplier, to three digits, by which releases `like` this one come to at most `wanted` epsilon.

    >>> noise_for(8.0, 1e-5, Release(1.0, count=4)) < 1.3
    True

    Raises:
        AtollError: no noise that is worth its name reaches it.
    """

    from scipy.optimize import brentq

    def over(log_noise: float) -> float:
        spent = epsilon([replace(like, noise_multiplier=math.exp(log_noise))], delta)
        return math.log(max(spent, 1e-9) / wanted)

    if math.isinf(wanted):
        return 0.0
    high = 0.0
    while over(high) > 0:
        high += 1.0
        if high > math.log(MOST_NOISE):
            raise AtollError(
                "no noise is enough for this budget", where="finetune.privacy.epsilon", found=wanted,
                remedy="fewer rounds, a larger epsilon, or a larger delta",
            )  # fmt: skip
    low = high - 1.0
    while over(low) < 0:
        low -= 1.0
        if low < math.log(LEAST_NOISE):
            return LEAST_NOISE
    found = float(brentq(over, low, high, xtol=1e-4))
    while over(found) > 0:
        found += 1e-4
    return math.exp(found)
