"""`flwr run` on a tiny model, as a process: from the shell's point of view.

Favorable to Flower: its SuperLink runs already, nothing is installed for the run, and Ray's actors share the cores.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.samples import inputs_folder
from benchmarks.worker import Measure, serve

APP = Path(__file__).parent / "app"
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
CONNECTION = """[superlink]
default = "benchmark"

[superlink.benchmark]
address = "{address}"
insecure = true
options.num-supernodes = 2
options.backend.client-resources.num-cpus = 1
options.backend.client-resources.num-gpus = 0
"""


def prepare(config: Mapping[str, Any]) -> Measure:
    """Starts a SuperLink; it ends with this process's group."""
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    port = free_port()
    settings = Path(os.environ["FLWR_HOME"]) / "config.toml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(CONNECTION.format(address=f"{HOST}:{port}"))
    start_superlink(port)
    values = f'rounds={config["rounds"]} steps={config["steps"]} inputs="{inputs_folder()}"'

    def measure() -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            app = shutil.copytree(APP, Path(folder) / "app")  # flwr rewrites its pyproject.toml
            command = [str(BIN / "flwr"), "run", str(app), "benchmark", "--stream", "--run-config", values]
            started = time.perf_counter()
            said = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - started
        print(said.stdout, said.stderr)
        if f"[ROUND {config['rounds']}/{config['rounds']}]" not in said.stdout + said.stderr:
            raise RuntimeError("flwr run did not come to its last round")
        return {"seconds": seconds}

    return measure


def start_superlink(port: int) -> None:
    """Waits until it answers."""
    subprocess.Popen(
        [str(BIN / "flower-superlink"), "--insecure", "--simulation", "--disable-runtime-dependency-installation",
         "--host", HOST, "--port", str(port), "--control-api-address", f"{HOST}:{free_port()}"]
    )  # fmt: skip
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError("the SuperLink does not answer")


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    serve(prepare, ("flwr", "ray", "torch", "transformers", "peft"))
