"""The wire: a payload as bytes, and back. Never pickle.

One buffer in the safetensors format holds all parts: `m/NAME` for the main part, `0/NAME`, `1/NAME`, ... for the
transforms' side parts. The safetensors library copies what it reads and writes; updates are large and come by the dozen, so
here tensors are sent from the memory they are in and read in the memory they came in. Tests hold both directions to the
library.

    8 bytes: length of the header | header: JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from atoll.cache import content_hash
from atoll.params import Params, nested, under
from atoll.transforms.chain import Payload

Buffer = bytes | bytearray | memoryview

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
MOST_SIDES = 64


def flatten(payload: Payload) -> Params:
    """All parts under one roof."""
    flat = nested("m", payload.main)
    for i, side in enumerate(payload.sides):
        flat |= nested(str(i), side)
    return flat


def unflatten(flat: Params, sides: int) -> Payload:
    """Back from `flatten`, for a chain of `sides` transforms."""
    return Payload(under("m", flat), tuple(under(str(i), flat) for i in range(sides)))


def pieces(payload: Payload) -> list[Buffer]:
    """The payload's buffer in pieces, in order: the header, then each tensor's own memory, not copied where contiguous."""
    tensors = _ordered(payload)
    return [_header(tensors, len(payload.sides)), *(_memory(x) for x in tensors.values())]


def pack(payload: Payload) -> bytes:
    """The payload as one buffer."""
    return b"".join(pieces(payload))


def size(payload: Payload) -> int:
    """len(pack(payload)), without packing: a fleet in one process counts the bytes that it does not copy."""
    tensors = _ordered(payload)
    return len(_header(tensors, len(payload.sides))) + sum(x.nbytes for x in tensors.values())


def unpack(data: Buffer, limit_bytes: int) -> Payload:
    """Back from `pack`: tensors in the memory of `data`, which has to be writable or is copied once.

    Raises ValueError for bytes that are no payload, or more than `limit_bytes` of them.
    """
    if len(data) > limit_bytes:
        raise ValueError(f"a payload of {len(data)} bytes, {limit_bytes} allowed")
    memory = memoryview(data)
    header, body = _read_header(memory)
    about = header.pop("__metadata__", None)
    try:
        sides = int(about["sides"])
        if not 0 <= sides <= MOST_SIDES:
            raise ValueError(f"{sides} side parts")
        writable = memory[body:] if not memory.readonly else memoryview(bytearray(memory[body:]))
        flat = dict(_tensors(header, writable))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"not a payload: {error}") from error
    return unflatten(flat, sides)


def _ordered(payload: Payload) -> Params:
    """In the order of the format: large elements first, so that each tensor begins at a multiple of its element's size."""
    return dict(sorted(flatten(payload).items(), key=lambda item: (-item[1].element_size(), item[0])))


def _header(tensors: Params, sides: int) -> bytes:
    """The header with its length before it, filled up with blanks to a multiple of eight bytes."""
    about: dict[str, object] = {"__metadata__": {"sides": str(sides)}}
    at = 0
    for name, x in tensors.items():
        about[name] = {
            "dtype": NAMES.get(x.dtype, str(x.dtype)),
            "shape": list(x.shape),
            "data_offsets": [at, at := at + x.nbytes],
        }
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _memory(x: Tensor) -> memoryview:
    """A tensor's bytes, where they are."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_header(memory: memoryview) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin. Raises ValueError."""
    body = 8 + int.from_bytes(memory[:8], "little")
    if len(memory) < 8 or body > len(memory):
        raise ValueError(f"not a payload: {len(memory)} bytes, and a header that ends at {body}")
    try:
        header = json.loads(bytes(memory[8:body]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a payload: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"not a payload: its header is a {type(header).__name__}")
    return header, body


def _tensors(header: Mapping[str, Any], body: memoryview) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name. They follow each other without gap or overlap and fill the body, or it is a ValueError."""
    end = 0
    for name, about in sorted(header.items(), key=lambda item: tuple(map(int, item[1]["data_offsets"]))):
        dtype, shape, (begin, stop) = DTYPES[about["dtype"]], [int(n) for n in about["shape"]], about["data_offsets"]
        count = math.prod(shape)
        if min(shape, default=0) < 0 or begin != end or stop - begin != count * dtype.itemsize or stop > len(body):
            raise ValueError(f"'{name}' of shape {shape} lies from {begin} to {stop} of {len(body)} bytes")
        end = stop
        if count:
            yield name, torch.frombuffer(body, dtype=dtype, count=count, offset=begin).reshape(shape)
        else:
            yield name, torch.empty(shape, dtype=dtype)
    if end != len(body):
        raise ValueError(f"the tensors end at {end} of {len(body)} bytes")


def content(params: Mapping[str, Tensor]) -> str:
    """Names params by their bytes, whatever their order.

    >>> content({"w": torch.ones(1), "b": torch.zeros(2)}) == content({"b": torch.zeros(2), "w": torch.ones(1)})
    True
    """
    parts: list[bytes | str] = []
    for name, x in sorted(params.items()):
        raw = x.detach().cpu().contiguous().view(-1).view(torch.uint8)
        parts += [f"{name} {x.dtype} {tuple(x.shape)}", raw.numpy().tobytes()]
    return content_hash(*parts)
