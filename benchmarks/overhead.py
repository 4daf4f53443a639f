"""Claim: at most 50 ms per client and round outside local steps, from the first round on; and a whole run of a tiny model
takes 1 / 2.5 of what `flwr run` takes.

20 clients, 2 a round. Ours do 10 local steps of 4 x 128 tokens on SmolLM2-135M with LoRA; the record says how long they
took. Flower's client only sleeps instead, and exchanges an adapter of the same 420 tensors: its time outside is the same,
and the benchmark is over sooner.
"""

from __future__ import annotations

from functools import partial

from benchmarks import inputs
from benchmarks.harness import Bar, Case, Contestant
from benchmarks.training import START

CLIENTS = 20
COHORT = 2
RUNS = "benchmarks.ours.runs"
FLOWER = "benchmarks.peers.flwr.simulation"
BARS = [
    Bar("overhead", "overhead", "outside_ms", "atoll", at_most=50, unit="ms"),
    Bar("overhead", "overhead", "outside_ms", "atoll", against="flwr-1x2", less_is_better=True),
    Bar("overhead", "overhead", "outside_ms", "atoll", against="flwr-2x1", less_is_better=True),
    Bar("overhead", "overhead", "with_checkpoint_ms", "atoll", unit="ms"),
    Bar("overhead", "overhead", "first_round_ms", "atoll", at_most=50, unit="ms"),
    Bar("overhead", "overhead", "first_round_ms", "atoll", against="flwr-1x2", less_is_better=True),
    Bar("overhead", "overhead-process", "seconds", "atoll", against="flwr", less_is_better=True, at_least=2.5),
]


def cases(tiny: bool) -> list[Case]:
    """The record's spans, and whole processes."""
    return [spans(tiny), processes(tiny)]


def spans(tiny: bool) -> Case:
    """Rounds of 2 of 20 clients; the first round apart from the others."""
    steps, flower_rounds = (1, 3) if tiny else (10, 10)
    common = {"cohort": COHORT, "start": START}
    ours = {"clients": CLIENTS, "cohort": COHORT, "rounds": 2, "steps": steps}
    theirs = {**common, "what": "overhead", "users": CLIENTS, "rounds": flower_rounds, "sleep": 0.1}
    contestants = (
        Contestant("atoll", RUNS, config={"what": "overhead", "model": inputs.MODEL, "file": "fixed-40.npz", **ours}),
        Contestant("flwr-1x2", FLOWER, "flwr", {**theirs, "cores": 2}),
        Contestant("flwr-2x1", FLOWER, "flwr", {**theirs, "cores": 1}),
    )
    return Case("overhead", contestants, partial(needs, START))


def needs(start: str) -> None:
    """Samples, and the adapter that Flower's clients exchange."""
    inputs.training("fixed", 40)
    inputs.adapter(start)


def processes(tiny: bool) -> Case:
    """From the shell: 10 rounds of 2 of 2 clients, 4 local steps, on a tiny Llama with LoRA."""
    size = {"rounds": 2 if tiny else 10, "steps": 4}
    contestants = (
        Contestant("atoll", "benchmarks.ours.process", config=size),
        Contestant("flwr", "benchmarks.peers.flwr.process", "flwr", size),
    )
    return Case("overhead-process", contestants, inputs.tiny_llama)
