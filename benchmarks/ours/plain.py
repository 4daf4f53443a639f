"""The plain PEFT loop on tiny models, and our local work on the same: neither knows of the other's parts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.inputs import batches
from benchmarks.ours.training import client
from benchmarks.samples import Sample, inputs_folder, load, tokens
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """One model of each family, all in this process; the warm-up is one measurement that is thrown away."""
    make = {"atoll": client, "plain": plain}[config["what"]]
    works = {family: make({**config, "model": f"tiny:{family}"}) for family in config["families"]}

    def measure() -> Mapping[str, Any]:
        done = {family: work() for family, work in works.items()}
        return {family: one["tokens_per_s"] for family, one in done.items()} | {
            f"{family}_loss": one["loss"] for family, one in done.items()
        }

    measure()
    return measure


def plain(config: Mapping[str, Any]) -> Measure:
    """A padded batch, the model's own loss, backward, clip, AdamW: what a tutorial writes."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from atoll.models.load import load_model

    samples = load(inputs_folder() / config["file"])
    base, tokenizer = load_model(config["model"])
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        exclude_modules=["out_proj", "conv1d"] if config["model"] == "tiny:mamba" else None,  # PEFT refuses these
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base, lora)
    start = {name: x.clone() for name, x in get_peft_model_state_dict(model).items()}
    model.train()

    def measure() -> Mapping[str, Any]:
        set_peft_model_state_dict(model, start)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3, weight_decay=0.0)
        started, losses = time.perf_counter(), []
        for batch in batches(samples, config["batch"]):
            loss = model(**padded(batch, int(tokenizer.pad_token_id))).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        seconds = time.perf_counter() - started
        return {"tokens_per_s": tokens(samples) / seconds, "loss": sum(losses) / len(losses)}

    return measure


def padded(batch: list[Sample], pad_id: int) -> dict[str, torch.Tensor]:
    """[rows, longest], with an attention mask, as transformers' own collators make it."""
    longest = max(len(ids) for ids, _ in batch)
    ids = np.full((len(batch), longest), pad_id, np.int64)
    labels, mask = np.full_like(ids, -100), np.zeros_like(ids)
    for row, (sample, targets) in enumerate(batch):
        ids[row, : len(sample)], labels[row, : len(sample)], mask[row, : len(sample)] = sample, targets, 1
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


if __name__ == "__main__":
    serve(prepare, ("atoll", "torch", "transformers", "peft"))
