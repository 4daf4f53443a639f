"""Evaluation: every client computes the held-out loss of the shared params. An exchange like any other that adds nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from atoll.exchange import Accepted, Refused, Reply, plain
from atoll.fleet.base import Fleet
from atoll.record.events import Evaluated
from atoll.round import RoundPlan, State, broadcast, converse
from atoll.schedule import everyone_answered


def evaluate(plan: RoundPlan, state: State, fleet: Fleet, clients: list[str], samples: int, final: bool) -> Evaluated:
    """Held-out loss of the state's params at each client: at most `samples` samples each.

    Clients without held-out samples answer nothing and are left out of the mean.
    """
    started = time.perf_counter()
    tasks, _ = broadcast(plan, state, clients, fleet.now(), kind="evaluate")
    tasks = [replace(task, data={"samples": samples}) for task in tasks]
    exchange = plain(tasks, [], lambda reply: hear(plan, reply), everyone_answered)
    verdicts = converse(fleet, exchange, plan.streams, {})
    each = {v.reply.client: v.reply.metrics for v in verdicts if isinstance(v, Accepted)}
    return summary(state.round, final, {name: each[name] for name in clients if name in each}, started)


def hear(plan: RoundPlan, reply: Reply) -> Accepted | Refused:
    """Takes metrics; there is nothing to add."""
    if reply.refusal or reply.plan != plan.hash:
        return Refused(reply.client, reply.task, reply.refusal or "made for another plan")
    return Accepted(reply, {})


def summary(round: int, final: bool, clients: Mapping[str, Mapping[str, float]], started: float) -> Evaluated:
    """Mean and worst over clients, each client counting once."""
    losses = [metrics["loss"] for metrics in clients.values()]
    mean = sum(losses) / len(losses) if losses else float("nan")
    return Evaluated(
        round, final, dict(clients), mean, max(losses, default=float("nan")), time.perf_counter() - started
    )
