"""Claim: LoRA training of SmolLM2-135M, non-padding tokens a second: 2.5 times TRL's default, 1.5 times TRL's best.

Every contestant has a frozen bf16 base, fp32 adapters of rank 8 on all linear layers, AdamW, and the same batches; their
losses must agree to 1% (with TRL's default: its packing makes other batches). On tiny models of the other families we must
not be slower than a plain PEFT loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks import inputs
from benchmarks.harness import Bar, Case, Contestant

START = "smollm2-135m-start.safetensors"
BATCH = {"fixed": 4, "chat": 8}
"""Samples a step: about 512 tokens."""


def trl(layout: str, attention: str, autocast: bool) -> dict[str, Any]:
    """A configuration of TRL without gradient checkpointing."""
    return {"layout": layout, "attention": attention, "sft": {"gradient_checkpointing": False, "bf16": autocast}}


BEST = {"fixed": trl("padded", "sdpa", True), "chat": trl("packed", "eager", True)}
"""TRL's best configuration: the fastest of the twelve in tuning.py."""

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma", "qwen", "phi", "mamba")

BARS = [
    *(
        Bar("training", f"training-{kind}", "tokens_per_s", "atoll", against=against, at_least=least)
        for kind in BATCH
        for against, least in (("trl-default", 2.5), ("trl-best", 1.5))
    ),
    *(
        Bar("training", f"training-{kind}", "loss", "atoll", against="trl-default", at_least=0.99, at_most=1.01)
        for kind in BATCH
    ),
    Bar("training", "training-fixed", "tokens_per_s", "atoll", against="limit"),
    *(Bar("training", "training-families", family, "atoll", against="plain", at_least=1) for family in FAMILIES),
]


def cases(tiny: bool) -> list[Case]:
    """Fixed lengths, chat samples, and the families."""
    steps = 2 if tiny else 4
    return [*(against_trl(kind, steps) for kind in BATCH), families(steps * 5)]


def against_trl(kind: str, steps: int) -> Case:
    """4 x 128 tokens, or 8 chat samples, a step."""
    common = work(kind, steps)
    contestants = [
        Contestant("atoll", "benchmarks.ours.training", config={**common, "steps": steps, "save_start": START}),
        Contestant("trl-default", "benchmarks.peers.trl.train", "trl", {**common, "start": START}),
        Contestant("trl-best", "benchmarks.peers.trl.train", "trl", {**common, "start": START, **BEST[kind]}),
    ]
    if kind == "fixed":
        size = {"model": inputs.MODEL, "size": 2048, "seconds": 2, "rank": 8, "length": 128}
        contestants.append(Contestant("limit", "benchmarks.ours.limit", config=size))
    return Case(f"training-{kind}", tuple(contestants), partial(inputs.training, kind, steps * BATCH[kind]))


def work(kind: str, steps: int) -> dict[str, Any]:
    """What every contestant is given."""
    count = steps * BATCH[kind]
    return {"model": inputs.MODEL, "file": f"{kind}-{count}.npz", "batch": BATCH[kind]}


def families(steps: int) -> Case:
    """One tiny model of each family on chat samples, whose tokens are cut down to the tiny vocabulary."""
    common: Mapping[str, Any] = {"file": f"bytes-{4 * steps}.npz", "batch": 4, "steps": steps, "families": FAMILIES}
    contestants = tuple(
        Contestant(name, "benchmarks.ours.plain", config={**common, "what": name}) for name in ("atoll", "plain")
    )
    return Case("training-families", contestants, partial(inputs.byte_samples, 4 * steps))
