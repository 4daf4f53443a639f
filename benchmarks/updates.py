"""The updates of the benchmark `mean`: 128 MiB of float32 each, in tensors of 4 MiB. Needs numpy alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Update = dict[str, np.ndarray]
VALUES_A_TENSOR = 1 << 20


def updates(config: Mapping[str, Any]) -> Iterator[Update]:
    """`config["updates"]` updates of `config["mebibytes"]` each, made one at a time from the same numbers."""
    base = np.random.default_rng(0).standard_normal(VALUES_A_TENSOR, dtype=np.float32)
    names = [f"layer{i}" for i in range(config["mebibytes"] // 4)]
    for number in range(config["updates"]):
        yield {name: base + np.float32(0.01 * number) for name in names}


def repeated(distinct: Sequence[Any], count: int) -> list[Any]:
    """`count` updates of which only a few are distinct, for peers that want all of them at once."""
    return [distinct[i % len(distinct)] for i in range(count)]


def gigabytes(config: Mapping[str, Any]) -> float:
    """All input, in GB of 1e9 bytes."""
    return float(config["updates"] * config["mebibytes"] * (1 << 20) / 1e9)


class Stopwatch:
    """Adds up the time spent in its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._started
