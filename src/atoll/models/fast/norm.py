"""Root-mean-square norms as one autograd function, for every family whose norm computes the same numbers.

Families write the norm as six small operations and as many copies to fp32; the graph of a step keeps all of them. Here
the forward pass keeps the input and one number per token, and the backward pass works in place.

With x^ = x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4) there are two forms: `w * x^`,
rounded to the input's precision before the weight (Llama, Qwen, Mistral, Phi-3, ...), and `(1 + w) * x^`, rounded after it
(Gemma). Which one a module computes, if any, is found by running it, not by its name.

Shapes: N tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        unit = x_ND.to(torch.float32, copy=True)
        inverse_N1 = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        inverse_N1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit.mul_(inverse_N1)
        y = unit.mul_(1 + weight.float()).to(x.dtype) if offset else unit.to(x.dtype).mul_(weight)
        ctx.save_for_backward(x_ND, weight, inverse_N1)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight, inverse_N1 = ctx.saved_tensors
        unit = x_ND.to(torch.float32, copy=True).mul_(inverse_N1)
        scaled = grad.reshape(x_ND.shape).to(torch.float32, copy=True)
        dw = (scaled * unit).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        scaled.mul_(1 + weight.float() if ctx.offset else weight.float())
        along_N1 = (scaled * unit).sum(-1, keepdim=True).div_(x_ND.shape[-1])
        dx = scaled.sub_(unit.mul_(along_N1)).mul_(inverse_N1)
        return dx.to(grad.dtype).view(grad.shape), dw, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    """weight * x^ of x [..., D], or (1 + weight) * x^ where `offset`."""
    y: Tensor = _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    return y


def form_of(norm: nn.Module) -> tuple[float, bool] | None:
    """(eps, offset) with which `rms_norm` computes what `norm` does; None where it computes something else."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    alone = [name for name, _ in norm.named_parameters()] == ["weight"] and not list(norm.children())
    if not alone or not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(4, len(weight), generator=generator)).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            expected = norm(x).double()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return None  # it wants more than x, as Qwen3-Next's norm with a gate does, or gives something else
        for offset in (False, True):
            difference = rms_norm(x, weight, eps, offset).double() - expected
            if difference.norm() <= 4 * torch.finfo(x.dtype).eps * expected.norm():
                return eps, offset
    return None


def rms_norm_class(cls: type[nn.Module], eps: float, offset: bool) -> type[nn.Module]:
    """A subclass of the norm `cls` that computes it as one function."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps, offset)  # type: ignore[arg-type]

    return type(cls.__name__, (cls,), {"forward": forward})
