"""Schedules: whom a round asks, when it stops waiting, and what a late answer is worth.

A schedule is data and three pure functions. Synchronous rounds and buffered asynchrony differ in nothing else: an
asynchronous round asks whoever is idle and closes after a few answers; the rest stay out and answer in a later round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from atoll.errors import AtollError
from atoll.keys import rng


@dataclass(frozen=True)
class Law:
    """How a cohort is drawn from the population; privacy accounting reads it."""

    kind: Literal["everyone", "uniform", "poisson", "idle"]
    answers: Callable[[int], float]
    """Population -> the clients whose updates make a round, on average."""
    least: int = 1
    """The smallest population that it can draw from."""


Waits = Callable[[Sequence[float], int], float]
"""(when each accepted reply came, how many were asked) -> until when the round waits, in seconds after it began."""

Seconds = Annotated[float, Gt(0)]

Sample = Callable[[Sequence[str], Sequence[str], int], list[str]]
"""(population, clients still busy, key) -> cohort, in the order of the population."""


@dataclass(frozen=True)
class Schedule:
    """Whom a round asks, when it closes, and what a late reply is worth: a factor by the rounds it is old."""

    law: Law
    sample: Sample
    waits: Waits = lambda came, asked: math.inf
    deadline: float = math.inf
    """Seconds that anything a round asks for may take at most."""
    discount: Callable[[int], float] = lambda staleness: 1.0
    quorum: float = 1.0
    """The share of those asked after whose replies a round waits little longer."""
    keeps_late: bool = True
    """Whether a reply that comes after its round has closed counts in a later one; else its task is dropped."""


def synchronous(
    cohort: Annotated[int, Ge(1)] | None = None,
    deadline: Seconds | None = None,
    quorum: Annotated[float, Gt(0), Le(1)] = 1.0,
    grace: Annotated[float, Ge(0)] = 0.0,
    late: Literal["drop", "take"] = "drop",
    exponent: Annotated[float, Ge(0)] = 0.5,
) -> Schedule:
    """Every round asks `cohort` clients, drawn uniformly without replacement (all of them by default), and waits for all.

    Args:
        cohort: how many are asked.
        deadline: seconds after which a round closes, whoever is missing.
        quorum: the share of those asked after whose replies a round waits for `grace` seconds more and no longer.
        grace: see `quorum`.
        late: what becomes of a reply that comes after its round has closed: nothing, or it counts in a later round.
        exponent: a late reply that is s rounds old is multiplied by (1 + s)^-exponent.
    """
    law = Law("everyone", float) if cohort is None else Law("uniform", lambda population: cohort, least=cohort)

    def sample(population: Sequence[str], busy: Sequence[str], key: int) -> list[str]:
        chosen = list(population) if cohort is None else _draw(population, cohort, key)
        return [client for client in chosen if client not in busy]

    def waits(came: Sequence[float], asked: int) -> float:
        enough = math.ceil(quorum * asked)
        return came[enough - 1] + grace if quorum < 1 and len(came) >= enough else math.inf

    return Schedule(law, sample, waits, deadline or math.inf, aging(exponent), quorum, late == "take")


def aging(exponent: float) -> Callable[[int], float]:
    """What an update that is s rounds old counts: (1 + s)^-exponent."""
    return lambda staleness: (1 + staleness) ** -exponent


def poisson(rate: Annotated[float, Gt(0), Le(1)]) -> Schedule:
    """Every client takes part in a round with probability `rate`, independently: the law that privacy accountants like."""

    def sample(population: Sequence[str], busy: Sequence[str], key: int) -> list[str]:
        chosen = rng(key).random(len(population)) < rate
        return [client for client, yes in zip(population, chosen, strict=True) if yes]

    return Schedule(Law("poisson", lambda population: rate * population), sample, keeps_late=False)


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

    def waits(came: Sequence[float], asked: int) -> float:
        return -math.inf if len(came) >= buffer else math.inf

    return Schedule(law, sample, waits, discount=aging(exponent))


def _draw(population: Sequence[str], count: int, key: int) -> list[str]:
    chosen = rng(key).choice(len(population), size=min(count, len(population)), replace=False)
    return [population[i] for i in sorted(chosen)]


def cohort_sizes(schedule: Schedule, population: int) -> tuple[int, int]:
    """How many clients a round asks, on average and at most."""
    asked = max(1, int(schedule.law.answers(population)))
    return asked, asked if schedule.law.kind == "uniform" else population
