"""Tasks and replies as bytes, and back: for clients that live in another process or on another machine. Never pickle.

One safetensors buffer: the tensors of every stream under `STREAM:PART/NAME`, everything else as JSON in its metadata. The
broadcast of a round goes once to whoever works for several clients, so a task names it by its round alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from atoll import wire
from atoll.exchange import Broadcast, Dropped, Event, Reply, Task
from atoll.params import Params
from atoll.transforms.chain import Payload


def pack_broadcast(sent: Broadcast) -> bytes:
    """The round's params, encoded."""
    return _pack({"kind": "broadcast", "round": sent.round}, sent.payloads)


def unpack_broadcast(data: bytes) -> Broadcast:
    """Back from `pack_broadcast`."""
    about, payloads = _unpack(data)
    return Broadcast(about["round"], payloads)


def is_broadcast(data: bytes) -> bool:
    """Whether these bytes are a broadcast, from their head alone."""
    return bool(_about(data)["kind"] == "broadcast")


def pack_task(task: Task) -> bytes:
    """A task without its broadcast."""
    about = {f.name: getattr(task, f.name) for f in fields(task) if f.name != "broadcast"}
    return _pack({"kind": "task", "round": task.broadcast.round, "task": about}, {})


def unpack_task(data: bytes, broadcast: Broadcast) -> Task:
    """Back from `pack_task`, with the broadcast that it names. Raises ValueError if this is another."""
    about, _ = _unpack(data)
    if about["round"] != broadcast.round:
        raise ValueError(f"a task of round {about['round']} with the broadcast of round {broadcast.round}")
    return Task(**about["task"], broadcast=broadcast)


def pack_event(event: Event) -> bytes:
    """A reply, or word that none will come."""
    if isinstance(event, Dropped):
        return _pack({"kind": "dropped", "dropped": vars(event)}, {})
    about = {f.name: getattr(event, f.name) for f in fields(event) if f.name != "payloads"}
    return _pack({"kind": "reply", "reply": about}, event.payloads)


def unpack_event(data: bytes) -> Event:
    """Back from `pack_event`."""
    about, payloads = _unpack(data)
    if about["kind"] == "dropped":
        return Dropped(**about["dropped"])
    return replace(Reply(**about["reply"]), payloads=payloads)


def _pack(about: dict[str, Any], payloads: Mapping[str, Payload]) -> bytes:
    flat: Params = {}
    for stream, payload in payloads.items():
        flat |= {f"{stream}:{name}": x.contiguous() for name, x in wire.flatten(payload).items()}
    sides = {stream: len(payload.sides) for stream, payload in payloads.items()}
    return bytes(save(flat, metadata={"message": json.dumps({**about, "sides": sides})}))


def _about(data: bytes) -> dict[str, Any]:
    """The JSON in the metadata of a safetensors buffer."""
    try:
        length = int.from_bytes(data[:8], "little")
        about: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["message"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"not a message: {error}") from error
    return about


def _unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Payload]]:
    about = _about(data)
    try:
        flat = load(data)
    except SafetensorError as error:
        raise ValueError(f"not a message: {error}") from error
    payloads = {}
    for stream, sides in about.pop("sides").items():
        start = stream + ":"
        own = {name.removeprefix(start): x for name, x in flat.items() if name.startswith(start)}
        payloads[stream] = wire.unflatten(own, sides)
    return about, payloads
