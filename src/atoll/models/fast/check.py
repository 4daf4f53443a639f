"""Whether a model still says what it said before a part of it was swapped, for families no test knows.

Each decoder layer hears what it heard before the swap, so that differences do not add up over layers, and what it adds
must be the same up to rounding. How much rounding matters differs from layer to layer (in bf16, from 0.2 % to 20 % of
what SmolLM2's layers add), so it is measured: the unswapped layers hear their inputs shaken by one unit of rounding.
On SmolLM2 in bf16 the swapped parts move a layer by at most 0.9 of that, a mask that leaks by 5 to 7 times that.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atoll.data.collate import evaluating, language_model


@dataclass(frozen=True)
class Said:
    """What each layer heard and added, and how far rounding alone moves what it adds (relative to its norm)."""

    heard: list[Tensor]
    added: list[Tensor]
    rounding: list[float]

    def differ(self, model: nn.Module) -> str:
        """How the layers of `model` now differ from what they said, beyond rounding; empty where they do not."""
        if not self.added:
            return "its layers were not found"
        try:
            _, added = _run(model, self.heard)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        moved = _moved(added, self.added)
        layer = max(range(len(moved)), key=lambda i: moved[i] / (1e-4 + 2 * self.rounding[i]))
        within = moved[layer] <= 1e-4 + 2 * self.rounding[layer]
        return "" if within else f"what a layer adds differs by {moved[layer]:.1%}"


def listen(model: nn.Module) -> Said:
    """Run `model` on nine tokens, as one sample and as two packed ones, with and without shaking."""
    heard, added = _run(model)
    _, shaken = _run(model, heard, shake=True)
    return Said(heard, added, _moved(shaken, added))


def _run(
    model: nn.Module, instead: list[Tensor] | None = None, shake: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """What each decoder layer hears and what it adds, [1, T, D] each; with `instead`, each layer hears that."""
    heard: list[Tensor] = []
    added: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = _hidden(args, kwargs)
        if instead is not None:
            noise = torch.randn(hidden.shape, generator=generator).to(hidden)
            size = torch.finfo(hidden.dtype).eps if shake else 0.0  # encoders beside may have another type
            hidden.copy_(instead[len(heard)] * (1 + size * noise))
        heard.append(hidden.clone())

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        added.append((output[0] if isinstance(output, tuple) else output) - heard[-1])

    layers = _layers(model)
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            for inputs in _inputs(model):
                model(use_cache=False, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return heard, added


def _inputs(model: nn.Module) -> list[dict[str, Tensor]]:
    """One sample; and two packed ones, where the family takes positions."""
    device = next(model.parameters()).device
    ids = torch.tensor([[3, 1, 4, 1, 5, 2, 6, 5, 3]], device=device)
    alone = {"input_ids": ids}
    if "position_ids" not in inspect.signature(language_model(model).forward).parameters:
        return [alone]
    return [alone, {**alone, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]], device=device)}]


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the outermost list with as many modules as the configuration says there are layers."""
    inner = language_model(model)
    count = inner.config.get_text_config().num_hidden_layers
    lists = (m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return list(next(lists, []))


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a decoder layer: the first tensor of numbers."""
    floats = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    return next(floats)


def _moved(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The distance of each from the expected one, relative to the expected one's norm."""
    return [float((a - b).float().norm() / b.float().norm()) for a, b in zip(found, expected, strict=True)]
