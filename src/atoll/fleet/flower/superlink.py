"""The server: Flower's SuperLink, with everything closed that Flower leaves open.

Flower's own command authenticates sites and nobody else: whoever reaches the port may enrol a key of his own, start runs and
take their work. Here the control API asks for the operator's token, work is given to its holder alone, and front.py stands
before the rest. Who may join is who lies in the folder `clients`, which is read every second: a file more enrols a site, a
file less turns it away at once.
"""

from __future__ import annotations

import hmac
import logging
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.common.constant import ACCESS_TOKEN_KEY, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.proto.control_pb2 import (
    RegisterNodeRequest,
    RegisterNodeResponse,
    UnregisterNodeRequest,
    UnregisterNodeResponse,
)
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

from atoll.errors import AtollError
from atoll.fleet.flower import certs
from atoll.fleet.flower.calls import Calls, Gone, only_here, trust
from atoll.fleet.flower.front import Front

Say = Callable[[str], None]


class TokenOnly(NoOpControlAuthnPlugin):
    """Lets the holder of the operator's token use the control API, and nobody else."""

    def __init__(self, token: str) -> None:
        self.token = token

    def validate_tokens_in_metadata(self, metadata: Any) -> tuple[bool, AccountInfo | None]:
        """Flower's question."""
        given = str(dict(metadata).get(ACCESS_TOKEN_KEY, ""))
        fits = hmac.compare_digest(given.encode(), self.token.encode())
        return fits, AccountInfo(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME) if fits else None


def serve(folder: Path, host: str, port: int, say: Say, insecure: bool = False) -> None:
    """Runs the server until it is stopped. `folder` is the server's part of `atoll certs init`.

    Raises:
        AtollError: keys that are not there; an address that is taken; no TLS at an address that others reach.
    """
    if insecure:
        only_here(host)
    token = certs.read(folder / "operator.token", "operator's token").strip()
    for name, what in (("server.key", "key of the server"), ("server.pem", "certificate of the server")):
        certs.read(folder / name, what)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # who joins and who may is said by us
    app = Front(create_app(settings(token, host, port), SuperLinkLifespan))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        ssl_certfile=None if insecure else folder / "server.pem",
        ssl_keyfile=None if insecure else folder / "server.key",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,  # sites keep their connections open: without this it would wait for ever
        timeout_keep_alive=75,
    )
    server = uvicorn.Server(config)
    context = None if insecure else trust(folder / "ca.pem")
    enrolment = Enrolment(folder / "clients", token.decode(), context, ourselves(host), port, server, say)
    threading.Thread(target=enrolment.watch, daemon=True).start()
    try:
        with suppress(KeyboardInterrupt):  # uvicorn has stopped, and passes the signal on
            server.run()
    except SystemExit as error:
        raise AtollError("the server cannot start", where=f"{host}:{port}", remedy="is the port taken?") from error


def ourselves(host: str) -> str:
    """Where a server that listens on `host` is reached from its own machine."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def settings(token: bytes, host: str, port: int) -> SuperLinkLifespanConfig:
    """Flower's settings: keys for sites, a token for the operator, no code run, nothing installed, nothing reported."""
    unset: dict[str, Any] = {one.name: None for one in fields(SuperLinkLifespanConfig)}
    wanted = {
        "control_address": "",
        "host": host,
        "port": port,
        "insecure": False,
        "superexec_auth_secret": certs.executor_secret(token),
        "authn_plugin": TokenOnly(token.decode()),
        "enable_event_log": False,
        "enable_supernode_auth": True,
        "fleet_api_type": "grpc-rere",
        "simulation": False,
        "database": ":flwr-in-memory:",
        "isolation": "process",
        "runtime_dependency_install": False,
    }
    return SuperLinkLifespanConfig(**(unset | wanted))


@dataclass
class Enrolment:
    """Keeps Flower's list of nodes what the folder says."""

    folder: Path
    token: str
    context: ssl.SSLContext | None
    host: str
    port: int
    server: uvicorn.Server
    say: Say
    _known: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Sites that may join: the file's content, and Flower's node."""
    _told: set[str] = field(default_factory=set)

    def watch(self) -> None:
        """Looks every second while the server lives."""
        bearer = {"authorization": f"Bearer {self.token}"}
        if self.context is not None:
            self.context.check_hostname = False  # it is ourselves that we call, by whatever name the certificate has
        control = Calls(f"{self.host}:{self.port}", self.context, lambda: bearer)
        pause = threading.Event()
        while not self.server.started and not self.server.should_exit:
            pause.wait(0.1)
        self.say(f"listening on port {self.port}; sites in {self.folder} may join")
        while not self.server.should_exit:
            self.update(control)
            pause.wait(1.0)

    def update(self, control: Calls) -> None:
        """Enrolls files that are new or changed, turns away sites whose file is gone; what fails is tried again."""
        listed = {path.stem: path for path in sorted(self.folder.glob("*.pub"))}
        for name in [*self._known]:
            if name not in listed or _content(listed[name]) not in (None, self._known[name][0]):
                with suppress(Gone):
                    request = UnregisterNodeRequest(node_id=self._known[name][1])
                    control("control/unregister-node", request, UnregisterNodeResponse, patience=1)
                    del self._known[name]
                    self.say(f"{name} is no longer let in")
        for name in listed.keys() - self._known.keys():
            try:
                written = listed[name].read_bytes()
                self._known[name] = (written, self._enrol(control, name, written))
            except Exception as error:  # a file of any kind may lie there, and the others' shall count
                if name not in self._told:
                    self.say(f"{name} is not enrolled: {error}")
                self._told.add(name)

    def _enrol(self, control: Calls, name: str, written: bytes) -> int:
        public = public_key_to_bytes(load_ssh_public_key(written))  # type: ignore[arg-type]
        request = RegisterNodeRequest(public_key=public, name=name)
        node: int = control("control/register-node", request, RegisterNodeResponse).node_id
        self.say(f"{name} may join")
        return node


def _content(path: Path) -> bytes | None:
    """What is in a file; None if it cannot be read just now."""
    try:
        return path.read_bytes()
    except OSError:
        return None
