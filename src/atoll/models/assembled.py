"""A model put together from a language model, encoders and connectors, once, into the cache; then one like any other.

    model:
      use: assembled
      language: smollm2-135m
      image: {encoder: efficientnet-lite0, connector: {use: mlp, pool: 7}}
      audio: {encoder: whisper-tiny.en, connector: {use: mlp, pool: 25}, seconds: 5}

Connectors are drawn by a seed that is the same everywhere: whoever assembles the same parts has the same model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from atoll import parts
from atoll.cache import Say, content_hash, home, once, quiet
from atoll.errors import AtollError, placed
from atoll.models.connectors import make_connector

ASSEMBLY = "1"
"""Raise this when the same parts are put together to another model."""

SEED = 0
"""Of the connectors' first values."""


@dataclass(frozen=True)
class Sense:
    """A modality of an assembled model, as a recipe says it."""

    encoder: str
    connector: Mapping[str, Any]
    """As written."""
    seconds: float | None = None
    """The longest sound; None for pictures."""


@dataclass(frozen=True)
class Assembled:
    """The parts of a model, by name."""

    language: str
    image: Sense | None = None
    audio: Sense | None = None

    def __str__(self) -> str:
        return " + ".join([self.language, *(sense.encoder for sense in self.senses.values())])

    @property
    def senses(self) -> dict[str, Sense]:
        """By modality, those that it has."""
        return {name: sense for name, sense in (("image", self.image), ("audio", self.audio)) if sense is not None}

    @property
    def identity(self) -> str:
        """Of the content: known before anything is fetched, for parts whose identities are."""
        from atoll.models.encoders import resolve_encoder
        from atoll.models.ref import resolve

        encoders = {name: resolve_encoder(sense.encoder, name).identity for name, sense in self.senses.items()}
        facts = [ASSEMBLY, resolve(self.language).identity, encoders, asdict(self)["image"], asdict(self)["audio"]]
        return content_hash(json.dumps(facts, sort_keys=True))


def image(encoder: str, connector: Mapping[str, Any]) -> Sense:
    """Pictures: an encoder, and the connector to the language model."""
    return Sense(encoder, connector)


def audio(encoder: str, connector: Mapping[str, Any], seconds: Annotated[float, Gt(0), Le(30)] = 30.0) -> Sense:
    """Sounds of at most `seconds`: an encoder, and the connector to the language model."""
    return Sense(encoder, connector, seconds)


def assembled(
    language: str, image: Mapping[str, Any] | None = None, audio: Mapping[str, Any] | None = None
) -> Assembled:
    """The parts as a recipe names them. Raises AtollError for a part that is none."""
    made = {"image": _sense("image", image), "audio": _sense("audio", audio)}
    if not any(made.values()):
        raise AtollError(
            "an assembled model needs an encoder", where="model", found="a language model alone",
            allowed="image, audio", remedy="`model: " + language + "` for text alone",
        )  # fmt: skip
    return Assembled(language, **made)


def _sense(name: str, written: Mapping[str, Any] | None) -> Sense | None:
    if written is None:
        return None
    at = f"model.{name}"
    sense: Sense = globals()[name](**parts.check(globals()[name], parts.Spec(name, written), at))
    make_connector(sense.connector, f"{at}.connector")
    return sense


def assembled_folder(one: Assembled, say: Say = quiet) -> Path:
    """The folder with the model, as `save_pretrained` writes it; put together the first time."""

    def build(folder: Path) -> None:
        say(f"putting {one} together once")
        put_together(one, folder, say)

    return once(home() / "models" / f"assembled-{one.identity[:12]}", build)


def tokens(sense: Sense, positions: int) -> int:
    """Places of one medium in the text: its connector's tokens and their two marks."""
    return make_connector(sense.connector).tokens(positions) + 2


def put_together(one: Assembled, folder: Path, say: Say) -> None:
    """Writes model, tokenizer and preprocessing."""
    import torch

    from atoll.data.media import MODALITIES
    from atoll.models.encoders import encoder_folder, load_encoder
    from atoll.models.load import load_model
    from atoll.models.multimodal import CONFIGS, ENCODERS, MultimodalConfig, MultimodalModel
    from atoll.models.presets import no_progress_bars

    language, tokenizer = load_model(one.language, device="cpu", say=say)
    encoders = {}
    for name, sense in one.senses.items():
        with placed(f"model.{name}.encoder"), no_progress_bars():
            encoders[name] = load_encoder(name, encoder_folder(sense.encoder, name, say), sense.seconds)
    tokenizer.add_special_tokens({"additional_special_tokens": [MODALITIES[name].placeholder for name in encoders]})
    said = {
        name: {
            "connector": dict(one.senses[name].connector),
            "positions": encoder.positions,
            "features": encoder.features,
            "tokens": tokens(one.senses[name], encoder.positions),
            "seconds": one.senses[name].seconds,
            "token_id": tokenizer.convert_tokens_to_ids(MODALITIES[name].placeholder),
        }
        for name, encoder in encoders.items()
    }
    configs: dict[str, Any] = {CONFIGS[name]: encoder.module.config for name, encoder in encoders.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = MultimodalModel(MultimodalConfig(language.config, **configs, **said))
    model.language_model = language
    embeddings: Any = language.get_input_embeddings().weight
    for name, encoder in encoders.items():
        setattr(model, ENCODERS[name], encoder.module)
        model.connector(name).as_loud_as(embeddings)
        encoder.prepare.processor.save_pretrained(folder / name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
