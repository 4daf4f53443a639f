"""`atoll run` on a tiny model, as a process: from the shell's point of view."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.ours.runs import common, write
from benchmarks.samples import inputs_folder
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Each measurement is a process of its own, the tokens being cached as Flower's app has them at hand."""
    command = [str(Path(sys.executable).parent / "atoll"), "run"]

    def measure() -> Mapping[str, Any]:
        folder = Path(tempfile.mkdtemp())
        write(recipe(config), folder / "recipe.yaml")
        environment = {**os.environ, "ATOLL_RUNS": str(folder / "runs")}
        started = time.perf_counter()
        subprocess.run([*command, str(folder / "recipe.yaml")], check=True, stdout=sys.stderr, env=environment)
        seconds = time.perf_counter() - started
        shutil.rmtree(folder)
        return {"seconds": seconds}

    return measure


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Two clients with the same samples, both every round; in float32, as Flower's app loads the model."""
    data = {"use": "benchmarks.ours.parts:token_clients", "file": "bytes-32.npz", "batch_size": 4, "clients": 2}
    finetune = {
        "rounds": config["rounds"],
        "space": {"use": "lora", "rank": 8, "alpha": 16},
        "batch_size": 4,
        "local_steps": config["steps"],
    }
    model = {"use": str(inputs_folder() / "tiny-llama"), "dtype": "float32"}
    return {**common("tiny"), "model": model, "data": data, "finetune": finetune}


if __name__ == "__main__":
    serve(prepare, ("atoll", "torch", "transformers", "peft"))
