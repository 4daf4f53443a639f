"""A model put together from a language model, encoders and connectors, once, into the cache; then one like any other.

    model:
      use: assembled
      language: smollm2-135m
      image: {encoder: efficientnet-lite0, connector: {use: mlp, pool: 7}}
      audio: {encoder: whisper-tiny.en, connector: {use: mlp, pool: 25}, seconds: 5}

A connector is drawn by a seed that is the same everywhere, apart from all else: whoever assembles the same parts has the
same model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from atoll import parts
from atoll.data.media import MODALITIES
from atoll.errors import AtollError, placed
from atoll.models.tiny import tiny

if TYPE_CHECKING:
    from torch import Tensor

    from atoll.models.connectors import Connector
    from atoll.models.multimodal import ModalityConfig

ASSEMBLY = "5"
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
    dropout: float = 0.0
    """The share of media that are taken for missing while the connector trains."""


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
        return {name: sense for name in MODALITIES if (sense := getattr(self, name)) is not None}


Share = Annotated[float, Ge(0), Lt(1)]


def image(encoder: str, connector: Mapping[str, Any] | str, dropout: Share = 0.0) -> Sense:
    """Pictures: an encoder, and the connector to the language model.

    A share `dropout` of them is taken for missing in training: the model learns to do without (modality dropout).
    """
    return Sense(encoder, _written(connector), dropout=dropout)


def audio(
    encoder: str,
    connector: Mapping[str, Any] | str,
    seconds: Annotated[float, Gt(0), Le(30)] = 30.0,
    dropout: Share = 0.0,
) -> Sense:
    """Sounds of at most `seconds`: an encoder, the connector to the language model, and dropout as of pictures."""
    return Sense(encoder, _written(connector), seconds, dropout)


SENSES: dict[str, Callable[..., Sense]] = {"image": image, "audio": audio}


def _written(connector: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """`mlp` is `{use: mlp}`, as of other parts."""
    return {"use": connector} if isinstance(connector, str) else connector


def assembled(
    language: str, image: Mapping[str, Any] | None = None, audio: Mapping[str, Any] | None = None
) -> Assembled:
    """A language model with an encoder and a connector for each modality: `image`, `audio`, or both.

    Args:
        language: a preset, a folder, or a hub id.
        image: {encoder, connector, dropout}, see `image`.
        audio: {encoder, connector, seconds, dropout}, see `audio`.

    Raises:
        AtollError: a part that is none; no encoder at all.
    """
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
    from atoll.models.connectors import make_connector

    at = f"model.{name}"
    make = SENSES[name]
    sense = make(**parts.check(make, parts.Spec(name, written), at, named=False))
    make_connector(sense.connector, f"{at}.connector")
    return sense


def tokens(sense: Sense, positions: int) -> int:
    """Places of one medium in the text: its connector's tokens and their marks."""
    from atoll.models.connectors import make_connector

    make = make_connector(sense.connector)
    return make.tokens(positions) + make.marks


