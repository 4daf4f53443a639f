"""What works and loses quality is said before a run, whoever wrote the part; what does not is said of nobody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

import atoll
from atoll.transforms.base import Stateless, Traits
from atoll.transforms.sparsify import topk

RECIPE = """
recipe: 1
name: warned
extends: runs/four-sites-tiny
"""

TOPK = "[{use: topk, fraction: 0.1}]"
FEEDBACK = "[{use: error-feedback, chain: " + TOPK + "}]"
DECAYED = "[{use: error-feedback, decay: 0.9, chain: " + TOPK + "}]"
BUFFERED = "finetune.schedule={use: buffered, concurrency: 2, buffer: 1}"
MASKED = "finetune.exchange={{use: secure-aggregation, survivors: {}}}"
OWN = "[test_warnings:drops_at_random]"


@dataclass(frozen=True)
class Drops(Stateless):
    """A user's own way to leave coordinates out."""

    traits: ClassVar = Traits()
    encode = topk(0.5).encode
    decode = topk(0.5).decode


def drops_at_random() -> Drops:
    return Drops()


@pytest.fixture
def said(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])
    path = tmp_path / "warned.yaml"
    path.write_text(RECIPE)
    return lambda *settings: " | ".join(atoll.plan(str(path), [*settings, "finetune.space=full"]).warnings)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        (["finetune.up=[{use: gaussian-noise, std: 0.1}]"], "no privacy claim"),
        ([f"finetune.up={TOPK}"], "lost for good"),
        ([f"finetune.up={OWN}"], "lost for good"),
        ([BUFFERED, "finetune.outer=momentum"], "stale updates"),
        ([BUFFERED, "finetune.outer=adam"], "stale updates"),
        ([f"finetune.up={DECAYED}", "finetune.outer=nesterov"], "SparseLoCo"),
        ([MASKED.format(2)], "a sum of two"),
        ([MASKED.format(3), "baselines=[pooled]"], "without masks and noise"),
    ],
)
def test_what_loses_quality_is_said(said, settings, warning):
    assert warning in said(*settings)


@pytest.mark.parametrize(
    "settings",
    [
        [],
        [f"finetune.up={FEEDBACK}"],
        ["finetune.up=[{use: int8}]"],
        [BUFFERED],
        [BUFFERED, "finetune.outer=adagrad"],
        ["finetune.outer=nesterov"],
        [f"finetune.up={DECAYED}"],
        [MASKED.format(3)],
    ],
)
def test_what_loses_none_is_not(said, settings):
    assert said(*settings) == ""


def test_averaging_factors_of_lora_is_said_with_what_it_was_measured_to_lose(tmp_path):
    path = tmp_path / "warned.yaml"
    path.write_text(RECIPE)
    (warning,) = atoll.plan(str(path), ["finetune.space=lora"]).warnings
    assert "mean(B) mean(A)" in warning
    assert "%" in warning
    assert atoll.plan(str(path), ["finetune.space=lora", "finetune.population=[clinic]"]).warnings == ()
