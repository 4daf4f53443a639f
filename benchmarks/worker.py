"""The process of one contestant: it gets ready once, then measures each time it is told to.

It speaks JSON lines: its configuration comes in first and `ready` goes out, then a result goes out for each line that
comes in. Contestants of all environments use it, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Measure = Callable[[], Mapping[str, Any]]
Prepare = Callable[[Mapping[str, Any]], Measure]


def serve(prepare: Prepare, packages: tuple[str, ...]) -> None:
    """Measures until the input ends. `packages` are those whose versions belong to the result."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log

    def answer(data: Mapping[str, Any]) -> None:
        print(json.dumps(data), file=answers, flush=True)

    measure = prepare(json.loads(sys.stdin.readline()))
    answer({"ready": True, "versions": versions(packages)})
    for _ in sys.stdin:
        answer(measure())


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of those packages that are here."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_rss_bytes(process: int | str = "self") -> int:
    """The most memory that a process has had resident so far.

    Not getrusage's ru_maxrss: a process that another one starts inherits that one's.
    """
    return _status(process, "VmHWM:")


def rss_bytes(process: int | str = "self") -> int:
    """The memory that a process has resident now."""
    return _status(process, "VmRSS:")


def _status(process: int | str, field: str) -> int:
    with open(f"/proc/{process}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
