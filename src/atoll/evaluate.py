"""Evaluation: every client computes the held-out loss of the shared params. An exchange like any other that adds nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from atoll.exchange import DECODING_ERRORS, Accepted, Dropped, Refused, Reply, Task, check_sender, plain
from atoll.fleet.base import Fleet
from atoll.record.events import Evaluated
from atoll.round import RoundPlan, State, broadcast, converse


def evaluate(plan: RoundPlan, state: State, fleet: Fleet, clients: list[str], samples: int, final: bool) -> Evaluated:
    """Held-out loss of the state's params at each client: at most `samples` samples each.

    Clients that refuse, or do not answer, are left out of the mean, and named.
    """
    started = time.perf_counter()
    tasks, _ = broadcast(plan, state, clients, fleet.now(), kind="evaluate")
    tasks = [replace(task, data={"samples": samples}, variant=str(samples)) for task in tasks]
    asked = {task.id: task for task in tasks}
    until = fleet.now() + plan.schedule.deadline
    exchange = plain(tasks, [], lambda reply: hear(asked[reply.task], reply), lambda came: until)
    verdicts = list(converse(fleet, exchange, plan.streams, {}))
    each = {v.reply.client: v.reply.metrics for v in verdicts if isinstance(v, Accepted)}
    absent = {v.client: v.reason for v in verdicts if isinstance(v, Refused | Dropped)}
    sent = sum(task.broadcast.nbytes for task in tasks)
    heard = {name: each[name] for name in clients if name in each}
    return summary(state.round, final, heard, absent, sent, started)


def hear(task: Task, reply: Reply) -> Accepted | Refused:
    """Takes metrics; there is nothing to add."""
    try:
        check_sender(task, reply)
        if missing := {"loss", "standard_error", "samples"} - reply.metrics.keys():
            raise ValueError(f"lacks the metrics {sorted(missing)}")
    except DECODING_ERRORS as error:
        return Refused(task.client, reply.task, str(error))
    return Accepted(reply, {})


def summary(
    round: int,
    final: bool,
    clients: Mapping[str, Mapping[str, float]],
    absent: Mapping[str, str],
    sent: int,
    started: float,
) -> Evaluated:
    """Mean and worst over clients, each client counting once."""
    losses = [metrics["loss"] for metrics in clients.values()]
    mean = sum(losses) / len(losses) if losses else float("nan")
    worst = max(losses, default=float("nan"))
    return Evaluated(round, final, dict(clients), mean, worst, time.perf_counter() - started, sent, dict(absent))
