"""A federation on one machine: a server and three sites as processes, TLS and keys, and one recipe over them.

    python examples/network.py [FOLDER]

What `make demo-network` runs. The same recipe runs in one process afterwards, and the largest difference of the results is
shown. Everything lies in FOLDER (by default a new temporary one); no process is left behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from atoll.cache import home
from atoll.data.prepared import four_sites
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder
from atoll.stream import UPDATE

SITES = ("clinic", "school", "desk")
RECIPE = """
recipe: 1
name: network
extends: methods/fedavg-lora
model: smollm2-135m
data: {use: folders, path: ./data}
finetune: {rounds: 2, local_steps: 2, batch_size: 4, context: 256}
evaluate: {every: 0, final_samples: 16}
"""


class Demo:
    """Processes in a folder, each with a log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, dict[str, subprocess.Popen[bytes]]()
        self.environment = os.environ | {"ATOLL_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}

    def call(self, *arguments: str) -> None:
        """A command, to its end."""
        print(f"$ atoll {' '.join(arguments)}", flush=True)
        subprocess.run(self.command(arguments), cwd=self.folder, env=self.environment, check=True)

    def start(self, name: str, *arguments: str, until: str) -> None:
        """A command that stays, once it has said `until`."""
        print(f"$ atoll {' '.join(arguments)} &", flush=True)
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(arguments), cwd=self.folder, env=self.environment, stdout=file, stderr=file
            )
        self.running[name] = process
        while until not in log.read_text():
            if process.poll() is not None:
                sys.exit(f"{name} ended:\n{log.read_text()}")
            time.sleep(0.1)

    def federate(self, sites: Sequence[str], suffix: str = "") -> str:
        """Keys, a server, and the sites joined, whose data are in the folder `data`; the server's address."""
        address = f"127.0.0.1:{free_port()}"
        self.call("certs", "init", *(word for name in sites for word in ("--site", name)))
        self.start("server", "server", "--listen", address, until=f"{max(sites)} may join")
        for name in sites:
            self.join(address, name, suffix)
        return address

    def join(self, address: str, name: str, suffix: str = "") -> None:
        """Starts a site, again if it has died."""
        own = ("--data", f"data/{name}{suffix}", "--certs", f"certs/sites/{name}", "--state", f"state/{name}")
        self.start(name, "join", address, *own, until="joined")

    def command(self, arguments: Sequence[str]) -> list[str]:
        """As typed, but for the interpreter."""
        return [sys.executable, "-m", "atoll", *arguments]

    def close(self) -> None:
        """Sites leave, then the server stops."""
        for process in reversed(self.running.values()):
            process.send_signal(signal.SIGINT)
        for process in self.running.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(folder: Path) -> None:
    """Keys, server, sites, a run over them, the same run in one process."""
    started, demo = time.monotonic(), Demo(folder)
    (folder / "data").symlink_to(subset(folder))
    (folder / "mine.yaml").write_text(RECIPE)
    try:
        address = demo.federate(SITES)
        demo.call("clients", address)
        demo.call("run", "mine.yaml", "--fleet", address, "--set", "fleet.ordered=true")
        demo.call("audit", "verify", f"state/{SITES[0]}/audit.jsonl")
    finally:
        demo.close()
    demo.call("run", "mine.yaml", "--set", "name=one-process")
    ours, theirs = (
        load_state(RunFolder(folder / "runs" / name).checkpoint).params[UPDATE]
        for name in ("network-1", "one-process-1")
    )
    largest = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    print(f"largest difference between the results over the network and in one process: {largest:.2g}")
    print(f"{time.monotonic() - started:.0f} s; everything is in {folder}")


def subset(folder: Path) -> Path:
    """The data of three of the quickstart's sites."""
    whole, chosen = four_sites(home()), folder / "sites"
    chosen.mkdir()
    for name in SITES:
        (chosen / name).symlink_to(whole / name)
    return chosen


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp(prefix="atoll-network-")).absolute())
