"""Partitions: every record once, the same for the same seed, and by the law they claim."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError, validate_call

from atoll.data.partition import Partition, dirichlet, iid, natural, skew_report
from atoll.errors import AtollError

LABELS = ["cat", "dog", "emu", "fox"]


def split(partition: Partition, labels: Sequence[Any]) -> dict[str, np.ndarray]:
    return partition(len(labels), {"animal": labels}.__getitem__)


def partitions(clients: int, seed: int, alpha: float) -> list[Partition]:
    return [natural("animal"), iid(clients, seed), dirichlet(clients, alpha, "animal", seed, minimum=0)]


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.sampled_from([*LABELS, 7, None]), min_size=5, max_size=80),
    clients=st.integers(1, 5),
    seed=st.integers(0, 99),
    alpha=st.floats(0.01, 1e6),
)
def test_every_record_goes_to_exactly_one_client_and_the_seed_decides(
    labels: list[Any], clients: int, seed: int, alpha: float
) -> None:
    for one, again in zip(partitions(clients, seed, alpha), partitions(clients, seed, alpha), strict=True):
        assignments = split(one, labels)
        assert sorted(np.concatenate(list(assignments.values())).tolist()) == list(range(len(labels)))
        assert all((np.diff(indices) > 0).all() for indices in assignments.values())
        repeated = split(again, labels)
        assert assignments.keys() == repeated.keys()
        assert all((assignments[name] == repeated[name]).all() for name in assignments)


def test_natural_follows_the_column() -> None:
    assignments = split(natural("animal"), ["dog", 7, "cat", "dog", "7"])
    assert {name: indices.tolist() for name, indices in assignments.items()} == {"7": [1, 4], "cat": [2], "dog": [0, 3]}


@given(count=st.integers(1, 200), clients=st.integers(1, 20))
def test_iid_sizes_differ_by_at_most_one(count: int, clients: int) -> None:
    if count < clients:
        with pytest.raises(AtollError, match="too few records"):
            split(iid(clients), ["x"] * count)
        return
    sizes = [len(indices) for indices in split(iid(clients), ["x"] * count).values()]
    assert len(sizes) == clients
    assert max(sizes) - min(sizes) <= 1


def test_iid_places_each_record_uniformly() -> None:
    """Record 0 goes to each of 5 clients in about a fifth of 2,000 seeds: chi-square with 4 degrees, 99.9% at 18.5."""
    counts = np.zeros(5)
    for seed in range(2000):
        for client, indices in enumerate(split(iid(5, seed), ["x"] * 20).values()):
            counts[client] += 0 in indices
    assert ((counts - 400) ** 2 / 400).sum() < 18.5


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_shares_follow_the_dirichlet_law(alpha: float) -> None:
    """A label's share at a client is Beta(alpha, (K - 1) alpha): mean 1 / K, and every quantile, against numpy's draws."""
    clients, records, draws = 4, 1000, 3000
    shares = np.array(
        [
            [
                len(own) / records
                for own in split(dirichlet(clients, alpha, "animal", seed, 0), ["cat"] * records).values()
            ]
            for seed in range(draws)
        ]
    )
    reference = np.random.default_rng(1234).dirichlet(np.full(clients, alpha), size=draws)
    np.testing.assert_allclose(shares.mean(axis=0), 1 / clients, atol=0.03)
    for client in range(clients):  # two-sample Kolmogorov-Smirnov, 0.1% level: 1.95 sqrt(2 / draws), plus the rounding
        ours, law = np.sort(shares[:, client]), np.sort(np.rint(reference[:, client] * records) / records)
        grid = np.linspace(0, 1, 201)
        distance = np.abs(np.searchsorted(ours, grid, "right") - np.searchsorted(law, grid, "right")).max() / draws
        assert distance < 1.95 * np.sqrt(2 / draws) + 0.01


def test_labels_are_dealt_independently_of_each_other() -> None:
    """The correlation of two labels' shares at a client is 0: below 4 / sqrt(draws)."""
    labels = ["cat"] * 200 + ["dog"] * 200
    first = [split(dirichlet(3, 0.5, "animal", seed, 0), labels)["client-0"] for seed in range(1000)]
    shares = np.array([[(own < 200).sum(), (own >= 200).sum()] for own in first])
    assert abs(np.corrcoef(shares.T)[0, 1]) < 4 / np.sqrt(1000)


