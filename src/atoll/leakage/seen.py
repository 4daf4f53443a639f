"""What the server sees of updates under the run's own plan: a round as the run had them, in which each site trains on one
sample, and somebody listens where the server sits.

    plain            the update itself; clipped, and under `local` noised, by the plan's own guard of the work
    masked           one reply of the `mask` phase, opened as if its masks were zero: centered levels times the common scale
    the sum          what the round opens when all masks are off, as the server has it before it adds noise of its own

The clients, the conversation, the words and the masks are those of a run, with fresh keys and fresh noise; only the fleet
listens. So numbers on noised updates differ a little from attack to attack: that noise must not be repeatable.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from atoll.aggregate.base import WEIGHT
from atoll.assemble import clients
from atoll.build import Plan
from atoll.data.sources import ClientData
from atoll.exchange import Abandoned, Dropped, Event, Refused, Reply, Verdict
from atoll.fleet.inprocess import InProcess
from atoll.leakage.subject import NotApplicable, Subject
from atoll.local.work import Local
from atoll.models.spaces import split
from atoll.params import Params
from atoll.privacy.hidden import Hidden
from atoll.record.folder import RunFolder
from atoll.round import initial, run_round
from atoll.schedule import cohort_sizes, synchronous
from atoll.stage import sent_along
from atoll.stream import UPDATE, Stream

IN_THE_CLEAR = "one update, in the clear"
"""What an update alone would tell, without any protection."""

Views = dict[str, Params]
"""What is seen of a site's update, by what it is: the update by itself, and under masks the sum that it is in."""


def is_protected(plan: Plan) -> bool:
    """Whether the server sees anything else than updates in the clear."""
    return plan.exchange is not None or plan.protection is not None


def single_view(plan: Plan, params: Mapping[str, Params]) -> str:
    """What the server sees of one client, in words: `one update, clipped, noised, masked`."""
    did = {
        "clipped": plan.protection is not None,
        "noised": noised(plan),
        "masked": plan.exchange is not None,
    }
    return ", ".join(["one update", *(word for word, holds in did.items() if holds)])


def sum_view(plan: Plan, params: Mapping[str, Params], size: int) -> str:
    """What masks leave, in words: `the sum of 4 updates, noised`."""
    return f"the sum of {size} updates" + (", noised" if noised(plan) else "")


def noised(plan: Plan) -> bool:
    """Whether clients add noise; what the server adds itself hides nothing from it."""
    protection = plan.protection
    return protection is not None and protection.mechanism.where != "central" and protection.noise_multiplier > 0


def of_one_sample(subject: Subject) -> Local:
    """The run's own local work, in one local step on one sample; its rate without a schedule, which may begin at zero."""
    local = subject.things.local
    return replace(local, rounds=1, batch_size=1, local_steps=1, accumulate=1, rate=lambda done: 1.0)


def overheard(subject: Subject, samples: Mapping[str, Any], folder: RunFolder) -> Iterator[tuple[str, Views]]:
    """(site, what the server sees of it), if each site trains on its one sample; in cohorts as large as the run's.

    Args:
        subject: the run.
        samples: of every site that may be sampled.
        folder: for what clients keep.

    Raises:
        NotApplicable: a cohort did not come through.
    """
    size, _ = cohort_sizes(subject.plan.rounds.schedule, len(subject.plan.trainers))
    told: set[str] = set()
    for cohort in cohorts(list(samples), size):
        for name, views in one_round(subject, {name: samples[name] for name in cohort}, folder).items():
            if name not in told:
                told.add(name)
                yield name, views


def cohorts(names: Sequence[str], size: int) -> Iterator[list[str]]:
    """Everybody, in cohorts of one size: the last is filled up from the first.

    >>> list(cohorts(["a", "b", "c"], 2))
    [['a', 'b'], ['c', 'a']]
    """
    for at in range(0, len(names), size):
        yield list(dict.fromkeys([*names[at : at + size], *names]))[:size]


def one_round(subject: Subject, samples: Mapping[str, Any], folder: RunFolder) -> dict[str, Views]:
    """One round of these sites, as the server sees it."""
    plan, opened, wrong = subject.plan, list[Params](), list[str]()

    def observe(verdict: Verdict) -> None:
        if isinstance(verdict, Abandoned | Dropped | Refused):
            wrong.append(verdict.reason)

    rounds = replace(
        plan.rounds,
        streams=tuple(listened_to(stream, opened) for stream in plan.rounds.streams),
        schedule=synchronous(),
        population=frozenset(samples),
    )
    data = {name: ClientData([sample], ()) for name, sample in samples.items()}
    things = replace(subject.things, local=of_one_sample(subject), data=data)
    fleet = Listening(list(data), clients(plan, things, folder))
    travels, _ = split(subject.base, plan.recipe.finetune.personal)
    state = initial(rounds, travels, fixed=sent_along(plan, subject.base))
    run_round(rounds, state, fleet, observe)
    if wrong or not opened:
        raise NotApplicable(
            "a round under the run's protection came to nothing", where="finetune", found="; ".join(wrong),
            remedy="look what the run's card says of its rounds",
        )  # fmt: skip
    stream = next(one for one in rounds.streams if one.name == UPDATE)
    single = single_view(plan, state.params)
    views = {name: {single: alone(stream, travels, fleet.heard[name])} for name in samples}
    if plan.exchange is None:
        return views
    together = {sum_view(plan, state.params, len(data)): stream.aggregate.finish(opened[0], stream.up.decode_sum)}
    return {name: view | together for name, view in views.items()}


def listened_to(stream: Stream, opened: list[Params]) -> Stream:
    """A stream whose opened total is kept, before the server does anything to it."""

    def release(total: Params, params: Mapping[str, Params]) -> Params:
        opened.append({name: x.clone() for name, x in total.items()})
        return total

    return replace(stream, release=release) if stream.name == UPDATE else stream


@dataclass
class Listening(InProcess):
    """Keeps what comes from each client; nothing takes any time."""

    speed: Any = lambda task: 0.0
    heard: dict[str, Reply] = field(default_factory=dict)
    """The replies that carry an update, whatever hides it."""

    def receive(self, tasks: Collection[str], until: float = math.inf) -> Event | None:
        """See `Fleet`."""
        event = super().receive(tasks, until)
        if isinstance(event, Reply) and UPDATE in event.payloads:
            self.heard[event.client] = event
        return event


def alone(stream: Stream, like: Params, reply: Reply) -> Params:
    """One reply's update; under masks by somebody who has no key to them, and reads the words as they are."""
    vector, how = stream.up.decode_reply(reply.payloads[UPDATE]), stream.aggregate
    if isinstance(how, Hidden):
        vector = how.open(how.add(how.init(like), vector, {}))
    return {name: x for name, x in vector.items() if not name.startswith(WEIGHT)}
