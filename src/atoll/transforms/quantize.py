"""Quantization of an update to 8 or 4 bits with stochastic rounding, one scale per block of values.

Stochastic rounding makes it unbiased: E[decode(encode(x))] = x (Alistarh et al. 2017, QSGD, arXiv 1610.02132; blocks as in
Dettmers et al. 2022, arXiv 2110.02861). The scale is each sender's own, so payloads cannot be summed before decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from atoll.keys import generator
from atoll.params import Params
from atoll.transforms.base import Encoded, Stateless, Traits


@dataclass(frozen=True)
class Quantize(Stateless):
    """See `int8` and `int4`."""

    bits: int
    block: int
    traits = Traits(fixed_support=True, unbiased=True)

    @property
    def top(self) -> int:
        """The largest level: 127 for 8 bits, 7 for 4 bits."""
        return int(2 ** (self.bits - 1)) - 1

    def encode(self, state: Params, x: Params, key: int) -> tuple[Params, Encoded]:
        """Main: the levels, flat (two to a byte for 4 bits); side: a scale [blocks] and the shape of each tensor."""
        draw = generator(key)
        main, side = {}, {}
        for name, value in sorted(x.items()):
            levels, side[f"{name}#scale"] = self._levels(value.flatten().float(), draw)
            main[name] = _pack_nibbles(levels) if self.bits == 4 else levels
            side[f"{name}#shape"] = torch.tensor(value.shape, dtype=torch.int64)
        return state, Encoded(main, side)

    def _levels(self, flat: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)
        scale = blocks.abs().amax(dim=1) / self.top
        scaled = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        levels = (scaled + torch.rand(scaled.shape, generator=draw)).floor_().clamp_(-self.top, self.top)
        return levels.to(torch.int8).flatten()[: flat.numel()], scale

    def decode(self, encoded: Encoded) -> Params:
        """Levels times scales, in float32."""
        return {name: self._values(name, levels, encoded.side) for name, levels in encoded.main.items()}

    def _values(self, name: str, levels: Tensor, side: Params) -> Tensor:
        scale, shape = side.get(f"{name}#scale"), side.get(f"{name}#shape")
        if scale is None or shape is None or levels.dtype != (torch.uint8 if self.bits == 4 else torch.int8):
            raise ValueError(f"{self.bits}-bit values of '{name}' lack their scale or have another type")
        size = 1
        for n in shape.tolist():
            size *= n
        if self.bits == 4:
            levels = _unpack_nibbles(levels)[:size]
        if levels.numel() != size or scale.numel() != -(-size // self.block):
            raise ValueError(f"'{name}' has {levels.numel()} levels and {scale.numel()} scales for {size} values")
        padded = torch.nn.functional.pad(levels.float(), (0, -size % self.block)).view(-1, self.block)
        return (padded * scale.unsqueeze(1)).flatten()[:size].reshape(shape.tolist())


def _pack_nibbles(levels: Tensor) -> Tensor:
    """int8 levels in [-7, 7] -> uint8 [ceil(n / 2)], the first of two in the low half."""
    pairs = torch.nn.functional.pad(levels + 8, (0, levels.numel() % 2)).view(-1, 2).to(torch.uint8)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [n] -> int8 levels [2 n]."""
    return torch.stack((packed & 15, packed >> 4), dim=1).flatten().to(torch.int8) - 8


def int8(block: Annotated[int, Ge(1)] = 256) -> Quantize:
    """8 bits a value, stochastic rounding, one scale per `block` values. Unbiased."""
    return Quantize(8, block)


def int4(block: Annotated[int, Ge(1)] = 64) -> Quantize:
    """4 bits a value, stochastic rounding, one scale per `block` values. Unbiased."""
    return Quantize(4, block)
