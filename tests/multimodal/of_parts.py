"""What the tests of multimodal models have in common: parts, records, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from atoll.models.assembled import assembled
from atoll.models.features import features_of
from atoll.models.multimodal import MultimodalModel

MLP, RESAMPLER = {"use": "mlp", "pool": 4}, {"use": "resampler", "queries": 3}


LANGUAGES = ["llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma", "qwen", "phi", "mamba"]


EYES, EARS = ["clip", "siglip", "vit", "dinov2"], ["whisper", "wav2vec2"]


def parts(language: str = "llama", eyes: str = "clip", ears: str = "whisper") -> Any:
    image, audio = {"encoder": f"tiny:{eyes}", "connector": MLP}, {"encoder": f"tiny:{ears}", "connector": RESAMPLER}
    return assembled(f"tiny:{language}", image, {**audio, "seconds": 1.0})


def asked(model: MultimodalModel, text: str, tokenizer: Any) -> torch.Tensor:
    """Tokens of a text, with as many placeholders as media have tokens."""
    features = features_of(model)
    assert features is not None
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    places = {sense.token_id: sense.tokens for sense in features.senses.values()}
    return ids.repeat_interleave(torch.tensor([places.get(int(one), 1) for one in ids]))[None]


RECORD = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "it"}]}


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(RECORD | one) + "\n" for one in records))


SITES = {"text": [{}], "see": [{}, {"images": ["p{}.png"]}], "hear": [{}, {"audio": ["s{}.wav"]}]}


RECIPE = """
recipe: 1
name: mine
extends: methods/fedavg-lora
model:
  use: assembled
  language: tiny:llama
  image: {encoder: "tiny:clip", connector: {use: mlp, pool: 4}}
  audio: {encoder: "tiny:whisper", connector: {use: resampler, queries: 3}, seconds: 1}
data: {use: folders, path: ./sites, held_out: 0.3}
finetune: {rounds: 2, local_steps: 2, batch_size: 4, context: 256, space: {use: lora, rank: 2, modules: [connectors]}}
evaluate: {every: 0, final_samples: 4}
"""


def final(run: Any) -> dict[str, torch.Tensor]:
    from atoll.record.checkpoint import load_state

    found: dict[str, torch.Tensor] = load_state(run.checkpoint).params["update"]
    return found


def parts_of_recipe() -> Any:
    image, audio = {"encoder": "tiny:clip", "connector": MLP}, {"encoder": "tiny:whisper", "connector": RESAMPLER}
    return assembled("tiny:llama", image, {**audio, "seconds": 1})
