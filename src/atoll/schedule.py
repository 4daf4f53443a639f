"""Schedules: whom a round asks, when it stops waiting, and what a late answer is worth.

A schedule is data and three pure functions. Synchronous rounds and buffered asynchrony differ in nothing else: an
asynchronous round asks whoever is idle and closes after a few answers; the rest stay out and answer in a later round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from atoll.errors import AtollError
from atoll.exchange import Closing
from atoll.keys import rng


@dataclass(frozen=True)
class Law:
    """How a cohort is drawn from the population; privacy accounting reads it."""

    kind: Literal["everyone", "uniform", "poisson", "idle"]
    answers: Callable[[int], float]
    """Population -> the clients whose updates make a round, on average."""
    least: int = 1
    """The smallest population that it can draw from."""


Sample = Callable[[Sequence[str], Sequence[str], int], list[str]]
"""(population, clients still busy, key) -> cohort, in the order of the population."""


@dataclass(frozen=True)
class Schedule:
    """Whom a round asks, when it closes, and the factor on an update that is `staleness` rounds old."""

    law: Law
    sample: Sample
    closed: Closing
    discount: Callable[[int], float] = lambda staleness: 1.0


def everyone_answered(accepted: int, out: int) -> bool:
    """The synchronous closing rule."""
    return out == 0


def synchronous(cohort: Annotated[int, Ge(1)] | None = None) -> Schedule:
    """Every round asks `cohort` clients, drawn uniformly without replacement (all of them by default), and waits for all."""
    law = Law("everyone", float) if cohort is None else Law("uniform", lambda population: cohort, least=cohort)

    def sample(population: Sequence[str], busy: Sequence[str], key: int) -> list[str]:
        if cohort is None:
            return list(population)
        return _draw(population, cohort, key)

    return Schedule(law, sample, everyone_answered)


def poisson(rate: Annotated[float, Gt(0), Le(1)]) -> Schedule:
    """Every client takes part in a round with probability `rate`, independently: the law that privacy accountants like."""

    def sample(population: Sequence[str], busy: Sequence[str], key: int) -> list[str]:
        chosen = rng(key).random(len(population)) < rate
        return [client for client, yes in zip(population, chosen, strict=True) if yes]

    return Schedule(Law("poisson", lambda population: rate * population), sample, everyone_answered)


def buffered(
    concurrency: Annotated[int, Ge(1)], buffer: Annotated[int, Ge(1)], exponent: Annotated[float, Ge(0)] = 0.5
) -> Schedule:
    """FedBuff: `concurrency` clients work at any time; every `buffer` accepted updates make a round.

    An update that is s rounds old is multiplied by (1 + s)^-exponent. Source: Nguyen et al. 2022 (arXiv 2106.06639),
    Algorithm 1: our `buffer` is their K, `concurrency` their C. Departs from it in that idle clients are asked again when
    a round ends, not one by one as they answer.
    """
    if buffer > concurrency:
        raise AtollError(
            "a buffer that never fills", where="schedule.buffer", found=buffer, allowed=f"1 to concurrency, {concurrency}",
            remedy="raise concurrency, or lower buffer",
        )  # fmt: skip

    def sample(population: Sequence[str], busy: Sequence[str], key: int) -> list[str]:
        idle = [client for client in population if client not in busy]
        return _draw(idle, min(max(0, concurrency - len(busy)), len(idle)), key)

    law = Law("idle", lambda population: min(buffer, population))
    return Schedule(
        law, sample, lambda accepted, out: accepted >= buffer, lambda staleness: (1 + staleness) ** -exponent
    )


def _draw(population: Sequence[str], count: int, key: int) -> list[str]:
    return [population[i] for i in sorted(rng(key).choice(len(population), size=count, replace=False))]
