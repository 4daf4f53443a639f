"""Calls of Flower's HTTP APIs: a protobuf message there, one back.

Flower's own clients copy what they send and receive several times over. Here a large body goes out of the memory it lies in.
A network that is gone for a while comes back: each call is tried again as long as its patience lasts.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import urllib3
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.message import DecodeError
from urllib3.exceptions import HTTPError
from urllib3.util import make_headers, parse_url

from atoll.errors import AtollError
from atoll.fleet.flower import certs
from atoll.wire import Buffer

PATIENCE = 60.0
"""Seconds for which a call is tried again while the network is gone."""

TIMEOUT = urllib3.Timeout(connect=10.0, read=30.0)

WAIT_HEADER = "atoll-wait"
"""Seconds for which the server may keep a question that has no answer yet; a server without our front answers at once."""

AWAY = "no server answers"

POLL = 0.02
"""Seconds between two looks for messages at a server that does not wait."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")

A = TypeVar("A")


class Gone(Exception):
    """The other end cannot be reached, or no longer knows us: `status` is what it answered, if it did."""

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why if status is None else f"HTTP {status} {why}".strip())
        self.status = status


def unreachable(server: str, error: Gone, denied: tuple[str, str]) -> AtollError:
    """What a server comes to that does not answer, is not trusted, or does not let us in: `denied` is what, and remedy."""
    said = str(error)
    if error.status in (401, 403, 412):
        return AtollError(denied[0], where=server, found=said, remedy=denied[1])
    if "certificate" in said.lower():
        return AtollError(
            "the server's certificate does not fit", where=server, found=said,
            remedy="ask for the server's own ca.pem, or for a certificate that names this host and has not expired",
        )  # fmt: skip
    if "WRONG_VERSION_NUMBER" in said:
        return AtollError(
            "the server speaks no TLS", where=server, remedy="--insecure, if it is yours and on this machine"
        )
    return AtollError(AWAY, where=server, found=said, remedy="check the address; HTTPS_PROXY names a proxy")


def secured(server: str, authority: Path, insecure: bool) -> ssl.SSLContext | None:
    """TLS to a server that the authority has signed; or none, on this machine alone. Raises AtollError."""
    if insecure:
        only_here(server.rpartition(":")[0])
        return None
    certs.read(authority, "certificate of the authority", "ask who hosts the server for their ca.pem")
    return trust(authority)


def only_here(host: str) -> None:
    """Refuses to go without TLS to where others may listen. Raises AtollError."""
    if host not in LOOPBACK:
        raise AtollError(
            "without TLS others could read and change what travels", where="--insecure", found=host,
            allowed=", ".join(LOOPBACK), remedy="leave --insecure out; `atoll certs init` makes the certificates",
        )  # fmt: skip


def trust(authority: Path) -> ssl.SSLContext:
    """TLS 1.3, to servers whose certificate the federation's authority has signed and no others."""
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except ssl.SSLError as error:
        raise AtollError(
            "not a certificate", where=str(authority), found=error, remedy="ask who hosts the server for their ca.pem"
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


@dataclass
class Calls:
    """Calls of the server at HOST:PORT. From several threads at once, with a connection for each."""

    server: str
    context: ssl.SSLContext | None
    """None without TLS: on this machine alone."""
    headers: Callable[[], Mapping[str, str]]
    """Say who is calling; asked anew for each call."""
    _address: str = field(init=False)
    _pool: urllib3.PoolManager = field(init=False)

    def __post_init__(self) -> None:
        self._address = f"{'http' if self.context is None else 'https'}://{self.server}/v1"
        self._pool = connections(self.server.rpartition(":")[0], self.context)

    def __call__(
        self,
        path: str,
        request: Any,
        answer: type[A],
        *,
        more: Sequence[Buffer] = (),
        wait: float = 0.0,
        patience: float = PATIENCE,
        headers: Mapping[str, str] | None = None,
    ) -> A:
        """Calls until it is answered. `more` is sent after the request as it lies in memory.

        Raises:
            Gone: patience ended, or access is denied.
        """
        said = self.raw(path, request, more=more, wait=wait, patience=patience, headers=headers)
        try:
            return answer.FromString(said)  # type: ignore[attr-defined, no-any-return]
        except DecodeError as error:
            raise Gone(f"an answer that is not Flower's: {error}") from error

    def raw(
        self,
        path: str,
        request: Any,
        *,
        more: Sequence[Buffer] = (),
        wait: float = 0.0,
        patience: float = PATIENCE,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """The answer's bytes; else as `__call__`."""
        body = [request.SerializeToString(), *more]
        own = {"content-type": PROTOBUF_MEDIA_TYPE, "content-length": str(sum(map(len, body)))}
        own |= {WAIT_HEADER: f"{wait:g}"} if wait else {}
        end, pause = time.monotonic() + patience, 0.05
        while True:
            try:
                return self._once(path, body, {**own, **self.headers(), **(headers or {})})
            except HTTPError as error:
                if "certificate" in str(error).lower() or time.monotonic() > end:
                    raise Gone(str(error)) from error
            except Gone as error:
                if error.status not in (502, 503, 504) or time.monotonic() > end:
                    raise
            time.sleep(pause)
            pause = min(2.0, 2 * pause)

    def _once(self, path: str, body: Any, headers: Mapping[str, str]) -> bytes:
        response = self._pool.request(
            "POST", f"{self._address}/{path}", body=body, headers=headers, timeout=TIMEOUT, redirect=False
        )
        if response.status != 200:
            raise Gone(response.data[:200].decode(errors="replace"), response.status)
        return response.data

    def messages(self, path: str, request: Any, answer: type[Any], wait: float) -> Sequence[Any]:
        """The heads of messages that are there, or come in `wait` seconds."""
        started = time.monotonic()
        heads: Sequence[Any] = self(path, request, answer, wait=wait).messages_list
        if not heads and time.monotonic() - started < min(wait, POLL):
            time.sleep(POLL)  # a server without our front does not wait
        return heads

    def close(self) -> None:
        """Closes the connections."""
        self._pool.clear()


def connections(host: str, context: ssl.SSLContext | None) -> urllib3.PoolManager:
    """Connections to a host; through the proxy that HTTPS_PROXY names, unless NO_PROXY excepts the host or it is ours."""
    options: dict[str, Any] = {"ssl_context": context, "retries": False, "maxsize": 8}
    if context is not None and not context.check_hostname:
        options["assert_hostname"] = False  # urllib3 would check it by itself
    proxy = getproxies().get("https")
    if proxy is None or host in LOOPBACK or proxy_bypass(host):
        return urllib3.PoolManager(**options)
    secret = parse_url(proxy).auth
    return urllib3.ProxyManager(
        proxy, proxy_headers=make_headers(proxy_basic_auth=unquote(secret)) if secret else None, **options
    )
