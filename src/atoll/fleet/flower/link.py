"""What both ends share: parts of bytes as Flower messages, in chunks that are named by their hash.

A message of ours is a few parts (an envelope, a broadcast, a task, a reply). Each part is cut into chunks, and each chunk is
an object of Flower's store, which takes an object once whoever sends it and says which it lacks: so a broadcast is uploaded
once for all sites, an upload that broke goes on where it was, and a chunk that was tampered with is not taken. What is
pulled is held to its hash again. A record in the message lists sizes and chunks.
"""

from __future__ import annotations

import hashlib
import secrets
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.app import ConfigRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.message_pb2 import Message as Wired
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from atoll.errors import AtollError
from atoll.wire import Buffer

CHUNK = 4 << 20
"""Bytes of a chunk: larger bodies cost Flower's server more than they save."""

LIMIT_BYTES = 1 << 36
"""What a message may take unless its reader knows better: 64 GiB."""

MOST_OBJECTS = 8
"""Objects of a message beside its chunks: ours have three."""

PATIENCE = 60.0
"""Seconds for which a call is tried again while the network is gone."""

WAIT_FOR_CHUNK = 60.0
"""Seconds for which a chunk that its sender has announced may be on its way."""

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Bytes ready to travel. Made once for all who get them; nothing is copied before it is sent."""

    chunks: Sequence[Sequence[memoryview]]
    ids: Sequence[str]
    size: int


def part(pieces: Sequence[Buffer]) -> Part:
    """Pieces of bytes, cut into chunks that are named by their hash."""
    chunks = list(_cut(pieces))
    return Part(chunks, [_name(chunk) for chunk in chunks], sum(map(len, pieces)))


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


class Gone(Exception):
    """The other end cannot be reached, or no longer knows us. The text says why."""


def unreachable(server: str, error: Gone, denied: tuple[str, str]) -> AtollError:
    """What a server comes to that does not answer, is not trusted, or does not let us in: `denied` is what, and remedy."""
    said = str(error)
    if any(status in said for status in ("HTTP 401", "HTTP 403", "HTTP 412")):
        return AtollError(denied[0], where=server, found=said, remedy=denied[1])
    if "certificate" in said.lower():
        return AtollError(
            "the server's certificate does not fit", where=server, found=said,
            remedy="ask for the server's own ca.pem, or for a certificate that names this host and has not expired",
        )  # fmt: skip
    return AtollError(
        "no server answers", where=server, found=said, remedy="check the address; HTTPS_PROXY names a proxy"
    )


class NotTaken(Exception):
    """The server does not take a message, because who it is for has left."""


def retried(call: Callable[..., T], *arguments: Any, patience: float = PATIENCE) -> T:
    """Calls until it is answered: a network that is gone comes back. Raises Gone when patience ends, or access is denied."""
    end, pause = time.monotonic() + patience, 0.05
    while True:
        try:
            return call(*arguments)
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in (502, 503, 504) or time.monotonic() > end:
                raise Gone(f"HTTP {error.response.status_code} {error.response.text[:200]}".strip()) from error
        except httpx.TransportError as error:
            if "certificate" in str(error).lower() or time.monotonic() > end:
                raise Gone(str(error) or type(error).__name__) from error
        time.sleep(pause)
        pause = min(2.0, 2 * pause)


def trust(authority: Path) -> ssl.SSLContext:
    """TLS 1.3, to servers whose certificate the federation's authority has signed and no others."""
    context = ssl.create_default_context(cafile=str(authority))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


@dataclass
class Headers:
    """Adds headers to each request of a Flower client; `make` is asked anew each time."""

    make: Callable[[], dict[str, str]]

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Flower's interceptor protocol."""
        context.request.headers.update(self.make())
        return call_next(context)


@dataclass
class Received:
    """A message that came: who sent it, what it answers, and its parts."""

    message: Any
    answers: str
    sender: int
    parts: list[bytearray]


