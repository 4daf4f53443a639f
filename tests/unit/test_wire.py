"""The wire, held to the safetensors library in both directions, and against headers that lie."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll import wire
from atoll.params import equal
from atoll.transforms.chain import Payload

PAYLOAD = Payload(
    {"w": torch.randn(3, 5), "b": torch.randn(()), "half": torch.randn(7).bfloat16(), "none": torch.zeros(0, 4)},
    ({"w#at": torch.arange(3), "w#sign": torch.tensor([True, False, True])}, {"q": torch.arange(-3, 4).to(torch.int8)}),
)


def test_the_library_reads_what_we_write_and_we_read_what_it_writes():
    flat = wire.flatten(PAYLOAD)
    assert equal(safetensors.torch.load(wire.pack(PAYLOAD)), flat)
    written = safetensors.torch.save(flat, metadata={"sides": "2"})
    assert equal(wire.flatten(wire.unpack(written, len(written))), flat)
    assert len(written) == wire.size(PAYLOAD) == len(wire.pack(PAYLOAD))


def test_pieces_are_the_tensors_own_memory():
    x = torch.zeros(4)
    header, body = wire.pieces(Payload({"x": x}))
    x[0] = 1.0
    back = wire.unpack(bytearray(b"".join([header, body])), 1000)
    assert back.main["x"][0] == 1.0


def test_a_transposed_tensor_arrives_as_it_was():
    x = torch.arange(6.0).reshape(2, 3).T
    data = wire.pack(Payload({"x": x}))
    assert torch.equal(wire.unpack(data, len(data)).main["x"], x)


def forged(**changes: object) -> bytes:
    """Two tensors of four floats, one of which has the header that is asked for."""
    good = {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}
    header = {
        "__metadata__": {"sides": "0"},
        "m/a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "m/b": {**good, **changes},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(32)


def test_the_forgery_without_changes_is_read():
    assert wire.unpack(forged(), 1000).main["b"].shape == (4,)


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": [0, 16]},
        {"data_offsets": [8, 24]},
        {"data_offsets": [16, 48]},
        {"data_offsets": [16]},
        {"data_offsets": "16"},
        {"data_offsets": [16.5, 32]},
        {"shape": [5]},
        {"shape": [-4]},
        {"shape": [-2, -2]},
        {"shape": [2**62, 4]},
        {"shape": "four"},
        {"dtype": "F8"},
        {"dtype": ["F32"]},
    ],
    ids=str,
)
def test_a_header_that_lies_is_a_value_error(changes):
    with pytest.raises(ValueError, match="not a payload"):
        wire.unpack(forged(**changes), 1000)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_payload_with_bytes_changed_is_read_or_is_a_value_error(data):
    packed = bytearray(wire.pack(PAYLOAD))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = wire.unpack(packed[: data.draw(st.integers(0, len(packed)))], 10_000)
    except ValueError:
        return
    assert sum(x.nbytes for x in wire.flatten(back).values()) <= len(packed)
