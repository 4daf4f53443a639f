"""A model of two parameters, y = a x + b, with squared loss: small enough to follow by hand, driven by the real driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from atoll.client import Client, MemoryStore, Store, Work
from atoll.exchange import Done, Task, Verdict
from atoll.fleet.base import Fleet
from atoll.fleet.inprocess import InProcess
from atoll.params import Params, subtract
from atoll.round import RoundPlan, State, initial, run_round
from atoll.stream import UPDATE, Stream

START = {"a": torch.zeros(1), "b": torch.zeros(1)}


@dataclass(frozen=True)
class Points:
    """A client's data: x, y and how the client is called."""

    x: torch.Tensor
    y: torch.Tensor


def line(slope: float, intercept: float, n: int = 8, start: float = -1.0) -> Points:
    """n points of y = slope x + intercept on [start, start + 2]."""
    x = torch.linspace(start, start + 2, n)
    return Points(x, slope * x + intercept)


def gradient(params: Params, data: Points) -> Params:
    """Of the mean of (a x + b - y)^2 / 2."""
    error = params["a"] * data.x + params["b"] - data.y
    return {"a": (error * data.x).mean(0, keepdim=True), "b": error.mean(0, keepdim=True)}


def descend(params: Params, data: Points, steps: int, lr: float) -> Params:
    """`steps` of plain gradient descent."""
    for _ in range(steps):
        params = {
            name: x - lr * g for (name, x), g in zip(params.items(), gradient(params, data).values(), strict=True)
        }
    return params


def fedavg_work(steps: int = 3, lr: float = 0.1) -> Work:
    """Local gradient descent; the weight is the number of points."""

    def work(params: Mapping[str, Params], data: Points, state: Params, task: Task) -> Done:
        after = descend(params[UPDATE], data, steps, lr)
        return Done({UPDATE: subtract(after, params[UPDATE])}, {"all": float(len(data.x))}, {}, {})

    return work


SITES = {"north": line(2.0, 1.0), "south": line(-1.0, 0.5, n=4, start=0.0), "west": line(0.5, -2.0, n=6)}


def toy_plan(**changes: object) -> RoundPlan:
    """FedAvg over the sites, unless changed."""
    return replace(RoundPlan("toy", seed=0, streams=(Stream(),)), **changes)


def toy_clients(
    plan: RoundPlan,
    work: Work,
    sites: Mapping[str, Points] = SITES,
    stores: Mapping[str, Store] | None = None,
) -> Callable[[str], Client]:
    """Makes the client of a site."""
    kept = stores or {name: MemoryStore() for name in sites}
    return lambda name: Client(name, plan.hash, plan.streams, {"train": work}, sites[name], kept[name])


def toy_fleet(
    plan: RoundPlan,
    work: Work,
    sites: Mapping[str, Points] = SITES,
    stores: Mapping[str, Store] | None = None,
    **more: object,
) -> InProcess:
    """The sites as simulated clients."""
    return InProcess(list(sites), toy_clients(plan, work, sites, stores), **more)


def remade() -> Callable[[str], Client]:
    """Plain FedAvg's clients, for a process that has nothing but this function's name."""
    return toy_clients(toy_plan(), fedavg_work())


def rounds(
    plan: RoundPlan,
    fleet: Fleet,
    count: int,
    state: State | None = None,
    observe: Callable[[Verdict], None] = lambda v: None,
) -> State:
    """Drives `count` rounds."""
    state = state or initial(plan, START)
    for _ in range(count):
        state = run_round(plan, state, fleet, observe)
    return state
