"""Epsilon of twenty settings by two accountants that share no code: ours, and Opacus' (Gopi et al. 2021, arXiv 2106.02848).

    python experiments/epsilon_table.py

Both under add-or-remove-one, everybody or Poisson samples. Opacus' PRV accountant gives an upper bound, ours is one too;
tests/unit/test_accounting.py holds them to one percent of each other.

Owner: src/atoll/privacy. Expires: when Opacus drops its PRV accountant, or the docs show this table from a run.
"""

from __future__ import annotations

from typing import NamedTuple

from opacus.accountants import PRVAccountant

from atoll.privacy.accounting import Release, epsilon


class Setting(NamedTuple):
    """One row."""

    noise: float
    rate: float
    rounds: int
    delta: float


SETTINGS = [
    Setting(0.6, 1, 1, 1e-3),
    Setting(0.6, 0.01, 200, 1e-5),
    Setting(0.8, 0.1, 10, 1e-4),
    Setting(0.8, 0.01, 2000, 1e-6),
    Setting(1, 1, 1, 1e-5),
    Setting(1, 1, 5, 1e-4),
    Setting(1, 0.3, 10, 1e-5),
    Setting(1, 0.1, 100, 1e-5),
    Setting(1, 0.01, 1000, 1e-5),
    Setting(1.5, 0.3, 20, 1e-3),
    Setting(1.5, 0.01, 300, 1e-5),
    Setting(2, 1, 10, 1e-5),
    Setting(2, 0.1, 500, 1e-6),
    Setting(3, 0.3, 100, 1e-4),
    Setting(3, 1, 20, 1e-6),
    Setting(4, 0.1, 1000, 1e-5),
    Setting(4, 1, 50, 1e-3),
    Setting(6, 0.3, 500, 1e-5),
    Setting(8, 1, 200, 1e-5),
    Setting(8, 0.1, 2000, 1e-6),
]


def ours(one: Setting) -> float:
    """By dp-accounting, as a ledger has it."""
    law = "everyone" if one.rate == 1 else "poisson"
    return epsilon([Release(one.noise, law, one.rate, count=one.rounds)], one.delta)  # type: ignore[arg-type]


def opacus_says(one: Setting) -> float:
    """An upper bound, at most 0.002 too large."""
    account = PRVAccountant()
    account.history = [(one.noise, one.rate, one.rounds)]
    return float(account.get_epsilon(one.delta, eps_error=0.002))


def main() -> None:
    """The table, as Markdown."""
    print("| noise multiplier | rate | rounds | delta | Atoll | Opacus | difference |")
    print("|---|---|---|---|---|---|---|")
    for one in SETTINGS:
        a, b = ours(one), opacus_says(one)
        cells = [f"{x:g}" for x in one] + [f"{a:.4f}", f"{b:.4f}", f"{100 * (a / b - 1):+.2f}%"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
