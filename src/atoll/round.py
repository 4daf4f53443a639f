"""One round, as Algorithm 1 has it:

    broadcast -> local work at each client -> encode -> wire -> decode -> aggregate -> outer step -> record

This is the only driver. FedAvg, SCAFFOLD, masked sums in several phases, buffered asynchrony and an all-reduce without a
server all run through it; what differs is data in the plan. `converse` is the only caller of `aggregate.add`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from atoll.aggregate.base import Weights
from atoll.exchange import (
    Accepted,
    Broadcast,
    Contribution,
    Event,
    Exchange,
    MakeExchange,
    Refused,
    Reply,
    Send,
    Task,
    Verdict,
    Wait,
    plain,
)
from atoll.fleet.base import Fleet
from atoll.keys import key
from atoll.params import Params
from atoll.schedule import Schedule, synchronous
from atoll.stream import Stream
from atoll.transforms.chain import Payload

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


def initial(plan: RoundPlan, params: Params, round: int = 0) -> State:
    """The state before the first round, from the params that train."""
    values = {stream.name: stream.initial(params) for stream in plan.streams}
    outer = {stream.name: stream.outer.init(values[stream.name]) for stream in plan.streams}
    down = {stream.name: stream.down.init(values[stream.name]) for stream in plan.streams}
    return State(round, values, outer, down)


def run_round(plan: RoundPlan, state: State, fleet: Fleet, observe: Observer = lambda verdict: None) -> State:
    """One round; `observe` hears every verdict as it falls. Gives the next state and leaves `state` as it was."""
    population = [client for client in fleet.clients() if plan.population is None or client in plan.population]
    busy = [task.client for task in state.in_flight]
    cohort = plan.schedule.sample(population, busy, key(plan.seed, state.round, "cohort"))
    tasks, down = broadcast(plan, state, cohort, fleet.now())
    totals = {stream.name: stream.aggregate.init(state.params[stream.name]) for stream in plan.streams}
    acknowledged = dict(state.acknowledged)
    out = {task.id: task for task in (*state.in_flight, *tasks)}

    exchange = plan.exchange(tasks, state.in_flight, partial(receive, plan, state, dict(out)), plan.schedule.closed)
    for verdict in converse(fleet, exchange, plan.streams, totals):
        if isinstance(verdict, Accepted):
            out.pop(verdict.reply.task, None)
            if verdict.reply.keeps_state:
                acknowledged[verdict.reply.client] = verdict.reply.task
        else:
            out.pop(verdict.task, None)
        observe(verdict)

    params, outer = {}, {}
    for stream in plan.streams:
        total = fleet.reduce(totals[stream.name])
        update = stream.aggregate.finish(stream.up.decode_sum(total))
        outer[stream.name], params[stream.name] = stream.outer.step(
            state.outer[stream.name], state.params[stream.name], update
        )
    sent = state.bytes_down + sum(task.broadcast.nbytes for task in tasks)
    return State(state.round + 1, params, outer, down, fleet.now(), sent, acknowledged, list(out.values()))


def broadcast(
    plan: RoundPlan, state: State, cohort: list[str], now: float, kind: str = "train"
) -> tuple[list[Task], dict[str, Params]]:
    """The round's tasks, all with one encoded broadcast, and the down chains' states after it."""
    down, payloads = {}, {}
    for stream in plan.streams:
        down[stream.name], payloads[stream.name] = stream.down.encode(
            state.down[stream.name], state.params[stream.name], key(plan.seed, state.round, "down", stream.name)
        )
    sent = Broadcast(state.round, payloads)
    tasks = [
        Task(kind, client, plan.hash, sent, key(plan.seed, state.round, client), now, state.acknowledged.get(client))
        for client in cohort
    ]
    return tasks, down


def converse(
    fleet: Fleet, exchange: Exchange, streams: tuple[Stream, ...], totals: dict[str, Params]
) -> Iterator[Verdict]:
    """Drives an exchange over a fleet; adds what is accepted to `totals`; passes every verdict on."""
    aggregators = {stream.name: stream.aggregate for stream in streams}
    answer: Event | None = None
    while True:
        try:
            step = exchange.send(answer)
        except StopIteration:
            return
        answer = None
        if isinstance(step, Send):
            fleet.submit(step.tasks)
        elif isinstance(step, Wait):
            answer = fleet.receive(step.tasks)
        else:
            if isinstance(step, Accepted):
                for name, given in step.contributions.items():
                    totals[name] = aggregators[name].add(totals[name], given.vector, given.weights)
            yield step


def receive(plan: RoundPlan, state: State, tasks: Mapping[str, Task], reply: Reply) -> Accepted | Refused:
    """Decodes and checks a reply. Whatever is wrong with it, the answer is a refusal with the reason, never an exception.

    What a reply is worth (its staleness, whose it is) is read from the task that it answers, not from what it claims.
    """
    refused = partial(Refused, reply.client, reply.task)
    task = tasks[reply.task]
    if reply.refusal:
        return refused(reply.refusal)
    if (reply.client, reply.plan) != (task.client, plan.hash):
        return refused(f"from {reply.client} for plan {reply.plan}; {task.client} was asked, for plan {plan.hash}")
    if missing := [stream.name for stream in plan.streams if stream.name not in reply.payloads]:
        return refused(f"lacks the stream '{missing[0]}'")
    staleness = state.round - task.broadcast.round
    factor = plan.schedule.discount(staleness)
    weights = {group: weight * factor for group, weight in reply.weights.items()}
    try:
        contributions = {
            s.name: contribution(s, state.params[s.name], reply.payloads[s.name], weights) for s in plan.streams
        }
    except DECODING_ERRORS as error:
        return refused(str(error) or type(error).__name__)
    return Accepted(reply, contributions, staleness)


DECODING_ERRORS = (ValueError, RuntimeError, TypeError, LookupError, OverflowError)
"""What transforms and torch raise on payloads that no client makes: wrong names, shapes, dtypes, numbers."""


def contribution(stream: Stream, like: Params, payload: Payload, weights: Weights) -> Contribution:
    """What a payload adds to its stream's total. Raises one of DECODING_ERRORS for what may not be added."""
    _check_weights(weights, stream.aggregate.groups(like))
    vector = stream.up.decode_reply(payload)
    _check_vector(vector, like)
    return Contribution(vector, weights)


def _check_weights(weights: Mapping[str, float], groups: set[str]) -> None:
    if weights.keys() != groups:
        raise ValueError(f"weights for {sorted(weights)}; {sorted(groups)} are needed")
    for group, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight {weight} for '{group}'; a finite number of at least 0 is needed")


def _check_vector(vector: Params, like: Params) -> None:
    """Same names and shapes as the params, and finite."""
    if vector.keys() != like.keys():
        odd = sorted(vector.keys() ^ like.keys())
        raise ValueError(f"{len(odd)} names do not match the plan's params, the first is '{odd[0]}'")
    for name, x in vector.items():
        if x.shape != like[name].shape:
            raise ValueError(f"'{name}' has the shape {tuple(x.shape)} instead of {tuple(like[name].shape)}")
        if x.is_complex():
            raise ValueError(f"'{name}' has the type {x.dtype}")
        # A sum is finite only if every term is, and it costs one pass instead of two.
        if x.is_floating_point() and not math.isfinite(float(x.sum())):
            raise ValueError(f"'{name}' has values that are not finite")
