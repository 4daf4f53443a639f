"""Noise before rounding, against exact distributions in one dimension: what aliasing.py claims of sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from atoll.aggregate.mean import mean
from atoll.privacy.aliasing import slack
from atoll.privacy.hidden import Hidden
from atoll.privacy.noise import gaussian

FLOAT = 1e-12
"""What float64 leaves of these distributions, generously."""


def rounded(x, s, reach):
    """P(round(x + N(0, s^2)) = k) for k in -reach .. reach: phi_s * tri as a second difference of z Phi(z) + phi(z)."""
    z = (np.arange(-reach, reach + 1) - x)[:, None] / s + np.array([1, 0, -1]) / s
    twice = z * norm.cdf(z) + norm.pdf(z)
    both = z * -norm.sf(z) + norm.pdf(z)  # the same but for a straight line, without cancellation where z is large
    odd = np.where(z[:, 1:2] > 0, both, twice)
    return np.maximum(s * (odd[:, 0] - 2 * odd[:, 1] + odd[:, 2]), 0)


def summed(xs, s):
    """The distribution of a sum of rounded noised numbers, by convolution, and the whole numbers that it is over."""
    reach = math.ceil(12 * s + 8)
    total = np.ones(1)
    for x in xs:
        total = np.convolve(total, rounded(x, s, reach))
    return np.arange(-(len(total) // 2), len(total) // 2 + 1), total


def rounded_once(xs, s, ks):
    """sum x_i + N(0, n s^2), rounded by the kernel tri^(*n): its characteristic function, integrated."""
    n, step = len(xs), 2 * math.pi / 1024
    last = round(9.5 / (s * math.sqrt(n)) / step)
    t = np.arange(-last, last + 1) * step
    hat = np.exp(-n * s**2 * t**2 / 2) * np.sinc(t / (2 * math.pi)) ** (2 * n)
    return (np.cos(np.outer(ks - sum(xs), t)) * hat).sum(axis=1) * step / (2 * math.pi)


def total_variation(p, q):
    return 0.5 * float(np.abs(p - q).sum())


CASES = [
    (s, xs)
    for s in (0.5, 0.7, 0.9, 1.0, 1.2, 1.5, 2.0)
    for xs in (
        [0.3, 0.5],
        [0.5, 0.0, 0.25],
        [0.1, 0.9, 0.5, 0.4],
        [0.5] * 6,
        [0.0, 0.5, 0.7, -0.3, 0.21, 1.9, 2.5, -0.8],
    )
]


@pytest.mark.parametrize(("s", "xs"), CASES)
def test_a_sum_of_rounded_numbers_is_one_rounded_number_but_for_the_slack(s, xs):
    ks, exact = summed(xs, s)
    ideal = rounded_once(xs, s, ks)
    assert exact.sum() == pytest.approx(1, abs=FLOAT)
    assert ideal.sum() == pytest.approx(1, abs=FLOAT)
    assert total_variation(exact, ideal) <= slack(s, len(xs), 1) + FLOAT


def test_the_oracle_sees_a_difference_where_there_is_one():
    """With a fifth of a level of noise two rounded numbers are not one: more than float error, less than the slack."""
    ks, exact = summed([0.5, 0.0], 0.2)
    seen = total_variation(exact, rounded_once([0.5, 0.0], 0.2, ks))
    assert 1e-4 < seen <= slack(0.2, 2, 1)


def hockey_stick(p, q, epsilon):
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


def of_gaussian(epsilon, noise_multiplier):
    """Balle and Wang 2018 (arXiv 1805.06530), Theorem 8."""
    a, b = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)


@pytest.mark.parametrize("s", [0.9, 1.2, 2.0])
@pytest.mark.parametrize("others", [[0.5], [0.25, 0.5], [0.0, 0.5, 0.3]])
@pytest.mark.parametrize("clip", [0.5, 1.0, 2.3, 5.0])
def test_neighbors_are_no_further_apart_than_under_gaussian_noise(s, others, clip):
    n = len(others) + 1
    for x in (clip, -clip, 0.37 * clip):
        with_x, without = summed([x, *others], s)[1], summed([0.0, *others], s)[1]
        for epsilon in (0.0, 0.1, 0.5, 1.0, 2.0, 4.0):
            allowed = of_gaussian(epsilon, s * math.sqrt(n) / clip) + (1 + math.exp(epsilon)) * slack(s, n, 1)
            for p, q in ((with_x, without), (without, with_x)):
                assert hockey_stick(p, q, epsilon) <= allowed + FLOAT * math.exp(epsilon)


@pytest.mark.parametrize("clients", [2, 64, 1000, 1024, 2000, 100_000])
def test_many_clients_cost_next_to_nothing(clients):
    assert 0 < slack(2.0, clients, 1) < 1e-14


def test_less_noise_more_coordinates_and_fewer_levels_cost_more():
    assert [slack(s, 4, 1) for s in (0.1, 0.6, 1.0, 1.5, 2.0)] == sorted(
        (slack(s, 4, 1) for s in (0.1, 0.6, 1.0, 1.5, 2.0)), reverse=True
    )
    assert slack(1.5, 4, 1000) == pytest.approx(1000 * slack(1.5, 4, 1))
    assert slack(0.01, 4, 1) == 1.0
    assert slack(0.01, 1, 10**9) == 0.0, "one client's rounding is post-processing"


@pytest.mark.parametrize("offset", [0.0, 0.25, 0.5, -3.7])
def test_levels_have_the_mean_and_the_variance_of_the_noise_and_its_rounding(offset):
    """The variance of a rounding with a uniform fraction is 1/6; at s = 1.5 the fraction is uniform to 1e-9."""
    import torch

    count, s = 200_000, 1.5
    how = Hidden(mean(), bits=16, clients=4, private_rounding=True)
    noised = {"w": torch.from_numpy(offset + s * gaussian(count))}
    levels = how.ring.centered(how.words(noised, 1.0, torch.Generator()))
    variance = s**2 + 1 / 6
    assert abs(levels.mean() - offset) < 5 * math.sqrt(variance / count)
    assert abs(levels.var() - variance) < 5 * variance * math.sqrt(2 / count)
    again = how.ring.centered(how.words(noised, 1.0, torch.Generator()))
    assert not np.array_equal(levels, again), "what hides a value must not come twice"
