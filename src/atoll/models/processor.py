"""Texts, pictures and sounds to the inputs of a `MultimodalModel`: what `transformers` calls a processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        padding_side: str = "left",
        return_tensors: str = "pt",
        **tokenizing: Any,
    ) -> BatchFeature:
        """Inputs for `forward` and `generate`: input_ids and attention_mask [B, N], image_inputs, audio_inputs.

        Args:
            text: one or several, padded to the longest, with `<image>` and `<audio>` where media stand.
            images: files or pictures of PIL, in the order of their places in all texts.
            audio: files, or float32 [samples] at the encoder's rate, in the order of their places.
            padding_side: left to generate, right to train.
            return_tensors: `pt`, which is all that the model takes.
            tokenizing: what the tokenizer takes, such as `add_special_tokens`.

        Raises:
            Unusable: a medium that cannot be read.
            ValueError: another kind of tensors; truncation, which would cut off places of media.
        """
        if return_tensors != "pt" or tokenizing.get("truncation"):
            raise ValueError(
                f"the model takes return_tensors='pt', not {return_tensors!r}, and whole texts: no truncation"
            )
        tokenizing.pop("padding", None)  # always
        found = {
            f"{name}_inputs": torch.stack([self.inputs(_medium(name, one)) for one in some])
            for name, some in (("image", images), ("audio", audio))
            if some
        }
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.expanded(self.tokenizer(one, **tokenizing)["input_ids"]) for one in texts]
        ids, mask = padded(rows, self.tokenizer.pad_token_id or 0, first=padding_side == "left")
        return BatchFeature({"input_ids": ids, "attention_mask": mask, **found})

    def inputs(self, medium: Medium | Given) -> Tensor:
        """What an encoder takes of a medium, without the batch's dimension. Raises Unusable for one that cannot be read."""
        raw = self.senses[medium.modality].read(medium) if isinstance(medium, Medium) else medium.raw
        return self.preparations[medium.modality](raw)

    def expanded(self, ids: Sequence[int]) -> list[int]:
        """Tokens with as many placeholders for each medium as it has tokens."""
        places = {sense.token_id: sense.tokens for sense in self.senses.values()}
        return [one for token in ids for one in [token] * places.get(token, 1)]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tokenize: bool = False,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """A conversation's text; or, to `tokenize`, the model's inputs of it and its media.

        A message's content is text, or parts as `transformers` has them: {"type": "text", "text": ...}, {"type": "image",
        "path": ...}, or with a picture of PIL or a sound under the type's own name.

        Raises:
            ValueError: a part of another type.
        """
        flat = [{**message, "content": "\n".join(map(_in_words, _parts(message)))} for message in conversation]
        text = self.tokenizer.apply_chat_template(flat, tokenize=False, **options)
        if not tokenize:
            return text
        media = [part for message in conversation for part in _parts(message) if part["type"] in MODALITIES]
        each = {name: [_raw(part) for part in media if part["type"] == name] for name in MODALITIES}
        made = self(text, images=each["image"], audio=each["audio"], add_special_tokens=False)
        return made if return_dict else made["input_ids"]

    def batch_decode(self, *args: Any, **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **options)

    def decode(self, *args: Any, **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **options)


class Given(NamedTuple):
    """A medium that is no file."""

    modality: str
    raw: Any
    """A picture of PIL in RGB, or float32 [samples]."""


def _medium(modality: str, one: Any) -> Medium | Given:
    """Of a file, or of what is in memory already."""
    if isinstance(one, str | Path):
        return Medium(modality, Path(one))
    return Given(modality, one.convert("RGB") if hasattr(one, "convert") else one)


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of a message; raises ValueError for one of an unknown type."""
    content = message["content"]
    found: list[Mapping[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    known = ("text", *MODALITIES)
    for part in found:
        if part["type"] not in known:
            raise ValueError(f"a part of type {part['type']!r}: the model takes {', '.join(known)}")
    return found


def _in_words(part: Mapping[str, Any]) -> str:
    """A part as it stands in the text."""
    return str(part["text"]) if part["type"] == "text" else MODALITIES[part["type"]].placeholder


def _raw(part: Mapping[str, Any]) -> Any:
    """The medium of a part. Raises ValueError for one that has none."""
    for name in (part["type"], "path"):
        if part.get(name) is not None:
            return part[name]
    raise ValueError(f"a part of type {part['type']!r} without '{part['type']}' or 'path'")


AutoProcessor.register(MultimodalConfig, MultimodalProcessor)  # type: ignore[no-untyped-call]
