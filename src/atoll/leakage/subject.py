"""The run as the attacks find it: model, samples, the params before the first round and after the last."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, repeat
from typing import Any

import numpy as np
import torch

from atoll import parts, recipe
from atoll.assemble import Assembly
from atoll.build import Plan, choose_model
from atoll.cache import Counting, Say
from atoll.data.sources import ClientData
from atoll.errors import AtollError
from atoll.fleet.inprocess import Elsewhere
from atoll.handover import begun_with
from atoll.identity import before_first
from atoll.keys import key
from atoll.leakage.scores import Floats
from atoll.local.work import EVALUATION_BATCH, draw
from atoll.models.spaces import write
from atoll.outcome import outcome, refuse_other_start
from atoll.params import Params
from atoll.planning import plan_again, quiet_libraries
from atoll.record.events import EVERYBODY, Event, Missing, Replied, read_events
from atoll.record.folder import RunFolder
from atoll.run import prepared
from atoll.schema import POOLED, Recipe
from atoll.stage import refuse_changed_data
from atoll.stream import REFERENCE


class NotApplicable(AtollError):
    """The run has nothing that an attack could work on."""


@dataclass(frozen=True)
class Subject:
    """A finished run, with what it takes to attack it and to say how well that went: samples, and the truth about them."""

    plan: Plan
    things: Assembly
    base: Params
    """Before the first round."""
    tuned: Params
    """After the last."""
    read: Mapping[str, Sequence[int]]
    """Client -> the numbers of its training samples in the batches of its updates, each as often as it was read."""
    say: Say

    @property
    def trained(self) -> Mapping[str, ClientData]:
        """The clients whose samples the model was trained on."""
        return {name: data for name, data in self.things.data.items() if name in self.plan.learners}

    def losses(self, params: Params, samples: Sequence[Any], what: str) -> Floats:
        """The mean loss of each sample under `params`, float64 [samples]."""
        local, progress = self.things.local, Counting(self.say, what, len(samples))
        write(local.space, local.model, params)
        local.model.eval()
        each = []
        with torch.no_grad():
            for at in range(0, len(samples), EVALUATION_BATCH):
                batch = samples[at : at + EVALUATION_BATCH]
                each.append(local.objective.measure(local.model, batch).losses.double().cpu())
                progress.more(len(batch))
        return np.asarray(torch.cat(each).numpy(), np.float64)


def replies_that_count(events: Sequence[Event], clients: Collection[str]) -> Iterator[Replied]:
    """Without those of rounds that were abandoned: masks that stay on leave nothing of them in the model."""
    missing = [one for one in events if isinstance(one, Missing) and one.client not in clients]
    abandoned = {one.round for one in missing if one.client == EVERYBODY}
    return (one for one in events if isinstance(one, Replied) and one.round not in abandoned)


def samples_read(ready: Plan, things: Assembly, replies: Iterable[Replied]) -> dict[str, list[int]]:
    """Client -> the numbers of the training samples in the batches of its replies, which the tasks' keys tell again."""
    read: dict[str, list[int]] = {}
    sizes = {name: len(data.train) for name, data in things.data.items()}
    if ready.protection and ready.protection.mechanism.unit == "example":  # its batches nobody can tell again
        named = {name for reply in replies for name in (sizes if reply.client == POOLED else [reply.client])}
        return {name: list(range(sizes[name])) for name in named}
    for reply in replies:
        count = sum(sizes.values()) if reply.client == POOLED else sizes[reply.client]
        task = key(ready.recipe.seed, reply.round - reply.staleness, reply.client)
        batches = draw(count, things.local.batch_size, things.local.accumulate, task)
        drawn = chain.from_iterable(chain.from_iterable(islice(batches, things.local.steps(count))))
        for name, number in owned(drawn, sizes) if reply.client == POOLED else zip(repeat(reply.client), drawn):
            read.setdefault(name, []).append(number)
    return read


def owned(numbers: Iterable[int], sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Whose the pooled client's samples are, and their numbers there: clients lie end to end.

    >>> list(owned([0, 2, 4], {"a": 2, "b": 3}))
    [('a', 0), ('b', 0), ('b', 2)]
    """
    names, ends = list(sizes), list(accumulate(sizes.values()))
    for number in numbers:
        at = bisect_right(ends, number)
        yield names[at], number - ends[at] + sizes[names[at]]


def open_run(folder: RunFolder, say: Say) -> Subject:
    """Loads the run's model and the samples that it was trained on.

    Raises:
        AtollError: the run is not finished, its data are elsewhere or have changed, its model is of the user's own factory.
    """
    written, _ = recipe.read(str(folder.recipe))
    refuse_own_model(written, folder)
    refuse_elsewhere(written, folder)
    refuse_unfinished(folder)
    say(f"planning {folder.name}")
    with quiet_libraries():
        ready, things = prepared(plan_again(folder), folder, say)
    found = outcome(folder)
    refuse_changed_data(found.progress.data, things.digests, folder)
    read = samples_read(ready, things, replies_that_count(list(read_events(folder.record)), things.data.keys()))
    base = {name: x.clone() for name, x in begun_with(ready, things, folder).items()}
    if written.starts:
        refuse_other_start(found.progress, before_first(ready, things, base).start, folder)
    things.local.refer({REFERENCE: base})
    return Subject(ready, things, base, {**base, **found.params}, read, say)


def refuse_own_model(written: Recipe, folder: RunFolder) -> None:
    """A model of the user's own has samples of the user's own, and nothing is known of them."""
    choice = choose_model(written.model)
    if choice.own_factory:
        raise AtollError(
            "the model comes from a factory: attacks read tokens", where=f"{folder.name}: model", found=choice.name,
            allowed="a run of a named model, a folder, or a hub id",
            remedy="call atoll.leakage.scores on losses that you have measured",
        )  # fmt: skip


def refuse_elsewhere(written: Recipe, folder: RunFolder) -> None:
    """Over a network the samples are at the sites, and stay there."""
    if isinstance(parts.make("fleet", written.fleet, "fleet"), Elsewhere):
        raise AtollError(
            "the run's samples are at its sites", where=f"{folder.name}: fleet", found=parts.spec(written.fleet, "").use,
            allowed="a run whose clients were simulated here",
            remedy="simulate the same recipe on data of your own: atoll run RECIPE --set fleet=inprocess",
        )  # fmt: skip


def refuse_unfinished(folder: RunFolder) -> None:
    """What a run has leaked is known when it is over."""
    if early := outcome(folder).early:
        raise AtollError(
            "the run is not finished", where=str(folder.path), found=early, allowed="a finished run",
            remedy=f"`atoll resume {folder.name}`",
        )  # fmt: skip
