"""The assembled model's parts by themselves: the cache of features, a local step, and alignment by anchors."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import atoll
from atoll.assemble import Assembly, assemble
from atoll.data.collate import Sample
from atoll.local.work import backward, draw
from atoll.models.connectors import Connector, make_connector
from atoll.models.features import features_of
from atoll.models.load import load_model
from benchmarks.ours.parts import KEY
from benchmarks.worker import Measure, serve

MEDIA = 64
"""That are encoded and read in a measurement."""


def prepare(config: Mapping[str, Any]) -> Measure:
    """The warm-up is one measurement that is thrown away."""
    measure = KINDS[config["what"]](config)
    measure()
    return measure


def things(config: Mapping[str, Any], *settings: str) -> Assembly:
    """The recipe's model and data; tiny encoders and a tiny language model to try the code."""
    tiny = [
        "model.language=tiny:llama", "model.image={encoder: 'tiny:clip', connector: {use: mlp, pool: 4}}",
        "model.audio={encoder: 'tiny:whisper', connector: {use: mlp, pool: 4}, seconds: 5}", "finetune.context=1024",
    ]  # fmt: skip
    return assemble(atoll.plan("multimodal", [*(tiny if config["model"] == "tiny" else []), *settings]))


def features(config: Mapping[str, Any]) -> Measure:
    """The same media encoded one at a time and in batches, and read from the cache; and a local step with them."""
    ready = things(config, "baselines=[]")
    kept, samples = features_of(ready.model), ready.data[config["site"]].train
    assert kept is not None
    media = list({one.key: one for i in range(len(samples)) for one in samples[i].media}.values())[:MEDIA]
    steps = gradients(ready, samples)

    def measure() -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            fresh = replace(kept, folder=Path(folder))
            encoded = seconds(lambda: fresh.fill(media))
            read = seconds(lambda: [fresh.of([one]) for one in media])
        step = seconds(lambda: next(steps))
        each = 1000 * read / len(media)
        return {
            "times": encoded / read,
            "encode_ms": 1000 * encoded / len(media),
            "read_ms": each,
            "percent_of_a_step": 100 * each * BATCH / (1000 * step),
            "step_s": step,
        }

    return measure


def step(config: Mapping[str, Any]) -> Measure:
    """Local steps on samples of all sites; without media, the language model's own on as many tokens."""
    ready = things(config, "baselines=[]")
    samples = [one for data in ready.data.values() for one in islice(data.train, 64)]
    if not config["media"]:
        vocabulary = ready.model.config.get_text_config().vocab_size
        samples = [words_alone(sample, vocabulary) for sample in samples]
        ready = assemble(atoll.plan("multimodal", [f"model={language_of(config)}", "baselines=[]", TEXT_ALONE]))
    rounds = gradients(ready, samples)
    tokens = [sum(len(samples[i][0]) for i in step[0]) for step in islice(draw(len(samples), BATCH, 1, KEY), 64)]

    def measure() -> Mapping[str, Any]:
        took = seconds(lambda: list(islice(rounds, config["steps"])))
        return {"seconds": took / config["steps"], "tokens": sum(tokens) / len(tokens)}

    return measure


TEXT_ALONE = "finetune.space={use: lora, rank: 8, alpha: 16, modules: []}"


def language_of(config: Mapping[str, Any]) -> str:
    """Of the assembled model."""
    return "tiny:llama" if config["model"] == "tiny" else "smollm2-135m"


def words_alone(sample: Sample, vocabulary: int) -> Sample:
    """As many tokens, with words where media stand, whose ids lie beyond the vocabulary; labeled in the same places."""
    ids, labels = (np.where(part >= vocabulary, 100, part) for part in (sample.ids, sample.labels))
    return Sample(ids, labels)


BATCH = 8
"""Samples in a local step, as the recipe has it."""


def gradients(ready: Assembly, samples: Sequence[Any]) -> Any:
    """Local steps without the optimizer's: losses, for ever, over the same samples in the same order."""
    local = ready.local
    local.model.train()
    for batches in draw(len(samples), BATCH, 1, KEY):
        yield backward(local, [local.objective.collate([samples[i] for i in batch]) for batch in batches])


def alignment(config: Mapping[str, Any]) -> Measure:
    """Forward and backward of a connector over a language model's embeddings; how far anchors are from the exact form."""
    torch.manual_seed(0)
    model, _ = load_model(language_of(config), dtype="float32")
    embeddings = model.get_input_embeddings().weight.detach()
    media = torch.randn(config["media"], config["positions"], config["features"])

    def connector(anchors: int | None) -> Connector:
        torch.manual_seed(1)
        make = make_connector({"use": "alignment", **({} if anchors is None else {"anchors": anchors})})
        made = Connector(make, config["positions"], config["features"], embeddings.shape[1])
        made.start_like(embeddings)
        return made

    mine = connector(config["anchors"])
    with torch.no_grad():
        exact = connector(None)(media, embeddings)
        difference = float((mine(media, embeddings) - exact).norm() / exact.norm())

    def once() -> None:
        mine(media, embeddings).sum().backward()
        mine.zero_grad()

    def measure() -> Mapping[str, Any]:
        return {"seconds": min(seconds(once) for _ in range(3)), "difference": difference}

    return measure


def seconds(work: Callable[[], object]) -> float:
    """That it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


KINDS: dict[str, Callable[[Mapping[str, Any]], Measure]] = {
    "features": features,
    "step": step,
    "alignment": alignment,
}

if __name__ == "__main__":
    serve(prepare, ("atoll", "torch", "transformers"))
