"""What both ends share: parts of bytes as Flower messages, in chunks that are named by their hash.

A message of ours is a few parts (an envelope, a broadcast, a task, a reply). Each part is cut into chunks, and each chunk is
an object of Flower's store, which takes an object once whoever sends it and says which it lacks: so a broadcast is uploaded
once for all sites, an upload that broke goes on where it was, and a chunk that was tampered with is not taken. What is
pulled is held to its hash again. A record in the message lists sizes and chunks.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as Wired
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from atoll.fleet.flower.calls import Calls, Gone
from atoll.wire import Buffer

CHUNK = 4 << 20
"""Bytes of a chunk: larger bodies cost Flower's server more than they save."""

LANES = 2
"""Chunks of a message that travel at once: while one is hashed, the other is on its way."""

MOST_OBJECTS = 8
"""Objects of a message beside its chunks: ours have three."""

WAIT_FOR_CHUNK = 60.0
"""Seconds for which a chunk that its sender has announced may be on its way."""


@dataclass(frozen=True)
class Part:
    """Bytes ready to travel. Made once for all who get them; nothing is copied before it is sent."""

    chunks: Sequence[Sequence[memoryview]]
    ids: Sequence[str]
    size: int
    stays: bool = False
    """Whether other messages will have the same: who has received it keeps it, and does not pull it again."""


def part(pieces: Sequence[Buffer], stays: bool = False) -> Part:
    """Pieces of bytes, cut into chunks that are named by their hash."""
    chunks = list(_cut(pieces))
    return Part(chunks, [_name(chunk) for chunk in chunks], sum(map(len, pieces)), stays)


def _cut(pieces: Sequence[Buffer]) -> Iterator[list[memoryview]]:
    """Views of the pieces, in chunks of CHUNK bytes but for the last."""
    chunk: list[memoryview] = []
    room = CHUNK
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while len(view):
            chunk.append(view[:room])
            view, room = view[room:], room - len(chunk[-1])
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk


def _head(size: int) -> bytes:
    """What Flower puts before the bytes of a chunk."""
    return b"ArrayChunk  %d\0" % size


def _name(chunk: Sequence[memoryview]) -> str:
    """Flower's name of a chunk: the SHA-256 of its content."""
    digest = hashlib.sha256(_head(sum(map(len, chunk))))
    for view in chunk:
        digest.update(view)
    return digest.hexdigest()


def at_once(do: Callable[..., None], *arguments: Sequence[Any]) -> None:
    """Does something for each chunk of a message, LANES at a time. What one raises is raised, after the others."""
    if len(arguments[0]) < 2:
        list(map(do, *arguments))
        return
    with ThreadPoolExecutor(LANES) as threads:  # of this message alone: one that does not come holds up no other
        list(threads.map(do, *arguments))


class NotTaken(Exception):
    """The server does not take a message, because who it is for has left."""


@dataclass
class Received:
    """A message that came: who sent it, what it answers, and its parts."""

    message: Any
    answers: str
    sender: int
    parts: list[bytearray]


