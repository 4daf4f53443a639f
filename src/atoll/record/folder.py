"""The folder of a run, and finding it again.

runs/quickstart-1/
  recipe.yaml               as resolved: runs again anywhere; of several stages the last, and whole.yaml all of them
  record.jsonl              the events
  checkpoint.safetensors    the state after the last whole round
  start.safetensors         what it began with, where that is what others had come to
  ledger.jsonl              what was spent of privacy, if the plan protects it
  clients/                  client state, one file each
  adapter/                  what trained, as `peft` loads it
  baselines/local-clinic/   a baseline's own run, same layout
  stages/finetune/          a stage before the last, same layout
  judged/                   its data with a judge's choices, where it learns from one
  leakage.json              what attacks on the result found, see `atoll leakage`
  tasks.json                what public tasks said of the result, see `atoll evaluate`
  card.md, plots            what the run says of itself
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from atoll.errors import AtollError, closest

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        """`quickstart-1`, or `quickstart-1/local-clinic` for a baseline's, and so for a stage before the last."""
        inside = self.outermost is not self
        return f"{self.outermost.path.name}/{self.path.name}" if inside else self.path.name

    @property
    def is_baseline(self) -> bool:
        """Whether another run is measured against it."""
        return self._inside == "baselines"

    @property
    def is_stage(self) -> bool:
        """Whether it is a stage before the last one of a run."""
        return self._inside == "stages"

    @property
    def _inside(self) -> str:
        """The kind of folder of another run that it lies in; empty for a run of its own, wherever runs lie."""
        kind = self.path.parent.name
        return kind if kind in ("baselines", "stages") and self.path.parent.absolute() != root().absolute() else ""

    @property
    def id(self) -> str:
        """Names this run among all there are, for clients on other machines. Drawn when it is first asked for."""
        path = self.path / "id"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        return path.read_text()

    @property
    def recipe(self) -> Path:
        """The recipe as resolved."""
        return self.path / "recipe.yaml"

    @property
    def record(self) -> Path:
        """The events."""
        return self.path / "record.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The state after the last whole round."""
        return self.path / CHECKPOINT

    @property
    def start(self) -> Path:
        """What it began with, where that is what others had come to; a baseline begins with what its run began with."""
        return (self.outermost if self.is_baseline else self).path / "start.safetensors"

    @property
    def whole(self) -> Path:
        """The recipe of all stages, where there are several."""
        return self.path / "whole.yaml"

    @property
    def has_begun(self) -> bool:
        """Whether it, or a stage of it, has an event."""
        return self.record.exists() or any(stage.record.exists() for stage in self.stages())

    @property
    def ledger(self) -> Path:
        """What was spent of privacy. It outlives a resume: nothing is ever taken out."""
        return self.path / "ledger.jsonl"

    @property
    def adapter(self) -> Path:
        """What trained, in the ecosystem's format."""
        return self.path / "adapter"

    @property
    def leakage(self) -> Path:
        """What attacks on the result found."""
        return self.path / "leakage.json"

    @property
    def judged(self) -> Path:
        """Its data with a judge's choices in the place of their own."""
        return self.path / "judged"

    @property
    def tasks(self) -> Path:
        """What public tasks said of the result."""
        return self.path / "tasks.json"

    @property
    def card(self) -> Path:
        """What the run says of itself."""
        return self.path / "card.md"

    def take_over(self, other: RunFolder) -> None:
        """What came of another run of the same, but for its card; the checkpoint last, and whole or not at all.

        A copy that was cut off counts for nothing.
        """
        for folder in (other.adapter, other.clients):
            if folder.exists():
                shutil.copytree(folder, self.path / folder.name, dirs_exist_ok=True)
        for file in (other.record, other.ledger, other.checkpoint):
            if file.exists():
                partial = self.path / f"{file.name}.partial"
                shutil.copyfile(file, partial)
                partial.replace(self.path / file.name)

    def client(self, name: str) -> Path:
        """A client's state. Names come from data: quoted, none leaves the folder and no two share a file."""
        return self.clients / f"{quote(name, safe='')}.safetensors"

    @property
    def clients(self) -> Path:
        """Client state, a file each."""
        return self.path / "clients"

    def baseline(self, name: str) -> RunFolder:
        """The run of a baseline."""
        return RunFolder(self.path / "baselines" / quote(name, safe=""))

    def stage(self, name: str) -> RunFolder:
        """The run of a stage before the last."""
        return RunFolder(self.path / "stages" / name)

    @property
    def outermost(self) -> RunFolder:
        """The run that this baseline or stage belongs to, or this run."""
        return RunFolder(self.path.parent.parent) if self._inside else self

    def baselines(self) -> list[RunFolder]:
        """The baselines that have a record."""
        return [RunFolder(p.parent) for p in sorted(self.path.glob("baselines/*/record.jsonl"))]

    def stages(self) -> list[RunFolder]:
        """The stages before the last, in their order."""
        found = [RunFolder(path.parent) for path in sorted(self.path.glob("stages/*/recipe.yaml"))]
        if len(found) < 2:
            return found
        from ruamel.yaml import YAML

        order: list[str] = YAML(typ="safe", pure=True).load(self.whole)["stages"]
        return sorted(found, key=lambda one: order.index(one.path.name))

    def earlier(self) -> list[RunFolder]:
        """The stages before this one."""
        each = self.outermost.stages()
        return each[: each.index(self)] if self in each else each

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time works on a run; the lock goes with the process, however it ends.

        What a process that was killed had half written is removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+") as file:
            if not any(_held(file, fcntl.LOCK_EX) for _ in range(5)):
                raise AtollError("the run is running already", where=str(self.path), remedy=f"`atoll stop {self.name}`")
            for unfinished in [*self.path.rglob("*.partial")]:
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
            yield

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Says what a full disk means for the run. Errors of tensor files and of copied folders have the number as text."""
        try:
            yield
        except Exception as error:
            full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            said = [text for n in full for text in (f"os error {n})", f"[Errno {n}]")]
            if getattr(error, "errno", None) not in full and not any(text in str(error) for text in said):
                raise
            raise AtollError(
                "no space on disk; the run is whole up to its last checkpoint", where=str(self.path), found=error,
                remedy=f"free some space, then `atoll resume {self.name}`",
            ) from error  # fmt: skip

    def is_running(self) -> bool:
        """Whether some process holds the lock."""
        lock = self.path / "lock"
        if not lock.exists():
            return False
        with lock.open("a+") as file:
            return not _held(file, fcntl.LOCK_SH)

    def ask_to_stop(self) -> None:
        """The run ends after the round it is in."""
        (self.path / "stop").touch()

    def asked_to_stop(self) -> bool:
        """Whether somebody has asked; the question is taken back by this call."""
        try:
            (self.path / "stop").unlink()
        except FileNotFoundError:
            return False
        return True


def _held(file: IO[str], how: int) -> bool:
    """Tries to lock; who only looks whether a run is running holds the lock for a moment."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError:
        time.sleep(0.05)
        return False
    return True


