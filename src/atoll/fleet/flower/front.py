"""What stands before Flower's app in the server: a door, a short way, and questions that wait.

The door: only Flower's APIs are open, and no body is larger than it needs to be. The short way: messages and their objects
go to Flower's own authentication and handlers past its middlewares, which cost more than the handlers do. Whatever goes
wrong on it is asked again of the app, so that errors are Flower's own. Questions that wait: who asks for messages and says
for how long is answered when one comes, instead of asking fifty times a second.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers as fleet
from flwr.superlink.servicer.runtime import runtime_handlers as runtime
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from atoll.fleet.flower.calls import WAIT_HEADER
from atoll.fleet.flower.link import CHUNK

LARGEST_OBJECT = 2 * CHUNK
LARGEST_OTHER = CHUNK // 2
"""Bytes of any other request: the names of 100 GB of chunks."""
OPEN_PATHS = ("/v1/fleet/", "/v1/control/", "/v1/runtime/", "/health")
LONGEST_WAIT = 25.0

Body = bytes
Receive = Callable[[], Any]
Send = Callable[[Any], Any]


@dataclass(frozen=True)
class Way:
    """A call that goes the short way: its request, its handler, and whom its messages concern."""

    request: Any
    handle: Callable[[Any, Any, Any], Any]
    """(request, state, task) -> response; at the fleet API there is no task."""
    waits: Callable[[Any], Iterable[Any]] | None = None
    """Names of the bells at which who makes this call may wait."""
    rings: Callable[[Any], Iterable[Any]] | None = None
    """Names of the bells that this call rings."""


SHORT = {
    "/v1/fleet/push-messages": Way(
        PushMessagesRequest,
        lambda request, state, _: fleet.push_messages(request, state),
        rings=lambda request: [one.metadata.reply_to_message_id for one in request.messages_list],
    ),
    "/v1/fleet/pull-messages": Way(
        PullMessagesRequest,
        lambda request, state, _: fleet.pull_messages(request, state, state.object_store),
        waits=lambda request: [request.node.node_id],
    ),
    "/v1/fleet/push-object": Way(PushObjectRequest, lambda request, state, _: fleet.push_object(request, state)),
    "/v1/fleet/pull-object": Way(PullObjectRequest, lambda request, state, _: fleet.pull_object(request, state)),
    "/v1/fleet/confirm-message-received": Way(
        ConfirmMessageReceivedRequest,
        lambda request, state, _: fleet.confirm_message_received(request, state, state.object_store),
    ),
    "/v1/runtime/push-messages": Way(
        PushAppMessagesRequest,
        runtime.push_messages,
        rings=lambda request: [one.metadata.dst_node_id for one in request.messages_list],
    ),
    "/v1/runtime/pull-messages": Way(
        PullAppMessagesRequest, runtime.pull_messages, waits=lambda request: request.message_ids
    ),
    "/v1/runtime/push-object": Way(PushObjectRequest, runtime.push_object),
    "/v1/runtime/pull-object": Way(PullObjectRequest, runtime.pull_object),
    "/v1/runtime/confirm-message-received": Way(ConfirmMessageReceivedRequest, runtime.confirm_message_received),
}
"""Nodes wait by their number, operators by the names of the messages that they want answered."""


class Bells:
    """Who waits for what, by name. Used in the event loop's thread alone."""

    def __init__(self) -> None:
        self._waiting: defaultdict[Any, set[asyncio.Event]] = defaultdict(set)

    def wait_at(self, names: Iterable[Any]) -> asyncio.Event:
        """A bell that rings when one of these does."""
        bell = asyncio.Event()
        for name in names:
            self._waiting[name].add(bell)
        return bell

    def leave(self, names: Iterable[Any], bell: asyncio.Event) -> None:
        """Nobody waits with it any more."""
        for name in names:
            self._waiting[name].discard(bell)
            if not self._waiting[name]:
                del self._waiting[name]

    def ring(self, names: Iterable[Any]) -> None:
        """Wakes all who wait at one of these."""
        for name in names:
            for bell in self._waiting.get(name, ()):
                bell.set()


