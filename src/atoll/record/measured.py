"""What held-out samples say of a run's models, as tables: base, each site alone, federated, pooled.

Losses and accuracies, by site and by what samples hold. Here are numbers; how they look is the card's and the terminal's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from atoll import metrics as names
from atoll.metrics import CHANCE, read_back, sums
from atoll.record.events import EVERYBODY, Evaluated, RunStarted
from atoll.record.story import Story
from atoll.schema import LOCAL, POOLED, origin


class Measure(NamedTuple):
    """A number with its standard error and how many it is the mean of, as evaluations name them."""

    name: str
    value: str
    error: str
    counted: str
    best: Callable[..., float]
    """Of several: `min` or `max`."""


LOSS = Measure("held-out loss", *names.LOSS, min)
ACCURACY = Measure("accuracy", *names.ACCURACY, max)
REWARD_ACCURACY = Measure("reward accuracy", *names.REWARD_ACCURACY, max)

Cell = tuple[float, float]
"""A number and its standard error, which one sample alone does not have: NaN."""

Row = tuple[str, list[Cell | None]]
"""A model's name, and its cells."""


@dataclass(frozen=True)
class Table:
    """A measure per site, or per modality."""

    columns: list[str]
    """Sites, or modalities."""
    rows: list[Row]
    notes: tuple[str, ...] = ()
    """Who is missing, and why."""
    measure: Measure = LOSS

    @property
    def mean_name(self) -> str:
        """The head of the mean's column. A site may be called `mean`, too."""
        return "mean of sites" if "mean" in self.columns else "mean"

    def mean(self, row: Row) -> Cell | None:
        """Over all sites, each counting once; with its standard error."""
        if any(cell is None for cell in row[1]):
            return None
        cells = [cell for cell in row[1] if cell]
        return sum(c[0] for c in cells) / len(cells), math.sqrt(sum(c[1] ** 2 for c in cells)) / len(cells)


@dataclass(frozen=True)
class Tables:
    """All that was measured of a run; None for what was not."""

    loss: Table | None
    """By site: but a note if nothing can be measured."""
    loss_by_modality: Table | None
    accuracy: Table | None
    accuracy_by_modality: Table | None
    reward_accuracy: Table | None
    """By site, where preferences were learned."""

    def __iter__(self) -> Iterator[Table]:
        return (one for one in vars(self).values() if one is not None)


def measured(story: Story) -> Tables:
    """What was measured so far."""
    return Tables(
        loss_table(story),
        by_modality(story, LOSS),
        accuracy_table(story),
        by_modality(story, ACCURACY),
        accuracy_table(story, REWARD_ACCURACY),
    )


def loss_table(story: Story) -> Table | None:
    """The comparison that the run was made for; None before anything is measured. It is but a note if nothing can be."""
    each = models(story)
    notes = (*unmeasured(story.started), *silent(each))
    sites = list(dict.fromkeys(site for _, one in each for site in one.clients))
    if not sites:
        return Table([], [], notes) if notes else None
    return Table(sites, [(name, [cell(e.clients, site) for site in sites]) for name, e in each], notes)


def accuracy_table(story: Story, measure: Measure = ACCURACY) -> Table | None:
    """The same of the answers to questions that allow certain ones; None where there are none."""
    each = comparable([*earlier(story), *models(story)]) if measure is ACCURACY else models(story)
    told: dict[str, Mapping[str, float]] = {}
    for _, evaluated in each:
        for site, metrics in evaluated.clients.items():
            if numbers(metrics, measure):
                told.setdefault(site, metrics)
    sites = list(told)
    if not sites:
        return None
    guess: Row = (CHANCE, [None if (one := told[site].get(CHANCE)) is None else (one, 0.0) for site in sites])
    rows = [(name, [cell(e.clients, site, measure) for site in sites]) for name, e in each]
    return Table(sites, [guess, *rows], measure=measure)


def by_modality(story: Story, measure: Measure) -> Table | None:
    """A measure by what samples hold: text alone, pictures, sounds; None for a run of text alone."""
    first = first_of(story)
    found = {key.partition("/")[2] for one in first.clients.values() for key in one} if first else set()
    kinds = sorted(kind for kind in found - {""} if first and over_clients(first, kind, measure))
    if not first or not kinds:
        return None
    rows: list[Row] = [(name, [over_clients(one, kind, measure) for kind in kinds]) for name, one in models(story)]
    if measure is ACCURACY:
        guess = measure._replace(value=CHANCE)
        cells = (over_clients(first, kind, guess) for kind in kinds)
        rows = [(CHANCE, [one and (one[0], 0.0) for one in cells]), *rows]
    return Table(kinds, rows, measure=measure)


def first_of(story: Story) -> Evaluated | None:
    """The evaluation that says what there is to measure."""
    return story.base or story.final


