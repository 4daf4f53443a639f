"""Why noise may be added before rounding to a ring, and what that costs.

Each of n clients sends Q_i = round(x_i + N(0, s^2)), rounded stochastically to whole levels; the server sees S = sum Q_i.
Let tri be the triangle of width 2 (what stochastic rounding does to a density) and phi_s the normal density. Then

    P(Q_i = k) = h(k - x_i),   h = phi_s * tri

and, if the sum over the lattice were the integral, S would have the density phi_(s sqrt n) * tri^(*n) at k - sum x_i. That
is sum x_i + N(0, n s^2), rounded by the kernel tri^(*n), whose values at whole numbers sum to one (it is a B-spline).
Rounding by a kernel that does not depend on the data is post-processing: S tells no more than the sum with Gaussian noise of
n s^2, however many coordinates there are. The lattice sum differs from the integral by the aliases of the densities
(Poisson's summation formula): the terms of prod_i sum_m h^(t + 2 pi m_i), in the characteristic function, whose m_i are
not all equal,

    |aliases(t)| <= (sum_m a_m)^n - sum_m a_m^n,   a_m = exp(-s^2 (t + 2 pi m)^2 / 2)

With s = 2 levels and 4 clients this is below 1e-24. Such a distance counts for every coordinate and round, and twice: the
hockey-stick divergence of two neighbors' sums, each of which differs by at most `slack` from one that is epsilon-delta, is
at most delta + (1 + exp(epsilon)) slack. What more clients than n add is independent of these: post-processing again.

The argument is one of real numbers: noise stays in float64 until it is rounded, whose steps are 2^-20 of a level or less.

The discrete Gaussian and Skellam mechanisms (Kairouz et al. 2021, arXiv 2102.06387; Agarwal et al. 2021, arXiv 2110.04995)
round first and pay for it by a sensitivity that grows by sqrt(coordinates) / 2 levels: at 8 bits and a million coordinates
several times the clip. See decisions/0010.
"""

from __future__ import annotations

import math

import numpy as np

WINDOW = 20
"""Standard deviations beyond which neither distribution has mass that matters: exp(-200)."""

TAIL = 1e-80
"""Of both beyond the window."""


def slack(levels: float, clients: int, coordinates: int) -> float:
    """By how much, in total variation, a sum differs from one with Gaussian noise that was rounded once.

    `levels` is the standard deviation of one client's noise, in levels.

    >>> slack(2.0, 4, 10**6) < 1e-15 < slack(1.0, 4, 10**6)
    True
    """
    if clients == 1:
        return 0.0  # rounding one client's noised vector is post-processing
    t = np.linspace(0, math.pi, 4001)
    squares = np.stack([(t + 2 * math.pi * m) ** 2 for m in (0, -1, 1, -2, 2)])
    log_a = -(levels**2) * squares / 2
    others = np.exp(log_a[1:] - log_a[0])  # against the largest
    log_all = clients * np.log1p(
        others.sum(axis=0)
    )  # of (sum_m a_m)^n over the largest; more than a float holds at times
    crossed = np.expm1(np.minimum(log_all, 600)) - (others**clients).sum(axis=0)
    log_crossed = np.where(log_all < 600, np.log(np.maximum(crossed, 1e-300)), log_all)
    aliases = float(np.exp(np.minimum(np.max(clients * log_a[0] + log_crossed), 0.0)))
    window = 2 * WINDOW * (levels + 1) * math.sqrt(clients)
    return min(1.0, coordinates * (window * aliases + TAIL))
