"""What the account says against others who were asked the same, and against what an attacker of the real mechanism sees."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from experiments.epsilon_table import SETTINGS, opacus_says, ours
from hypothesis import given as drawn
from hypothesis import settings as drawing
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import beta, norm
from test_masks import Losing, masked_clients
from toys import rounds, toy_plan

from atoll.client import Client, MemoryStore
from atoll.exchange import Done
from atoll.fleet.inprocess import InProcess
from atoll.privacy import mechanisms
from atoll.privacy.accounting import Release, epsilon, noise_for
from atoll.privacy.masks import secure_aggregation
from atoll.privacy.mechanisms import Cohorts, Mechanism, in_a_ring, protect
from atoll.privacy.noise import with_noise
from atoll.round import initial
from atoll.schedule import poisson
from atoll.stream import UPDATE, Stream

# Two accountants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_epsilon_is_that_of_another_accountant(setting):
    assert 0.1 < ours(setting) < 20
    assert ours(setting) == pytest.approx(opacus_says(setting), rel=0.01)


def analytic_gaussian(noise_multiplier, delta):
    """Balle and Wang 2018 (arXiv 1805.06530), Theorem 8, solved for epsilon."""

    def over(log_epsilon):
        found = math.exp(log_epsilon)
        a, b = 1 / (2 * noise_multiplier), found * noise_multiplier
        return norm.cdf(a - b) - math.exp(found + norm.logcdf(-a - b)) - delta

    return math.exp(brentq(over, -12, 7, xtol=1e-12))


@pytest.mark.parametrize("noise", [0.4, 1.0, 2.5, 8.0])
@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_releases_of_everybody_are_one_gaussian_mechanism(noise, count, delta):
    assert epsilon([Release(noise, count=count)], delta) == pytest.approx(
        analytic_gaussian(noise / math.sqrt(count), delta), abs=1e-3
    )


def test_an_account_is_that_of_its_entries_in_any_order():
    parts = [Release(1.5, count=3), Release(2.0), Release(1.0, "poisson", 0.1, count=5)]
    whole = epsilon(parts, 1e-5)
    assert epsilon([*reversed(parts)], 1e-5) == whole
    assert epsilon([Release(1.5)] * 3 + parts[1:], 1e-5) == whole
    assert max(epsilon([one], 1e-5) for one in parts) < whole < sum(epsilon([one], 1e-5) for one in parts)


def test_no_release_costs_nothing_and_one_without_noise_everything():
    assert epsilon([], 1e-5) == 0
    assert epsilon([Release(0.0)], 1e-5) == math.inf
    assert epsilon([Release(3.0), Release(0.0, "poisson", 0.5)], 1e-5) == math.inf


@pytest.mark.parametrize("one", [Release(0.02, count=100), Release(0.05, "poisson", 0.1, count=50)])
def test_next_to_no_noise_is_accounted_for_in_a_moment(one):
    assert epsilon([one], 1e-5) > 1000


# Cohorts of a fixed size ------------------------------------------------------------------------------------------------


def cohorts(noise, size, population, count=1):
    return Release(noise, "uniform", size / population, population, count)


def test_the_noise_of_replace_one_is_over_twice_the_clip():
    """dp-accounting's noise multiplier is over the sensitivity, and one unit in the place of another changes two clips."""
    for noise in (1.0, 3.0):
        assert epsilon([cohorts(noise, 10, 10)], 1e-5) == pytest.approx(analytic_gaussian(noise / 2, 1e-5), abs=1e-3)


@pytest.mark.parametrize(("size", "population"), [(1, 100), (20, 100), (2, 3), (99, 100)])
@pytest.mark.parametrize("noise", [2.0])
def test_sampling_a_fixed_number_lies_between_its_bounds(size, population, noise):
    """Above add-or-remove of Poisson samples, half of what replaces; never above the same releases of everybody."""
    found = epsilon([cohorts(noise, size, population, 20)], 1e-5)
    assert found <= analytic_gaussian(noise / 2 / math.sqrt(20), 1e-5) * (1 + 1e-6)
    assert found >= epsilon([Release(noise, "poisson", size / population, count=20)], 1e-5)


def mixture_divergence(eps, noise, rate):
    """Of (1 - q) N(0, z^2) + q N(1, z^2) from the same with -1: one round of replace-one in one dimension."""
    x = np.linspace(-12 * noise - 1, 12 * noise + 1, 200_001)
    p, q = ((1 - rate) * norm.pdf(x, 0, noise) + rate * norm.pdf(x, at, noise) for at in (1, -1))
    return float(np.maximum(p - math.exp(eps) * q, 0).sum() * (x[1] - x[0]))


