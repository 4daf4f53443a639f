"""Tiny random models of each family, with a tokenizer made in code: for tests and benchmarks, no download.

Two layers, hidden size 32, a vocabulary of 256 bytes and four special tokens. Initial values are wider than the
families' own, so that the outputs of a wrong computation differ visibly from those of the right one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.cache import content_hash, home, once
from atoll.errors import AtollError, closest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VOCAB = 260
HIDDEN = 32
LAYERS = 2
HEADS = 4
CONTEXT = 256
"""Of the families with learned positions, which are params."""
LONG_CONTEXT = 8192
"""Of those whose positions are computed: it costs nothing."""
SPECIAL = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_USUAL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LONG_CONTEXT,
    "initializer_range": 0.1,
}
_GROUPED: dict[str, Any] = _USUAL | {"num_key_value_heads": 2, "intermediate_size": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "gpt2": (
        "GPT2Config",
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, "initializer_range": 0.1}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "gpt_neox": ("GPTNeoXConfig", _USUAL | {"intermediate_size": 64}),
    "opt": (
        "OPTConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_dim": 64}
        | {"max_position_embeddings": CONTEXT, "word_embed_proj_dim": HIDDEN, "dropout": 0.0, "init_std": 0.1},
    ),
    "bloom": (
        "BloomConfig",
        {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "initializer_range": 0.1, "seq_length": CONTEXT},
    ),
    "gemma": ("GemmaConfig", _GROUPED | {"num_key_value_heads": 1, "head_dim": 8}),
    "qwen": ("Qwen2Config", _GROUPED),
    "phi": ("PhiConfig", _GROUPED),
    "mamba": (
        "MambaConfig",
        {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8, "initializer_range": 0.1},
    ),
}
"""Family -> (class of its configuration in transformers, arguments). Dropout is off: a seed determines the result."""

_SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_MEL: dict[str, Any] = {"feature_size": 80, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 30, "n_fft": 400}
_EARS: dict[str, Any] = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64,
}
_EARS |= {"decoder_layers": 1, "decoder_attention_heads": HEADS, "decoder_ffn_dim": 64, "vocab_size": VOCAB}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_PIXELS: tuple[str, dict[str, Any]] = (
    "CLIPImageProcessorPil", {"size": {"height": 32, "width": 32}, "do_center_crop": False},
)  # fmt: skip

ENCODERS: dict[str, dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]]] = {
    "image": {
        "clip": ("CLIPVisionConfig", _SMALL, *_PIXELS),
        "siglip": ("SiglipVisionConfig", _SMALL, *_PIXELS),
        "vit": ("ViTConfig", _SMALL, *_PIXELS),
        "dinov2": ("Dinov2Config", {k: v for k, v in _SMALL.items() if k != "intermediate_size"}, *_PIXELS),
    },
    "audio": {
        "whisper": ("WhisperConfig", _EARS | _TOKENS, "WhisperFeatureExtractor", _MEL),
        "wav2vec2": (
            "Wav2Vec2Config",
            {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
            | {"conv_dim": (HIDDEN,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
            "Wav2Vec2FeatureExtractor",
            {},
        ),
    },
}
"""Modality -> family -> (class of its configuration, arguments, class of its preprocessing, arguments)."""


def tiny_encoder_identity(name: str, modality: str) -> str:
    """Of the content of the tiny encoder `tiny:FAMILY`. Raises AtollError for an unknown family."""
    family, known = name.removeprefix("tiny:"), ENCODERS[modality]
    if family not in known:
        raise AtollError(
            f"unknown family of tiny encoders of {modality}", where=f"model.{modality}.encoder", found=family,
            allowed=", ".join(known), remedy=closest(family, known),
        )  # fmt: skip
    return content_hash("tiny encoder", family, json.dumps(known[family], sort_keys=True))


def tiny_encoder(name: str, modality: str) -> Path:
    """The folder with a random tiny encoder and its preprocessing, in the cache."""
    import torch
    import transformers
    from transformers import AutoModel

    config, arguments, processor, options = ENCODERS[modality][name.removeprefix("tiny:")]

    def build(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModel.from_config(getattr(transformers, config)(**arguments))  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
        getattr(transformers, processor)(**options).save_pretrained(folder)

    return once(home() / "models" / f"{name.replace(':', '-')}-{tiny_encoder_identity(name, modality)[:12]}", build)


def tiny(family: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random float32 model of `family` and its byte-level tokenizer, the same for the same seed.

    Raises:
        AtollError: unknown family.

    Example:
        >>> model, tokenizer = tiny("llama")
        >>> ids = tokenizer("hello", return_tensors="pt").input_ids
        >>> model(input_ids=ids).logits.shape
        torch.Size([1, 5, 260])
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)  # type: ignore[no-untyped-call]
    return model.eval(), byte_tokenizer()


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration of the tiny model of `family`."""
    import transformers

    if family not in FAMILIES:
        raise AtollError("unknown family of tiny models", found=family, remedy=closest(family, FAMILIES))
    name, arguments = FAMILIES[family]
    tokens = {"unk_token_id": 256, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 259}
    config: PretrainedConfig = getattr(transformers, name)(vocab_size=VOCAB, **tokens, **arguments)
    return config


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte, the special tokens of ChatML after them, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL.values()))
    options = SPECIAL | {"chat_template": CHAT_TEMPLATE, "model_max_length": CONTEXT}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)  # type: ignore[no-untyped-call]
