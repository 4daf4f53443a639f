"""TRL's DPOTrainer with PEFT on the same pairs; what the reference says of them is made before the clock starts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import set_peft_model_state_dict
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from benchmarks.peers.trl.train import Timer, arguments, peft_model, start_of
from benchmarks.samples import inputs_folder
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """The warm-up is one measurement that is thrown away."""
    work = trainer(config)
    work()
    return work


def trainer(config: Mapping[str, Any]) -> Measure:
    """One pass over the pairs in order, each time from the same adapter and a new optimizer."""
    rows = Dataset.from_json(str(inputs_folder() / config["file"]))
    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pairs = rows.map(lambda row: {k: [{"role": role, "content": row[k]}] for k, role in turns.items()})
    model = peft_model(config)
    start = start_of(model, config)
    timer = Timer()
    wanted = {**arguments(config, tempfile.mkdtemp()), **config.get("dpo", {})}
    dpo = DPOTrainer(
        model=model,
        args=DPOConfig(**wanted, beta=0.1, precompute_ref_log_probs=True),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(inputs_folder() / config["model"]),
        callbacks=[timer],
    )

    def measure() -> Mapping[str, Any]:
        set_peft_model_state_dict(model, start)
        dpo.optimizer = dpo.lr_scheduler = None
        loss = dpo.train().training_loss
        seconds = timer.last - timer.first
        return {"pairs_per_s": len(pairs) / seconds, "loss": loss, "seconds": seconds}

    return measure


if __name__ == "__main__":
    serve(prepare, ("trl", "transformers", "peft", "torch"))