@dataclass
class Link:
    """Messages of a run with chunks, over one of Flower's APIs: `runtime` at the operator, `fleet` at a site."""

    calls: Calls
    api: str
    node: Node
    run: int
    limit_bytes: int
    """What a message may take: more is not pulled."""
    kept: dict[str, memoryview] | None = None
    """By name: the chunks that stay, of the last message that had any. None: nothing is kept."""

    def wired(self, metadata: Metadata, parts: Sequence[Part]) -> tuple[Wired, ObjectTree, dict[str, Any]]:
        """A message as Flower sends it: its head, the tree of its objects, and the objects by name."""
        record = ConfigRecord(
            {
                "nonce": secrets.token_bytes(16),  # names of messages are hashes of them: nobody shall guess one
                "sizes": [one.size for one in parts],
                "chunks": [name for one in parts for name in one.ids],
                "stays": [one.stays for one in parts],
            }
        )
        message = make_message(metadata=metadata, content=RecordDict({"atoll": record}))
        message.metadata.__dict__["_message_id"] = message.object_id
        tree = get_object_tree(message)
        objects: dict[str, Any] = {name: o.deflate() for name, o in get_all_nested_objects(message).items()}
        for one in parts:
            for name, chunk in zip(one.ids, one.chunks, strict=True):
                if name not in objects:
                    tree.children.append(ObjectTree(object_id=name))
                    objects[name] = chunk
        return message_to_proto(remove_content_from_message(message)), tree, objects

    def push(self, wanted: Sequence[str], session: str, objects: dict[str, Any]) -> None:
        """Uploads the objects that the store lacks."""

        def one(name: str) -> None:
            content = objects[name]
            pieces = [content] if isinstance(content, bytes) else [_head(sum(map(len, content))), *content]
            request = PushObjectRequest(node=self.node, run_id=self.run, object_id=name, session_id=session)
            more = [_field(PushObjectRequest.OBJECT_CONTENT_FIELD_NUMBER, sum(map(len, pieces))), *pieces]
            self.calls(f"{self.api}/push-object", request, PushObjectResponse, more=more)

        at_once(one, wanted)

    def receive(self, wired: Wired) -> Received:
        """Pulls a message's objects as they come, and lets the store forget them.

        Raises ValueError for what is no message of ours, is larger than the limit, does not match its hash, or stays away.
        """
        arrival = Arrival(self, wired)
        while (received := arrival.advance(WAIT_FOR_CHUNK)) is None:
            pass
        return received

    def confirm(self, name: str) -> None:
        """Lets the store forget a message."""
        confirm = ConfirmMessageReceivedRequest(node=self.node, run_id=self.run, message_object_id=name)
        self.calls(f"{self.api}/confirm-message-received", confirm, ConfirmMessageReceivedResponse)

    def inflated(self, name: str, patience: float) -> Any:
        """The message without its chunks: one record in a list of them. Raises Absent, or ValueError."""
        contents = {name: bytes(self.pull(name, patience))}
        wanted = _children(contents[name])
        while wanted:
            child = wanted.pop()
            if child in contents or len(contents) > MOST_OBJECTS:
                raise ValueError("a message of too many objects")
            contents[child] = bytes(self.pull(child, patience))
            wanted += _children(contents[child])
        message: Any = inflate_object_from_contents(name, contents)
        message.metadata.__dict__["_message_id"] = name
        return message

    def pull(self, name: str, patience: float, size: int | None = None) -> memoryview:
        """An object, once it is there; of so many bytes, if that is known.

        Raises ValueError if it does not match its hash or is not to come, Absent if it is not there when patience ends.
        """
        end, pause = time.monotonic() + patience, 0.01
        request = PullObjectRequest(node=self.node, run_id=self.run, object_id=name)
        while True:
            answer = self.calls.raw(f"{self.api}/pull-object", request)
            if size and hashlib.sha256(end_of := memoryview(answer)[-size:]).hexdigest() == name:
                return end_of  # the content is the end of the answer: here it is without a copy
            about = PullObjectResponse.FromString(answer)
            if about.object_available:
                if hashlib.sha256(about.object_content).hexdigest() != name:
                    raise ValueError(f"the object {name[:12]} does not match its hash")
                return memoryview(about.object_content)
            if not about.object_found:
                raise ValueError(f"the object {name[:12]} did not come")
            if time.monotonic() > end:
                raise Absent(name)
            time.sleep(pause)
            pause = min(0.5, 2 * pause)


class Absent(Exception):
    """A chunk that its sender has announced is not there yet."""


Places = list[tuple[str, memoryview]]
"""Chunks by name, and where each goes."""


