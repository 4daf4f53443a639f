"""Claim: secure aggregation costs a quarter of Flower's SecAgg+, in a fifth more bytes than its sums need; and a protected
round of a language model a tenth more time than the same round in the clear.

Ten clients hold 460,800 float32 values each, as many as LoRA of rank 8 has on q and v of every block of SmolLM2-135M. Two
of them vanish once shares are distributed, so that their masks must come off with the help of the others. All mask with all,
and seven shares give back a secret. One process does everything in turn, without a network: `server_s` is all that the
server does in all stages, `client_s` all that one surviving client does (the median over them), without local training;
`seconds` is both. A value of 16 bits needs 16 + log2(10) bits, rounded up, for a sum of ten to fit: 2.5 bytes.
"""

from __future__ import annotations

from functools import partial

from benchmarks import inputs
from benchmarks.harness import Bar, Case, Contestant

CASE = "masks-460800"
FLOWER = "flwr-secaggplus"
BARS = [
    Bar("masks", CASE, "seconds", "atoll", against=FLOWER, at_most=0.25),
    Bar("masks", CASE, "server_s", "atoll", against=FLOWER),
    Bar("masks", CASE, "client_s", "atoll", against=FLOWER),
    Bar("masks", CASE, "times_needed_bytes", "atoll", at_most=1.2, unit="x what is needed"),
    Bar("masks", CASE, "upload_bytes", "atoll", against=FLOWER),
    Bar("masks", CASE, "error_in_steps", "atoll", against=FLOWER),
    *(
        Bar("masks", case, metric, "atoll", unit=unit)
        for case in ("masks-100-complete", "masks-1000-sparse")
        for metric, unit in (
            ("neighbors", ""),
            ("server_s", "s"),
            ("client_s", "s"),
            ("upload_bytes", "B"),
            ("phase_bytes_up", "B"),
            ("phase_bytes_down", "B"),
        )
    ),
    Bar("masks", "masks-protected", "round_s", "atoll-protected", against="atoll-clear", at_most=1.1),
]

RUNS = "benchmarks.ours.runs"
PROTECTION = {
    "exchange": {"use": "secure-aggregation", "bits": 8},
    "privacy": {"use": "distributed", "clip": 1.0, "delta": 0.01, "noise_multiplier": 1.0},
    "weighting": "uniform",
}


def cases(tiny: bool) -> list[Case]:
    """The same values, dropouts, threshold and steps for all."""
    setting = {"dropped": [3, 7], "threshold": 7, "bits": 16, "clip": 8.0, "seed": 0}
    config = {"clients": 10, "values": 4608 if tiny else 460800, "setting": setting}
    contestants = (
        Contestant("atoll", "benchmarks.ours.masks", config=config),
        Contestant(FLOWER, "benchmarks.peers.flwr.masks", "flwr", config),
    )
    return [
        Case(CASE, contestants, repeats=2 if tiny else 5),
        many("masks-100-complete", 4608 if tiny else 460800, clients=100, complete=True),
        many("masks-1000-sparse", 46 if tiny else 46080, clients=1000, complete=False),
        protected(tiny),
    ]


def many(name: str, values: int, **size: int) -> Case:
    """What a client's seconds and bytes come to where there are many: 20 bits a value and about 1.4 kB a neighbor."""
    config = {"values": values, "bits": 16, **size}
    return Case(name, (Contestant("atoll", "benchmarks.ours.masks", config=config),), repeats=3)


def protected(tiny: bool) -> Case:
    """Rounds of 4 clients with 4 local steps of 4 x 128 tokens on SmolLM2-135M with LoRA, as the quickstart's: in the clear,
    and with masks, 8 bits and shares of noise."""
    size = {"what": "rounds", "model": inputs.MODEL, "file": "fixed-40.npz", "clients": 4, "cohort": 4, "steps": 4}
    rounds = {"rounds": 2 if tiny else 4}
    contestants = (
        Contestant("atoll-clear", RUNS, config={**size, **rounds}),
        Contestant("atoll-protected", RUNS, config={**size, **rounds, "finetune": PROTECTION}),
    )
    return Case("masks-protected", contestants, partial(inputs.training, "fixed", 40))
