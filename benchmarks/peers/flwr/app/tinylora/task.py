"""The model, the data and the local steps of both apps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

BATCH = 4


def load_model(inputs: str) -> Any:
    """The tiny Llama with LoRA of rank 8 on all linear layers."""
    base = AutoModelForCausalLM.from_pretrained(Path(inputs) / "tiny-llama")
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def load_samples(inputs: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels) of each sample."""
    with np.load(Path(inputs) / "bytes-32.npz") as file:
        ends = np.cumsum(file["lengths"])
        return [(file["ids"][e - n : e], file["labels"][e - n : e]) for e, n in zip(ends, file["lengths"], strict=True)]


def train(model: Any, samples: list[tuple[np.ndarray, np.ndarray]], steps: int) -> float:
    """AdamW on padded batches; the mean loss."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
    total = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(samples[step * BATCH : (step + 1) * BATCH])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach())
    return total / steps


def batch(samples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Padded on the right to the longest."""
    parts = [[torch.from_numpy(sample[part].astype(np.int64)) for sample in samples] for part in (0, 1)]
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = (pad(rows, True, value) for rows, value in zip(parts, (0, -100), strict=True))
    mask = pad([torch.ones_like(row) for row in parts[0]], True, 0)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
