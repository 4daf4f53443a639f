"""Texts, pictures and sounds to the inputs of a `MultimodalModel`: what `transformers` calls a processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BatchFeature

from atoll.data.collate import padded
from atoll.data.media import MODALITIES, Medium, Senses
from atoll.models.features import preparations, senses_of
from atoll.models.multimodal import MultimodalConfig


class MultimodalProcessor:
    """A tokenizer, and what prepares media for the encoders.

    Args:
        tokenizer: the model's.
        config: the model's, read from the folder where its preprocessing lies.
    """

    def __init__(self, tokenizer: Any, config: MultimodalConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.preparations = preparations(config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **ignored: Any) -> MultimodalProcessor:
        """Reads a folder as `save_pretrained` writes it."""
        return cls(AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder))

    def save_pretrained(self, folder: str | Path, **ignored: Any) -> None:
        """Writes tokenizer and preprocessing beside a model."""
        self.tokenizer.save_pretrained(folder)
        for name, one in self.preparations.items():
            one.processor.save_pretrained(Path(folder) / name)

    @property
    def senses(self) -> Senses:
        """How the model takes media."""
        return senses_of(self.config, self.preparations)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[str | Path] = (),
        audio: Sequence[str | Path] = (),
        padding_side: str = "left",
        **tokenizing: Any,
    ) -> BatchFeature:
        """Inputs for `forward` and `generate`: input_ids and attention_mask [B, N], image_inputs, audio_inputs.

        Args:
            text: one or several, with `<image>` and `<audio>` where media stand.
            images, audio: files, in the order of their places in all texts.
            padding_side: left to generate, right to train.
            tokenizing: what the tokenizer takes, such as `add_special_tokens`.

        Raises:
            Unusable: a medium that cannot be read.
        """
        found: dict[str, Tensor] = {}
        for name, files in (("image", images), ("audio", audio)):
            if files:
                media = [Medium(name, Path(file)) for file in files]
                made = [self.preparations[name](self.senses[name].read(medium)) for medium in media]
                found[f"{name}_inputs"] = torch.stack(made)
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.expanded(self.tokenizer(one, **tokenizing)["input_ids"]) for one in texts]
        ids, mask = padded(rows, self.tokenizer.pad_token_id or 0, first=padding_side == "left")
        return BatchFeature({"input_ids": ids, "attention_mask": mask, **found})

    def expanded(self, ids: Sequence[int]) -> list[int]:
        """Tokens with as many placeholders for each medium as it has tokens."""
        places = {sense.token_id: sense.tokens for sense in self.senses.values()}
        return [one for token in ids for one in [token] * places.get(token, 1)]

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The tokenizer's, after media of a message's parts ({"type": "image"}) were given their placeholders."""
        return self.tokenizer.apply_chat_template([_flat(message) for message in conversation], **options)

    def batch_decode(self, *args: Any, **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **options)

    def decode(self, *args: Any, **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **options)


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is text, of one whose content is parts as `transformers` has them."""
    if isinstance(message["content"], str):
        return message
    texts = [
        part["text"] if part["type"] == "text" else MODALITIES[part["type"]].placeholder for part in message["content"]
    ]
    return {**message, "content": "\n".join(texts)}


AutoProcessor.register(MultimodalConfig, MultimodalProcessor)  # type: ignore[no-untyped-call]
