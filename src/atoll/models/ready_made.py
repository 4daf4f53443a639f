"""Models that somebody has put together already, as parts: their encoder, connector and language model, by the same folder.

    model:
      use: assembled
      language: ./llava
      image: {encoder: ./llava, connector: {use: llava, of: ./llava}}

The assembled model says what the ready-made one says. A family is a line of `FAMILIES`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from atoll.errors import AtollError


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, inside its base model."""

    encoder: str
    language: str


FAMILIES = {"llava": Family("vision_tower", "language_model")}
"""By model type in transformers."""


def family_of(folder: Path) -> Family | None:
    """The family of a folder's model, if it is one that is known here."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads it says what is wrong
        return None
    return FAMILIES.get(str(said.get("model_type"))) if isinstance(said, dict) else None


@lru_cache(maxsize=1)
def whole(folder: Path) -> Any:
    """The model as it is: its parts are asked for one after the other."""
    from transformers import AutoModelForImageTextToText

    ready: Any = AutoModelForImageTextToText.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, dtype="auto"
    )
    return ready.eval()


def language_model(folder: Path, family: Family) -> Any:
    """Its language model, with the head, as a causal language model of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    ready, make = whole(folder), AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = make.from_config(ready.config.get_text_config(), dtype=ready.dtype)  # type: ignore[no-untyped-call]
    setattr(model, model.base_model_prefix, getattr(ready.model, family.language))
    model.set_output_embeddings(ready.get_output_embeddings())
    return model


def encoder(folder: Path, family: Family) -> tuple[Any, int, int]:
    """Its encoder; which of that one's layers it takes the features of, and how many of the first it leaves out."""
    ready = whole(folder)
    layer = ready.config.vision_feature_layer
    if not isinstance(layer, int):
        raise AtollError(
            "the model takes features of several layers", where=str(folder), found=f"vision_feature_layer {layer}",
            allowed="one layer",
        )  # fmt: skip
    selected = [value for name, value in ready.config.to_dict().items() if name.startswith("vision_feature_select")]
    skip = 1 if selected == ["default"] else 0  # without the class token
    return getattr(ready.model, family.encoder).float(), layer, skip


def connector(folder: Path) -> Any:
    """What stands between its encoder and its language model. Raises AtollError for a folder of no known family."""
    family = family_of(folder)
    if family is None:
        raise AtollError(
            "no ready-made model that is known here", where=str(folder), allowed=", ".join(FAMILIES),
            remedy="`connector: {use: mlp}` begins with one of its own",
        )  # fmt: skip
    named = whole(folder).model.named_children()
    return next(module for name, module in named if name not in (family.encoder, family.language))