def models(story: Story) -> list[tuple[str, Evaluated]]:
    """The models that were measured, in the order of the tables."""
    named: list[tuple[str, Evaluated | None]] = [(begins_as(story), story.base)]
    named += [(f"{name.removeprefix(LOCAL)} alone", s.final) for name, s in _of(story, LOCAL)]
    named += [("federated", story.final)]
    named += [("pooled", s.final) for _, s in _of(story, POOLED)]
    return comparable([(name, one) for name, one in named if one is not None])


def comparable(each: Sequence[tuple[str, Evaluated]]) -> list[tuple[str, Evaluated]]:
    """Each model once; where sums alone are known of one, of all of them no more is told."""
    sums_alone = any(EVERYBODY in one.clients for _, one in each)
    return [(name, of_everybody(one) if sums_alone else one) for name, one in dict(each).items()]


def of_everybody(evaluated: Evaluated) -> Evaluated:
    """The same as if sums alone had left the clients."""
    each = [sums(metrics) for metrics in evaluated.clients.values()]
    if EVERYBODY in evaluated.clients or not each:
        return evaluated
    total = read_back({name: sum((one[name] for one in each[1:]), each[0][name]) for name in each[0]})
    return replace(evaluated, clients={EVERYBODY: total})


def after(stage: str) -> str:
    """What a stage's result is called."""
    return f"after {stage}"


def begins_as(story: Story) -> str:
    """What the model before the first round is called: the base, or the stage that it comes from."""
    start = story.started.recipe.get("start")
    if isinstance(start, list | tuple):
        return "fused"
    stage = origin(start).stage if start else ""
    return after(stage) if stage else "base"


def earlier(story: Story) -> list[tuple[str, Evaluated]]:
    """The models of the stages before, where they were asked the same questions. Their losses may be other objectives'."""
    first = next(iter(story.before.values()), None)
    each = [("base", first and first.base), *((after(name), one.final) for name, one in story.before.items())]
    mine = first_of(story)
    alike = [(name, one) for name, one in each if one and mine and same_guesses(one, mine)]
    return alike if all(questions(one) == questions(story) for one in story.before.values()) else []


def questions(story: Story) -> tuple[object, ...]:
    """What decides which questions are held out."""
    started = story.started
    return (started.data, started.recipe.get("finetune", {}).get("context"))


def same_guesses(one: Evaluated, other: Evaluated) -> bool:
    """Whether a guess comes to the same for both; sums are rounded, and may be all that is known of one."""
    if EVERYBODY in {*one.clients, *other.clients}:
        one, other = of_everybody(one), of_everybody(other)
    found, expected = guesses(one), guesses(other)
    return found.keys() == expected.keys() and all(math.isclose(found[n], expected[n], abs_tol=1e-4) for n in found)


def guesses(evaluated: Evaluated) -> dict[str, float]:
    """What a guess comes to at each site: of other measures of an answer it is another."""
    return {site: metrics[CHANCE] for site, metrics in evaluated.clients.items() if CHANCE in metrics}


def over_clients(evaluated: Evaluated, modality: str, measure: Measure) -> Cell | None:
    """Of a modality, over the samples of the clients that tell of it, each sample counting once."""
    each = []
    for metrics in evaluated.clients.values():
        if told := numbers(metrics, measure, f"/{modality}"):
            value, error, count = told
            each.append((value, error if count > 1 else math.nan, count))
    total = sum(count for _, _, count in each)
    if not total:
        return None
    error = math.sqrt(sum((count * one) ** 2 for _, one, count in each)) / total
    return sum(value * count for value, _, count in each) / total, error


def numbers(metrics: Mapping[str, float], measure: Measure, of: str = "") -> tuple[float, float, float] | None:
    """Mean, error and count; None unless a client tells all of them: a policy may keep some."""
    value, error, count = (metrics.get(f"{name}{of}") for name in measure[1:4])
    return None if value is None or error is None or count is None else (value, error, count)


def unmeasured(started: RunStarted) -> tuple[str, ...]:
    """Whose held-out loss is not known, because nothing of theirs is held out."""
    without = [name for name, count in started.held_out.items() if not count]
    if without and len(without) == len(started.held_out):
        return ("nothing is held out, so no loss is measured: set data.held_out, or name files for it",)
    return tuple(f"{name}: no held-out sample, not in the mean" for name in without)


def silent(each: Sequence[tuple[str, Evaluated]]) -> Iterator[str]:
    """Who was asked about which model, and told nothing."""
    return (f"{site}: told nothing of {name}: {reason}" for name, one in each for site, reason in one.absent.items())


def _of(story: Story, prefix: str) -> list[tuple[str, Story]]:
    return [(name, s) for name, s in story.baselines.items() if name.startswith(prefix)]


def cell(clients: Mapping[str, Mapping[str, float]], site: str, measure: Measure = LOSS) -> Cell | None:
    """A site's number and its standard error, of which one sample says nothing."""
    told = numbers(clients.get(site, {}), measure)
    return told and (told[0], told[1] if told[2] > 1 else math.nan)
