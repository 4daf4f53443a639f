"""Claim: secure aggregation costs a quarter of Flower's SecAgg+, in a fifth more bytes than its sums need.

Ten clients hold 460,800 float32 values each, as many as LoRA of rank 8 has on q and v of every block of SmolLM2-135M. Two
of them vanish once shares are distributed, so that their masks must come off with the help of the others. All mask with all,
and seven shares give back a secret. One process does everything in turn, without a network: `server_s` is all that the
server does in all stages, `client_s` all that one surviving client does (the median over them), without local training;
`seconds` is both. A value of 16 bits needs 16 + log2(10) bits, rounded up, for a sum of ten to fit: 2.5 bytes.
"""

from __future__ import annotations

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
]


def cases(tiny: bool) -> list[Case]:
    """The same values, dropouts, threshold and steps for all."""
    setting = {"dropped": [3, 7], "threshold": 7, "bits": 16, "clip": 8.0, "seed": 0}
    config = {"clients": 10, "values": 4608 if tiny else 460800, "setting": setting}
    contestants = (
        Contestant("atoll", "benchmarks.ours.masks", config=config),
        Contestant(FLOWER, "benchmarks.peers.flwr.masks", "flwr", config),
    )
    return [Case(CASE, contestants, repeats=2 if tiny else 5)]