@dataclass
class Front:
    """See the module's text. `flower` is the app that Flower made."""

    flower: Any
    bells: Bells = field(default_factory=Bells)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.flower(scope, receive, send)
        elif not scope["path"].startswith(OPEN_PATHS):
            await _refuse(send, 404)
        elif scope["method"] == "POST" and not _fits(scope):
            await _refuse(send, 413)
        elif scope["method"] == "POST" and scope["path"] in SHORT:
            await self._short(SHORT[scope["path"]], scope, receive, send)
        else:
            await self.flower(scope, receive, send)

    async def _short(self, way: Way, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        body = await _whole(receive)
        if body is None:
            return
        try:
            request = Request({**scope, "app": self.flower, "state": {}})
            message = await run_in_threadpool(way.request.FromString, body)
            request.state.protobuf_request = message
            answer = await self._waited_for(way, request, message, receive)
        except Exception:  # Flower says what is wrong
            await self.flower(scope, _again(body, receive), send)
            return
        if answer is not None:
            if way.rings is not None:
                self.bells.ring(way.rings(message))
            await _respond(send, answer)

    async def _waited_for(self, way: Way, request: Request, message: Any, receive: Receive) -> Any:
        """The handler's answer, when there is one that says something; None if nobody listens any more."""
        end = asyncio.get_running_loop().time() + _seconds(request.headers.get(WAIT_HEADER, "0"))
        answer = await run_in_threadpool(_handle, way, request, message)  # nobody waits who is not known
        if way.waits is None or answer.messages_list or end <= asyncio.get_running_loop().time():
            return answer
        names, gone = list(way.waits(message)), asyncio.ensure_future(receive())
        try:
            while not gone.done():  # else the message stays where it is, for the next who asks
                bell = self.bells.wait_at(names)
                try:
                    answer = await run_in_threadpool(_handle, way, request, message)
                    left = end - asyncio.get_running_loop().time()
                    if answer.messages_list or left <= 0:
                        return answer
                    await _either(bell, gone, left)
                finally:
                    self.bells.leave(names, bell)
        finally:
            gone.cancel()
        return None


def _handle(way: Way, request: Request, message: Any) -> Any:
    """Flower's authentication and handler; raises what they raise."""
    state = get_linkstate(request)
    if request.url.path.startswith("/v1/fleet/"):
        authenticate_node(request)
        return way.handle(message, state, None)
    return way.handle(message, state, authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), state))


async def _either(bell: asyncio.Event, gone: asyncio.Future[Any], seconds: float) -> None:
    """Until the bell rings, the other end is gone, or time is over."""
    ringing = asyncio.ensure_future(bell.wait())
    await asyncio.wait({ringing, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    ringing.cancel()
    with suppress(asyncio.CancelledError):
        await ringing


async def _whole(receive: Receive) -> Body | None:
    """A request's body; None if it breaks off."""
    parts: list[bytes] = []
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        parts.append(event.get("body", b""))
        if not event.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _again(body: Body, receive: Receive) -> Receive:
    """A body that was read, to be read once more."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Any:
        return left.pop() if left else await receive()

    return given


def _seconds(written: str) -> float:
    """For how long somebody wants to wait."""
    try:
        seconds = float(written)
    except ValueError:
        return 0.0
    return min(LONGEST_WAIT, seconds) if seconds > 0 else 0.0


def _fits(scope: Mapping[str, Any]) -> bool:
    length = dict(scope["headers"]).get(b"content-length", b"")
    largest = LARGEST_OBJECT if scope["path"].endswith("/push-object") else LARGEST_OTHER
    return length.isdigit() and int(length) <= largest


async def _respond(send: Send, answer: Any) -> None:
    content = answer.SerializeToString()
    length = str(len(content)).encode()
    headers = [(b"content-type", PROTOBUF_MEDIA_TYPE.encode()), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _refuse(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
