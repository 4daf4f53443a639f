"""An ordinary Flower deployment on loopback: a SuperLink and SuperNodes with TLS, node keys and subprocess isolation.

All of it by Flower's own commands. Nothing is installed for a run, in Flower's favor.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import HOST, Processes, free_port
from benchmarks.samples import inputs_folder
from benchmarks.worker import Measure, serve

APP = Path(__file__).parent / "rounds"
BIN = Path(sys.executable).parent
SETTINGS = ("what", "clients", "rounds", "pause", "tensors", "bytes")
CONNECTION = """[superlink]
default = "benchmark"

[superlink.benchmark]
address = "{address}"
root-certificates = "{authority}"
"""


def prepare(config: Mapping[str, Any]) -> Measure:
    """Each measurement has a federation of its own, so that none waits beside the other contestants."""

    def measure() -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            rounds = run(config, Path(name), inputs_folder() / config["keys"])
        outside = [one["seconds"] - max(one["local"]) for one in rounds]
        if config["what"] == "update":
            return {"mb_per_s": config["bytes"] / outside[0] / 1e6, "seconds": outside[0]}
        return {"seconds": median(outside[1:]), "first_round_seconds": outside[0]}

    return measure


def run(config: Mapping[str, Any], folder: Path, keys: Path) -> list[dict[str, Any]]:
    """Starts everything, runs the app, ends everything; gives the rounds that the app wrote down."""
    port, authority, said = free_port(), keys / "server" / "ca.pem", folder / "rounds.json"
    (folder / "config.toml").write_text(CONNECTION.format(address=f"{HOST}:{port}", authority=authority))
    with Processes(folder, surroundings(folder)) as processes:
        processes.start("superlink", superlink(port, keys / "server"), "Uvicorn running")
        for i in range(config["clients"]):
            public = keys / "server" / "clients" / f"site-{i}.pub"
            processes.call(str(BIN / "flwr"), "supernode", "register", str(public), "benchmark")
            command = supernode(f"{HOST}:{port}", keys / "sites" / f"site-{i}")
            processes.start(f"site-{i}", command, "Uvicorn running")
        app = shutil.copytree(APP, folder / "app")  # flwr rewrites its pyproject.toml
        values = " ".join(f"{name}={json.dumps(config[name])}" for name in SETTINGS) + f' out="{said}"'
        printed = processes.call(str(BIN / "flwr"), "run", str(app), "benchmark", "--stream", "--run-config", values)
        if not said.exists():
            raise RuntimeError(f"the app did not come to its end:\n{printed}\n{processes.said()}")
        return checked(json.loads(said.read_text()), config)


def checked(rounds: list[dict[str, Any]], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Raises RuntimeError where a client did not take part in a round."""
    if [len(one["local"]) for one in rounds] != [config["clients"]] * config["rounds"]:
        raise RuntimeError(f"rounds were not whole: {rounds}")
    return rounds


def surroundings(folder: Path) -> dict[str, str]:
    """One thread for each of so many processes; Flower's own files in the folder."""
    quiet = ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "OMP_NUM_THREADS")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**dict.fromkeys(quiet, "1"), "FLWR_HOME": str(folder), "PATH": path}


def superlink(port: int, keys: Path) -> Sequence[str]:
    """The server's command."""
    tls = ["--ssl-certfile", str(keys / "server.pem"), "--ssl-keyfile", str(keys / "server.key")]
    return [str(BIN / "flower-superlink"), "--host", HOST, "--port", str(port), *tls, "--ssl-ca-certfile",
            str(keys / "ca.pem"), "--enable-supernode-auth", "--isolation", "subprocess",
            "--disable-runtime-dependency-installation"]  # fmt: skip


def supernode(address: str, keys: Path) -> Sequence[str]:
    """A site's command."""
    trust = ["--root-certificates", str(keys / "ca.pem"), "--auth-supernode-private-key", str(keys / "site.key")]
    return [str(BIN / "flower-supernode"), "--superlink", address, *trust, "--host", HOST, "--port", str(free_port()),
            "--isolation", "subprocess"]  # fmt: skip


if __name__ == "__main__":
    serve(prepare, ("flwr", "torch"))
