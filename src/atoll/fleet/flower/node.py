"""The site's end: a SuperNode that is the warm process itself, over Flower's fleet API with the site's own key.

Flower's own SuperNode starts a process for each message; ours answers from the process that holds the model. Messages are
pulled, one thread answers at once what takes no time, another works; an answer is pushed when it is ready, in any order.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from atoll.errors import AtollError
from atoll.fleet.flower import certs
from atoll.fleet.flower.calls import AWAY, Calls, Gone, secured, unreachable
from atoll.fleet.flower.link import Arrival, Link, Received, part
from atoll.wire import Buffer

HEARTBEAT = 30.0
"""Seconds, of which Flower lets two pass before it takes a site for gone: a network may be away for half a minute."""

WAIT = 2.0
"""Seconds for which the server keeps the question for messages: so soon a site can leave."""

DENIED = (
    "the server does not let this site in",
    "its key must be enrolled there (`atoll certs site`), and only one process may use it at a time",
)

STALL = 0.2
"""Seconds without a further chunk after which other messages come first."""

Say = Callable[[str], None]
Parts = Sequence[Sequence[Buffer]]
Answer = Callable[[Sequence[Buffer]], Parts]
Urgent = Callable[[Sequence[Buffer]], Parts | None]
"""Answers what takes no time; None for what does."""


@dataclass
class SuperNode:
    """A site at a server. `folder` holds what it must find again when it starts anew."""

    server: str
    key_file: Path
    authority: Path
    folder: Path
    say: Say
    insecure: bool = False
    limit_bytes: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    """What a message may take: no more than this machine has."""
    id: int = 0
    calls: Calls = field(init=False)
    _public: bytes = field(init=False)
    _arriving: list[Arrival] = field(default_factory=list)
    """Messages that have not come whole."""
    _kept: dict[str, memoryview] = field(default_factory=dict)
    """Chunks that messages have in common."""
    _work: SimpleQueue[tuple[Link, Received] | None] = field(default_factory=SimpleQueue)
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        text = certs.read(
            self.key_file, "key of the site", "`atoll certs key`, or the folder that the host handed over"
        )
        try:
            key = load_ssh_private_key(text, None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
        except (ValueError, AssertionError) as error:
            raise AtollError(
                "not a site's key", where=str(self.key_file), found=str(error), remedy="`atoll certs site NAME`"
            ) from error
        self._public = public_key_to_bytes(key.public_key())
        context = secured(self.server, self.authority, self.insecure)
        self.calls = Calls(self.server, context, lambda: signed(key, self._public))

    def join(self, patience: float) -> None:
        """Makes itself known to the server. Raises AtollError where it is not let in."""
        last = self.folder / "node.json"
        if last.exists():  # our last life may have ended without a word; the server would take us for a second one
            with suppress(Gone, ValueError):
                before = json.loads(last.read_text())["node"]
                self._deactivate(before, patience=0)
        try:
            request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
            self.id = self.calls("fleet/activate-node", request, ActivateNodeResponse, patience=patience).node_id
        except Gone as error:
            raise unreachable(self.server, error, DENIED) from error
        last.write_text(json.dumps({"node": self.id}))

    def serve(self, urgent: Urgent, answer: Answer) -> None:
        """Answers messages until `over` is set."""
        threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, lambda: self._worker(answer))]
        for thread in threads:
            thread.start()
        try:
            for arrival in self._messages():
                with self._surviving():
                    self._hand_over(arrival, urgent)
        finally:
            self._work.put(None)
            self.leave()

    def _hand_over(self, arrival: Arrival, urgent: Urgent) -> None:
        """A message, if it has come whole, to who answers it; else it is looked at again after others."""
        received = arrival.advance(STALL)
        if received is None:
            self._arriving.append(arrival)
        elif (said := urgent(received.parts)) is None:
            self._work.put((arrival.link, received))
        else:
            self._reply(arrival.link, received, said)

    def leave(self) -> None:
        """Says good-bye."""
        self.over.set()
        with suppress(Gone):
            self._deactivate(self.id, patience=1)
        self.calls.close()
        (self.folder / "node.json").unlink(missing_ok=True)

    def _deactivate(self, id: int, patience: float) -> None:
        request = DeactivateNodeRequest(node_id=id)
        self.calls("fleet/deactivate-node", request, DeactivateNodeResponse, patience=patience)

    def _messages(self) -> Iterator[Arrival]:
        """Messages as they come, and those again that had not come whole. A server that was away is joined again."""
        while not self.over.is_set():
            node = Node(node_id=self.id)
            asking, wait = PullMessagesRequest(node=node), STALL if self._arriving else WAIT
            try:
                heads = self.calls.messages("fleet/pull-messages", asking, PullMessagesResponse, wait)
            except Gone as error:
                self._return(error)
                continue
            for wired in heads:
                link = Link(self.calls, "fleet", node, wired.metadata.run_id, self.limit_bytes, self._kept)
                yield Arrival(link, wired)
            late, self._arriving = self._arriving, []
            yield from late

    def _return(self, error: Gone) -> None:
        told = ""
        self.say(f"the server {self.server} is away: {error}")
        while not self.over.is_set():
            try:
                self.join(patience=5)
                self.say(f"back at {self.server}")
                return
            except AtollError as refused:
                if refused.what != told and refused.what != AWAY:
                    self.say(str(refused))
                told = refused.what
                self.over.wait(1.0)

    def _worker(self, answer: Answer) -> None:
        while (item := self._work.get()) is not None:
            link, received = item
            with self._surviving():
                self._reply(link, received, answer(received.parts))

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """A message that cannot be read, or an answer that cannot be delivered, is no reason to leave."""
        try:
            yield
        except Exception as error:
            self.say(f"a message was lost: {type(error).__name__}: {error}")

    def _reply(self, link: Link, received: Received, parts: Parts) -> None:
        metadata = Message(RecordDict(), reply_to=received.message).metadata
        head, tree, objects = link.wired(metadata, [part(pieces) for pieces in parts])
        request = PushMessagesRequest(node=link.node, messages_list=[head], message_object_trees=[tree])
        taken = self.calls("fleet/push-messages", request, PushMessagesResponse)
        link.push(taken.objects_to_push, taken.session_id, objects)

    def _beat(self) -> None:
        while not self.over.wait(HEARTBEAT / 2):
            with suppress(Gone):
                request = SendNodeHeartbeatRequest(node=Node(node_id=self.id), heartbeat_interval=HEARTBEAT)
                self.calls("fleet/send-node-heartbeat", request, SendNodeHeartbeatResponse)


def signed(key: ec.EllipticCurvePrivateKey, public: bytes) -> dict[str, str]:
    """Headers by which Flower knows a site: the time of day, signed."""
    at = now().isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode(),
        TIMESTAMP_HEADER: at,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, at.encode())).decode(),
    }


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder of a site: a second process with the same one is told at once."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AtollError(
                "this site has joined already, in another process",
                where=str(folder),
                remedy="stop that one, or give --state",
            ) from error
        file.write(f"{os.getpid()} {time.time()}")
        yield
