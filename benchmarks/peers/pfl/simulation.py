"""pfl-research's simulation, in one process or in several by torchrun, as its documentation has it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.worker import Measure, serve

MODULE = "benchmarks.peers.pfl.simulate"


def prepare(config: Mapping[str, Any]) -> Measure:
    """Each measurement is a simulation from its beginning; only rounds after the first count."""

    def measure() -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            subprocess.run(
                [*launcher(config["processes"]), "-m", MODULE, json.dumps(dict(config)), str(result)], check=True
            )
            found: dict[str, Any] = json.loads(result.read_text())
        return found

    return measure


def launcher(processes: int) -> list[str]:
    """python for one process, torchrun for more."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


if __name__ == "__main__":
    serve(prepare, ("pfl", "torch"))
