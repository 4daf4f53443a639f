"""A language model that sees and hears, as a `transformers` model: encoders -> connectors -> any causal language model.

    features = encoder(raw)          [media, T, F]      frozen, so that they may be computed once and kept
    tokens = connector(features)     [media, K + 2, D]  what trains, beside adapters of the language model
    the embeddings of a medium's K + 2 placeholders in the text are its tokens

Source: LLaVA (Liu et al. 2023, arXiv 2304.08485), with one encoder and connector for each modality as in Macaw-LLM (Lyu et
al. 2023, arXiv 2306.09093). Departs from both in that placeholders are no rows of the language model's embeddings: what it
embeds in their place is never read. Their ids are the tokenizer's, mostly beyond the vocabulary; where the vocabulary is
larger than the tokenizer's they are of it, and are not generated.

Shapes: media of one modality in the order of the text; T, F, K, D as in connectors.py; B rows, N positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from atoll.data.media import MODALITIES
from atoll.models.connectors import Connector, make_connector

MODEL_TYPE = "atoll_multimodal"


class ModalityConfig(TypedDict):
    """What a saved model's configuration says of a modality."""

    connector: dict[str, Any]
    """As in a recipe."""
    positions: int
    """T, of its encoder."""
    features: int
    """F."""
    tokens: int
    """Places of one medium in the text: K + 2."""
    token_id: int
    """Of its placeholder."""
    seconds: float | None
    """The longest sound; None for pictures."""
    dropout: float
    """The share of media that are taken for missing while the connector trains."""
    layer: int | None
    """Of the encoder, whose outputs the features are; None: the last one's, after its norm."""
    skip: int
    """Features that are left out at the beginning."""


class MultimodalConfig(PreTrainedConfig):
    """Encoders, connectors and the language model of a `MultimodalModel`.

    Args:
        text_config: of the causal language model.
        vision_config, audio_config: of the encoders; None for a modality that the model does not know.
        image, audio: of each modality that it knows, a `ModalityConfig`.
    """

    model_type = MODEL_TYPE
    sub_configs = dict.fromkeys(["text_config", *(one.config for one in MODALITIES.values())], AutoConfig)

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        audio_config: Any = None,
        image: ModalityConfig | None = None,
        audio: ModalityConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _config(text_config) or CONFIG_MAPPING["llama"]()
        self.vision_config, self.audio_config = _config(vision_config), _config(audio_config)
        self.image, self.audio = dict(image or {}), dict(audio or {})
        super().__init__(**{"tie_word_embeddings": False, **kwargs})  # the language model ties its own

    @property
    def modalities(self) -> list[str]:
        """Those that the model knows."""
        return [name for name, one in MODALITIES.items() if getattr(self, one.config) is not None]

    def of(self, modality: str) -> ModalityConfig:
        """What it says of a modality that the model knows."""
        found: ModalityConfig = getattr(self, modality)
        return found


def _config(written: Any) -> Any:
    return CONFIG_MAPPING[written["model_type"]](**written) if isinstance(written, dict) else written


def bare(model: Any) -> nn.Module:
    """What makes features, of a model that has a decoder or a head beside it."""
    encoder = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    found: nn.Module = getattr(encoder, "vision_model", encoder)
    return found


def hidden(encoder: Any, raw: Tensor, layer: int | None, skip: int) -> Tensor:
    """An encoder's features [media, T, F]: of a layer, or the last ones; without the first `skip`."""
    made = encoder(raw) if layer is None else encoder(raw, output_hidden_states=True)
    found: Tensor = made.last_hidden_state if layer is None else made.hidden_states[layer]
    found = found.flatten(2).transpose(1, 2) if found.dim() == 4 else found  # [media, F, height, width]
    return found[:, skip:]


def new_connector(said: ModalityConfig, width: int) -> Connector:
    """A connector to a language model of this width, with first values of its own."""
    make = make_connector(said["connector"])
    return Connector(make, said["positions"], said["features"], width, said["dropout"])


