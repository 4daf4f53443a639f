"""Our local training: a plan is built and assembled as in a run, then one client's work is measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from atoll.assemble import Assembly, assemble
from atoll.build import build
from atoll.exchange import Broadcast, Task
from atoll.local.work import train
from atoll.schema import validate
from atoll.stream import UPDATE
from benchmarks.ours.parts import KEY
from benchmarks.samples import inputs_folder, tokens
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """The warm-up is one measurement that is thrown away."""
    work = client(config)
    work()
    return work


def client(config: Mapping[str, Any]) -> Measure:
    """One task of `config["steps"]` local steps, each time from the same params."""
    plan = build(validate(recipe(config), "benchmark"), recipe(config))
    things = assemble(plan)
    save_start(config, things)
    (data,) = things.data.values()
    task = Task("train", "client-00", plan.hash, Broadcast(0, {}), KEY)

    def measure() -> Mapping[str, Any]:
        started = time.perf_counter()
        done = train(things.local, {UPDATE: things.start}, data, {}, task)
        seconds = time.perf_counter() - started
        in_steps = done.metrics["seconds_in_steps"]
        return {
            "tokens_per_s": tokens(list(data.train)) / in_steps,
            "loss": done.metrics["loss"],
            "seconds": in_steps,
            "outside_ms": 1000 * (seconds - in_steps),
        }

    return measure


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA of rank 8 on all linear layers, AdamW at 1e-3, gradients clipped at 1, labels as the samples have them."""
    data = {"use": "benchmarks.ours.parts:token_clients", "file": config["file"], "batch_size": config["batch"]}
    finetune = {
        "rounds": 1,
        "objective": "sft",
        "space": {"use": "lora", "rank": 8, "alpha": 16},
        "optimizer": {"use": "adamw", "lr": 1e-3},
        "batch_size": config["batch"],
        "context": 256,
        "local_steps": config["steps"],
        "clip_norm": 1.0,
    }
    model = config["model"] if "model" in config else str(inputs_folder() / config["folder"])
    return {"recipe": 1, "name": "benchmark", "model": model, "data": data, "finetune": finetune}


def save_start(config: Mapping[str, Any], things: Assembly) -> None:
    """The adapter that training starts from, for contestants that must start from the same."""
    if name := config.get("save_start"):
        from safetensors.torch import save_file

        save_file(things.start, inputs_folder() / name)


if __name__ == "__main__":
    serve(prepare, ("atoll", "torch", "transformers", "peft"))
