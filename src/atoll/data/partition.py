"""How the records of one source lie over simulated clients, and how uneven that is.

Real federations are uneven in what clients hold and in how much. Three ways to get there: `natural` follows a column (the
author, the hospital), `dirichlet` skews the values of a column by a concentration alpha, `iid` is the even reference. A
partition is a function of the number of records and of a column; every record goes to exactly one client, and the same seed
gives the same clients. The signature of a factory is the schema of its entry in a recipe.

Sources:
    Dirichlet over clients for each label: Yurochkin et al. 2019 (arXiv:1905.12022, section 4), Li et al. 2022
    (arXiv:2102.02079, "distribution-based label imbalance").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt
from numpy.typing import NDArray

from atoll.errors import AtollError

Ints = NDArray[np.int64]
Assignments = dict[str, Ints]
"""Client -> the indices of its records, ascending."""

Column = Callable[[str], Sequence[Any]]
"""The values of a column, one a record."""

Partition = Callable[[int, Column], Assignments]
"""(number of records, column) -> assignments."""

MAX_TRIES = 1000


def natural(column: str) -> Partition:
    """One client for each value of `column`, named by it.

    Example:
        >>> natural("author")(3, {"author": ["ann", "bob", "ann"]}.__getitem__)
        {'ann': array([0, 2]), 'bob': array([1])}
    """

    def partition(count: int, columns: Column) -> Assignments:
        values = _values(columns, column, count)
        return {str(value): indices for value, indices in _groups(values).items()}

    return partition


def iid(clients: Annotated[int, Ge(1)], seed: Annotated[int, Ge(0)] = 0) -> Partition:
    """Shuffle the records and deal them out: sizes differ by at most one.

    Raises:
        AtollError: fewer records than clients.

    Example:
        >>> {name: len(indices) for name, indices in iid(2)(5, {}.__getitem__).items()}
        {'client-0': 3, 'client-1': 2}
    """

    def partition(count: int, columns: Column) -> Assignments:
        _enough(count, clients, 1)
        shuffled = np.random.default_rng(seed).permutation(count)
        return _named(np.array_split(shuffled, clients))

    return partition


def dirichlet(
    clients: Annotated[int, Ge(1)],
    alpha: Annotated[float, Gt(0)],
    column: str,
    seed: Annotated[int, Ge(0)] = 0,
    minimum: Annotated[int, Ge(0)] = 1,
) -> Partition:
    """For each value of `column`, draw the clients' shares from Dirichlet(alpha, ..., alpha) and deal its records by them.

    Small alpha gives each client few values (0.1: strong skew), alpha to infinity equal shares. The draw is repeated until
    every client holds at least `minimum` records, as in the papers' code.

    Raises:
        AtollError: `minimum` cannot be met, or was not in 1,000 draws.
    """

    def partition(count: int, columns: Column) -> Assignments:
        _enough(count, clients, minimum)
        groups = list(_groups(_values(columns, column, count)).values())
        rng = np.random.default_rng(seed)
        for _ in range(MAX_TRIES):
            dealt = _deal(groups, clients, alpha, rng)
            if min(map(len, dealt)) >= minimum:
                return _named(dealt)
        raise AtollError(
            "no Dirichlet draw gives every client enough records",
            found=f"{count} records, {clients} clients, alpha {alpha}, {MAX_TRIES} draws",
            allowed=f"at least {minimum} records for each client",
            remedy="raise alpha, or lower minimum or clients",
        )

    return partition


def _deal(groups: Sequence[Ints], clients: int, alpha: float, rng: np.random.Generator) -> list[Ints]:
    """One draw: for each group of records, shares over clients, and the shuffled records cut by them."""
    pieces: list[list[Ints]] = [[] for _ in range(clients)]
    for indices in groups:
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
        for own, piece in zip(pieces, np.split(rng.permutation(indices), cuts), strict=True):
            own.append(piece)
    return [np.concatenate(own) for own in pieces]


def _values(columns: Column, name: str, count: int) -> list[str]:
    values = [str(value) for value in columns(name)]
    if len(values) != count:
        raise AtollError("a column does not fit the records", where=name, found=len(values), allowed=count)
    return values


def _groups(values: Sequence[str]) -> dict[str, Ints]:
    """The indices of each value, ascending; values in sorted order, so that the order of records does not matter."""
    names, codes = np.unique(np.asarray(values, dtype=np.str_), return_inverse=True)
    order = np.argsort(codes, kind="stable").astype(np.int64)
    cuts = np.cumsum(np.bincount(codes, minlength=len(names)))[:-1]
    return dict(zip(names.tolist(), np.split(order, cuts), strict=True))


def _named(parts: Sequence[NDArray[Any]]) -> Assignments:
    width = len(str(len(parts) - 1))
    return {f"client-{number:0{width}}": np.sort(part).astype(np.int64) for number, part in enumerate(parts)}


def _enough(count: int, clients: int, minimum: int) -> None:
    if count < clients * minimum:
        raise AtollError(
            "too few records for the clients",
            found=f"{count} records",
            allowed=f"at least {clients * minimum} ({clients} clients with {minimum} each)",
            remedy="lower the number of clients",
        )


@dataclass(frozen=True)
class SkewReport:
    """How uneven a partition is.

    Attributes:
        labels: the label values, in sorted order.
        counts: client -> records of each label, in the order of `labels`.
        distance: client -> total variation distance of its labels from the whole, 0 (the same mix) to 1 (nothing shared).
        gini: Gini coefficient of the clients' sizes, 0 (equal) to nearly 1 (one client holds everything).
    """

    labels: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    distance: dict[str, float]
    gini: float

    @property
    def mean_distance(self) -> float:
        """The clients' distances, averaged with equal weights."""
        return float(np.mean(list(self.distance.values())))

    def as_table(self) -> list[dict[str, Any]]:
        """One row a client: client, records, a count for each label, distance."""
        return [
            {"client": client, "records": sum(counts)}
            | dict(zip(self.labels, counts, strict=True))
            | {"distance": round(self.distance[client], 4)}
            for client, counts in self.counts.items()
        ]


