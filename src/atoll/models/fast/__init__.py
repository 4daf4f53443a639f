"""Faster parts for the local training of any Hugging Face causal LM, each held by a test to the plain result.

`accelerate` swaps parts of a model in place, by type: attention, PEFT's LoRA linear layers, RMS norms. After each swap
every layer is run on a few tokens and must say what it said before (`check`); a part that does not, or that a family does
in its own way, stays the family's own, and the report says why. Names of parameters do not change: adapters are saved and
read as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from atoll.data.collate import language_model
from atoll.models.fast.check import listen
from atoll.models.fast.memory import keep_freed_memory

__all__ = ["Accelerated", "accelerate"]


@dataclass
class Accelerated:
    """What was swapped and what was not: part -> how many modules, and part -> reason."""

    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{name}: {count} swapped" for name, count in self.swapped.items()]
        return "; ".join(parts + [f"{name}: as it is ({reason})" for name, reason in self.left.items()])


Swap = tuple[int, Callable[[], None]] | str
"""How many modules were swapped and how to swap them back, or the reason why none was."""


def accelerate(model: nn.Module) -> Accelerated:
    """Swap every part of `model` (plain or wrapped by PEFT) that a faster one computes alike, in place.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...                    num_attention_heads=2)
    >>> print(accelerate(LlamaForCausalLM(tiny)))
    attention: 1 swapped; norm: 3 swapped; linear: as it is (no LoRA linear layer)
    """
    report = Accelerated()
    if next(model.parameters()).device.type == "cpu":
        keep_freed_memory()
    said = listen(model)
    for part, swap in (("attention", _attention), ("linear", _linears), ("norm", _norms)):
        outcome = swap(model)
        if isinstance(outcome, str):
            report.left[part] = outcome
            continue
        count, undo = outcome
        if reason := said.differ(model):
            undo()
            report.left[part] = reason
        else:
            report.swapped[part] = count
    return report


def _attention(model: nn.Module) -> Swap:
    from transformers import AttentionInterface, AttentionMaskInterface

    from atoll.models.fast import attention

    inner = language_model(model)
    config = inner.config.get_text_config()
    if not getattr(inner, "_supports_attention_backend", False):
        return f"{type(inner).__name__} takes no attention function"
    before = inner.config._attn_implementation
    AttentionInterface.register(attention.NAME, attention.attention)
    AttentionMaskInterface.register(attention.NAME, attention.mask_or_layout)
    inner.set_attn_implementation(attention.NAME)
    return config.num_hidden_layers, lambda: inner.set_attn_implementation(before)


def _linears(model: nn.Module) -> Swap:
    if not hasattr(model, "peft_config"):
        return "no LoRA linear layer"
    from peft.tuners import lora

    from atoll.models.fast.linear import lora_linear_class

    layers: list[Any] = [layer for layer in model.modules() if type(layer) is lora.Linear]
    linear = [layer for layer in layers if type(layer.base_layer) is nn.Linear]
    return _reclass({layer: lora_linear_class() for layer in linear}) if linear else "no LoRA linear layer"


def _norms(model: nn.Module) -> Swap:
    from atoll.models.fast.norm import form_of, rms_norm_class

    forms = {m: (type(m), *form) for m in model.modules() if (form := form_of(m)) is not None}
    classes = {form: rms_norm_class(*form) for form in forms.values()}
    return _reclass({m: classes[form] for m, form in forms.items()}) if forms else "no RMS norm"


def _reclass(new_classes: dict[nn.Module, type[nn.Module]]) -> Swap:
    """Give each module its new class: its parameters, their names and its place in the model stay."""
    before = {module: type(module) for module in new_classes}

    def assign(classes: dict[nn.Module, type[nn.Module]]) -> None:
        for module, cls in classes.items():
            module.__class__ = cls

    assign(new_classes)
    return len(before), lambda: assign(before)
