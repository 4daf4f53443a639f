"""One round, as Algorithm 1 has it:

    broadcast -> local work at each client -> encode -> wire -> decode -> aggregate -> release -> outer step -> record

This is the only driver. FedAvg, SCAFFOLD, masked sums in several phases, buffered asynchrony and an all-reduce without a
server all run through it; what differs is data in the plan. `converse` is the only caller of `aggregate.add`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import torch

from atoll.aggregate.base import ALL
from atoll.exchange import (
    DECODING_ERRORS,
    Abandoned,
    Accepted,
    Broadcast,
    Contribution,
    Dropped,
    Exchange,
    Heard,
    MakeExchange,
    Opened,
    Refused,
    Reply,
    Send,
    Task,
    Verdict,
    Wait,
    check_sender,
    plain,
)
from atoll.fleet.base import Fleet
from atoll.keys import key
from atoll.params import Params, clipped
from atoll.schedule import Schedule, synchronous
from atoll.stream import Stream

Observer = Callable[[Verdict], None]


@dataclass(frozen=True)
class RoundPlan:
    """What the driver needs to know: what travels, whom to ask, in what conversation."""

    hash: str
    seed: int
    streams: tuple[Stream, ...]
    schedule: Schedule = field(default_factory=synchronous)
    exchange: MakeExchange = plain
    population: frozenset[str] | None = None
    """Who may be sampled; everybody in the fleet if None."""
    least: int = 1
    """The fewest updates that may be put together."""
    attempt: Callable[[], str] = lambda: ""
    """Names an attempt at a round, so that keys and masks of another are not taken for this one's."""
    evaluated: tuple[Stream, ...] = ()
    """What evaluations add up; nothing: every client's own metrics are told."""
    evaluation: MakeExchange = plain


@dataclass
class State:
    """What the server knows between rounds; a checkpoint holds exactly this."""

    round: int
    params: dict[str, Params]
    """Per stream: what the next broadcast says."""
    outer: dict[str, Params]
    down: dict[str, Params]
    clock: float = 0.0
    bytes_down: int = 0
    """Sent to clients since the start of the run, counted where it leaves."""
    acknowledged: dict[str, str] = field(default_factory=dict)
    """Per client with state: its last task whose reply was taken in."""
    in_flight: list[Task] = field(default_factory=list)
    """Tasks that are still out, in the order they were sent."""
    fixed: Mapping[str, Params] = field(default_factory=dict)
    """By name: what goes down to each client once and stays as it was before the first round."""
    have_fixed: frozenset[str] = frozenset()
    """The clients that have what is fixed: they have answered since."""


def initial(plan: RoundPlan, params: Params, round: int = 0, fixed: Mapping[str, Params] | None = None) -> State:
    """The state before the first round, from the params that train; `fixed` goes down to each client once."""
    values = {stream.name: stream.initial(params) for stream in plan.streams}
    outer = {stream.name: stream.outer.init(values[stream.name]) for stream in plan.streams}
    down = {stream.name: stream.down.init(values[stream.name]) for stream in plan.streams}
    return State(round, values, outer, down, fixed=fixed or {})


def run_round(plan: RoundPlan, state: State, fleet: Fleet, observe: Observer = lambda verdict: None) -> State:
    """One round; `observe` hears every verdict as it falls. Gives the next state and leaves `state` as it was."""
    busy = [task.client for task in state.in_flight]
    here, population = present(plan, fleet)
    drawn = plan.schedule.sample(population, busy, key(plan.seed, state.round, "cohort"))
    cohort = [client for client in drawn if client in here]
    began = fleet.now()
    tasks, down = broadcast(plan, state, cohort, began, variant=plan.attempt())
    totals = {stream.name: stream.aggregate.init(state.params[stream.name]) for stream in plan.streams}
    acknowledged = dict(state.acknowledged)
    sent = state.bytes_down + sum(task.broadcast.nbytes for task in tasks) + fixed_bytes(state, tasks)
    out = {task.id: task for task in (*state.in_flight, *tasks)}

    closes = partial(closing, plan.schedule, began, len(out))
    accepted, heard = 0, set[str]()
    exchange = plan.exchange(tasks, state.in_flight, partial(receive, plan, state, dict(out)), closes)
    for verdict in chain(converse(fleet, exchange, plan.streams, totals), too_late(plan.schedule, out)):
        settle(verdict, out, acknowledged)
        observe(verdict)
        accepted += isinstance(verdict, Accepted)
        heard |= answered(verdict)
    if totals and 0 < accepted < plan.least:
        totals.clear()
        observe(Abandoned(f"{accepted} updates came; at least {plan.least} are needed"))
    after = replace(
        having(state, heard),
        round=state.round + 1, down=down, bytes_down=sent, in_flight=list(out.values()),
    )  # fmt: skip
    if totals:
        params, outer = step(plan, state, fleet, totals)
        if odd := not_finite(params):
            observe(Abandoned(f"the step would make '{odd}' infinite or not a number"))
        else:
            after = replace(after, params=params, outer=outer, acknowledged=acknowledged)
    return replace(after, clock=fleet.now())  # an abandoned round applies nothing, and nobody's new state counts