@pytest.mark.parametrize(("size", "population"), [(1, 100), (20, 100), (50, 100)])
@pytest.mark.parametrize("noise", [0.7, 2.0])
def test_sampling_a_fixed_number_says_no_less_than_an_exact_pair_of_neighbors(size, population, noise):
    found = epsilon([cohorts(noise, size, population)], 1e-5)
    assert mixture_divergence(found, noise, size / population) <= 1e-5


def test_accounts_of_unlike_adjacency_are_refused():
    with pytest.raises(Exception, match="cannot be put into one account"):
        epsilon([Release(1.0), cohorts(1.0, 2, 10)], 1e-5)


# Noise from a budget ----------------------------------------------------------------------------------------------------


@drawing(deadline=None, max_examples=25)
@drawn(wanted=st.floats(0.2, 30), log_delta=st.floats(-8, -2), count=st.integers(1, 500))
def test_the_noise_for_a_budget_keeps_it_and_is_hardly_more_than_that_takes(wanted, log_delta, count):
    delta, like = 10**log_delta, Release(1.0, count=count)
    noise = noise_for(wanted, delta, like)
    assert epsilon([replace(like, noise_multiplier=noise)], delta) <= wanted
    assert epsilon([replace(like, noise_multiplier=noise * 0.999)], delta) > wanted


@drawing(deadline=None, max_examples=15)
@drawn(
    budgets=st.lists(st.floats(0.2, 30), min_size=2, max_size=2),
    counts=st.lists(st.integers(1, 500), min_size=2, max_size=2),
)
def test_more_rounds_and_smaller_budgets_take_more_noise(budgets, counts):
    (small, large), (few, many) = sorted(budgets), sorted(counts)
    least = noise_for(large, 1e-5, Release(1.0, count=few))
    assert least <= noise_for(small, 1e-5, Release(1.0, count=few)) * (1 + 2e-4)
    assert least <= noise_for(large, 1e-5, Release(1.0, count=many)) * (1 + 2e-4)


@pytest.mark.parametrize("like", [Release(1.0, "poisson", 0.1, count=20), cohorts(1.0, 5, 100, 20)])
def test_the_noise_for_sampled_rounds_keeps_the_budget(like):
    noise = noise_for(2.0, 1e-5, like)
    assert 1.95 < epsilon([replace(like, noise_multiplier=noise)], 1e-5) <= 2.0


# What an attacker sees --------------------------------------------------------------------------------------------------
#
# Jagielski et al. 2020 (arXiv 2006.07709), Nasr et al. 2021 (arXiv 2101.04535): of many runs with and without one client,
# the most telling event bounds epsilon from below, epsilon >= log((P - delta) / Q), by Clopper and Pearson's bounds on both.

SURE = 1e-4
"""The chance that one of the two bounds is wrong."""


def lower_bound(with_client, without, delta):
    """The threshold is chosen on one half of the draws, its event counted on the other."""
    half = len(with_client) // 2
    best = max(
        np.quantile(without[:half], np.linspace(0.5, 0.995, 60)),
        key=lambda t: bound_at(t, with_client[:half], without[:half], delta),
    )
    return bound_at(best, with_client[half:], without[half:], delta)


def bound_at(threshold, with_client, without, delta):
    hits, misses, n = int((with_client > threshold).sum()), int((without > threshold).sum()), len(with_client)
    low = beta.ppf(SURE, hits, n - hits + 1) if hits else 0.0
    high = beta.ppf(1 - SURE, misses + 1, n - misses) if misses < n else 1.0
    return math.log(max(low - delta, 1e-12) / high)


DELTA, CLIP = 0.01, 0.5


def private(where, noise, expected=2.0, noisy=1, sampling="everyone", rate=1.0, count=1):
    mechanism = Mechanism(where, CLIP, DELTA, None, noise, None)
    return protect(mechanism, Cohorts(Release(1.0, sampling, rate), expected, noisy, count))


def run_of(protection, updates, count, schedule=None):
    """The param after some rounds of the real driver; what all rounds released is in it."""
    plan = toy_plan(streams=protection.streams((Stream(),)))
    if schedule:
        plan = replace(plan, schedule=schedule)

    def client(name):
        def work(params, data, state, task):
            return Done({UPDATE: {"a": torch.tensor([updates[name]], dtype=torch.float64)}}, {"all": 1.0}, {}, {})

        return Client(name, plan.hash, plan.streams, {"train": protection.guarded(work)}, None, MemoryStore())

    def once(seed):
        state = initial(replace(plan, seed=seed), {"a": torch.zeros(1, dtype=torch.float64)})
        end = rounds(replace(plan, seed=seed), InProcess(list(updates), client), count, state)
        return float(end.params[UPDATE]["a"])

    return once


