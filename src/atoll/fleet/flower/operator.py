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
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse, StartRunRequest, StartRunResponse
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    PushTaskOutputRequest,
    PushTaskOutputResponse,
    SendTaskHeartbeatRequest,
    SendTaskHeartbeatResponse,
)
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType

from atoll.fleet.flower import certs
from atoll.fleet.flower.calls import Calls, Gone, secured, unreachable
from atoll.fleet.flower.link import Arrival, Link, NotTaken, Part, Received

HEARTBEAT = 15.0
"""Seconds; Flower ends a run that it has not heard of for 60."""

RECEIVERS = 2
"""Answers that arrive at once: what is in memory is theirs, and what of others is not yet added up."""

STALL = 1.0
"""Seconds without a further chunk after which others come first."""

LOOK = 0.05
"""Seconds between two looks for further answers while some arrive."""

DENIED = (
    "the server does not accept this operator's token",
    "use the operator/ folder that `atoll certs init` made for this server",
)

LIFE = 24 * 3600.0
"""Seconds for which Flower keeps a message that nobody has answered."""


@dataclass(frozen=True)
class Failed:
    """No answer will come to a message: Flower says why."""

    answers: str
    reason: str
    unreadable: bool = False
    """Whether an answer came and cannot be read; else the site is gone."""


Answer = Received | Failed


@dataclass
class Operator:
    """A run at a server. `keys` is the operator's folder (see certs.py)."""

    server: str
    keys: Path
    limit_bytes: int
    insecure: bool = False
    control: Calls = field(init=False)
    link: Link = field(init=False)
    _over: threading.Event = field(default_factory=threading.Event)
    _arriving: dict[str, tuple[Arrival, Future[Received | None]]] = field(default_factory=dict)
    """Answers whose chunks are on their way, by what they answer."""
    _receivers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(RECEIVERS))

    def __post_init__(self) -> None:
        token = certs.read(self.keys / "operator.token", "operator's token").strip()
        bearer = {"authorization": f"Bearer {token.decode()}"}
        self.control = Calls(self.server, secured(self.server, self.keys / "ca.pem", self.insecure), lambda: bearer)
        try:
            self.link = self._started(certs.executor_secret(token))
        except Gone as error:
            self.control.close()
            raise unreachable(self.server, error, DENIED) from error
        threading.Thread(target=self._beat, daemon=True).start()

    def _started(self, secret: bytes) -> Link:
        """A run, and the right to speak in it."""
        app = empty_app()
        start = StartRunRequest(fab=Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app))
        self.control("control/start-run", start, StartRunResponse, patience=10)
        taking = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        signature = create_superexec_auth_metadata(
            auth_secret=derive_auth_secret(secret), method="/flwr.proto.Runtime/AcquireTask", request=taking
        )
        task = self.control("runtime/acquire-task", taking, AcquireTaskResponse, headers=dict(signature))
        token = {TASK_TOKEN_HEADER: task.token}
        calls = Calls(self.server, self.control.context, lambda: token)
        calls("runtime/pull-task-input", PullTaskInputRequest(), PullTaskInputResponse)
        return Link(calls, "runtime", Node(node_id=SUPERLINK_NODE_ID), task.task.run_id, self.limit_bytes)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            with suppress(Gone):
                self._alive()

    def _alive(self) -> None:
        self.link.calls("runtime/send-task-heartbeat", SendTaskHeartbeatRequest(), SendTaskHeartbeatResponse)

    def _listed(self) -> Any:
        return self.control("control/list-nodes", ListNodesRequest(), ListNodesResponse).nodes_info

    def members(self) -> list[dict[str, Any]]:
        """Everybody who is enrolled: name, status, and when Flower last heard of them."""
        known = [node for node in self._listed() if node.status != "unregistered"]
        seen = {node.name: node.last_deactivated_at or node.last_activated_at for node in known}
        return [
            {"name": node.name, "status": node.status, "last_seen": seen[node.name]}
            for node in sorted(known, key=lambda n: n.name)
        ]

    def sites(self) -> dict[str, int]:
        """Who is there now: name -> node. Raises Gone if the server has died since this run began, and knows nobody yet."""
        there = [node for node in self._listed() if node.status == "online"]
        self._alive()  # after it: a server that died and came back while we asked answers too, and knows nobody yet
        return {node.name: node.node_id for node in sorted(there, key=lambda n: n.name)}

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
        taken = self.link.calls("runtime/push-messages", request, PushAppMessagesResponse)
        if not taken.message_ids[0]:
            raise NotTaken("the site has left")
        self.link.push(taken.objects_to_push, taken.session_id, objects)
        name: str = taken.message_ids[0]
        return name

    def answers(self, names: Collection[str], wait: float) -> Iterator[Answer]:
        """What has come in answer to these messages, or comes in `wait` seconds.

        Large answers arrive beside each other, so that one on a slow line holds up nobody.
        """
        for head in self._heads([name for name in names if name not in self._arriving], wait):
            answered = head.metadata.reply_to_message_id
            if head.HasField("error"):
                yield Failed(answered, head.error.reason)
            else:
                self._advance(answered, Arrival(self.link, head))
        futures.wait([coming for _, coming in self._arriving.values()], min(wait, LOOK), futures.FIRST_COMPLETED)
        for answered, (arrival, coming) in list(self._arriving.items()):
            if answered not in names:  # whoever asked has forgotten it
                coming.cancel()
                del self._arriving[answered]
            elif coming.done():
                del self._arriving[answered]
                if (come := answer_of(answered, coming)) is not None:
                    yield come
                else:
                    self._advance(answered, arrival)

    def _advance(self, answered: str, arrival: Arrival) -> None:
        """Goes on with an answer after the others that are coming: one that hangs holds up nobody for long."""
        self._arriving[answered] = (arrival, self._receivers.submit(arrival.advance, STALL))

    def _heads(self, names: Sequence[str], wait: float) -> Sequence[Any]:
        """Heads of messages that have come: waits for them only where nothing else is on its way."""
        if not names:
            return ()
        asking = PullAppMessagesRequest(message_ids=names)
        wait = 0.0 if self._arriving else wait
        return self.link.calls.messages("runtime/pull-messages", asking, PullAppMessagesResponse, wait)

    def close(self) -> None:
        """Ends the run."""
        self._over.set()
        self._receivers.shutdown(wait=False, cancel_futures=True)
        ended = PushTaskOutputRequest(sub_status="completed", details="")
        with suppress(Gone):
            self.link.calls("runtime/push-task-output", ended, PushTaskOutputResponse, patience=2)
        self.link.calls.close()
        self.control.close()


def answer_of(answered: str, coming: Future[Received | None]) -> Answer | None:
    """An answer that has come, or what is wrong with it; None if more of it is to come. Raises Gone."""
    try:
        return coming.result()
    except ValueError as error:
        return Failed(answered, str(error), unreadable=True)


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