def present(plan: RoundPlan, fleet: Fleet) -> tuple[set[str], list[str]]:
    """Who is there, and who may be sampled: also those of a plan who are away, or drawing the others would be likelier."""
    here = [client for client in fleet.clients() if plan.population is None or client in plan.population]
    return set(here), here + sorted((plan.population or frozenset()) - set(here))


def step(
    plan: RoundPlan, state: State, fleet: Fleet, totals: dict[str, Params]
) -> tuple[dict[str, Params], dict[str, Params]]:
    """The params and the outer optimizers' states after a step by the round's totals, per stream."""
    params, outer = {}, {}
    for stream in plan.streams:
        total = stream.aggregate.open(fleet.reduce(totals[stream.name]))
        total = stream.release(total, state.params)
        update = stream.aggregate.finish(total, stream.up.decode_sum)
        outer[stream.name], params[stream.name] = stream.outer.step(
            state.outer[stream.name], state.params[stream.name], update
        )
    return params, outer


def not_finite(params: Mapping[str, Params]) -> str:
    """The first parameter that has a value which is no finite number; empty if there is none."""
    every = ((name, x) for values in params.values() for name, x in values.items())
    return next((name for name, x in every if not torch.isfinite(x.sum()) and not torch.isfinite(x).all()), "")


def closing(schedule: Schedule, began: float, asked: int, came: Sequence[float]) -> float:
    """Until when a round waits that began then, by the fleet's clock."""
    until = schedule.waits([at - began for at in came], asked)
    return began + min(until, schedule.deadline)


def too_late(schedule: Schedule, out: Mapping[str, Task]) -> Iterator[Dropped]:
    """Those who have not answered when the round has closed, unless a later round takes their replies."""
    if not schedule.keeps_late:
        for task in list(out.values()):
            yield Dropped(task.client, task.id, "no answer before the round closed")


def settle(verdict: Verdict, out: dict[str, Task], acknowledged: dict[str, str]) -> None:
    """Takes an answered task off those that are out, and notes which state its client shall go on from; in place."""
    if isinstance(verdict, Abandoned | Opened):
        return
    out.pop(verdict.reply.task if isinstance(verdict, Accepted) else verdict.task, None)
    if isinstance(verdict, Accepted) and verdict.reply.keeps_state:
        acknowledged[verdict.reply.client] = verdict.reply.task
    if isinstance(verdict, Refused) and verdict.lost_state:
        acknowledged.pop(verdict.client, None)


def broadcast(
    plan: RoundPlan, state: State, cohort: list[str], now: float, kind: str = "train", variant: str = ""
) -> tuple[list[Task], dict[str, Params]]:
    """The round's tasks, all with one encoded broadcast, and the down chains' states after it."""
    down, payloads = {}, {}
    for stream in plan.streams:
        down[stream.name], payloads[stream.name] = stream.down.encode(
            state.down[stream.name], state.params[stream.name], key(plan.seed, state.round, "down", stream.name)
        )
    sent = Broadcast(state.round, payloads, state.fixed)
    tasks = [
        Task(
            kind,
            client,
            plan.hash,
            sent,
            key(plan.seed, state.round, client),
            now,
            state.acknowledged.get(client),
            variant=variant,
        )
        for client in cohort
    ]
    return tasks, down


def fixed_bytes(state: State, tasks: Sequence[Task]) -> int:
    """Bytes that the clients of these tasks are sent of what is fixed: those alone who do not have it, or are about to."""
    have = state.have_fixed.union(task.client for task in state.in_flight)
    return sum(task.broadcast.fixed_nbytes for task in tasks if task.client not in have)


def answered(verdict: Verdict) -> set[str]:
    """Whose answer it is about, if it is: who refuses has heard the task as well."""
    if isinstance(verdict, Accepted):
        return {verdict.reply.client}
    return {verdict.client} if isinstance(verdict, Refused) else set()


def having(state: State, clients: Iterable[str]) -> State:
    """The state once these clients have what is fixed, if anything is."""
    return replace(state, have_fixed=state.have_fixed.union(clients)) if state.fixed else state


