"""Who shares masks with whom: everybody with everybody up to 64 clients, a sparse random graph above.

Source: Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (CCS 2020), SecAgg+: a Harary
graph over a random order of the clients. Its degree is large enough that, but for a chance of 2^-40, no client has so many
colluding neighbors that they could take its masks off, and, but for 2^-30, enough of everybody's neighbors stay.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache

COMPLETE = 64
"""Up to so many clients everybody is everybody's neighbor."""

SECURITY = 2.0**-40
CORRECTNESS = 2.0**-30

COLLUDING = 0.1
DROPPED = 0.2
"""The shares of the clients that a sparse graph is made for."""


def threshold(holders: int, colluding: int) -> int:
    """Shares that give a secret: so many that no two lists of survivors can get both secrets of a client.

    Everybody gives one share of one of the two, but for colluding clients, who give both: 2 t > holders + colluding.

    >>> threshold(4, 0), threshold(10, 0), threshold(10, 3)
    (3, 6, 7)
    """
    return (holders + colluding) // 2 + 1


@lru_cache
def degree(clients: int) -> int:
    """Neighbors of each client; even in a sparse graph.

    >>> degree(10), degree(100), degree(1000) < 120
    (9, 66, True)
    """
    if clients <= COMPLETE:
        return clients - 1
    return next((k for k in range(COMPLETE + 2, clients - 1, 2) if _suffices(clients, k)), clients - 1)


def _suffices(clients: int, k: int) -> bool:
    """Whether k neighbors are enough: hypergeometric tails over all clients (Bell et al., Theorem 3.10 and Lemma 3.7)."""
    from scipy.stats import hypergeom

    t = threshold(k + 1, 0)
    too_many = hypergeom.sf(t - 2, clients - 1, int(COLLUDING * clients), k)
    too_few = hypergeom.cdf(t - 1, clients - 1, clients - 1 - int(DROPPED * clients), k)
    return bool(clients * too_many < SECURITY and clients * too_few < CORRECTNESS)


def neighbors(names: Sequence[str]) -> dict[str, list[str]]:
    """Each client's neighbors: those up to k / 2 places away in a circle of random order."""
    k = degree(len(names))
    if k == len(names) - 1:
        return {name: [other for other in names if other != name] for name in names}
    circle = list(names)
    secrets.SystemRandom().shuffle(circle)
    steps = [step for step in range(-k // 2, k // 2 + 1) if step]
    return {name: [circle[(at + step) % len(circle)] for step in steps] for at, name in enumerate(circle)}
