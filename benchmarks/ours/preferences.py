"""Our side of preferences.py: DPO as a client's local steps; rollouts; questions with choices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from atoll.assemble import assemble
from atoll.build import build
from atoll.data.answers import ends_of
from atoll.data.prepared_tasks import task
from atoll.data.sources import ClientData
from atoll.data.tokenize import prepare as tokenize
from atoll.exchange import Broadcast, Task
from atoll.local.choices import in_full, log_likelihoods
from atoll.local.grpo import GRPO, prompt_of
from atoll.local.rollouts import Sampling, rollouts
from atoll.local.work import EVALUATION_BATCH, train
from atoll.models.fast import accelerate
from atoll.models.load import load_model
from atoll.schema import validate
from atoll.stream import UPDATE
from benchmarks.ours.parts import KEY, in_order
from benchmarks.ours.training import save_start
from benchmarks.samples import inputs_folder
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """The warm-up is one measurement that is thrown away: it also asks the reference."""
    work = WORKS[config["what"]](config)
    work()
    return work


def dpo(config: Mapping[str, Any]) -> Measure:
    """One task of `config["steps"]` local steps, each time from the same params."""
    work = one_task(config, {"use": "dpo", "beta": 0.1})

    def measure() -> Mapping[str, Any]:
        told, count = work()
        seconds = told["seconds_in_steps"]
        return {"pairs_per_s": count / seconds, "loss": told["loss"], "seconds": seconds}

    return measure


def grpo(config: Mapping[str, Any]) -> Measure:
    """The same of completions that are drawn, rewarded as the peer rewards them, and where the time went."""
    work = one_task(config, {"use": "grpo", "completions": config["completions"], "most_tokens": config["most"]})

    def measure() -> Mapping[str, Any]:
        told, count = work()
        seconds = told["seconds_in_steps"]
        shares = {f"share_{what}": told[f"seconds_{what}"] / seconds for what in ("drawing", "rewarding")}
        drawn = count * config["completions"]
        return {"samples_per_s": drawn / seconds, "tokens": told["tokens"], "seconds": seconds, **shares}

    return measure


def letters(completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """How many letters a completion has: something that differs."""
    return [float(sum(map(str.isalpha, one))) for one in completions]


def one_task(config: Mapping[str, Any], objective: dict[str, Any]) -> Callable[[], tuple[Mapping[str, float], int]]:
    """Local steps as a client does them: metrics, and the number of samples."""
    plan = build(validate(recipe(config, objective), "benchmark"), recipe(config, objective))
    if isinstance(plan.objective, GRPO):
        plan = replace(plan, objective=replace(plan.objective, reward=letters))
    things = assemble(plan)
    save_start(config, things)
    (data,) = things.data.values()
    data = ClientData(in_order(list(data.train), config["batch"]), data.test)
    asked = Task("train", "one", plan.hash, Broadcast(0, {}), KEY)
    return lambda: (train(things.local, {UPDATE: things.start}, data, {}, asked).metrics, len(data.train))


def recipe(config: Mapping[str, Any], objective: dict[str, Any]) -> dict[str, Any]:
    """LoRA of rank 8 on all linear layers, AdamW at 1e-3, gradients clipped at 1."""
    path = str(inputs_folder() / config["file"])
    finetune = {
        "rounds": 1,
        "objective": objective,
        "space": {"use": "lora", "rank": 8, "alpha": 16},
        "optimizer": {"use": "adamw", "lr": 1e-3},
        "batch_size": config["batch"],
        "local_steps": config["steps"],
        "clip_norm": 1.0,
    }
    data = {"use": "clients", "paths": {"one": path}, "held_out": 0.0}
    return {"recipe": 1, "name": "benchmark", "model": config["model"], "data": data, "finetune": finetune}


def drawn(config: Mapping[str, Any]) -> Measure:
    """Completions of one prompt, none of which ends early."""
    model, tokenizer = load_model(config["model"])
    accelerate(model.eval())
    (sample, *_) = tokenize(inputs_folder() / config["file"], tokenizer, 256).train
    how = Sampling(config["completions"], config["most"], 1.0, [])
    assert ends_of(tokenizer)

    def measure() -> Mapping[str, Any]:
        torch.manual_seed(0)
        started = time.perf_counter()
        (found,) = rollouts(model, [prompt_of(sample)], lambda samples: {}, how)
        seconds = time.perf_counter() - started
        return {"tokens_per_s": sum(map(len, found)) / seconds, "seconds": seconds}

    return measure


def chosen(config: Mapping[str, Any]) -> Measure:
    """The likelihoods of every choice of questions."""
    model, tokenizer = load_model(config["model"])
    accelerate(model.eval())
    samples = list(tokenize(task("openbookqa"), tokenizer, 256).test)[: config["count"]]

    score = log_likelihoods if config["how"] == "shared" else in_full
    batches = [samples[at : at + EVALUATION_BATCH] for at in range(0, len(samples), EVALUATION_BATCH)]

    @torch.no_grad()
    def measure() -> Mapping[str, Any]:
        started = time.perf_counter()
        found = [one for batch in batches for one in score(model, batch, lambda some: {})]
        seconds = time.perf_counter() - started
        right = sum(int(each.argmax()) == sample.choices.right for each, sample in zip(found, samples, strict=True))
        return {"questions_per_s": len(samples) / seconds, "accuracy": right / len(samples), "seconds": seconds}

    return measure


WORKS: dict[str, Callable[[Mapping[str, Any]], Measure]] = {
    "dpo": dpo,
    "grpo": grpo,
    "rollouts": drawn,
    "choices": chosen,
}

if __name__ == "__main__":
    serve(prepare, ("atoll", "torch", "transformers", "peft"))
