"""Evaluation: every client computes the held-out loss of the shared params. An exchange like any other.

In the clear it adds nothing: each client's metrics are told. Under masks replies are sums, and everybody's metrics are told.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from atoll.exchange import (
    DECODING_ERRORS,
    Abandoned,
    Accepted,
    Dropped,
    Opened,
    Receive,
    Refused,
    Reply,
    Task,
    Verdict,
    check_sender,
    plain,
)
from atoll.fleet.base import Fleet
from atoll.metrics import LOSS, read_back
from atoll.params import Params
from atoll.record.events import EVERYBODY, Evaluated
from atoll.round import RoundPlan, State, answered, broadcast, converse, fixed_bytes, having, receive

Metrics = Mapping[str, Mapping[str, float]]
"""By client, or of everybody."""


def evaluate(
    plan: RoundPlan, state: State, fleet: Fleet, clients: list[str], samples: int, final: bool
) -> tuple[Evaluated, State]:
    """Held-out loss of the state's params at each client, or over all of them: at most `samples` samples each.

    Clients that refuse, or do not answer, are left out of the mean, and named. The state that is given back knows who has
    what is fixed, and is else the same.
    """
    started = time.perf_counter()
    variant = plan.attempt() if plan.evaluated else str(samples)
    tasks, _ = broadcast(plan, state, clients, fleet.now(), kind="evaluate", variant=variant)
    tasks = [replace(task, data={"samples": samples}) for task in tasks]
    until = fleet.now() + plan.schedule.deadline
    totals = {stream.name: stream.aggregate.init(stream.initial({})) for stream in plan.evaluated}
    make = plan.evaluation if plan.evaluated else plain
    exchange = make(tasks, [], hearing(plan, state, tasks), lambda came: until)
    verdicts = list(converse(fleet, exchange, plan.evaluated, totals))
    given_up = [v.reason for v in verdicts if isinstance(v, Abandoned)]
    absent = {v.client: v.reason for v in verdicts if isinstance(v, Refused | Dropped)}
    if given_up:
        absent = {**absent, EVERYBODY: "; ".join(given_up)}
    each = of_everybody(plan, fleet, totals) if plan.evaluated else of_each(clients, verdicts)
    if not plan.evaluated:  # under masks everybody has a verdict
        silent = (name for name in clients if name not in each and name not in absent)
        absent |= dict.fromkeys(silent, "no answer before the deadline")
    sent = sum(task.broadcast.nbytes for task in tasks) + sum(v.bytes_down for v in verdicts if isinstance(v, Opened))
    found = summary(state.round, final, each, absent, sent, fixed_bytes(state, tasks), started)
    return found, having(state, set().union(*map(answered, verdicts)))


def hearing(plan: RoundPlan, state: State, tasks: Sequence[Task]) -> Receive:
    """What is made of a reply: its metrics are taken, or its sums."""
    asked = {task.id: task for task in tasks}
    if not plan.evaluated:
        return lambda reply: hear(asked[reply.task], reply)
    like = {stream.name: stream.initial({}) for stream in plan.evaluated}
    return partial(receive, replace(plan, streams=plan.evaluated), replace(state, params=like), asked)


def hear(task: Task, reply: Reply) -> Accepted | Refused:
    """Takes metrics; there is nothing to add."""
    try:
        check_sender(task, reply)
        if missing := set(LOSS) - reply.metrics.keys():
            raise ValueError(f"lacks the metrics {sorted(missing)}")
    except DECODING_ERRORS as error:
        return Refused(task.client, reply.task, str(error))
    return Accepted(reply, {})


def of_each(clients: Sequence[str], verdicts: Sequence[Verdict]) -> Metrics:
    """What each client told, in the clients' order."""
    each = {v.reply.client: v.reply.metrics for v in verdicts if isinstance(v, Accepted)}
    return {name: each[name] for name in clients if name in each}


def of_everybody(plan: RoundPlan, fleet: Fleet, totals: Mapping[str, Params]) -> Metrics:
    """What the sums say; nothing where they were not opened, or nobody's loss is among them."""
    if not totals:
        return {}
    [stream] = plan.evaluated
    opened = stream.aggregate.open(fleet.reduce(totals[stream.name]))
    metrics = read_back(stream.aggregate.finish(opened, stream.up.decode_sum))
    return {EVERYBODY: metrics} if LOSS.value in metrics else {}


def summary(
    round: int, final: bool, each: Metrics, absent: Mapping[str, str], sent: int, fixed: int, started: float
) -> Evaluated:
    """Mean and worst over clients, each client counting once; where sums alone are known, over samples, and no worst."""
    losses = [metrics[LOSS.value] for metrics in each.values()]
    mean = sum(losses) / len(losses) if losses else float("nan")
    worst = float("nan") if EVERYBODY in each else max(losses, default=float("nan"))
    return Evaluated(round, final, dict(each), mean, worst, time.perf_counter() - started, sent, dict(absent), fixed)
