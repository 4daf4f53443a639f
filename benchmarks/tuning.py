"""How TRL's best configuration in training.py was found: every layout, attention and precision, measured once."""

from __future__ import annotations

import itertools
from functools import partial

from benchmarks import inputs
from benchmarks.harness import Bar, Case, Contestant
from benchmarks.training import BATCH, trl, work

BARS: list[Bar] = []


def cases(tiny: bool) -> list[Case]:
    """For fixed lengths and for chat samples."""
    return [tuning(kind, 2 if tiny else 4) for kind in BATCH]


def tuning(kind: str, steps: int) -> Case:
    """Twelve configurations, a process each."""
    choices = itertools.product(("padded", "padding-free", "packed"), ("eager", "sdpa"), (True, False))
    contestants = tuple(
        Contestant(
            f"{layout}-{attention}-{'bf16' if autocast else 'fp32'}",
            "benchmarks.peers.trl.train",
            "trl",
            {**work(kind, steps), **trl(layout, attention, autocast)},
        )
        for layout, attention, autocast in choices
    )
    needs = partial(inputs.training, kind, steps * BATCH[kind])
    return Case(f"tuning-{kind}", contestants, needs, repeats=1, stay=False)
