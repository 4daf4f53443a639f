"""What contestants read: made once into `harness.inputs()`, the same for all of them.

The text is the Apache License that comes with the model: real English, here without any download of its own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import inputs
from benchmarks.samples import Sample, save

MODEL = "smollm2-135m"
ANSWER_SHARE = (0.3, 0.7)
"""The answer's part of a chat sample, drawn uniformly from this range."""


def training(name: str, count: int) -> None:
    """The model and `count` samples of a kind; see SAMPLES."""
    folder = model()
    target = inputs() / f"{name}-{count}.npz"
    if not target.exists():
        tokens, rng = text_tokens(folder), np.random.default_rng(7)
        save(target, [SAMPLES[name](tokens, rng) for _ in range(count)])


def pairs(count: int) -> None:
    """The model, and `count` preferences of the four sites of the recipe `align`, a site after the other."""
    from atoll.data.prepared_preferences import preference_sites

    model()
    target = inputs() / f"pairs-{count}.jsonl"
    if not target.exists():
        sites = [path.read_text().splitlines() for path in sorted(preference_sites(print).glob("*/train.jsonl"))]
        rows = [line for some in zip(*sites, strict=False) for line in some][:count]
        target.write_text("".join(line + "\n" for line in rows))


def byte_samples(count: int) -> None:
    """`count` chat samples of bytes, for the tiny models, whose tokens are bytes."""
    target = inputs() / f"bytes-{count}.npz"
    if not target.exists():
        text, rng = list((model() / "LICENSE").read_bytes()), np.random.default_rng(7)
        save(target, [chat(text, rng) for _ in range(count)])


def model() -> Path:
    """The folder of SmolLM2-135M; also as inputs/smollm2-135m for the peers."""
    from atoll.models.presets import carrier_folder

    folder = carrier_folder(MODEL, print)
    link = inputs() / MODEL
    if not link.exists() or link.resolve() != folder.resolve():
        link.unlink(missing_ok=True)
        os.symlink(folder, link)
    return folder


def text_tokens(folder: Path) -> list[int]:
    """The tokens of the license, about 2,200."""
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(folder)((folder / "LICENSE").read_text()).input_ids
    return ids


def fixed(tokens: list[int], rng: np.random.Generator, length: int = 128) -> Sample:
    """`length` consecutive tokens, all labeled."""
    ids = window(tokens, length, rng)
    return ids, ids


def chat(tokens: list[int], rng: np.random.Generator) -> Sample:
    """16 to 128 consecutive tokens, of which the last part, the answer, is labeled."""
    ids = window(tokens, int(rng.integers(16, 129)), rng)
    labels = ids.copy()
    labels[: int(len(ids) * (1 - rng.uniform(*ANSWER_SHARE)))] = -100
    return ids, labels


def window(tokens: list[int], length: int, rng: np.random.Generator) -> np.ndarray:
    """`length` consecutive tokens from a random place."""
    start = int(rng.integers(0, len(tokens) - length))
    return np.asarray(tokens[start : start + length], np.int32)


def adapter(name: str) -> None:
    """The params that LoRA training of the model starts from, as our own training saves them."""
    if not (inputs() / name).exists():
        from benchmarks.harness import Contestant, worker

        config = {"model": MODEL, "file": "fixed-40.npz", "batch": 4, "steps": 1, "save_start": name}
        with worker(Contestant("adapter", "benchmarks.ours.training", config=config)):
            pass


def tiny_llama() -> None:
    """The tiny Llama of the tests as a folder, and byte samples for it."""
    from atoll.models.load import load_model

    byte_samples(32)
    model, tokenizer = load_model("tiny:llama")
    model.save_pretrained(inputs() / "tiny-llama")
    tokenizer.save_pretrained(inputs() / "tiny-llama")


SAMPLES: dict[str, Callable[[list[int], np.random.Generator], Sample]] = {
    "fixed": fixed,
    "chat": chat,
    "long": partial(fixed, length=1024),
}
"""How a sample is cut from the text, by kind."""


def images(users: int, samples: int) -> None:
    """CIFAR10's shapes for `users` users: images float32 [users, samples, 32, 32, 3] and labels, in two files."""
    rng = np.random.default_rng(11)
    shape = (users, samples, 32, 32, 3)
    pictures, labels = inputs() / f"images-{users}.npy", inputs() / f"labels-{users}.npy"
    if labels.exists():
        return
    array = np.lib.format.open_memmap(pictures, mode="w+", dtype=np.float32, shape=shape)
    for user in range(users):
        array[user] = rng.standard_normal(shape[1:], dtype=np.float32)
    array.flush()
    np.save(labels, rng.integers(0, 10, (users, samples)))


def random_model(name: str, **config: Any) -> Path:
    """A Llama of random bf16 values, saved once: speed does not depend on what a model has learned."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    folder = inputs() / name
    if not folder.exists():
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        partial = folder.with_suffix(".partial")
        made.save_pretrained(partial)
        AutoTokenizer.from_pretrained(model()).save_pretrained(partial)
        partial.rename(folder)
    return folder


def batches(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    """The samples in order, `size` at a time."""
    rest = iter(samples)
    return iter(lambda: list(itertools.islice(rest, size)), [])
