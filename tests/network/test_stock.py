"""A federation that exists already: Flower's own SuperLink, started by Flower's own command, with our ends at it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from machines import NAMES, Federation, wait_until

from atoll.fleet.flower.calls import Calls, Gone, trust

pytestmark = pytest.mark.network


@pytest.fixture
def existing(bare: Federation) -> Iterator[Federation]:
    """Flower's server as its documentation has it for production: TLS, keys for nodes, a secret for executors."""
    keys = bare.folder / "certs" / "server"
    command = [
        str(Path(sys.executable).parent / "flower-superlink"), "--host", "127.0.0.1", "--port", str(bare.port),
        "--ssl-certfile", str(keys / "server.pem"), "--ssl-keyfile", str(keys / "server.key"),
        "--ssl-ca-certfile", str(keys / "ca.pem"), "--enable-supernode-auth", "--isolation", "process",
        "--superexec-auth-secret-file", str(keys / "executor.secret"), "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    surroundings = {**os.environ, "FLWR_HOME": str(bare.folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"}
    with (bare.folder / "superlink.log").open("wb") as log:
        bare.running["superlink"] = subprocess.Popen(command, stdout=log, stderr=log, env=surroundings)
    yield bare
    bare.close()


def enrol(federation: Federation) -> None:
    """As `flwr supernode register` does."""
    from flwr.proto.control_pb2 import RegisterNodeRequest, RegisterNodeResponse
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    folder = federation.folder / "certs" / "server"
    control = Calls(federation.address, trust(folder / "ca.pem"), dict)
    for name in NAMES:
        public = public_key_to_bytes(load_ssh_public_key((folder / "clients" / f"{name}.pub").read_bytes()))
        request = RegisterNodeRequest(public_key=public, name=name)
        control("control/register-node", request, RegisterNodeResponse, patience=30)


def test_our_ends_work_at_a_server_that_is_flowers_own(existing):
    enrol(existing)
    for name in NAMES:
        existing.join(name)
    done = existing.run("run", "mine.yaml", "--fleet", existing.address)
    assert done.returncode == 0, done.stderr
    assert "round 3 done: 3 accepted" in done.stderr
    for name in NAMES:
        existing.stop(name)


def test_its_sites_are_not_let_in_without_a_key(existing):
    wait_until(lambda: answers(existing), "the server to answer")
    own = ("--data", "data/north.jsonl", "--certs", "certs/sites/north", "--state", "state/nobody")
    told = existing.run("join", existing.address, *own)
    assert told.returncode == 1
    assert "does not let this site in" in told.stderr


def answers(federation: Federation) -> bool:
    from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse

    control = Calls(federation.address, trust(federation.folder / "certs/server/ca.pem"), dict)
    try:
        control("control/list-nodes", ListNodesRequest(), ListNodesResponse, patience=0)
    except Gone as error:
        return error.status is not None
    return True
