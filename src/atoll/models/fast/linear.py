"""PEFT's LoRA linear layer as one autograd function.

PEFT runs the adapter beside a frozen layer in the adapter's own precision: with a bf16 base and fp32 adapters that is a
copy of every input and output in fp32 and matrix products without bf16 instructions, seven times a layer. Here the
products of the adapter are made in the precision of the activations and added in place, and the backward pass forms the
adapter's two gradients and the input's in one node.

Same result: y = x W^T + b + s (x A^T) B^T, up to the rounding of A, B and x A^T to the precision of the activations (LoRA,
Hu et al. 2021, arXiv 2106.09685, eq. 3; s is their alpha / r).

Shapes: N tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        a_rI, b_Or = a.to(x.dtype), (b * scaling).to(x.dtype)
        y_NO = torch.mm(x_NI, weight.t()) if bias is None else torch.addmm(bias, x_NI, weight.t())
        u_Nr = torch.mm(x_NI, a_rI.t())
        y_NO.addmm_(u_Nr, b_Or.t())
        ctx.save_for_backward(x_NI, weight, a_rI, b_Or, u_Nr)
        ctx.scaling, ctx.adapter_dtype, ctx.shape = scaling, a.dtype, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight, a_rI, b_Or, u_Nr = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        du_Nr = torch.mm(grad_NO, b_Or)
        da = torch.mm(du_Nr.t(), x_NI).to(ctx.adapter_dtype) if ctx.needs_input_grad[3] else None  # FFA freezes A
        db = torch.mm(u_Nr.t(), grad_NO).t().to(ctx.adapter_dtype).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(grad_NO, weight).addmm_(du_Nr, a_rI).view(ctx.shape)
        return dx, None, None, da, db, None


@cache
def lora_linear_class() -> type[nn.Module]:
    """The subclass of PEFT's LoRA linear layer that runs as one function where that is the same, and as PEFT's elsewhere.

    Elsewhere: several adapters or none, adapters disabled or merged, dropout, variants such as DoRA, a base that trains.
    """
    from peft.tuners import lora

    class LoraLinear(lora.Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = None if args or kwargs else _only_adapter(self)
            base = self.base_layer
            if name is None or x.dtype != base.weight.dtype or torch.is_autocast_enabled(x.device.type):
                y: Tensor = super().forward(x, *args, **kwargs)
                return y
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            result: Tensor = _LoraLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name])  # type: ignore[no-untyped-call]
            return result

    return LoraLinear


def _only_adapter(layer: Any) -> str | None:
    """The one active adapter of a PEFT layer that is x W^T + s x A^T B^T and nothing else, if it is that."""
    active = layer.active_adapters
    if len(active) != 1 or layer.disable_adapters or layer.merged_adapters:
        return None
    name: str = active[0]
    plain = name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
    still = isinstance(layer.lora_dropout[name], nn.Identity)
    frozen = not layer.base_layer.weight.requires_grad
    return name if plain and still and frozen else None
