"""Rollouts against transformers' own generation, and what is drawn against what the model says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, VOCABULARY, build, with_lora

from atoll.data.collate import Sample
from atoll.exchange import WorkFailed
from atoll.local.rollouts import Sampling, drawn, rollouts
from atoll.models.fast import accelerate

RECURRENT = {"mamba", "qwen3-next"}


def prompts(lengths: tuple[int, ...] = (5, 9, 2)) -> list[Sample]:
    rng = np.random.default_rng(0)
    drawn = [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
    return [Sample(ids, ids) for ids in drawn]


def no_media(samples: Any) -> dict[str, torch.Tensor]:
    return {}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in RECURRENT])
def test_the_likeliest_tokens_are_those_that_transformers_generates(family: str) -> None:
    model = with_lora(build(family)).eval()
    first = [greedy(model, sample, 8) for sample in prompts()]
    ends = [int(first[0][3])]  # one that stops early
    expected = [greedy(model, sample, 8, ends) for sample in prompts()]
    accelerate(model)
    found = rollouts(model, prompts(), no_media, Sampling(2, 8, 0.0, ends))
    assert [[x.tolist() for x in each] for each in found] == [[one, one] for one in expected]
    assert len(expected[0]) <= 4


def greedy(model: Any, sample: Sample, most: int, ends: list[int] | None = None) -> list[int]:
    ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
    made = model.generate(
        input_ids=ids, do_sample=False, max_new_tokens=most, eos_token_id=ends or VOCABULARY + 1, pad_token_id=0
    )
    said = made[0, ids.shape[1] :].tolist()
    cut = next((i + 1 for i, token in enumerate(said) if ends and token in ends), len(said))
    return said[:cut]


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    model, sample = build("llama").eval(), prompts((6,))
    with torch.no_grad():
        ids = torch.from_numpy(sample[0].ids.astype(np.int64))[None]
        p = torch.softmax(model(input_ids=ids).logits[0, -1].double() / 1.5, -1)
    torch.manual_seed(0)
    (found,) = rollouts(model, sample, no_media, Sampling(4000, 1, 1.5, []))
    counts = np.bincount([int(one[0]) for one in found], minlength=VOCABULARY)
    distance = np.abs(counts / 4000 - p.numpy()).sum() / 2
    assert distance < 0.08, "two thirds of what 4,000 draws of as many tokens are off by chance"


def test_completions_differ_and_repeat_with_the_seed() -> None:
    model = build("llama")
    how = Sampling(4, 6, 1.0, [3])
    torch.manual_seed(1)
    one = rollouts(model, prompts(), no_media, how)
    torch.manual_seed(1)
    two = rollouts(model, prompts(), no_media, how)
    assert [[x.tolist() for x in each] for each in one] == [[x.tolist() for x in each] for each in two]
    assert len({tuple(x) for x in one[0]}) > 1
    assert model.training, "it trains on"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_is_drawn_where_the_model_has_diverged(bad: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, bad, 1.0]])
    assert drawn(logits[:1], 0.0).tolist() == [1]
    with pytest.raises(WorkFailed, match="the loss is not a number"):
        drawn(logits, temperature)
