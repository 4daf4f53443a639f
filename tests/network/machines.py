"""A federation of real processes on this machine: TLS, keys, a server and three sites, started by the users' commands."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("north", "south", "west")


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Looks again and again; fails with what was waited for."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds:g} s for: {what}"
        time.sleep(0.1)


def heed_interrupts() -> None:
    """A process that a shell started in the background ignores Ctrl-C, and so would those that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Federation:
    """Its folder, and the processes that it started, by name."""

    folder: Path
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def surroundings(self) -> dict[str, str]:
        """Runs and cache in the folder, and a home in which nothing is to be written."""
        own = {"ATOLL_RUNS": "runs", "ATOLL_HOME": "cache", "HOME": "home"}
        return {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(self.folder / name) for key, name in own.items()}}

    def start(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """`atoll ARGUMENTS` with what it says in NAME.log, which another process writes: see `fill_disk`."""
        sink = subprocess.Popen(
            ["tee", "-a", f"{name}.log"], cwd=self.folder, stdin=-1, stdout=subprocess.DEVNULL
        ).stdin
        assert sink is not None
        command = [sys.executable, "-m", "atoll", *arguments]
        self.running[name] = subprocess.Popen(
            command, cwd=self.folder, stdout=sink, stderr=sink, env=self.surroundings | environment,
            preexec_fn=heed_interrupts,
        )  # fmt: skip
        sink.close()
        return self.running[name]

    def serve(self, *more: str) -> None:
        """The server, listening."""
        before = self.said("server").count("may join")
        self.start("server", "server", "--listen", self.address, "--certs", "certs/server", *more)
        enrolled = len(list((self.folder / "certs" / "server" / "clients").iterdir()))
        wait_until(lambda: self.said("server").count("may join") >= before + enrolled, "sites that may join")

    def join(self, name: str, *more: str, address: str = "", **environment: str) -> None:
        """A site, joined."""
        before = self.said(name).count("joined")
        own = ("--data", f"data/{name}.jsonl", "--certs", f"certs/sites/{name}", "--state", f"state/{name}")
        self.start(name, "join", address or self.address, *own, *more, **environment)
        wait_until(lambda: self.said(name).count("joined") > before, f"{name} to join")

    def run(self, *arguments: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """A command of the operator, to its end."""
        command = [sys.executable, "-m", "atoll", *arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.surroundings,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def said(self, name: str) -> str:
        """What a process has said so far."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self, name: str) -> None:
        """As a power cut would."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def fill_disk(self, name: str) -> None:
        """From now on this process can write nothing to a file."""
        resource.prlimit(self.running[name].pid, resource.RLIMIT_FSIZE, (0, 0))

    def stop(self, name: str) -> int:
        """As Ctrl-C would; its exit status."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGINT)
        return process.wait(timeout=30)

    def close(self) -> None:
        """Leaves no process behind."""
        for name in sorted(self.running, reverse=True):
            self.running[name].kill()
            self.running.pop(name).wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def write_sites(folder: Path) -> None:
    """Forty small chats a site."""
    folder.mkdir()
    for k, name in enumerate(NAMES):
        said = [(f"{name}: what is {i} + {k}?", f"It is {i + k}.") for i in range(40)]
        chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


RECIPE = """
recipe: 1
name: net
model: tiny:llama
data: {use: folders, path: ./data, held_out: 0.2}
finetune: {rounds: 3, local_steps: 3, batch_size: 4}
evaluate: {every: 0}
"""
