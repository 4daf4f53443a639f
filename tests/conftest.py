"""What many tests need."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "contract"))


@pytest.fixture
def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients whose answers differ, as a folder of JSONL."""
    root = tmp_path_factory.mktemp("sites")
    for site, color in (("north", "red"), ("south", "blue"), ("west", "green")):
        records = [{"prompt": f"What color is item {i}?", "completion": f"Item {i} is {color}."} for i in range(40)]
        (root / f"{site}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root
