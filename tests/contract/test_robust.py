"""Robust aggregators against scipy's, numpy's and a plain search; and what bad updates do to them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from atoll.aggregate.robust import krum, median, multi_krum, trimmed_mean

RULES = {"median": median(), "trimmed-mean": trimmed_mean(0.3), "krum": krum(1), "multi-krum": multi_krum(1)}


def updates(count: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(3, 2, generator=draw), "b": torch.randn(4, generator=draw)} for _ in range(count)]


def together(rule, given_, weights=None, decode=lambda total: total):
    total = rule.init(given_[0])
    for update, weight in zip(given_, weights or [1.0] * len(given_), strict=True):
        total = rule.add(total, update, {"all": weight})
    return rule.finish(rule.open(total), decode)


def stacked(given_, name):
    return np.stack([one[name].numpy() for one in given_])


@given(st.integers(3, 9), st.integers(0, 99), st.sampled_from([0.0, 0.34, 0.4, 0.49]))
@settings(max_examples=40, deadline=None)
def test_coordinate_rules_are_numpys_and_scipys(count, seed, share):
    given_ = updates(count, seed)
    for name in ("w", "b"):
        middle, trimmed = together(median(), given_)[name], together(trimmed_mean(share), given_)[name]
        np.testing.assert_allclose(middle, np.median(stacked(given_, name), axis=0), atol=1e-6)
        np.testing.assert_allclose(trimmed, stats.trim_mean(stacked(given_, name), share, axis=0), atol=1e-6)


@given(st.integers(0, 2), st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_krum_is_the_update_with_the_nearest_neighbors(bad, more, seed):
    given_ = updates(2 * bad + 3 + more, seed)
    flat = [torch.cat([one["w"].flatten(), one["b"]]).double().numpy() for one in given_]

    def score(i):
        others = [((flat[i] - x) ** 2).sum() for j, x in enumerate(flat) if j != i]
        return min(sum(some) for some in combinations(others, len(flat) - bad - 2))

    order = sorted(range(len(flat)), key=score)
    assert torch.equal(together(krum(bad), given_)["w"], given_[order[0]]["w"])
    best = stacked([given_[i] for i in order[: len(flat) - bad]], "b").mean(axis=0)
    np.testing.assert_allclose(together(multi_krum(bad), given_)["b"], best, atol=1e-6)
    two = stacked([given_[i] for i in order[:2]], "b").mean(axis=0)
    np.testing.assert_allclose(together(multi_krum(bad, kept=2), given_)["b"], two, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_one_update_that_is_far_off_moves_nothing_far(name):
    given_ = updates(7, seed=3)
    honest = together(RULES[name], given_[:6])
    attacked = together(RULES[name], [*given_[:6], {n: 1e6 * torch.ones_like(x) for n, x in given_[6].items()}])
    spread = max(float(stacked(given_[:6], n).std(axis=0).max()) for n in ("w", "b"))
    assert all(float((attacked[n] - honest[n]).abs().max()) < 4 * spread for n in ("w", "b"))


@pytest.mark.parametrize("name", RULES)
def test_weights_say_no_more_than_whether_an_update_counts(name):
    given_ = updates(6, seed=4)
    equal = together(RULES[name], given_[:5])
    odd = together(RULES[name], given_, [1e9, 1.0, 2.0, 1e-3, 7.0, 0.0])
    assert all(torch.equal(equal[n], odd[n]) for n in equal)
    assert together(RULES[name], given_, [0.0] * 6) == {}


@pytest.mark.parametrize("name", RULES)
def test_too_few_updates_move_nothing(name):
    assert RULES[name].least >= 3
    assert together(RULES[name], updates(RULES[name].least - 1, seed=6)) == {}


@pytest.mark.parametrize("name", RULES)
def test_what_the_chain_did_is_undone_of_every_update(name):
    given_ = updates(6, seed=5)
    halved = [{n: x / 2 for n, x in one.items()} for one in given_]
    found = together(RULES[name], halved, decode=lambda one: {n: 2 * x for n, x in one.items()})
    expected = together(RULES[name], given_)
    assert all(torch.allclose(found[n], expected[n]) for n in found)