def put_together(
    one: Assembled,
    language: Path | None,
    encoders: Mapping[str, Path],
    ready: Mapping[str, Path],
    folder: Path,
) -> None:
    """Writes model, tokenizer and preprocessing, of the folders of its parts (None: a tiny language model)."""
    import torch

    from atoll.models.encoders import load_encoder
    from atoll.models.multimodal import ModalityConfig, MultimodalConfig, MultimodalModel

    with placed("model.language"):
        model_of_text, tokenizer = language_model(one.language, language)
    made = {}
    for name, sense in one.senses.items():
        with placed(f"model.{name}.encoder"):
            made[name] = load_encoder(name, encoders[name], sense.seconds)
    tokenizer.add_special_tokens({"additional_special_tokens": [MODALITIES[name].placeholder for name in made]})
    said = {
        name: ModalityConfig(
            connector={key: value for key, value in one.senses[name].connector.items() if key != "of"},
            positions=encoder.positions,
            features=encoder.features,
            tokens=tokens(one.senses[name], encoder.positions),
            seconds=one.senses[name].seconds,
            dropout=one.senses[name].dropout,
            token_id=tokenizer.convert_tokens_to_ids(MODALITIES[name].placeholder),
            layer=encoder.layer,
            skip=encoder.skip,
        )
        for name, encoder in made.items()
    }
    configs: dict[str, Any] = {MODALITIES[name].config: encoder.module.config for name, encoder in made.items()}
    with torch.device("meta"):  # nothing of it stays: every part is put in its place
        model = MultimodalModel(MultimodalConfig(model_of_text.config, **configs, **said))
    model.language_model = model_of_text
    model.generation_config = generation(model_of_text, [one["token_id"] for one in said.values()])
    words = embedded(model_of_text)
    for name, encoder in made.items():
        setattr(model, MODALITIES[name].encoder, encoder.module)
        model.connectors[name] = connector = drawn(name, said[name], model.width)
        connector.start_like(words)
        if name in ready:
            copy_connector(ready[name], connector.body.layers)
        encoder.prepare.processor.save_pretrained(folder / name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def generation(language: Any, placeholders: Sequence[int]) -> Any:
    """How it generates: as the language model does, and no placeholders, which a larger vocabulary than the tokenizer's has.

    A family whose state is no cache of keys and values reads the whole text again for each token.
    """
    found = copy.deepcopy(language.generation_config)
    found.suppress_tokens = [one for one in placeholders if one < language.config.get_text_config().vocab_size] or None
    found.use_cache = "past_key_values" in inspect.signature(language.forward).parameters
    return found


def embedded(language: Any) -> Tensor:
    """What the language model makes of each token [V, D]: of some families that is not the row of its embeddings."""
    import torch

    embed = language.get_input_embeddings()
    with torch.no_grad():
        rows: Tensor = embed(torch.arange(len(embed.weight), device=embed.weight.device))
    return rows


def drawn(name: str, said: ModalityConfig, width: int) -> Connector:
    """A connector's first values, which hang on nothing but what it is."""
    import torch

    from atoll.keys import key
    from atoll.models.multimodal import new_connector

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(SEED, name))
        return new_connector(said, width)


def copy_connector(folder: Path, layers: Any) -> None:
    """A ready-made model's two linear layers into ours. Raises AtollError where they are of another size."""
    from atoll.models.ready_made import connector

    theirs = connector(folder)
    if type(theirs.act).__name__ not in ("GELUActivation", "GELU") or theirs.linear_1.bias is None:
        raise AtollError(
            "the ready-made model's connector is of another kind", where="connector.of", found=" ".join(str(theirs).split()),
            allowed="two linear layers with biases, and GELU between them", remedy="`connector: {use: mlp}` begins anew",
        )  # fmt: skip
    try:
        for mine, its in ((layers[0], theirs.linear_1), (layers[2], theirs.linear_2)):
            mine.load_state_dict(its.state_dict())
    except RuntimeError as error:
        raise AtollError(
            "the connector is between other sizes", where="connector.of", found=str(folder),
            remedy="name the encoder and the language model of the same folder",
        ) from error  # fmt: skip


def language_model(name: str, folder: Path | None) -> tuple[Any, Any]:
    """A causal language model in the type it is stored in, and its tokenizer."""
    if folder is None:
        return tiny(name.removeprefix("tiny:"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from atoll.models import ready_made
    from atoll.models.causal import causal_config

    if family := ready_made.family_of(folder):
        return ready_made.language_model(folder, family), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if causal_config(folder).model_type == "atoll_multimodal":
        raise AtollError(
            "an assembled model has a language model among its parts, and no other assembled one", where=str(folder),
            remedy="name that one's parts, or its folder as the model: `model: FOLDER`",
        )  # fmt: skip
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, dtype="auto", output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:4])
        raise AtollError("the model's files lack params", where=str(folder), found=f"no {missing}")
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
