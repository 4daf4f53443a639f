"""The operator's end: a Flower run of its own, in which messages go to sites and their answers come back.

Speaks Flower's control API (who is there; start a run) and its runtime API (push and pull messages), as the process of a
ServerApp would. The app that Flower wants for a run is empty, and nothing of it is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.control_pb2 import ListNodesRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from atoll.fleet.flower import certs
from atoll.fleet.flower.link import Gone, Headers, Link, NotTaken, Part, Received, retried, trust, unreachable

HEARTBEAT = 15.0
"""Seconds; Flower ends a run that it has not heard of for 60."""

DENIED = (
    "the server does not accept this operator's token",
    "use the operator/ folder that `atoll certs init` made for this server",
)

LIFE = 24 * 3600.0
"""Seconds for which Flower keeps a message that nobody has answered."""


def executor_secret(token: bytes) -> bytes:
    """What lets a process take a run's work at the SuperLink: whoever has the operator's token."""
    return hashlib.sha256(b"executor " + token).digest()


@dataclass(frozen=True)
class Failed:
    """No answer will come to a message: Flower says why."""

    answers: str
    reason: str
    unreadable: bool = False
    """Whether an answer came and cannot be read; else the site is gone."""


@dataclass
class Operator:
    """A run at a server. `keys` is the operator's folder (see certs.py)."""

    server: str
    keys: Path
    limit_bytes: int
    control: ControlHttpClient = field(init=False)
    link: Link = field(init=False)
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        token = certs.read(self.keys / "operator.token", "operator's token").strip()
        certs.read(self.keys / "ca.pem", "certificate of the authority")
        address, context = f"https://{self.server}", trust(self.keys / "ca.pem")
        bearer = Headers(lambda: {"authorization": f"Bearer {token.decode()}"})
        self.control = ControlHttpClient(address, interceptors=[bearer], verify=context)
        self._start(address, context, executor_secret(token))
        threading.Thread(target=self._beat, daemon=True).start()

    def _start(self, address: str, context: Any, secret: bytes) -> None:
        """A run, and the right to speak in it."""
        app = empty_app()
        try:
            retried(
                self.control.StartRun,
                StartRunRequest(fab=Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app)),
                patience=10,
            )
            protected = {"/flwr.proto.Runtime/AcquireTask"}
            taker = RuntimeHttpClient(
                address,
                verify=context,
                interceptors=[SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected)],
            )
            task = retried(taker.AcquireTask, AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            taker.close()
        except Gone as error:
            raise unreachable(self.server, error, DENIED) from error
        token = {TASK_TOKEN_HEADER: task.token}
        client = RuntimeHttpClient(address, verify=context, interceptors=[Headers(lambda: token)])
        self.link = Link(client, Node(node_id=SUPERLINK_NODE_ID), task.task.run_id, self.limit_bytes)
        retried(client.PullTaskInput, PullTaskInputRequest())

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            with suppress(Gone):
                retried(self.link.client.SendTaskHeartbeat, SendTaskHeartbeatRequest())

    def members(self) -> list[dict[str, Any]]:
        """Everybody who is enrolled: name, status, and when Flower last heard of them."""
        listed = retried(self.control.ListNodes, ListNodesRequest()).nodes_info
        known = [node for node in listed if node.status != "unregistered"]
        seen = {node.name: node.last_deactivated_at or node.last_activated_at for node in known}
        return [
            {"name": node.name, "status": node.status, "last_seen": seen[node.name]}
            for node in sorted(known, key=lambda n: n.name)
        ]

    def sites(self) -> dict[str, int]:
        """Who is there now: name -> node. Raises Gone if the server has died since this run began, and knows nobody yet."""
        retried(self.link.client.SendTaskHeartbeat, SendTaskHeartbeatRequest())
        listed = retried(self.control.ListNodes, ListNodesRequest()).nodes_info
        return {node.name: node.node_id for node in sorted(listed, key=lambda n: n.name) if node.status == "online"}

    def send(self, node: int, parts: Sequence[Part]) -> str:
        """Sends a message; gives its name, by which it will be answered. Raises NotTaken, or Gone."""
        metadata = Metadata(
            run_id=self.link.run,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=LIFE,
            message_type="query.atoll",
        )
        metadata.delivered_at = ""
        head, tree, objects = self.link.wired(metadata, parts)
        request = PushAppMessagesRequest(messages_list=[head], message_object_trees=[tree])
        taken = retried(self.link.client.PushMessages, request)
        if not taken.message_ids[0]:
            raise NotTaken("the site has left")
        self.link.push(taken.objects_to_push, taken.session_id, objects)
        name: str = taken.message_ids[0]
        return name

    def answers(self, names: Collection[str]) -> Iterator[Received | Failed]:
        """What has come in answer to these messages; does not wait for more."""
        pulled = retried(self.link.client.PullMessages, PullAppMessagesRequest(message_ids=list(names)))
        for head in pulled.messages_list:
            answered = head.metadata.reply_to_message_id
            if head.HasField("error"):
                yield Failed(answered, head.error.reason)
                continue
            try:
                yield self.link.receive(head)
            except ValueError as error:
                yield Failed(answered, str(error), unreadable=True)

    def close(self) -> None:
        """Ends the run."""
        self._over.set()
        with suppress(Gone, httpx.HTTPError):
            retried(
                self.link.client.PushTaskOutput, PushTaskOutputRequest(sub_status="completed", details=""), patience=2
            )
        self.link.pool.shutdown(wait=False)


def empty_app() -> bytes:
    """The least that Flower takes for an app: a name in a zip."""
    about = b"""[project]
name = "atoll"
version = "1.0.0"
[tool.flwr.app]
publisher = "atoll"
[tool.flwr.app.components]
serverapp = "atoll:none"
clientapp = "atoll:none"
"""
    listed = f"pyproject.toml,{hashlib.sha256(about).hexdigest()},{len(about) * 8}"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(zipfile.ZipInfo("pyproject.toml", (2024, 1, 1, 0, 0, 0)), about)
        file.writestr(zipfile.ZipInfo(".info/CONTENT", (2024, 1, 1, 0, 0, 0)), listed)
    return packed.getvalue()