@dataclass
class Link:
    """Messages with chunks over one of Flower's clients: the runtime's at the operator, the fleet's at a site."""

    client: Any
    node: Node
    run: int
    limit_bytes: int
    """What a message may take: more is not pulled."""
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))

    def wired(self, metadata: Metadata, parts: Sequence[Part]) -> tuple[Wired, ObjectTree, dict[str, Any]]:
        """A message as Flower sends it: its head, the tree of its objects, and the objects by name."""
        record = ConfigRecord(
            {
                "nonce": secrets.token_bytes(16),  # names of messages are hashes of them: nobody shall guess one
                "sizes": [one.size for one in parts],
                "chunks": [name for one in parts for name in one.ids],
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
            if not isinstance(content, bytes):
                content = b"".join([_head(sum(map(len, content))), *content])
            request = PushObjectRequest(
                node=self.node, run_id=self.run, object_id=name, object_content=content, session_id=session
            )
            retried(self.client.PushObject, request)

        for _ in self.pool.map(one, wanted):
            pass

    def receive(self, wired: Wired) -> Received:
        """Pulls a message's objects, and lets the store forget them.

        Raises ValueError for what is no message of ours, is larger than the limit, or does not match its hash.
        """
        name = wired.metadata.message_id
        try:
            message = self._inflated(name)
            parts = self._parts(message)
        except (ValueError, Gone):
            raise
        except Exception as error:  # whatever Flower makes of objects that no sender of ours writes
            raise ValueError(f"not a message of Atoll: {error!r}") from error
        confirm = ConfirmMessageReceivedRequest(node=self.node, run_id=self.run, message_object_id=name)
        retried(self.client.ConfirmMessageReceived, confirm)
        return Received(message, wired.metadata.reply_to_message_id, wired.metadata.src_node_id, parts)

    def _inflated(self, name: str) -> Any:
        """The message without its chunks: one record in a list of them."""
        contents = {name: self._pull(name)}
        wanted = _children(contents[name])
        while wanted:
            child = wanted.pop()
            if child in contents or len(contents) > MOST_OBJECTS:
                raise ValueError("a message of too many objects")
            contents[child] = self._pull(child)
            wanted += _children(contents[child])
        message: Any = inflate_object_from_contents(name, contents)
        message.metadata.__dict__["_message_id"] = name
        return message

    def _parts(self, message: Any) -> list[bytearray]:
        try:
            record = message.content["atoll"]
            sizes, chunks = [int(size) for size in record["sizes"]], list(record["chunks"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a message of Atoll: {error!r}") from error
        if min(sizes, default=0) < 0 or sum(sizes) > self.limit_bytes:
            raise ValueError(f"a message of {sum(sizes)} bytes, {self.limit_bytes} allowed")
        if sum(-(-size // CHUNK) for size in sizes) != len(chunks):
            raise ValueError(f"a message of {sum(sizes)} bytes in {len(chunks)} chunks")
        parts = [bytearray(size) for size in sizes]
        places = [memoryview(one)[at : at + CHUNK] for one in parts for at in range(0, len(one), CHUNK)]

        def fill(name: str, place: memoryview) -> None:
            content = self._pull(name)
            head = _head(len(place))
            if len(content) != len(head) + len(place) or not content.startswith(head):
                raise ValueError(f"the chunk {name[:12]} is not {len(place)} bytes")
            place[:] = memoryview(content)[len(head) :]

        for _ in self.pool.map(fill, chunks, places):
            pass
        return parts

    def _pull(self, name: str) -> bytes:
        """An object, once it is there. Raises ValueError if it does not match its hash, or does not come."""
        end, pause = time.monotonic() + WAIT_FOR_CHUNK, 0.01
        while True:
            request = PullObjectRequest(node=self.node, run_id=self.run, object_id=name)
            answer = retried(self.client.PullObject, request)
            if answer.object_available:
                content: bytes = answer.object_content
                if hashlib.sha256(content).hexdigest() != name:
                    raise ValueError(f"the object {name[:12]} does not match its hash")
                return content
            if not answer.object_found or time.monotonic() > end:
                raise ValueError(f"the object {name[:12]} did not come")
            time.sleep(pause)
            pause = min(0.5, 2 * pause)


def _children(content: bytes) -> list[str]:
    """The names of the objects below one of Flower's own, from its head: `Type child,child size NUL`."""
    fields = content[: content.index(b"\0")].split(b" ")
    return [name for name in fields[1].decode().split(",") if name]
