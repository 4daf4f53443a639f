"""What the machine allows: bf16 matrix products at full speed, and how many a token of LoRA training needs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.samples import inputs_folder
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Multiplies two square matrices of `config["size"]` for about a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(config["size"], config["size"], dtype=torch.bfloat16, device=device) for _ in range(2))
    flop = flop_per_token(config)
    multiply(a, b, 0.3)

    def measure() -> Mapping[str, Any]:
        rate = multiply(a, b, config["seconds"])
        return {"tokens_per_s": rate / flop, "gflop_per_s": rate / 1e9, "mflop_per_token": flop / 1e6}

    return measure


def multiply(a: torch.Tensor, b: torch.Tensor, seconds: float) -> float:
    """FLOP per second."""
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(10):
            torch.mm(a, b)
        count += 10
        if a.is_cuda:
            torch.cuda.synchronize()
    return 2 * len(a) ** 3 * count / (time.perf_counter() - started)


def flop_per_token(config: Mapping[str, Any]) -> float:
    """Of LoRA training, rank r, every token labeled, samples of T tokens, causal attention.

    Frozen linear layers and the head: 2 forward and 2 backward per param (the input's gradient alone). Adapters: 2 and 4.
    Attention: two products of T / 2 positions on average, backward twice that.
    """
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(inputs_folder() / config["model"])
    kv = c.hidden_size * c.num_key_value_heads // c.num_attention_heads
    linears = (
        [(c.hidden_size, c.hidden_size)] * 2 + [(c.hidden_size, kv)] * 2 + [(c.hidden_size, c.intermediate_size)] * 3
    )
    frozen = c.num_hidden_layers * sum(i * o for i, o in linears) + c.hidden_size * c.vocab_size
    adapters = c.num_hidden_layers * sum(config["rank"] * (i + o) for i, o in linears)
    attention = c.num_hidden_layers * 3 * 2 * 2 * c.hidden_size * config["length"] / 2
    return float(4 * frozen + 6 * adapters + attention)


if __name__ == "__main__":
    serve(prepare, ("torch",))
