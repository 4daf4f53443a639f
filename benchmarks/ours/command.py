"""Seconds that a command of ours takes, from the shell's point of view."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Runs it once before, so that files are in the page cache and shapes in ours."""
    command = [str(Path(sys.executable).parent / "atoll"), *config["arguments"]]

    def measure() -> Mapping[str, Any]:
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {"seconds": time.perf_counter() - started}

    measure()
    return measure


if __name__ == "__main__":
    serve(prepare, ("atoll", "typer"))
