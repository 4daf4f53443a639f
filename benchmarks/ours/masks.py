"""Our secure aggregation on given values: the work of both ends, without transport. Not written yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.masked import Measured, Setting, rounds
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Rounds over the values that all contestants have."""
    return rounds(measure, config)


def measure(values: np.ndarray, setting: Setting) -> Measured:
    """One round over `values`, float32 [clients, n], with new keys: see `benchmarks.masked.Masks`."""
    raise NotImplementedError("masks of ours do not exist yet: write this once they do")


if __name__ == "__main__":
    serve(prepare, ("atoll", "numpy", "cryptography"))