def converse(
    fleet: Fleet, exchange: Exchange, streams: tuple[Stream, ...], totals: dict[str, Params]
) -> Iterator[Verdict]:
    """Drives an exchange over a fleet; adds what is accepted to `totals`; passes every verdict on.

    An exchange that is abandoned leaves `totals` empty.
    """
    aggregators = {stream.name: stream.aggregate for stream in streams}
    answer: Heard | None = None
    while True:
        try:
            step = exchange.send(answer)
        except StopIteration:
            return
        answer = None
        if isinstance(step, Send):
            fleet.submit(step.tasks)
        elif isinstance(step, Wait):
            answer = Heard(fleet.receive(step.tasks, step.until), fleet.now())
        else:
            if isinstance(step, Accepted | Opened):
                for name, given in step.contributions.items():
                    totals[name] = aggregators[name].add(totals[name], given.vector, given.weights)
            if isinstance(step, Abandoned):
                totals.clear()
            yield step


def receive(plan: RoundPlan, state: State, tasks: Mapping[str, Task], reply: Reply) -> Accepted | Refused:
    """Decodes and checks a reply. Whatever is wrong with it, the answer is a refusal with the reason, never an exception.

    What a reply is worth (its staleness, whose it is) is read from the task that it answers, not from what it claims.
    """
    task = tasks[reply.task]
    try:
        check_sender(task, reply)
        staleness = state.round - task.broadcast.round
        factor = plan.schedule.discount(staleness)
        given = {s.name: contribution(s, state.params, reply, factor if s.ages else 1.0) for s in plan.streams}
    except DECODING_ERRORS as error:
        reason = str(error) or type(error).__name__
        return Refused(task.client, reply.task, reason, reply.nbytes, reply.lost_state)
    return Accepted(reply, given, staleness)


LARGEST = 1e15
"""The largest weighted value that may be added: in float32 10^8 of them, and the square of one, stay finite."""

LEAST_WEIGHT = 1e-9
"""The least weight that counts: dividing by less takes float32 beyond what it holds."""


def contribution(stream: Stream, params: Mapping[str, Params], reply: Reply, factor: float) -> Contribution:
    """What a reply adds to a stream's total, times the discount for its age. Raises one of DECODING_ERRORS."""
    like = params[stream.name]
    if stream.name not in reply.payloads:
        raise ValueError(f"lacks the stream '{stream.name}'")
    weights = {group: float(weight) for group, weight in reply.weights.items()}
    check_weights(weights, stream.aggregate.groups(like))
    vector = stream.up.decode_reply(reply.payloads[stream.name])
    check_vector(vector, stream.aggregate.vector(like), max(weights.values(), default=1.0))
    if stream.bound is not None:
        vector = clipped(vector, stream.bound(params) / max(1e-30, *weights.values()))
    return Contribution(vector if factor == 1 else {n: x * factor for n, x in vector.items()}, weights)


def check_weights(weights: Mapping[str, float], groups: set[str]) -> None:
    """A finite weight of at least 0 for each group, its own or that of all. Raises ValueError."""
    named = weights.keys()
    if not named <= groups | {ALL} or (groups - named and ALL not in named) or (named and not groups):
        raise ValueError(f"weights for {sorted(weights)}; {sorted(groups)} are needed")
    for group, weight in weights.items():
        if weight != 0 and not LEAST_WEIGHT <= weight <= LARGEST:
            raise ValueError(
                f"the weight {weight} for '{group}'; 0, or a number from {LEAST_WEIGHT:g} to {LARGEST:g} is needed"
            )


def check_vector(vector: Params, like: Params, weight: float) -> None:
    """The names and shapes of the params; values that stay finite when weighted and summed. Raises ValueError."""
    if vector.keys() != like.keys():
        odd = sorted(vector.keys() ^ like.keys())
        raise ValueError(f"{len(odd)} names do not match the plan's params, the first is '{odd[0]}'")
    for name, x in vector.items():
        if x.shape != like[name].shape:
            raise ValueError(f"'{name}' has the shape {tuple(x.shape)} instead of {tuple(like[name].shape)}")
        if x.is_complex() or (not like[name].is_floating_point() and x.dtype != like[name].dtype):
            raise ValueError(f"'{name}' has the type {x.dtype}")
        if x.is_floating_point() and x.numel():
            low, high = (float(bound) for bound in torch.aminmax(x))  # NaN comes through, and fails any comparison
            if not max(abs(low), abs(high)) * max(weight, 1.0) <= LARGEST:
                raise ValueError(f"'{name}' has values that are not finite or too large: from {low:g} to {high:g}")
