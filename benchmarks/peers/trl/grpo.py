"""TRL's GRPOTrainer with PEFT, without vLLM: completions are drawn by transformers' generate."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from peft import set_peft_model_state_dict
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.trl.train import Timer, arguments, peft_model, start_of
from benchmarks.samples import inputs_folder
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """The warm-up is one measurement that is thrown away."""
    work = trainer(config)
    work()
    return work


def letters(completions: list[Any], **kwargs: Any) -> list[float]:
    """How many letters a completion has: something that differs."""
    return [float(sum(map(str.isalpha, one[0]["content"]))) for one in completions]


def trainer(config: Mapping[str, Any]) -> Measure:
    """One pass over the prompts in order, each time from the same adapter and a new optimizer."""
    rows = Dataset.from_json(str(inputs_folder() / config["file"]))
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    model = peft_model(config)
    start = start_of(model, config)
    timer = Timer()
    each, batch = config["completions"], config["batch"]
    wanted = {
        **arguments(config, tempfile.mkdtemp()),
        **config.get("grpo", {}),
        "per_device_train_batch_size": batch * each,
    }
    grpo = GRPOTrainer(
        model=model,
        reward_funcs=letters,
        args=GRPOConfig(
            **wanted, beta=0.0, num_generations=each, max_completion_length=config["most"], temperature=1.0, use_vllm=False,
            shuffle_dataset=False, loss_type="dapo",
        ),
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(inputs_folder() / config["model"]),
        callbacks=[timer],
    )  # fmt: skip

    def measure() -> Mapping[str, Any]:
        set_peft_model_state_dict(model, start)
        grpo.optimizer = grpo.lr_scheduler = None
        grpo.train()
        seconds = timer.last - timer.first
        drawn = [one["completions/mean_length"] for one in grpo.state.log_history if "completions/mean_length" in one]
        return {"samples_per_s": len(prompts) * each / seconds, "tokens": sum(drawn) / len(drawn), "seconds": seconds}

    return measure


if __name__ == "__main__":
    serve(prepare, ("trl", "transformers", "peft", "torch"))
