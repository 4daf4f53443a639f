"""Calls over real sockets: a network that comes back, a door that is closed, a proxy, and bodies in pieces."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesRequest, PullMessagesResponse

from atoll.fleet.flower.calls import POLL, WAIT_HEADER, Calls, Gone


class Answers(BaseHTTPRequestHandler):
    """Notes what comes; answers with the server's next (status, body), the last one for ever."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append((self.path, body, dict(self.headers)))
        script = self.server.script
        status, content = script.pop(0) if len(script) > 1 else script[0]
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def answering(*script):
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.script, server.seen = list(script), []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def calls_of(server, **headers):
    return Calls(f"127.0.0.1:{server.server_port}", None, lambda: headers)


NODE = ActivateNodeResponse(node_id=7)


def test_a_request_goes_out_in_pieces_with_who_is_calling():
    with answering((200, NODE.SerializeToString())) as server:
        request = PullMessagesRequest()
        said = calls_of(server, who="me")("fleet/x", request, ActivateNodeResponse, more=[b"ab", memoryview(b"cd")])
    assert said == NODE
    path, body, headers = server.seen[0]
    assert (path, body, headers["who"]) == ("/v1/fleet/x", request.SerializeToString() + b"abcd", "me")


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_server_that_comes_back_is_waited_for(status):
    with answering((status, b"later"), (status, b"later"), (200, NODE.SerializeToString())) as server:
        assert calls_of(server)("fleet/x", PullMessagesRequest(), ActivateNodeResponse) == NODE
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 412, 500])
def test_a_door_that_is_closed_is_told_at_once(status):
    with answering((status, b"no")) as server, pytest.raises(Gone, match=f"HTTP {status} no") as told:
        calls_of(server)("fleet/x", PullMessagesRequest(), ActivateNodeResponse)
    assert (told.value.status, len(server.seen)) == (status, 1)


def test_a_network_that_stays_away_is_told_when_patience_ends():
    with answering((200, b"")) as server:
        pass
    started = time.monotonic()
    with pytest.raises(Gone, match="refused"):
        calls_of(server)("fleet/x", PullMessagesRequest(), ActivateNodeResponse, patience=0.3)
    assert 0.3 < time.monotonic() - started < 5


def test_a_page_that_is_no_answer_is_told():
    with answering((200, b"<html>Please log in</html>")) as server, pytest.raises(Gone, match="not Flower's"):
        calls_of(server)("fleet/x", PullMessagesRequest(), ActivateNodeResponse)


def test_a_server_that_does_not_wait_is_asked_no_more_often_than_it_bears():
    with answering((200, PullMessagesResponse().SerializeToString())) as server:
        calls, started = calls_of(server), time.monotonic()
        for _ in range(5):
            assert not calls.messages("fleet/pull-messages", PullMessagesRequest(), PullMessagesResponse, wait=2.0)
        assert time.monotonic() - started >= 5 * POLL
    assert server.seen[0][2][WAIT_HEADER] == "2"
