"""Tiny random models of every family the system promises to serve, and the plain result they are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atoll.data.collate import IGNORE, Sample

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
WINDOWED: dict[str, Any] = {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
LAYERS = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied-biased": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True, "attention_bias": True}),
    "gpt2": ("GPT2Config", {**SHAPE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoXConfig", {**SHAPE, "intermediate_size": 48}),
    "opt": ("OPTConfig", {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "bloom": ("BloomConfig", {**SHAPE, "n_layer": 2, "n_head": 4}),
    "gemma2": (
        "Gemma2Config",
        {**WINDOWED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "layer_types": LAYERS},
    ),
    "gemma3": ("Gemma3TextConfig", {**WINDOWED, "layer_types": LAYERS}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "qwen3-next": (  # a gated norm, linear attention, experts
        "Qwen3NextConfig",
        {**GROUPED, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "phi": ("PhiConfig", {**SHAPE, "intermediate_size": 48}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 3.0}),
    "cohere": ("CohereConfig", GROUPED),
    "mamba": ("MambaConfig", {**SHAPE, "state_size": 8}),
}
NOT_PACKABLE = {"bloom", "mamba", "qwen3-next", "opt"}
"""No positions; a recurrent state; the same; positions that its mask does not see."""


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model of `family` without dropout; initial weights large enough for logits and gradients to matter."""
    import transformers

    name, fields = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**fields)
    for field in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def with_lora(model: nn.Module) -> nn.Module:
    """LoRA on every linear layer but the head (PEFT forbids Mamba's out_proj); B is random: gradients reach A."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["in_proj", "x_proj"] if model.config.model_type == "mamba" else "all-linear"
    peft_model: nn.Module = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model


def samples(lengths: tuple[int, ...] = (7, 3, 12, 7, 1), seed: int = 0) -> list[Sample]:
    """Random samples; each has labels on its second half, one sample of one token has nothing to predict."""
    random = np.random.default_rng(seed)
    made = []
    for n in lengths:
        ids = random.integers(3, VOCABULARY, n).astype(np.int32)
        labels = np.where(np.arange(n) >= n // 2, ids, IGNORE).astype(np.int32)
        made.append(Sample(ids, labels))
    return made


def plain_losses(model: nn.Module, batch: list[Sample]) -> list[Tensor]:
    """The sum of losses of each sample, run alone through the model's own loss."""
    losses = []
    for ids, labels, *_ in batch:
        ids_, labels_ = (torch.from_numpy(part.astype(np.int64))[None] for part in (ids, labels))
        count = int((labels_[:, 1:] != IGNORE).sum())
        if count:
            losses.append(model(input_ids=ids_, labels=labels_, use_cache=False).loss * count)
        else:
            losses.append(torch.zeros(()))
    return losses


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` for each trained parameter, by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: torch.zeros_like(trained[name]) if g is None else g for name, g in zip(trained, grads, strict=True)}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Each gradient within `tolerance` of the expected one, relative to the expected one's largest entry."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        size = grad.abs().max()
        assert (found[name] - grad).abs().max() <= tolerance * size + 1e-7, name
