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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as Wired
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from atoll.errors import AtollError
from atoll.fleet.flower import certs
from atoll.fleet.flower.link import LIMIT_BYTES, Gone, Link, Received, part, retried, trust, unreachable
from atoll.wire import Buffer

HEARTBEAT = 30.0
"""Seconds, of which Flower lets two pass before it takes a site for gone: a network may be away for half a minute."""

POLL = (0.02, 1.0)
"""Seconds between two looks for messages: while there is traffic, and after a while without."""

DENIED = (
    "the server does not let this site in",
    "its key must be enrolled there (`atoll certs site`), and only one process may use it at a time",
)

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
    limit_bytes: int = LIMIT_BYTES
    id: int = 0
    client: FleetHttpClient = field(init=False)
    _public: bytes = field(init=False)
    _links: dict[int, Link] = field(default_factory=dict)
    _work: SimpleQueue[tuple[Link, Received] | None] = field(default_factory=SimpleQueue)
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        text = certs.read(self.key_file, "key of the site")
        try:
            key = load_ssh_private_key(text, None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
        except (ValueError, AssertionError) as error:
            raise AtollError(
                "not a site's key", where=str(self.key_file), found=str(error), remedy="`atoll certs site NAME`"
            ) from error
        certs.read(self.authority, "certificate of the authority")
        self._public = public_key_to_bytes(key.public_key())
        signing = NodeAuthHttpInterceptor(key, key.public_key())
        context = trust(self.authority)
        self.client = FleetHttpClient(f"https://{self.server}", interceptors=[signing], verify=context, timeout=60.0)

    def join(self, patience: float) -> None:
        """Makes itself known to the server. Raises AtollError where it is not let in."""
        last = self.folder / "node.json"
        if last.exists():  # our last life may have ended without a word; the server would take us for a second one
            with suppress(Gone, ValueError):
                before = json.loads(last.read_text())["node"]
                retried(self.client.DeactivateNode, DeactivateNodeRequest(node_id=before), patience=0)
        try:
            request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
            self.id = retried(self.client.ActivateNode, request, patience=patience).node_id
        except Gone as error:
            raise unreachable(self.server, error, DENIED) from error
        self._links.clear()
        last.write_text(json.dumps({"node": self.id}))

    def serve(self, urgent: Urgent, answer: Answer) -> None:
        """Answers messages until `over` is set."""
        threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, lambda: self._worker(answer))]
        for thread in threads:
            thread.start()
        try:
            for link, wired in self._messages():
                with self._surviving(link, wired):
                    received = link.receive(wired)
                    said = urgent(received.parts)
                    if said is None:
                        self._work.put((link, received))
                    else:
                        self._reply(link, received, said)
        finally:
            self._work.put(None)
            self.leave()

    def leave(self) -> None:
        """Says good-bye."""
        self.over.set()
        with suppress(Gone, httpx.HTTPError):
            retried(self.client.DeactivateNode, DeactivateNodeRequest(node_id=self.id), patience=1)
        (self.folder / "node.json").unlink(missing_ok=True)

    def _messages(self) -> Iterator[tuple[Link, Wired]]:
        """Messages as they come. A server that was away, or has forgotten us, is joined again."""
        idle = 0
        while not self.over.is_set():
            try:
                pulled = retried(self.client.PullMessages, PullMessagesRequest(node=Node(node_id=self.id)))
            except Gone as error:
                self._return(error)
                continue
            idle = 0 if pulled.messages_list else idle + 1
            for wired in pulled.messages_list:
                run = wired.metadata.run_id
                yield (
                    self._links.setdefault(run, Link(self.client, Node(node_id=self.id), run, self.limit_bytes)),
                    wired,
                )
            if idle:
                self.over.wait(POLL[0] if idle < 500 else POLL[1])

    def _return(self, error: Gone) -> None:
        self.say(f"the server {self.server} is away: {error}")
        while not self.over.is_set():
            try:
                self.join(patience=5)
                self.say(f"back at {self.server}")
                return
            except AtollError:
                self.over.wait(1.0)

    def _worker(self, answer: Answer) -> None:
        while (item := self._work.get()) is not None:
            link, received = item
            with self._surviving(link, None):
                self._reply(link, received, answer(received.parts))

    @contextmanager
    def _surviving(self, link: Link, wired: Wired | None) -> Iterator[None]:
        """A message that cannot be read, or an answer that cannot be delivered, is no reason to leave."""
        try:
            yield
        except Exception as error:
            self.say(f"a message was lost: {type(error).__name__}: {error}")

    def _reply(self, link: Link, received: Received, parts: Parts) -> None:
        metadata = Message(RecordDict(), reply_to=received.message).metadata
        head, tree, objects = link.wired(metadata, [part(pieces) for pieces in parts])
        request = PushMessagesRequest(node=link.node, messages_list=[head], message_object_trees=[tree])
        taken = retried(self.client.PushMessages, request)
        link.push(taken.objects_to_push, taken.session_id, objects)

    def _beat(self) -> None:
        while not self.over.wait(HEARTBEAT / 2):
            with suppress(Gone):
                request = SendNodeHeartbeatRequest(node=Node(node_id=self.id), heartbeat_interval=HEARTBEAT)
                retried(self.client.SendNodeHeartbeat, request)


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