def seen(protection, draws, count=1, schedule=None):
    """Of runs with a client that does what it can, and without it; the other client does nothing."""
    with_client = run_of(protection, {"a": 0.0, "b": 100.0}, count, schedule)
    without = run_of(protection, {"a": 0.0}, count, schedule)
    return [np.array([once(seed) for seed in range(draws)]) for once in (with_client, without)]


def test_an_attacker_of_the_central_mechanism_finds_less_than_its_epsilon_and_more_with_a_third_of_the_noise(
    monkeypatch,
):
    protection = private("central", 2.1)
    stated = protection.epsilon(2)
    found = lower_bound(*seen(protection, 3000, count=2), DELTA)
    assert 0.05 < found < stated
    monkeypatch.setattr(mechanisms, "with_noise", lambda total, std, snap: with_noise(total, std / 3, snap))
    broken = lower_bound(*seen(protection, 3000, count=2), DELTA)
    print(f"central, 2 rounds: found {found:.3f} of {stated:.3f} stated; with a third of the noise {broken:.3f}")
    assert broken > stated


def test_an_attacker_of_sampled_rounds_finds_less_than_their_epsilon_and_more_if_all_are_drawn():
    protection = private("central", 1.0, sampling="poisson", rate=0.1)
    stated = protection.epsilon(1)
    found = lower_bound(*seen(protection, 3000, schedule=poisson(0.1)), DELTA)
    broken = lower_bound(*seen(protection, 3000), DELTA)
    print(f"central, sampled: found {found:.3f} of {stated:.3f} stated; without sampling {broken:.3f}")
    assert found < stated < broken


def masked_sums(protection, updates, draws, bits, std_factor=1.0):
    """Sums of what clients put under masks, many at once: one coordinate is a draw. Masks add nothing to a sum."""
    stream = secure_aggregation(bits=bits).hide(
        Stream(), len(updates), lambda params: protection.largest(UPDATE, params), noised=True
    )
    how, params = stream.aggregate, {UPDATE: {"a": torch.zeros(draws)}}
    scale = how.scale(how.public(params))
    total = 0
    for update in updates:
        value = torch.full((draws,), update, dtype=torch.float64)
        noised = with_noise({"a": value}, std_factor * protection.share_std(UPDATE, params))
        total = total + how.words(noised, scale, torch.Generator())
    return how.ring.centered(how.ring.of(total.astype(np.int64))) * scale


@pytest.mark.parametrize("bits", [6, 16])
def test_an_attacker_of_the_distributed_mechanism_finds_less_than_its_epsilon_and_more_if_half_the_noise_is_lacking(
    bits,
):
    protection = in_a_ring(private("distributed", 2.0, noisy=3), 1, bits)
    stated = protection.epsilon(1)
    at = {
        factor: [masked_sums(protection, [x, 0.1, -0.2], 200_000, bits, factor) for x in (CLIP, 0.0)]
        for factor in (1.0, 0.5)
    }
    found, broken = (lower_bound(*at[factor], DELTA) for factor in (1.0, 0.5))
    print(f"distributed, {bits} bits: found {found:.3f} of {stated:.3f} stated; with half the noise {broken:.3f}")
    assert 0.5 * stated < found < stated < broken


def test_the_noise_behind_masks_is_that_which_the_plan_states():
    """The driver, the client's guard, keys, masks and the ring: what the server adds up has the noise of all shares."""
    names, size = list("abcd"), 20_000
    aggregation = secure_aggregation(bits=16, survivors=3)
    protection = in_a_ring(private("distributed", 2.0, expected=4.0, noisy=3), size, 16)
    (protected,) = protection.streams((Stream(),))
    stream = aggregation.hide(protected, 4, lambda params: protection.largest(UPDATE, params), noised=True)
    plan = toy_plan(streams=(stream,), exchange=aggregation.exchange((stream,), 4), attempt=aggregation.attempt)
    zeros = {"w": torch.zeros(size)}
    make = masked_clients(plan, aggregation, dict.fromkeys(names, zeros))

    def guarded(name):
        client = make(name)
        client.works = {"train": protection.guarded(client.works["train"])}
        return client

    fleet = Losing(names, guarded)
    fleet.lost = (("mask", "d", "update"),)
    noise = rounds(plan, fleet, 1, initial(plan, zeros)).params[UPDATE]["w"].double() * 4
    wanted = 2.0 * CLIP
    assert abs(float(noise.var()) / wanted**2 - 1) < 6 * math.sqrt(2 / size)
    assert abs(float(noise.mean())) < 6 * wanted / math.sqrt(size)