def root() -> Path:
    """Where runs lie: $ATOLL_RUNS, or `runs` in the current folder."""
    return Path(os.environ.get("ATOLL_RUNS", "runs"))


def create(name: str) -> RunFolder:
    """A new folder `name-N` with the next free number.

    Raises:
        AtollError: runs cannot be kept where they should be.
    """
    try:
        root().mkdir(parents=True, exist_ok=True)
        return _next(name)
    except OSError as error:
        raise AtollError(
            "cannot make a folder for the run", where=str(root().absolute()), found=error.strerror,
            remedy="go to a folder that can be written, or set ATOLL_RUNS to one",
        ) from error  # fmt: skip


def _next(name: str) -> RunFolder:
    number = 1 + max(
        (int(p.name.rpartition("-")[2]) for p in root().glob(f"{name}-*") if _numbered(p, name)), default=0
    )
    while True:
        try:
            (root() / f"{name}-{number}").mkdir()
        except FileExistsError:  # somebody else was faster
            number += 1
        else:
            return RunFolder(root() / f"{name}-{number}")


def _numbered(path: Path, name: str) -> bool:
    return path.name.removeprefix(f"{name}-").isdigit()


def find(reference: str) -> RunFolder:
    """A run by its name, its path, or `latest`."""
    if (Path(reference) / "recipe.yaml").exists():
        return RunFolder(Path(reference))
    known = {folder.name: folder for folder in every()}
    if not known:
        raise AtollError(
            "there are no runs yet", where=str(root().absolute()), found=reference,
            remedy="`atoll run quickstart` makes one",
        )  # fmt: skip
    if reference == "latest":
        return max(known.values(), key=lambda folder: folder.recipe.stat().st_mtime)
    run, _, inner = reference.partition("/")
    for one in (known[run].baseline(inner), known[run].stage(inner)) if run in known and inner else ():
        if one.recipe.exists():
            return one
    if reference not in known:
        raise AtollError(
            "there is no such run", where=str(root().absolute()), found=reference, remedy=closest(reference, known)
        )
    return known[reference]


def every() -> list[RunFolder]:
    """All runs here, by name."""
    return [RunFolder(path.parent) for path in sorted(root().glob("*/recipe.yaml"))]
