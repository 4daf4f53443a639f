"""Tiny random models of each family, with a tokenizer made in code: for tests and benchmarks, no download.

Two layers, hidden size 32, a vocabulary of 256 bytes and four special tokens. Initial values are wider than the
families' own, so that the outputs of a wrong computation differ visibly from those of the right one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
