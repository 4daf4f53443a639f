"""Claim: simulated clients a second, against pfl-research and Flower; and memory that does not grow with the clients.

1,000 users with 50 samples each, cohorts of 50, batches of 10, one local epoch, the 1.6M-parameter CNN of pfl-research's
CIFAR10 benchmark on data of CIFAR10's shape.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import inputs
from benchmarks.harness import Bar, Case, Contestant

SAMPLES = 50
OURS = "benchmarks.ours.runs"
PFL = "benchmarks.peers.pfl.simulation"
FLOWER = "benchmarks.peers.flwr.simulation"
BARS = [
    *(
        Bar("simulation", "simulation-cnn", "clients_per_s", ours, against=peer, at_least=least)
        for ours in ("atoll-1x2", "atoll-2x1")
        for peer, least in (("pfl-1x2", 1.3), ("pfl-2x1", 1.3), ("flwr-1x2", 2.2), ("flwr-2x1", 2.2))
    ),
    Bar("simulation", "simulation-memory", "peak_rss_mib", "atoll-1000", against="atoll-10", at_most=1.2),
]
"""NAME-PxT: P processes with T threads each. The better configuration of each side counts."""


def cases(tiny: bool) -> list[Case]:
    """Everybody runs as one process with two threads and as two with one."""
    users = 100 if tiny else 1000
    size = {"users": users, "cohort": 4 if tiny else 50, "rounds": 2 if tiny else 3}
    return [speed(size), memory(users)]


def speed(size: dict[str, int]) -> Case:
    """Who simulates most clients a second."""
    contestants = (
        Contestant("atoll-1x2", OURS, config={"what": "simulation", **size}),
        Contestant("atoll-2x1", OURS, config={"what": "simulation", **size, "workers": 2}),
        Contestant("pfl-1x2", PFL, "pfl", {**size, "processes": 1, "threads": 2}),
        Contestant("pfl-2x1", PFL, "pfl", {**size, "processes": 2, "threads": 1}),
        Contestant("flwr-1x2", FLOWER, "flwr", {"what": "simulation", **size, "cores": 2}),
        Contestant("flwr-2x1", FLOWER, "flwr", {"what": "simulation", **size, "cores": 1}),
    )
    return Case("simulation-cnn", contestants, partial(inputs.images, size["users"], SAMPLES))


def memory(users: int) -> Case:
    """The same cohort out of few and out of many: a process of its own for each measurement."""

    def contestant(count: int) -> Contestant:
        config: dict[str, Any] = {"what": "simulation", "users": count, "cohort": 10, "rounds": 3}
        return Contestant(f"atoll-{count}", OURS, config=config)

    def needs() -> None:
        for count in (10, users):
            inputs.images(count, SAMPLES)

    return Case("simulation-memory", (contestant(10), contestant(users)), needs, stay=False)
