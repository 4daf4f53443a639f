"""What many tests need."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from support import Atoll, Said


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


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests that run recipes, so that data are tokenized once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def atoll(
    tmp_path: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Atoll:
    """Runs a command line in this process, in a folder of its own with runs of its own."""
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> Said:
        from atoll.cli import call

        capsys.readouterr()
        status = call(arguments)
        return Said(status, *capsys.readouterr())

    return said


TINY = """\
recipe: 1
extends: methods/fedavg-lora
name: tiny
model: tiny:llama
data: {{use: folders, path: {sites}, held_out: 0.25}}
finetune: {{rounds: 2, local_steps: 2, batch_size: 4, optimizer: {{use: adamw, lr: 1e-2}}}}
evaluate: {{samples: 4, final_samples: 8}}
"""


@pytest.fixture
def tiny(tmp_path: Path, sites: Path) -> str:
    """A recipe that runs in seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(sites=sites))
    return str(path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, sites: Path, shared_home: Path) -> Path:
    """The folder of a finished run with baselines. Look, and copy what you change."""
    from atoll.run import run

    root = tmp_path_factory.mktemp("finished")
    (root / "tiny.yaml").write_text(TINY.format(sites=sites))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_HOME", str(shared_home))
        patch.setenv("ATOLL_RUNS", str(root / "runs"))
        return run(str(root / "tiny.yaml"), ["baselines=[local, pooled]"]).path