@dataclass
class Arrival:
    """A message on its way: what has come of it stays when the rest is late, and others come first."""

    link: Link
    wired: Wired
    progress: float = field(default_factory=time.monotonic)
    """When something last came."""
    _message: Any = None
    _parts: list[bytearray] = field(default_factory=list)
    _left: Places = field(default_factory=list)
    _stay: Places = field(default_factory=list)

    def advance(self, patience: float) -> Received | None:
        """Takes what is there; None if nothing more came in `patience` seconds.

        Raises ValueError for what is no message of ours, is larger than the limit, does not match its hash, or has not
        moved for WAIT_FOR_CHUNK seconds.
        """
        name = self.wired.metadata.message_id
        try:
            if self._message is None:
                self._message = self.link.inflated(name, patience)
                self._parts, every, self._stay = room_for(self._message, self.link.limit_bytes)
                self._left = [one for one in every if not self._have(*one)]
            self._fill(patience)
            if self._stay and self.link.kept is not None:
                self.link.kept.clear()
                self.link.kept.update(self._stay)
        except Absent as error:
            if time.monotonic() - self.progress < WAIT_FOR_CHUNK:
                return None
            self.link.confirm(name)
            raise ValueError(f"the object {str(error)[:12]} did not come") from error
        except Gone:
            raise
        except Exception as error:  # whatever Flower makes of objects that no sender of ours writes
            self.link.confirm(name)
            raise (
                error if isinstance(error, ValueError) else ValueError(f"not a message of Atoll: {error!r}")
            ) from error
        self.link.confirm(name)
        about = self.wired.metadata
        return Received(self._message, about.reply_to_message_id, about.src_node_id, self._parts)

    def _have(self, name: str, place: memoryview) -> bool:
        """Whether a chunk was kept, and is what it was; if so it is put in its place."""
        kept = (self.link.kept or {}).get(name)
        if kept is None or len(kept) != len(place) or _name([kept]) != name:
            return False
        place[:] = kept
        return True

    def _fill(self, patience: float) -> None:
        """The chunks that are there."""
        come: set[int] = set()

        def fill(number: int, name: str, place: memoryview) -> None:
            head = _head(len(place))
            content = self.link.pull(name, patience, len(head) + len(place))
            if len(content) != len(head) + len(place) or content[: len(head)] != head:
                raise ValueError(f"the chunk {name[:12]} is not {len(place)} bytes")
            place[:] = content[len(head) :]
            self.progress = time.monotonic()
            come.add(number)

        try:
            at_once(fill, range(len(self._left)), *zip(*self._left, strict=True)) if self._left else None
        finally:
            self._left = [one for number, one in enumerate(self._left) if number not in come]


def room_for(message: Any, limit_bytes: int) -> tuple[list[bytearray], Places, Places]:
    """Room for the parts of a message, and where in it each of their chunks goes: all, and those of parts that stay.

    Raises ValueError.
    """
    try:
        record = message.content["atoll"]
        sizes, chunks = [int(size) for size in record["sizes"]], list(record["chunks"])
        stays = list(record.get("stays", [False] * len(sizes)))  # a version before this one says nothing of it
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a message of Atoll: {error!r}") from error
    if min(sizes, default=0) < 0 or sum(sizes) > limit_bytes:
        raise ValueError(f"a message of {sum(sizes)} bytes, {limit_bytes} allowed")
    if sum(-(-size // CHUNK) for size in sizes) != len(chunks):
        raise ValueError(f"a message of {sum(sizes)} bytes in {len(chunks)} chunks")
    if len(stays) != len(sizes):
        raise ValueError(f"a message of {len(sizes)} parts that says of {len(stays)} whether they stay")
    parts = [bytearray(size) for size in sizes]
    room = [memoryview(one)[at : at + CHUNK] for one in parts for at in range(0, len(one), CHUNK)]
    of = [bool(stay) for one, stay in zip(parts, stays, strict=True) for _ in range(0, len(one), CHUNK)]
    every = list(zip(chunks, room, strict=True))
    return parts, every, [one for one, stay in zip(every, of, strict=True) if stay]


def _field(number: int, length: int) -> bytes:
    """What protobuf puts before `length` bytes in a field of a message; fields come in any order."""
    written, rest = bytearray(), length
    while rest > 127:
        written.append(rest & 127 | 128)
        rest >>= 7
    return bytes([number << 3 | 2, *written, rest])


def _children(content: bytes) -> list[str]:
    """The names of the objects below one of Flower's own, from its head: `Type child,child size NUL`."""
    fields = content[: content.index(b"\0")].split(b" ")
    return [name for name in fields[1].decode().split(",") if name]
