"""What the system refuses, what breaks in a part of the user's own, what is interrupted: told with a remedy."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.cache import atomic_folder, write_file
from atoll.errors import AtollError
from support import Atoll


def refusing(number: int) -> object:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    return refuse


def test_runs_that_is_a_file(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    said = atoll("run", tiny)
    assert said.status == 1
    assert "cannot make a folder for the run" in said.err
    assert str(tmp_path / "runs") in said.err
    assert "ATOLL_RUNS" in said.err


def test_folder_that_cannot_be_written(atoll: Atoll, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    atoll("plan", tiny)
    monkeypatch.setattr(Path, "mkdir", refusing(errno.EACCES))
    said = atoll("run", tiny)
    assert said.status == 1
    assert "Permission denied" in said.err
    assert "set ATOLL_RUNS" in said.err


def test_cache_that_cannot_be_entered(atoll: Atoll, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "file" / "home"))
    said = atoll("plan", tiny)
    assert said.status == 1
    assert str(tmp_path / "file") in said.err
    assert "set ATOLL_HOME" in said.err


def test_cache_above_which_nothing_can_be_made(atoll: Atoll, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", "/proc/nope")
    said = atoll("plan", tiny)
    assert said.status == 1
    assert "/proc/nope" in said.err
    assert "set ATOLL_HOME" in said.err


def test_recipe_that_cannot_be_written_is_not_the_cache(atoll: Atoll, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", refusing(errno.EROFS))
    said = atoll("init", "q.yaml")
    assert said.status == 1
    assert "cannot write here" in said.err
    assert "ATOLL_HOME" not in said.err
    with pytest.raises(AtollError, match="cannot write to the cache"):
        write_file(Path(os.environ["ATOLL_HOME"]) / "note", b"")


# Parts of the user's own.


def run_with(atoll: Atoll, tiny: str, tmp_path: Path, module: str, source: str) -> str:
    (tmp_path / f"{module}.py").write_text(source)
    said = atoll("run", tiny, "--set", f"sinks=['{module}:part']")
    assert said.status == 1
    assert f"your part {module}:part failed" in said.err
    assert "Traceback" not in said.err
    return said.err


def test_own_part_with_a_syntax_error(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    told = run_with(atoll, tiny, tmp_path, "own_broken", "x = 1\n\ndef part(:\n    pass\n")
    assert "--set sinks: sinks[0]" in told
    assert f"{tmp_path}/own_broken.py line 3" in told
    assert "SyntaxError" in told


def test_own_part_that_fails_when_it_is_imported(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    told = run_with(atoll, tiny, tmp_path, "own_import", "x = 1\nx.upper()\n")
    assert f"{tmp_path}/own_import.py line 2" in told
    assert "AttributeError" in told


def test_own_part_that_fails_at_work(atoll: Atoll, tiny: str, tmp_path: Path) -> None:
    told = run_with(
        atoll, tiny, tmp_path, "own_work",
        "def part():\n    def at(folder):\n        def sink(event):\n            return {}['step']\n"
        "        return sink\n    return at\n",
    )  # fmt: skip
    assert f"{tmp_path}/own_work.py line 4" in told
    assert "KeyError: 'step'" in told
    (note,) = (tmp_path / "runs/tiny-1").glob("error-*.txt")
    assert str(note) in told
    assert "`atoll resume tiny-1`" in told


# Interruptions.


def test_interrupted_before_it_began_keeps_nothing(
    atoll: Atoll, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atoll import run as module

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[module.__name__], "assemble", interrupt)
    said = atoll("run", tiny)
    assert said.status == 130
    assert "interrupted before it began; nothing was kept" in said.err
    assert "resume" not in said.err
    assert not list((tmp_path / "runs").iterdir())


def test_run_that_began_stays_when_it_is_interrupted(
    atoll: Atoll, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atoll import stage

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "sum_up", interrupt)
    said = atoll("run", tiny)
    assert said.status == 130
    assert "interrupted; the rounds that are done are kept" in said.err
    monkeypatch.undo()
    assert (tmp_path / "runs/tiny-1/record.jsonl").exists()


STOPPED = """
import os, signal, sys, time
from atoll import cli

INTERRUPT = "os.kill(os.getpid(), signal.SIGINT); time.sleep(10)"

def command():
    try:
        exec(INTERRUPT)
    except BaseException:
        {then}

cli.COMMANDS["runs"] = (command, "")
sys.argv = ["atoll", "runs"]
cli.main()
"""


@pytest.mark.parametrize("then", ["raise", "raise ModuleNotFoundError('swallowed') from None"])
def test_an_interrupt_is_one_wherever_a_library_meets_it(tmp_path: Path, then: str) -> None:
    """Inside `exec`, as in dataclasses, CPython would end as if killed; lazy imports make another error of it."""
    (tmp_path / "stopped.py").write_text(STOPPED.format(then=then))
    done = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "atoll: interrupted\n")


# The cache, and the hub.


def test_tokens_are_for_their_owner_alone(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "tokens" / "key") as folder:
        (folder / "train").mkdir()
        (folder / "train" / "ids.npy").write_bytes(b"private")
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [tmp_path / "tokens", *(tmp_path / "tokens").rglob("*")]}
    assert {modes[name] for name in ("tokens", "key", "train")} == {0o700}
    assert modes["ids.npy"] == 0o600


def test_models_stay_open_to_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "models" / "key"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "models" / "key").stat().st_mode) == 0o755


def test_hub_that_is_not_reached_is_asked_once_and_quietly(tmp_path: Path, free_port: int) -> None:
    code = (
        "import sys; from atoll.cli import call; sys.exit(call(['data', 'one.jsonl', '--model', 'org/no-such-model']))"
    )
    (tmp_path / "one.jsonl").write_text('{"text": "x"}\n')
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port}", "HF_HOME": str(tmp_path / "hub"),
        "ATOLL_HOME": str(tmp_path / "home"), "PATH": "",
    }  # fmt: skip
    started = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert said.returncode == 1
    assert "cannot get the model from the hub" in said.stderr
    assert "etrying" not in said.stderr
    assert "thrown while" not in said.stderr
    assert time.monotonic() - started < 20


def test_part_of_ours_that_is_named_by_its_place_stays_ours() -> None:
    from atoll import parts
    from atoll.outer import sgd

    parts.find("outer", "atoll.outer:sgd", "outer")
    parts.find("outer", "json:loads", "outer")
    assert parts.own_failure(failure(lambda: sgd().step({}, None, None))) is None  # type: ignore[arg-type]
    told = parts.own_failure(failure(lambda: json.loads(None)))  # type: ignore[arg-type]
    assert told is not None
    assert told.what == "your part json:loads failed"


def failure(do: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:
        do()
    return caught.value
