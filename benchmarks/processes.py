"""Processes that a contestant starts, and their end. Contestants of all environments use it: standard library alone.

Flower starts processes in sessions of their own, which no signal to a group reaches. So the harness gives each contestant a
mark in its environment, which all that it starts inherits, and whoever has the mark is ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

HOST = "127.0.0.1"
MARK = "BENCHMARK_MARK"
PATIENCE_SECONDS = 120


class Processes:
    """Processes with a log each in `folder`. They end with the block: the first one last, the others need it to leave."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, {**os.environ, **environment}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        running = list(self.running.values())
        for group in (running[1:], running[:1]):
            for process in group:
                process.terminate()
            for process in group:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        end_marked(os.environ.get(MARK, ""))

    def start(self, name: str, command: Sequence[str], *until: str) -> int:
        """A process that stays, once its log says all of `until`; its number."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            self.running[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        end = time.monotonic() + PATIENCE_SECONDS
        while not all(text in (said := log.read_text(errors="replace")) for text in until):
            if self.running[name].poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} did not come to {until}:\n{said[-2000:]}")
            time.sleep(0.1)
        return self.running[name].pid

    def call(self, *command: str) -> str:
        """A process, to its end; what it prints. Raises RuntimeError with what everybody said if it fails."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}\n{self.said()}")
        return done.stdout

    def said(self) -> str:
        """The end of each log."""
        logs = ((name, (self.folder / f"{name}.log").read_text(errors="replace")) for name in self.running)
        return "\n".join(f"--- {name}\n{text[-1000:]}" for name, text in logs)


def end_marked(mark: str) -> None:
    """Ends all processes with this mark but the one that calls, and those that they start meanwhile."""
    while mark and (found := [pid for pid in marked(mark) if pid != os.getpid()]):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """Who has the mark, by number; those that have ended and that nobody has waited for have no environment (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
