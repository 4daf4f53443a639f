"""The wire: a payload as bytes, and back. Never pickle.

One safetensors buffer holds all parts: `m/NAME` for the main part, `0/NAME`, `1/NAME`, ... for the transforms' side parts.
`size` is what `pack` would give without packing, so that a fleet in one process counts the bytes it does not copy.
"""

from __future__ import annotations

import json

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from atoll.params import Params, nbytes, nested, under
from atoll.transforms.chain import Payload

_DTYPES = {"torch.float32": "F32", "torch.float64": "F64", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_DTYPES |= {"torch.int8": "I8", "torch.uint8": "U8", "torch.int32": "I32", "torch.int64": "I64", "torch.bool": "BOOL"}


def flatten(payload: Payload) -> Params:
    """All parts under one roof."""
    flat = nested("m", payload.main)
    for i, side in enumerate(payload.sides):
        flat |= nested(str(i), side)
    return flat


def unflatten(flat: Params, sides: int) -> Payload:
    """Back from `flatten`, for a chain of `sides` transforms."""
    return Payload(under("m", flat), tuple(under(str(i), flat) for i in range(sides)))


def pack(payload: Payload) -> bytes:
    """The payload as one safetensors buffer."""
    flat = {name: x.contiguous() for name, x in flatten(payload).items()}
    return bytes(save(flat, metadata={"sides": str(len(payload.sides))}))


def unpack(data: bytes, limit_bytes: int) -> Payload:
    """Back from `pack`. Raises ValueError for bytes that are no payload, or more than `limit_bytes` of them."""
    if len(data) > limit_bytes:
        raise ValueError(f"a payload of {len(data)} bytes, {limit_bytes} allowed")
    try:
        flat = load(data)
        length = int.from_bytes(data[:8], "little")
        sides = int(json.loads(data[8 : 8 + length])["__metadata__"]["sides"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"not a payload: {error}") from error
    if not 0 <= sides <= 64:
        raise ValueError(f"a payload of {sides} side parts")
    return unflatten(flat, sides)


def size(payload: Payload) -> int:
    """len(pack(payload)), without packing."""
    flat = flatten(payload)
    order = sorted(flat.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"sides": str(len(payload.sides))}}
    at = 0
    for name, x in order:
        header[name] = {"dtype": _dtype(x), "shape": list(x.shape), "data_offsets": [at, at + nbytes({"": x})]}
        at += nbytes({"": x})
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + (-length % 8) + at


def _dtype(x: Tensor) -> str:
    return _DTYPES.get(str(x.dtype), str(x.dtype))
