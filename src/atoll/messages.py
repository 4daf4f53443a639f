"""Tasks and replies as bytes, and back: for clients that live in another process or on another machine. Never pickle.

    8 bytes: length of the head | head: JSON | a payload of wire.py for each stream that the head names

each filled up to a multiple of eight bytes, so that tensors can be used where they lie.

The broadcast of a round goes once to whoever works for several clients, so a task names it by its round alone; what is fixed
in it goes once a run, as a message of its own.

Reading raises ValueError for anything that is no message, or larger than `limit_bytes`, before it takes the memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from itertools import chain
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from atoll import wire
from atoll.exchange import Broadcast, Dropped, Event, Reply, Task
from atoll.params import Params
from atoll.transforms.chain import Payload
from atoll.wire import Buffer

LIMIT_BYTES = 1 << 36
"""What a message may take unless its reader knows better: 64 GiB."""

TENSORS = ("broadcast", "payloads")
"""Fields that do not travel in the head."""

WRONG = (KeyError, TypeError, AttributeError, OverflowError, UnicodeDecodeError, json.JSONDecodeError)
"""What a head that is JSON, but not ours, comes to."""


def pack_broadcast(sent: Broadcast) -> list[Buffer]:
    """The round's params, encoded; in pieces, as everything that is packed here, to be written one after the other."""
    return _pack({"kind": "broadcast", "round": sent.round}, sent.payloads)


def pack_fixed(fixed: Mapping[str, Params]) -> list[Buffer]:
    """What a broadcast does not say again: the same bytes in every round."""
    return _pack({"kind": "fixed"}, {name: Payload(params) for name, params in fixed.items()})


def kind_of(data: Buffer) -> str:
    """What these bytes are, from their head alone."""
    return str(_head(data)[0].get("kind"))


def unpack_fixed(data: Buffer, limit_bytes: int = LIMIT_BYTES) -> dict[str, Params]:
    """Back from `pack_fixed`."""
    return {name: payload.main for name, payload in _unpack(data, limit_bytes)[1].items()}


def unpack_broadcast(data: Buffer, fixed: Mapping[str, Params], limit_bytes: int = LIMIT_BYTES) -> Broadcast:
    """Back from `pack_broadcast`, with what it does not say again."""
    head, payloads = _unpack(data, limit_bytes)
    try:
        return Broadcast(int(head["round"]), payloads, fixed)
    except WRONG as error:
        raise ValueError(f"not a broadcast: {error}") from error


def pack_task(task: Task) -> list[Buffer]:
    """A task without its broadcast."""
    about = {f.name: getattr(task, f.name) for f in fields(task) if f.name not in TENSORS}
    return _pack({"kind": "task", "round": task.broadcast.round, "task": about}, {})


def unpack_task(data: Buffer, broadcast: Broadcast) -> Task:
    """Back from `pack_task`, with the broadcast that it names. Raises ValueError if this is another."""
    head, _ = _unpack(data, LIMIT_BYTES)
    try:
        if head["round"] != broadcast.round:
            raise ValueError(f"a task of round {head['round']} with the broadcast of round {broadcast.round}")
        return Task(**_typed(Task, head["task"]), broadcast=broadcast)
    except WRONG as error:
        raise ValueError(f"not a task: {error}") from error


def task_id(data: Buffer) -> str:
    """The id of a packed task. Raises ValueError for what is none."""
    head, _ = _head(data)
    try:
        return unpack_task(data, Broadcast(head["round"], {})).id
    except WRONG as error:
        raise ValueError(f"not a task: {error}") from error


def pack_event(event: Event) -> list[Buffer]:
    """A reply, or word that none will come."""
    if isinstance(event, Dropped):
        return _pack({"kind": "dropped", "dropped": vars(event)}, {})
    about = {f.name: getattr(event, f.name) for f in fields(event) if f.name not in TENSORS}
    return _pack({"kind": "reply", "reply": about}, event.payloads)


def unpack_event(data: Buffer, limit_bytes: int = LIMIT_BYTES) -> Event:
    """Back from `pack_event`."""
    head, payloads = _unpack(data, limit_bytes)
    try:
        if head["kind"] == "dropped":
            return Dropped(**_typed(Dropped, head["dropped"]))
        return replace(Reply(**_typed(Reply, head["reply"])), payloads=payloads)
    except WRONG as error:
        raise ValueError(f"not a message: {error}") from error


@cache
def _types(kind: type) -> dict[str, TypeAdapter[Any]]:
    return {name: TypeAdapter(hint) for name, hint in get_type_hints(kind).items() if name not in TENSORS}


def _typed(kind: type, about: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a message that are no tensors, each of the type that it is declared with. Raises ValueError."""
    return {name: _types(kind)[name].validate_python(value, strict=True) for name, value in about.items()}


def _pack(head: dict[str, Any], payloads: Mapping[str, Payload]) -> list[Buffer]:
    blocks = {stream: wire.pieces(payload) for stream, payload in payloads.items()}
    lengths = {stream: sum(map(len, block)) for stream, block in blocks.items()}
    text = json.dumps({**head, "streams": lengths}).encode()
    text += b" " * (-len(text) % 8)
    filled = ([*block, bytes(-lengths[stream] % 8)] for stream, block in blocks.items())
    return [len(text).to_bytes(8, "little") + text, *chain.from_iterable(filled)]


def _head(data: Buffer) -> tuple[dict[str, Any], int]:
    """The head, and where the payloads begin."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        head = json.loads(bytes(data[8:end]))
    except (*WRONG, RecursionError) as error:
        raise ValueError(f"not a message: {error}") from error
    if not isinstance(head, dict):
        raise ValueError(f"not a message: its head is a {type(head).__name__}")
    return head, end


def _unpack(data: Buffer, limit_bytes: int) -> tuple[dict[str, Any], dict[str, Payload]]:
    if len(data) > limit_bytes:
        raise ValueError(f"a message of {len(data)} bytes, {limit_bytes} allowed")
    memory = memoryview(data)
    head, at = _head(memory)
    payloads = {}
    try:
        for stream, length in head.pop("streams").items():
            payloads[stream] = wire.unpack(memory[at : at + length], limit_bytes)
            at += length + -length % 8
    except WRONG as error:
        raise ValueError(f"not a message: {error}") from error
    return head, payloads
