"""Every family of models goes through the whole system: plan, rounds, adapter; in either space, by either objective."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from atoll import run
from atoll.models.tiny import FAMILIES, tiny
from atoll.record.checkpoint import load_state
from atoll.record.story import read_story

RECIPE = """
recipe: 1
name: family
model: "tiny:{family}"
data: {{use: folders, path: {data}}}
finetune:
  rounds: 3
  local_steps: 4
  context: 256
  batch_size: 4
  space: {space}
  objective: {objective}
  optimizer: {{use: adamw, lr: 5e-3}}
evaluate: {{every: 0, final_samples: 8}}
"""


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(("space", "objective"), [("lora", "sft"), ("full", "causal-lm")])
def test_a_family_learns(family, space, objective, tmp_path, monkeypatch, sites):
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    recipe = tmp_path / "family.yaml"
    recipe.write_text(RECIPE.format(family=family, data=sites, space=space, objective=objective))
    folder = run.run(str(recipe))
    story = read_story(folder)
    assert story.final.mean < 0.97 * story.base.mean
    trained = load_state(folder.checkpoint).params["update"]
    assert {name: tuple(x.shape) for name, x in trained.items()} == run.plan(str(recipe)).trains
    loaded = reload(family, space, folder.adapter)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert not torch.allclose(loaded(ids).logits, tiny(family)[0](ids).logits, atol=1e-3)


def reload(family, space, folder: Path):
    """By the ecosystem's own means."""
    if space == "lora":
        from peft import PeftModel

        return PeftModel.from_pretrained(tiny(family)[0], folder)
    from transformers import AutoModelForCausalLM

    assert json.loads((folder / "config.json").read_text())["model_type"]
    return AutoModelForCausalLM.from_pretrained(folder).eval()
