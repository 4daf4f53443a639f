"""Claim: on a GPU, LoRA training of a 1.1B model of random values runs at 1.3 times TRL's best and 40% of the bf16 peak.

Where there is no GPU, nothing is measured and the table says so; `--tiny` runs the same code on a CPU with a small model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import inputs
from benchmarks.harness import Bar, Case, Contestant

CASE = "gpu-1b"
SHAPE = {
    "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {**SHAPE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2}  # fmt: skip
BARS = [
    *(
        Bar("gpu", CASE, "tokens_per_s", "atoll", against=f"trl-{attention}", at_least=1.3)
        for attention in ("sdpa", "flash")
    ),
    Bar("gpu", CASE, "tokens_per_s", "atoll", against="limit", at_least=0.4),
]


def cases(tiny: bool) -> list[Case]:
    """Batches of 16 x 1024 tokens; TRL without checkpointing, by torch's attention and by flash attention's varlen one."""
    if not tiny and not here():
        return []
    steps, batch = (1, 1) if tiny else (8, 16)
    name, shape = ("random-tiny", TINY) if tiny else ("random-1b", SHAPE)
    common: dict[str, Any] = {"file": f"long-{steps * batch}.npz", "batch": batch}
    off = {"sft": {"gradient_checkpointing": False, "bf16": True}}
    flash = {**off, "attention": "kernels-community/flash-attn2", "layout": "padding-free"}
    contestants = [
        Contestant("atoll", "benchmarks.ours.training", config={**common, "folder": name, "steps": steps}),
        Contestant("trl-sdpa", "benchmarks.peers.trl.train", "trl", {**common, "model": name, **off}),
        Contestant("trl-flash", "benchmarks.peers.trl.train", "trl", {**common, "model": name, **flash}),
        Contestant("limit", "benchmarks.ours.limit", config={"model": name, "size": 512 if tiny else 8192,
                                                             "seconds": 2, "rank": 8, "length": 1024}),
    ]  # fmt: skip
    return [Case(CASE, tuple(contestants[: 2 if tiny else 4]), partial(needs, name, shape, steps * batch))]


def needs(name: str, shape: dict[str, Any], samples: int) -> None:
    """The model and its samples."""
    inputs.random_model(name, **shape)
    inputs.training("long", samples)


def here() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def note() -> str:
    """What the table says where there is none."""
    if here():
        return ""
    return "gpu: torch sees no GPU here, nothing is measured; the code path runs on a CPU by `--tiny gpu`."
