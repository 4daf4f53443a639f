"""TRL's SFTTrainer with PEFT on the same samples, in the configuration that the case gives it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.samples import inputs_folder, load, tokens
from benchmarks.worker import Measure, serve

PACKED_TOKENS = 512


class Timer(TrainerCallback):  # type: ignore[misc]
    """From the beginning of the first step to the end of the last: data loading between steps is inside."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.first = self.last = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.first = self.first or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.last = time.perf_counter()


def prepare(config: Mapping[str, Any]) -> Measure:
    """The warm-up is one measurement that is thrown away."""
    work = trainer(config)
    work()
    return work


def trainer(config: Mapping[str, Any]) -> Measure:
    """One pass over the samples in order, each time from the same adapter and a new optimizer."""
    samples = load(inputs_folder() / config["file"])
    model = peft_model(config)
    start = start_of(model, config)
    timer = Timer()
    sft = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(config, tempfile.mkdtemp())),
        train_dataset=Dataset.from_dict({"input_ids": [s[0] for s in samples], "labels": [s[1] for s in samples]}),
        processing_class=AutoTokenizer.from_pretrained(inputs_folder() / config["model"]),
        callbacks=[timer],
    )

    def measure() -> Mapping[str, Any]:
        set_peft_model_state_dict(model, start)
        sft.optimizer = sft.lr_scheduler = None
        loss = sft.train().training_loss
        seconds = timer.last - timer.first
        return {"tokens_per_s": tokens(samples) / seconds, "loss": loss, "seconds": seconds}

    return measure


def peft_model(config: Mapping[str, Any]) -> Any:
    """A frozen bf16 base with fp32 adapters, as PEFT makes them by itself."""
    model = AutoModelForCausalLM.from_pretrained(
        inputs_folder() / config["model"], dtype=torch.bfloat16, attn_implementation=config.get("attention", "sdpa")
    )
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def start_of(model: Any, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The adapter that every contestant starts from, if the case has one."""
    if name := config.get("start"):
        return load_file(inputs_folder() / name)
    return {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}


def arguments(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What is the same for all, and what the case has tuned; everything else is SFTConfig's default."""
    same = {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": config["batch"],
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return {**same, **layout(config), **config.get("sft", {})}


def layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """How samples lie in a batch: padded to one length, end to end, or packed into rows of one length."""
    kind = config.get("layout", "padded")
    if kind == "packed":
        return {"packing": True, "max_length": PACKED_TOKENS, "per_device_train_batch_size": 1}
    return {"padding_free": True, "max_length": None} if kind == "padding-free" else {}


if __name__ == "__main__":
    serve(prepare, ("trl", "transformers", "peft", "torch"))
