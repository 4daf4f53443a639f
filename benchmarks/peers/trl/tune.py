"""Looks for TRL's best configuration: every layout, attention and precision of the adapters, measured once each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.trl.train import trainer
from benchmarks.worker import Measure, serve

LAYOUTS = ("padded", "padding-free", "packed")
ATTENTIONS = ("eager", "sdpa")
AUTOCAST = (True, False)


def prepare(config: Mapping[str, Any]) -> Measure:
    """Tokens per second by configuration."""

    def measure() -> Mapping[str, Any]:
        return {
            f"{layout}, {attention}, bf16={autocast}": speed(config, layout, attention, autocast)
            for layout, attention, autocast in itertools.product(LAYOUTS, ATTENTIONS, AUTOCAST)
        }

    return measure


def speed(config: Mapping[str, Any], layout: str, attention: str, autocast: bool) -> float:
    """The better of two passes: the first one warms up."""
    sft = {"gradient_checkpointing": False, "bf16": autocast}
    measure = trainer({**config, "layout": layout, "attention": attention, "sft": sft})
    return max(float(measure()["tokens_per_s"]) for _ in range(2))


if __name__ == "__main__":
    serve(prepare, ("trl", "transformers", "peft", "torch"))
