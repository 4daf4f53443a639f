"""Claim: over a network a round takes at most a second longer than an empty one of stock Flower, and a tenth of what it
takes as an ordinary Flower app; a 512-MiB update travels at 100 MB/s, with 64 MB of extra memory at either end.

All on loopback, over TLS and with node keys, a process for each site. In `network-round` four clients get and give an
adapter of 5 MiB each round; instead of training they pause for a time that is subtracted, and give noise: updates that were
equal would travel once for all. In `network-512MiB` one site sends one update. Memory is what a process had at its peak,
less what it had before: at the site with the update in it, at the operator with the total to which it is added, and less
the update itself there, which it holds as it came. The server is Flower's, and keeps the update until it is fetched.
"""

from __future__ import annotations

import shutil
from functools import partial

from benchmarks.harness import Bar, Case, Contestant, inputs

CLIENTS = 4
RANK = 1280
"""Of LoRA on the tiny Llama, whose linear layers have 1,024 inputs and outputs in all: 5 MiB in 28 float32 tensors."""
TENSORS = 28
PAUSE_SECONDS = 0.2
KEYS = "network-keys"
OURS = "benchmarks.ours.network"
FLOWER = "benchmarks.peers.flwr.network"
ROUND, UPDATE = "network-round", "network-512MiB"
BARS = [
    Bar("network", ROUND, "seconds", "atoll", against="flwr-empty", less_is_better=True, plus=1.0, at_least=1),
    Bar("network", ROUND, "seconds", "atoll", against="flwr-app", less_is_better=True, at_least=10),
    Bar("network", ROUND, "with_checkpoint_seconds", "atoll", unit="s"),
    Bar("network", UPDATE, "mb_per_s", "atoll", at_least=100, unit="MB/s"),
    Bar("network", UPDATE, "mb_per_s", "atoll", against="flwr"),
    Bar("network", UPDATE, "site_extra_mb", "atoll", at_most=64, unit="MB"),
    Bar("network", UPDATE, "operator_extra_mb", "atoll", at_most=64, unit="MB"),
    Bar("network", UPDATE, "server_extra_mb", "atoll", unit="MB"),
]


def cases(tiny: bool) -> list[Case]:
    """Rounds of small updates, and one large update."""
    return [rounds(tiny), update(tiny)]


def rounds(tiny: bool) -> Case:
    """Fewer rounds of stock Flower, which takes 10 s and more for each."""
    ours, theirs = (3, 2) if tiny else (10, 4)
    common = {"keys": KEYS, "clients": CLIENTS, "pause": PAUSE_SECONDS}
    sizes = {"tensors": TENSORS, "bytes": 4096 * RANK, "rounds": theirs}
    contestants = (
        Contestant("atoll", OURS, config={"what": "rounds", "rounds": ours, "rank": RANK, **common}),
        Contestant("flwr-app", FLOWER, "flwr", {"what": "fedavg", **sizes, **common}),
        Contestant("flwr-empty", FLOWER, "flwr", {"what": "empty", **sizes, **common}),
    )
    return Case(ROUND, contestants, partial(keys, CLIENTS))


def update(tiny: bool) -> Case:
    """As large as the claim says: 512 MiB."""
    size = (32 if tiny else 512) << 20
    common = {"keys": KEYS, "tensors": 16, "bytes": size, "clients": 1}
    contestants = (
        Contestant("atoll", OURS, config={"what": "update", **common}),
        Contestant("flwr", FLOWER, "flwr", {"what": "update", "rounds": 1, "pause": 0.0, **common}),
    )
    return Case(UPDATE, contestants, partial(keys, CLIENTS))


def keys(clients: int) -> None:
    """An authority, a server's certificate and the sites' keys, new each time: certificates expire."""
    from atoll.fleet.flower import certs

    folder = inputs() / KEYS
    shutil.rmtree(folder, ignore_errors=True)
    certs.init(folder, ["localhost", "127.0.0.1"])
    for i in range(clients):
        certs.site(folder, f"site-{i}")
