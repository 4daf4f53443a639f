"""Claim: the streaming mean runs at 60% of what memory allows, in the memory of three models, however many clients."""

from __future__ import annotations

from benchmarks.harness import Bar, Case, Contestant

CASE = "mean-128MiB"
BARS = [
    Bar("mean", CASE, "gb_per_s", "atoll", against="torch-add", at_least=0.6),
    Bar("mean", CASE, "gb_per_s", "atoll", against="flwr-arrayrecords", at_least=4),
    Bar("mean", CASE, "gb_per_s", "atoll", against="flwr-ndarrays", at_least=4),
    Bar("mean", CASE, "gb_per_s", "atoll", against="nvflare", at_least=2),
    Bar("mean", CASE, "gb_per_s", "atoll-driver", against="torch-add"),
    Bar("mean", CASE, "peak_models", "atoll", at_most=3, unit="models"),
    Bar("mean", CASE, "peak_models", "atoll-driver", unit="models"),
]


def cases(tiny: bool) -> list[Case]:
    """32 updates of 128 MiB."""
    size = {"updates": 4, "mebibytes": 8} if tiny else {"updates": 32, "mebibytes": 128}
    contestants = (
        Contestant("atoll", "benchmarks.ours.mean", config={"what": "aggregator", **size}),
        Contestant("atoll-driver", "benchmarks.ours.mean", config={"what": "driver", **size}),
        Contestant("torch-add", "benchmarks.ours.mean", config={"what": "torch", **size}),
        Contestant("flwr-arrayrecords", "benchmarks.peers.flwr.mean", "flwr", {"api": "arrayrecords", **size}),
        Contestant("flwr-ndarrays", "benchmarks.peers.flwr.mean", "flwr", {"api": "ndarrays", **size}),
        Contestant("nvflare", "benchmarks.peers.nvflare.mean", "nvflare", size),
    )
    return [Case(CASE, contestants, repeats=2 if tiny else 5)]
