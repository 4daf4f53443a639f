"""Four sites with sums whose answers can be checked, made by rule, for the recipe `grpo`.

    shop      a + b, both from 1 to 40
    bank      a - b, of numbers to 60, never less than nothing
    school    a times b, both from 2 to 12
    post      which of three numbers below 100 is the largest

A fifth of each is held out, by hash of the question; nobody trains on it in any stage.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from atoll.cache import content_hash, home, once

VERSION = 1
"""Raise it when the rules give other records."""

MOST = 500
"""Questions of a site."""

Question = tuple[str, str]


def arithmetic_sites() -> Path:
    """The folder with the four sites' questions; made the first time."""

    def build(folder: Path) -> None:
        for site, questions in {"shop": sums(), "bank": differences(), "school": products(), "post": largest()}.items():
            mixed = sorted(questions, key=lambda one: content_hash(one[0]))[:MOST]
            held_out = len(mixed) // 5
            (folder / site).mkdir(parents=True)
            for name, part in (("test", mixed[:held_out]), ("train", mixed[held_out:])):
                lines = (json.dumps({"prompt": asked, "completion": answer}) + "\n" for asked, answer in part)
                (folder / site / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    return once(home() / "data" / f"arithmetic-sites-{VERSION}", build)


def sums() -> list[Question]:
    """Question and answer."""
    pairs = product(range(1, 41), repeat=2)
    return [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}") for a, b in pairs]


def differences() -> list[Question]:
    """Question and answer."""
    pairs = ((a, b) for a, b in product(range(1, 61), repeat=2) if b <= a)
    return [(f"What is {a} - {b}?", f"{a} - {b} = {a - b}") for a, b in pairs]


def products() -> list[Question]:
    """Question and answer."""
    pairs = product(range(2, 13), repeat=2)
    return [(f"What is {a} times {b}?", f"{a} times {b} = {a * b}") for a, b in pairs]


def largest() -> list[Question]:
    """Question and answer."""
    numbers = range(10, 100, 3)
    trios = [trio for trio in product(numbers, repeat=3) if len(set(trio)) == 3]
    return [(f"Which is the largest: {a}, {b} or {c}?", f"The largest is {max(a, b, c)}") for a, b, c in trios]