class MultimodalModel(PreTrainedModel, GenerationMixin):
    """See the module's text."""

    config: MultimodalConfig
    config_class = MultimodalConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = [*MODALITIES, "text"]  # noqa: RUF012 - as the base class has it
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"connectors", *(m.encoder for m in MODALITIES.values())}  # noqa: RUF012 - small, and exact there

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__(config)
        self.connectors = nn.ModuleDict()  # before the language model: the order of what trains and travels
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        for name in config.modalities:
            encoder: Any = AutoModel.from_config(getattr(config, MODALITIES[name].config))
            setattr(self, MODALITIES[name].encoder, bare(encoder))
            self.connectors[name] = new_connector(config.of(name), self.width)
        self.post_init()

    @property
    def width(self) -> int:
        """D, of what the language model embeds: some families' is not that of their hidden states."""
        embeddings: Any = self.get_input_embeddings()
        return int(embeddings.weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The language model's: encoders and connectors are small, and exact."""
        found: torch.dtype = self.language_model.dtype
        return found

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        found: nn.Module = self.language_model.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        found: nn.Module = self.language_model.get_output_embeddings()
        return found

    def train(self, mode: bool = True) -> MultimodalModel:
        """Encoders stay as they are: their norms must not follow the media that they see."""
        super().train(mode)
        for name in self.config.modalities:
            self.encoder(name).eval()
        return self

    def encoder(self, modality: str) -> Any:
        """Of this modality; frozen."""
        return getattr(self, MODALITIES[modality].encoder)

    def connector(self, modality: str) -> Connector:
        """Of this modality; by PEFT's copy where that is what trains."""
        found: Any = self.connectors[modality]
        return cast(Connector, found)

    def encode(self, modality: str, raw: Tensor) -> Tensor:
        """An encoder's features [media, T, F] of its own inputs [media, ...], without gradients."""
        encoder, said = self.encoder(modality), self.config.of(modality)
        with torch.no_grad():
            return hidden(encoder, raw.to(encoder.device, encoder.dtype), said["layer"], said["skip"])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        image_inputs: Tensor | None = None,
        audio_inputs: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, N, V]. Of each modality the media' features, or the encoder's own inputs, of which they are made.

        Raises:
            ValueError: not as many placeholders as the media have tokens.
        """
        if inputs_embeds is None:
            given = {"image": (image_features, image_inputs), "audio": (audio_features, audio_inputs)}
            media = {
                name: self.encode(name, raw) if features is None and raw is not None else features
                for name, (features, raw) in given.items()
            }
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, {name: one for name, one in media.items() if one is not None})
        if position_ids is not None and "position_ids" in inspect.signature(self.language_model.forward).parameters:
            kwargs["position_ids"] = position_ids
        out: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs
        )
        return out

    def tokens(self, modality: str, features: Tensor) -> Tensor:
        """What a connector makes of features: [media, K + 2, D]."""
        embeddings: Any = self.get_input_embeddings()
        found: Tensor = self.connector(modality)(features, embeddings.weight)
        return found

    def embed(self, input_ids: Tensor, media: Mapping[str, Tensor]) -> Tensor:
        """The language model's inputs [B, N, D]: embeddings of the text, with the media' tokens at their placeholders."""
        places = {name: input_ids == self.config.of(name)["token_id"] for name in self.config.modalities}
        anywhere = torch.stack([*places.values(), torch.zeros_like(input_ids, dtype=torch.bool)]).any(0)
        embeds: Tensor = self.get_input_embeddings()(input_ids.masked_fill(anywhere, 0))
        for name, place in places.items():
            tokens = self.tokens(name, media[name]) if name in media else embeds.new_zeros(0, 0, embeds.shape[-1])
            if int(place.sum()) != tokens.shape[0] * tokens.shape[1]:
                raise ValueError(
                    f"{int(place.sum())} placeholders of {name} for {tokens.shape[0]} media of {tokens.shape[1]} tokens each"
                )
            if len(tokens):
                embeds = embeds.masked_scatter(place[..., None], tokens.to(embeds.dtype))
        return embeds

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Rows are repeated for beams one by one; so are the media of each row, together."""
        media = {name: kwargs.pop(name) for name in MEDIA if kwargs.get(name) is not None}
        if input_ids is not None:
            media = {name: self._of_rows(name, x, input_ids, expand_size) for name, x in media.items()}
        ids, rest = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=cast(Any, input_ids), **kwargs
        )
        return ids, rest | media

    def _of_rows(self, name: str, media: Tensor, input_ids: Tensor, times: int) -> Tensor:
        """Media [media, ...] in the order of rows each of which comes so many times."""
        said = self.config.of(name.partition("_")[0])
        counts = ((input_ids == said["token_id"]).sum(1) // said["tokens"]).tolist()
        return torch.cat([row for part in media.split(counts) for row in [part] * times]) if times > 1 else media

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any) -> Any:
        """Media count at the first step alone: after it their tokens lie in the cache."""
        media = {name: kwargs.pop(name, None) for name in MEDIA}
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs = prepare(*args, is_first_iteration=is_first_iteration, **kwargs)
        return inputs | media if is_first_iteration or not kwargs.get("use_cache", True) else inputs


MEDIA = tuple(f"{name}_{what}" for name in MODALITIES for what in ("features", "inputs"))
"""The arguments of `forward` that hold media."""

AutoConfig.register(MODEL_TYPE, MultimodalConfig)
AutoModelForCausalLM.register(MultimodalConfig, MultimodalModel)
AutoModelForImageTextToText.register(MultimodalConfig, MultimodalModel)