def test_dirichlet_shuffles_the_records_of_a_label() -> None:
    """With equal shares record 0 goes to each of 4 clients in about a quarter of the seeds: 99.9% at 16.3."""
    counts = np.zeros(4)
    for seed in range(800):
        for client, indices in enumerate(split(dirichlet(4, 1e6, "animal", seed), ["cat"] * 40).values()):
            counts[client] += 0 in indices
    assert ((counts - 200) ** 2 / 200).sum() < 16.3


def test_large_alpha_approaches_iid_and_small_alpha_separates() -> None:
    labels = np.random.default_rng(0).choice(LABELS, 4000).tolist()
    distances = [
        skew_report(split(dirichlet(8, alpha, "animal", 0), labels), labels).mean_distance
        for alpha in (0.05, 0.5, 5, 500, 1e7)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.5
    even = skew_report(split(iid(8), labels), labels)
    assert distances[-1] <= even.mean_distance
    assert even.mean_distance < 0.05


def test_the_order_of_records_does_not_decide_which_labels_a_client_gets() -> None:
    labels = ["cat"] * 60 + ["dog"] * 60
    forward = skew_report(split(dirichlet(4, 0.3, "animal", 3), labels), labels)
    backward = skew_report(split(dirichlet(4, 0.3, "animal", 3), labels[::-1]), labels[::-1])
    assert forward == backward


def test_the_minimum_is_kept_or_refused() -> None:
    labels = ["cat"] * 100 + ["dog"] * 100
    for seed in range(20):
        assert min(map(len, split(dirichlet(5, 0.3, "animal", seed, minimum=10), labels).values())) >= 10
    with pytest.raises(AtollError, match="too few records"):
        split(dirichlet(5, 1.0, "animal", minimum=41), labels)
    with pytest.raises(AtollError, match="no Dirichlet draw") as caught:
        split(dirichlet(20, 0.01, "animal", minimum=10), labels)
    assert "raise alpha" in str(caught.value)


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(AtollError, match="does not fit"):
        natural("animal")(3, {"animal": ["cat"]}.__getitem__)


def test_names_sort_as_the_clients_count() -> None:
    assert list(split(iid(11), ["x"] * 11)) == [f"client-{number:02}" for number in range(11)]


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        (iid, {"clients": 0}),
        (iid, {"clients": 2, "seed": -1}),
        (dirichlet, {"clients": 2, "alpha": 0, "column": "a"}),
        (dirichlet, {"clients": 2, "alpha": 1.0}),
        (dirichlet, {"clients": 2, "alpha": 1.0, "column": "a", "minimum": -1}),
        (natural, {}),
    ],
)
def test_the_signature_is_the_schema(factory: Any, arguments: dict[str, Any]) -> None:
    assert TypeAdapter(factory).json_schema()["type"] == "object"
    with pytest.raises(ValidationError):
        validate_call(factory)(**arguments)


# The skew report


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    seed=st.integers(0, 9),
)
def test_the_report_agrees_with_the_definitions(sizes: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).choice(LABELS, sum(sizes) or 1).tolist()
    cuts = np.cumsum(sizes)[:-1]
    assignments = {f"c{n}": part for n, part in enumerate(np.split(np.arange(sum(sizes)), cuts))}
    report = skew_report(assignments, labels)
    held = [labels[index] for part in assignments.values() for index in part]
    for name, part in assignments.items():
        own = [labels[index] for index in part]
        assert report.counts[name] == tuple(own.count(label) for label in report.labels)
        expected = (
            max(
                abs(sum(own.count(a) / len(own) - held.count(a) / len(held) for a in event))
                for size in range(len(report.labels) + 1)
                for event in combinations(report.labels, size)
            )
            if own
            else 1.0
        )  # the largest difference in probability of any event
        assert report.distance[name] == pytest.approx(expected)
    mean_difference = sum(abs(a - b) for a in sizes for b in sizes) / len(sizes) ** 2
    assert report.gini == pytest.approx(mean_difference / (2 * np.mean(sizes)) if sum(sizes) else 0.0)


def test_the_table_has_a_row_for_each_client() -> None:
    report = skew_report({"a": np.array([0, 1]), "b": np.array([2])}, ["x", "x", "y"])
    assert report.as_table() == [
        {"client": "a", "records": 2, "x": 2, "y": 0, "distance": 0.3333},
        {"client": "b", "records": 1, "x": 0, "y": 1, "distance": 0.6667},
    ]
