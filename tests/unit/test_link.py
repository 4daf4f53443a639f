"""Messages in chunks over a store like Flower's: what is sent twice, broken off, tampered with or too large."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field

import pytest
from flwr.app.metadata import Metadata
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node

from atoll.fleet.flower import certs
from atoll.fleet.flower import link as linked
from atoll.fleet.flower.link import Arrival, Link, part
from atoll.fleet.flower.node import SuperNode


@dataclass
class Store:
    """Objects by their hash, behind calls as they travel; `spoil` changes what is given out."""

    objects: dict[str, bytes] = field(default_factory=dict)
    pushed: list[str] = field(default_factory=list)
    spoil: dict[str, bytes] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    """Announced, and on their way."""
    pulled: list[str] = field(default_factory=list)

    def raw(self, path, request, *, more=()):
        body = b"".join([request.SerializeToString(), *more])
        if path == "fleet/push-object":
            pushed = PushObjectRequest.FromString(body)
            assert hashlib.sha256(pushed.object_content).hexdigest() == pushed.object_id, "Flower would not take it"
            self.pushed.append(pushed.object_id)
            self.objects[pushed.object_id] = pushed.object_content
            return PushObjectResponse(stored=True).SerializeToString()
        if path == "fleet/pull-object":
            self.pulled.append(request.object_id)
            content = self.spoil.get(request.object_id, self.objects.get(request.object_id))
            there = content is not None
            found = PullObjectResponse(
                object_found=there or request.object_id in self.late, object_available=there, object_content=content
            )
            return found.SerializeToString()
        assert path == "fleet/confirm-message-received"
        return b""

    def __call__(self, path, request, answer, *, more=()):
        return answer.FromString(self.raw(path, request, more=more))


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(linked, "CHUNK", 1000)
    return Store()


@pytest.fixture
def ends(store):
    return Link(store, "fleet", Node(node_id=1), 7, limit_bytes=100_000, kept={})


def send(ends, store, *parts):
    """As an operator does; gives what the receiver hears of first."""
    metadata = Metadata(
        run_id=7, message_id="", src_node_id=1, dst_node_id=2, reply_to_message_id="", group_id="",
        created_at=time.time(), ttl=60.0, message_type="query.atoll",
    )  # fmt: skip
    metadata.delivered_at = ""
    head, _, objects = ends.wired(metadata, parts)
    ends.push([name for name in objects if name not in store.objects], "session", objects)
    return head


@pytest.mark.parametrize("sizes", [(0,), (1,), (999, 1), (1000,), (1001, 0, 2500), (10_000,)])
def test_parts_arrive_as_they_were(ends, store, sizes):
    sent = [os.urandom(size) for size in sizes]
    received = ends.receive(send(ends, store, *(part([one[:3], one[3:]]) for one in sent)))
    assert [bytes(one) for one in received.parts] == sent


def test_a_broadcast_is_uploaded_once_however_many_get_it(ends, store):
    broadcast = part([os.urandom(5000)])
    send(ends, store, broadcast)
    before = len(store.pushed)
    head = send(ends, store, broadcast, part([b"for you alone"]))
    assert not set(broadcast.ids) & set(store.pushed[before:])
    assert bytes(ends.receive(head).parts[1]) == b"for you alone"


def test_what_stays_is_pulled_once_and_held_to_its_hash(ends, store):
    same = part([os.urandom(2500)], stays=True)
    first = ends.receive(send(ends, store, part([b"one"]), same))
    ends.receive(send(ends, store, part([b"about something else"])))
    before = len(store.pulled)
    again = ends.receive(send(ends, store, part([b"two"]), same))
    assert bytes(again.parts[1]) == bytes(first.parts[1])
    assert not set(same.ids) & set(store.pulled[before:])
    again.parts[1][1500] ^= 1  # by whoever works with it: the second chunk is not what it was
    before = len(store.pulled)
    assert bytes(ends.receive(send(ends, store, same)).parts[0]) == bytes(first.parts[1])
    assert set(same.ids) & set(store.pulled[before:]) == {same.ids[1]}
    ends.receive(send(ends, store, part([os.urandom(1200)], stays=True)))
    before = len(store.pulled)
    ends.receive(send(ends, store, same))
    assert set(same.ids) <= set(store.pulled[before:]), "the last that stays is kept, and no more"


def test_a_site_pulls_what_stays_once_however_many_messages_have_it(store, tmp_path, monkeypatch):
    certs.site_key(tmp_path / "site.key")
    node = SuperNode("localhost:1", tmp_path / "site.key", tmp_path / "ca.pem", tmp_path, print, insecure=True)
    same, operator = part([os.urandom(2500)], stays=True), Link(store, "fleet", Node(node_id=1), 7, limit_bytes=100_000)
    heads = [send(operator, store, part([word]), same) for word in (b"one", b"two")]
    monkeypatch.setattr(
        store, "messages", lambda *asked: [heads.pop(0)] if heads else node.over.set() or [], raising=False
    )
    node.calls = store
    received = [arrival.advance(0.0) for arrival in node._messages()]
    assert [bytes(one.parts[0]) for one in received] == [b"one", b"two"]
    assert bytes(received[0].parts[1]) == bytes(received[1].parts[1])
    assert [store.pulled.count(name) for name in same.ids] == [1, 1, 1]


def test_an_end_that_keeps_nothing_is_not_made_to(ends, store):
    ends.kept = None
    same = part([os.urandom(2500)], stays=True)
    for _ in range(2):
        ends.receive(send(ends, store, same))
    assert [store.pulled.count(name) for name in same.ids] == [2, 2, 2]


def test_two_messages_of_one_content_have_two_names(ends, store):
    assert send(ends, store, part([b"x"])).metadata.message_id != send(ends, store, part([b"x"])).metadata.message_id


def test_a_chunk_that_was_tampered_with_is_not_believed(ends, store):
    one = part([os.urandom(2500)])
    head = send(ends, store, one)
    good = store.objects[one.ids[1]]
    store.spoil[one.ids[1]] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(ValueError, match="does not match its hash"):
        ends.receive(head)


def test_an_upload_that_was_cut_off_is_not_waited_for_for_ever(ends, store, monkeypatch):
    monkeypatch.setattr(linked, "WAIT_FOR_CHUNK", 0.2)
    one = part([os.urandom(2500)])
    head = send(ends, store, one)
    del store.objects[one.ids[2]]
    with pytest.raises(ValueError, match="did not come"):
        ends.receive(head)


def test_a_message_over_the_limit_is_not_pulled(ends, store):
    head = send(ends, store, part([bytes(100_001)]))
    with pytest.raises(ValueError, match="100000 allowed"):
        ends.receive(head)


def test_a_message_that_comes_bit_by_bit_keeps_what_has_come(ends, store):
    one = part([os.urandom(2500)])
    head = send(ends, store, one)
    late = store.objects.pop(one.ids[1])
    store.late.add(one.ids[1])
    arrival = Arrival(ends, head)
    assert arrival.advance(0.0) is None
    taken = len(store.pulled)
    assert arrival.advance(0.0) is None
    assert store.pulled[taken:] == [one.ids[1]], "nothing is pulled twice"
    store.objects[one.ids[1]] = late
    assert bytes(arrival.advance(0.0).parts[0]) == b"".join(view for chunk in one.chunks for view in chunk)
