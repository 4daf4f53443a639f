"""Makes the peers' environments: `python -m benchmarks.peers.setup [PEER ...]`.

Each peer has an environment of its own, `.venv-PEER`, because their requirements contradict each other and ours. torch
comes first and pinned: without that, pip takes a build with several GB of CUDA.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PEERS = ("trl", "flwr", "pfl", "nvflare")
TORCH = "torch==2.13.0"


def setup(peer: str) -> None:
    """Makes `.venv-PEER`, or completes it."""
    folder = ROOT / f".venv-{peer}"
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not folder.exists():
        venv.create(folder, with_pip=True)
    print(f"{folder.name}: installing", flush=True)
    subprocess.run([*pip, TORCH, "numpy"], check=True)
    subprocess.run([*pip, TORCH, "-r", str(HERE / peer / "requirements.txt")], check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or PEERS:
        setup(name)
