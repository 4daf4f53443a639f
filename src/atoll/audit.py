"""The audit log of a site: what left it, one JSON line a payload, each line chained to the one before by its hash.

    {"at": ..., "run": ..., "plan": ..., "task": ..., "bytes": ..., "sha256": ..., "before": ..., "hash": ...}

`before` is the hash of the line before, `hash` the SHA-256 of the line without it. A line that is changed, taken out or put
in breaks the chain, and `verify` says where. Lines taken off the end show only against a hash that was noted elsewhere:
`verify` gives the last one for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.errors import AtollError

FIRST = "0" * 64
"""What the first line has before it."""


@dataclass
class AuditLog:
    """Appends to a log; what is there is verified first, so that nobody goes on from a broken one."""

    path: Path
    last: str = FIRST

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            drop_half_line(self.path)
            self.last = verify(self.path).last

    def wrote(self, run: str, plan: str, task: str, payload: Iterable[Any]) -> None:
        """A payload is about to leave. On disk before it does."""
        digest, size = hashlib.sha256(), 0
        for piece in payload:
            digest.update(piece)
            size += len(piece)
        line: dict[str, Any] = {"at": round(time.time(), 3), "run": run, "plan": plan, "task": task, "bytes": size}
        line |= {"sha256": digest.hexdigest(), "before": self.last}
        line["hash"] = hash_of(line)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            drop_half_line(self.path)
            raise
        self.last = line["hash"]


def drop_half_line(path: Path) -> None:
    """Takes off what a crash left of a last line: a payload leaves once its line is whole, so nothing left with this."""
    written = path.read_bytes()
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        os.truncate(path, whole)


@dataclass(frozen=True)
class Verified:
    """What a whole log holds."""

    lines: int
    bytes: int
    last: str
    """The hash of the last line: note it elsewhere, and lines cannot be taken off the end unseen."""


def verify(path: Path) -> Verified:
    """Follows the chain.

    Raises:
        AtollError: no log, or the first line that does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AtollError("no audit log to read", where=str(path), found=error) from error
    before, size = FIRST, 0
    lines = text.splitlines()
    for number, written in enumerate(lines, 1):
        line = _parsed(written)
        if line is None or line.get("before") != before or line.get("hash") != hash_of(line):
            raise AtollError(
                "the audit log is damaged", where=f"{path}:{number}",
                found="a line that was changed, put in, or whose predecessor was taken out",
                allowed="each line holds the hash of the one before it and its own",
                remedy="lines before this one are as they were written; keep the file as evidence, and start a new one",
            )  # fmt: skip
        before, size = str(line["hash"]), size + int(line["bytes"])
    return Verified(len(lines), size, before)


def hash_of(line: Mapping[str, Any]) -> str:
    """The SHA-256 of a line without its own hash."""
    rest = {name: value for name, value in line.items() if name != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _parsed(written: str) -> dict[str, Any] | None:
    try:
        line = json.loads(written)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("bytes"), int) else None
