"""The cache: folders that are either complete or absent, named by what is in them.

Models and data that are fetched or computed once live under `home()`. A folder is filled beside its final place and
renamed when complete, so that a killed process leaves no half folder and a second process never reads one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from atoll.errors import AtollError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Say = Callable[[str], None]
"""Told one line before each step that takes longer than about 2 seconds."""


def quiet(line: str) -> None:
    """The `Say` of who was given none: heard by nobody, unless somebody is `listening`."""
    if (say := _LISTENER.get()) is not None:
        say(line)


_LISTENER: ContextVar[Say | None] = ContextVar("listener", default=None)


@contextmanager
def listening(say: Say) -> Iterator[None]:
    """Hears what would be said to nobody: where a part of a recipe is made, which has no other way to tell of a download."""
    token = _LISTENER.set(say)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def home() -> Path:
    """The root of the cache: `$ATOLL_HOME`, or `~/.cache/atoll`. The folder need not exist yet."""
    chosen = os.environ.get("ATOLL_HOME")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "atoll"


SECONDS_OF_SILENCE = 5.0
"""While something takes long."""


@dataclass
class Counting:
    """Says how far a long count is, whenever nothing was said for some seconds."""

    say: Say
    what: str
    of: int
    done: int = 0

    def __post_init__(self) -> None:
        self.last = time.monotonic()

    def more(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if time.monotonic() - self.last > SECONDS_OF_SILENCE:
            self.last = time.monotonic()
            self.say(f"{self.what}: {self.done} of {self.of}")


def watched(items: Iterable[T], say: Say, what: str) -> Iterator[T]:
    """The items as they come; every few seconds it is said how many there were."""
    said = time.monotonic()
    for number, item in enumerate(items, 1):
        if time.monotonic() - said > SECONDS_OF_SILENCE:
            said = time.monotonic()
            say(f"{what}: {number}")
        yield item


def content_hash(*parts: bytes | str | Path) -> str:
    """Name content by its bytes: 32 hex digits, BLAKE2b-128 over each part's length and bytes.

    A `Path` stands for the bytes of that file, read in blocks, whatever its name.

    >>> content_hash("ab", "c") == content_hash(b"ab", b"c"), content_hash("ab", "c") == content_hash("a", "bc")
    (True, False)
    """
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(_digest(part))
    return total.hexdigest()


def _digest(part: bytes | str | Path) -> bytes:
    if isinstance(part, Path):
        with part.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).digest()
    return hashlib.blake2b(part.encode() if isinstance(part, str) else part).digest()


HASHED_AT_ONCE = 1 << 20
"""Bytes whose hash takes no longer than to look up what it was: pictures and sounds are many and small."""


def file_hash(path: Path) -> str:
    """`content_hash(path)`; of a large file remembered for as long as its place, size and time of change stay the same.

    Hashing a model of several GB takes seconds; a plan has less.
    """
    status = path.stat()
    if status.st_size <= HASHED_AT_ONCE:
        return content_hash(path)
    facts = [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns]
    note = home() / "hashes" / f"{content_hash(json.dumps(facts))}.txt"
    if note.is_file() and (known := note.read_text().strip()):
        return known
    found = content_hash(path)
    write_file(note, found.encode())
    return found


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or all of the new, also after a kill."""
    with _plain_errors(path.parent, cached=path.is_relative_to(home())):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.write_bytes(content)
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, none of which shares its storage with another: what has not changed is one in many places."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, x in tensors.items():
        x = x.contiguous()
        place = x.untyped_storage().data_ptr()
        found[name] = x.clone() if place in seen else x
        seen.add(place)
    return found


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step: after a crash or a power cut it is the old one or the new one, whole.

    Raises:
        OSError: the disk is full, or will not take it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(apart(tensors), unfinished, metadata=metadata)
    except SafetensorError as error:  # the library's own type, whatever the system said
        unfinished.unlink(missing_ok=True)
        said = re.search(r"os error (\d+)", str(error))
        raise OSError(int(said[1]) if said else errno.EIO, str(error), str(path)) from error
    sync(unfinished)
    os.replace(unfinished, path)


def once(target: Path, build: Callable[[Path], None]) -> Path:
    """The folder `target`, filled by `build(folder)` if it is not there yet. Of many processes one builds, others wait.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> folder = once(root / "a", lambda folder: (folder / "x").write_text("1") and None)
        >>> once(root / "a", lambda folder: 1 / 0) == folder, (folder / "x").read_text()
        (True, '1')
    """
    if not target.is_dir():
        with _locked(target):
            if not target.is_dir():
                with _filled(target) as partial:
                    build(partial)
    return target


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    Files and folders are on disk (fsync) before the rename. Where `target` is already there it stays, because a folder
    of the cache is named by its content. Leftovers of killed processes are removed. Processes that fill the same target
    take turns; `once` spares the later ones the work.

    Raises:
        AtollError: the disk is full, or the cache cannot be written.
    """
    with _locked(target), _filled(target) as partial:
        yield partial


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `AtollError` unless the disk below `folder` has `needed` bytes free."""
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise _disk_full(folder, found=f"{free / 1e6:.0f} MB free", allowed=f"{needed / 1e6:.0f} MB for {what}")


PRIVATE = "tokens"
"""The folder of the cache that holds what clients wrote: nobody but its owner may look into it."""


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the target's lock file. The kernel lets go of it when the process dies, however it dies."""
    with _plain_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent.name == PRIVATE:
            target.parent.chmod(0o700)
        lock = (target.parent / f".{target.name}.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _filled(target: Path) -> Iterator[Path]:
    """`atomic_folder` for the holder of the lock, to whom every other partial folder is a leftover."""
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(leftover)
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    with _plain_errors(target.parent):
        partial.mkdir()
        try:
            yield partial
            if target.parent.name == PRIVATE:
                _close_to_others(partial)
            if not target.is_dir():
                _sync_tree(partial)
                partial.rename(target)
                sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _close_to_others(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _plain_errors(folder: Path, cached: bool = True) -> Iterator[None]:
    """Turn the system's errors about a disk, that of the cache or another, into ones that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder, found=str(error), allowed="") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and str(folder) in str(error.filename):
            what = "cannot write to the cache" if cached else "cannot write here"
            remedy = "set ATOLL_HOME to a folder that can be written" if cached else "name a place that can be written"
            raise AtollError(what, where=str(folder), found=str(error), remedy=remedy) from error
        raise


def _disk_full(folder: Path, *, found: str, allowed: str) -> AtollError:
    remedy = f"free some space, or set ATOLL_HOME to a folder on another disk (now {home()})"
    return AtollError("no space on disk", where=str(folder), found=found, allowed=allowed, remedy=remedy)