def skew_report(assignments: Mapping[str, Ints], labels: Sequence[Any]) -> SkewReport:
    """Compare each client's labels with the whole partition's.

    Args:
        assignments: client -> indices into `labels`.
        labels: the label of each record.

    Example:
        >>> report = skew_report({"a": np.array([0, 1]), "b": np.array([2, 3])}, ["x", "x", "x", "y"])
        >>> report.counts, report.distance, report.gini
        ({'a': (2, 0), 'b': (1, 1)}, {'a': 0.25, 'b': 0.25}, 0.0)
    """
    names, codes = np.unique(np.asarray([str(label) for label in labels], dtype=np.str_), return_inverse=True)
    counts = {client: np.bincount(codes[indices], minlength=len(names)) for client, indices in assignments.items()}
    whole = np.sum(list(counts.values()), axis=0)
    return SkewReport(
        labels=tuple(names.tolist()),
        counts={client: tuple(own.tolist()) for client, own in counts.items()},
        distance={client: _total_variation(own, whole) for client, own in counts.items()},
        gini=_gini(np.array([own.sum() for own in counts.values()])),
    )


def _total_variation(own: Ints, whole: Ints) -> float:
    """Half the L1 distance of two distributions; a client without records is as far as can be."""
    return float(np.abs(own / own.sum() - whole / whole.sum()).sum() / 2) if own.sum() else 1.0


def _gini(sizes: Ints) -> float:
    """Mean absolute difference of all pairs over twice the mean, by the sorted form of the sum."""
    if not sizes.sum():
        return 0.0
    ranks = np.arange(1, len(sizes) + 1)
    return float((2 * ranks - len(sizes) - 1) @ np.sort(sizes) / (len(sizes) * sizes.sum()))
