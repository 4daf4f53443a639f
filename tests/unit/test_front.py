"""What stands before Flower's app: questions that wait, whoever leaves meanwhile, and errors that stay Flower's own."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node

from atoll.fleet.flower import front as fronts
from atoll.fleet.flower.front import LARGEST_OBJECT, LARGEST_OTHER, Front, Way


class Mailbox:
    """Messages that wait for a node, and an app behind the front that answers everything with 403."""

    def __init__(self, monkeypatch):
        self.messages: list[Message] = []
        self.seen_by_app: list[bytes] = []
        ways = {
            "/v1/fleet/pull-messages": Way(PullMessagesRequest, self.pull, waits=lambda m: [m.node.node_id]),
            "/v1/runtime/push-messages": Way(
                PushMessagesRequest, self.push, rings=lambda m: [one.metadata.dst_node_id for one in m.messages_list]
            ),
        }
        monkeypatch.setattr(fronts, "SHORT", ways)
        monkeypatch.setattr(fronts, "get_linkstate", lambda request: None)
        monkeypatch.setattr(fronts, "authenticate_node", lambda request: None)
        monkeypatch.setattr(fronts, "authenticate_task", lambda request, token, state: None)
        self.front = Front(self.app)

    def pull(self, request, state, task):
        if request.node.node_id == 13:
            raise PermissionError("not you")
        given, self.messages = self.messages[:1], self.messages[1:]
        return PullMessagesResponse(messages_list=given)

    def push(self, request, state, task):
        self.messages += request.messages_list
        return PushMessagesResponse()

    async def app(self, scope, receive, send):
        self.seen_by_app.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b"Flower says no"})

    async def call(self, path, request, *, wait="", leaves_after=None, length=None):
        """(status, body, seconds); the caller hangs up after `leaves_after` seconds, if that is given."""
        body, sent, started = request.SerializeToString(), [], time.monotonic()
        first = [{"type": "http.request", "body": body[:2], "more_body": True},
                 {"type": "http.request", "body": body[2:], "more_body": False}]  # fmt: skip

        async def receive():
            if first:
                return first.pop(0)
            await asyncio.sleep(1000 if leaves_after is None else leaves_after)
            return {"type": "http.disconnect"}

        async def send(event):
            sent.append(event)

        headers = [(b"content-length", str(length or len(body)).encode()), (b"atoll-wait", wait.encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await self.front(scope, receive, send)
        content = b"".join(one["body"] for one in sent[1:])
        return SimpleNamespace(
            status=sent[0]["status"] if sent else None, body=content, seconds=time.monotonic() - started
        )


@pytest.fixture
def mailbox(monkeypatch):
    return Mailbox(monkeypatch)


def pull(node=1):
    return PullMessagesRequest(node=Node(node_id=node))


def push(node=1):
    return PushMessagesRequest(messages_list=[Message(metadata=Metadata(dst_node_id=node))])


def heard(answer):
    return len(PullMessagesResponse.FromString(answer.body).messages_list)


async def after(seconds, coroutine):
    await asyncio.sleep(seconds)
    return await coroutine


def test_who_does_not_wait_is_answered_at_once(mailbox):
    answer = asyncio.run(mailbox.call("/v1/fleet/pull-messages", pull()))
    assert (answer.status, heard(answer)) == (200, 0)
    assert answer.seconds < 1


def test_who_waits_is_answered_when_a_message_comes_for_him_and_not_before(mailbox):
    async def both():
        return await asyncio.gather(
            mailbox.call("/v1/fleet/pull-messages", pull(1), wait="20"),
            mailbox.call("/v1/fleet/pull-messages", pull(2), wait="0.6"),
            after(0.3, mailbox.call("/v1/runtime/push-messages", push(1))),
        )

    first, other, _ = asyncio.run(both())
    assert heard(first) == 1
    assert 0.3 <= first.seconds < 2
    assert heard(other) == 0
    assert other.seconds >= 0.6
    assert not mailbox.front.bells._waiting, "nobody is left at a bell"


def test_a_message_is_not_given_to_one_who_has_hung_up(mailbox):
    async def leaves_and_comes_back():
        gone = mailbox.call("/v1/fleet/pull-messages", pull(), wait="20", leaves_after=0.2)
        left, _ = await asyncio.gather(gone, after(0.5, mailbox.call("/v1/runtime/push-messages", push())))
        return left, await mailbox.call("/v1/fleet/pull-messages", pull(), wait="5")

    left, back = asyncio.run(leaves_and_comes_back())
    assert left.status is None
    assert left.seconds < 1
    assert heard(back) == 1


def test_what_goes_wrong_is_asked_again_of_flower_with_the_whole_body(mailbox):
    answer = asyncio.run(mailbox.call("/v1/fleet/pull-messages", pull(13), wait="20"))
    assert (answer.status, answer.body) == (403, b"Flower says no")
    assert mailbox.seen_by_app == [pull(13).SerializeToString()]
    assert not mailbox.front.bells._waiting


@pytest.mark.parametrize("wait", ["nan", "-1", "soon", ""])
def test_an_odd_wish_to_wait_is_none(mailbox, wait):
    assert asyncio.run(mailbox.call("/v1/fleet/pull-messages", pull(), wait=wait)).seconds < 1


def test_what_is_too_large_is_refused_before_it_is_read(mailbox):
    for call, largest in (("push-object", LARGEST_OBJECT), ("pull-messages", LARGEST_OTHER)):
        answer = asyncio.run(mailbox.call(f"/v1/fleet/{call}", pull(), length=largest + 1))
        assert (answer.status, mailbox.seen_by_app) == (413, [])


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/", "/v1/other"])
def test_only_the_apis_are_open(mailbox, path):
    assert asyncio.run(mailbox.call(path, pull())).status == 404
