"""Token samples in one .npz file: ids and labels end to end, and their lengths. Needs numpy alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

Sample = tuple[np.ndarray, np.ndarray]


def inputs_folder() -> Path:
    """Where the harness has put what contestants read."""
    return Path(os.environ["BENCHMARK_INPUTS"])


def save(path: Path, samples: list[Sample]) -> None:
    """Writes them in order."""
    ids, labels = (np.concatenate([sample[part] for sample in samples]) for part in (0, 1))
    np.savez(path, ids=ids, labels=labels, lengths=np.array([len(ids) for ids, _ in samples]))


def load(path: Path) -> list[Sample]:
    """Reads what `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        ids, labels, lengths = file["ids"], file["labels"], file["lengths"]
    ends = np.cumsum(lengths)
    return [(ids[end - n : end], labels[end - n : end]) for n, end in zip(lengths, ends, strict=True)]


def tokens(samples: list[Sample]) -> int:
    """All tokens, labeled or not; there is no padding in a sample."""
    return sum(len(ids) for ids, _ in samples)
