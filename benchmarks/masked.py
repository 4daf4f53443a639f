"""What the contestants of `masks` share: the values, and what becomes of a measurement. Needs numpy alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.worker import Measure


@dataclass(frozen=True)
class Setting:
    """One round of secure aggregation."""

    dropped: Sequence[int]
    """Rows of the clients that vanish once shares are distributed, before their masked values arrive."""
    threshold: int
    """How many shares give back a secret."""
    bits: int
    """A value is quantized to 2**bits steps over [-clip, clip], by either way of rounding."""
    clip: float
    """No value is beyond it."""
    seed: int
    """For values and rounding, where it is drawn from a seed. Keys and masks never come from it."""


@dataclass(frozen=True)
class Measured:
    """What one round took, without transport, and without making the updates."""

    server_s: float
    """All that the server does in all stages."""
    client_s: float
    """All that one surviving client does in all stages: the median over them."""
    upload_bytes: int
    """One client's masked values as the message that carries them, the rest of that message included."""
    mean: np.ndarray
    """Of the survivors' values, each with the weight 1: float [n]."""


class Masks(Protocol):
    """What a contestant provides. It raises where the round does not come to its end."""

    def __call__(self, values: np.ndarray, setting: Setting) -> Measured:
        """One round over `values`, float32 [clients, n], with new keys."""


def rounds(measure: Masks, config: Mapping[str, Any]) -> Measure:
    """Measures rounds over the same values, with new keys each; the first, a warm-up, is thrown away."""
    setting = Setting(**config["setting"])
    values = updates(config["clients"], config["values"], setting)

    def run() -> Mapping[str, Any]:
        return report(values, setting, measure(values, setting))

    run()
    return run


def updates(count: int, n: int, setting: Setting) -> np.ndarray:
    """The update of each client: normal, an eighth of the clipping range wide, so that hardly anything is clipped."""
    drawn = np.random.default_rng(setting.seed).standard_normal((count, n), dtype=np.float32)
    return np.clip(drawn * np.float32(setting.clip / 8), -setting.clip, setting.clip)


def report(values: np.ndarray, setting: Setting, measured: Measured) -> Mapping[str, Any]:
    """The numbers of one measurement: the same judge for all."""
    survivors = np.delete(values, list(setting.dropped), axis=0).astype(np.float64)
    error = float(np.abs(np.asarray(measured.mean, np.float64) - survivors.mean(axis=0)).max())
    n = values.shape[1]
    return {
        "seconds": measured.server_s + measured.client_s,
        "server_s": measured.server_s,
        "client_s": measured.client_s,
        "upload_bytes": measured.upload_bytes,
        "bytes_a_value": measured.upload_bytes / n,
        "times_needed_bytes": measured.upload_bytes / n / needed_bytes(len(values), setting.bits),
        "error": error,
        "error_in_steps": error / (2 * setting.clip / 2**setting.bits),
    }


def needed_bytes(clients: int, bits: int) -> float:
    """A value's masked bytes if every bit counts: the sum of all clients' values must fit."""
    return math.ceil(bits + math.log2(clients)) / 8
