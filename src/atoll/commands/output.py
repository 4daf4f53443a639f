"""What the commands share: results on stdout as tables or JSON, and what an interruption or a crash of a run says."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.errors import AtollError, Interrupted
from atoll.interrupts import interrupted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from atoll.record.folder import RunFolder

RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, its path, or `latest`.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a path.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting over the recipe; may be repeated.")
]
Fleet = Annotated[
    str | None, typer.Option("--fleet", metavar="HOST:PORT", help="Run at the sites that have joined this server.")
]
Certs = Annotated[str, typer.Option("--certs", help="The operator's keys, for --fleet.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Without TLS: on this machine alone, to try things out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable, and nothing else on stdout.")]


class Crashed(Exception):
    """An error that is no one's mistake but ours; its traceback is in the file `note`."""

    def __init__(self, error: BaseException, note: Path | None) -> None:
        super().__init__(str(error))
        self.error, self.note = error, note


def show(table: RenderableType) -> None:
    """A result for people; in a file or a pipe without the blanks that fill up lines."""
    from atoll.terminal import console

    screen = console()
    if screen.is_terminal:
        screen.print(table)
        return
    with screen.capture() as printed:
        screen.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def show_json(data: Any) -> None:
    """A result for programs. What is not a number is null: JSON has no word for it."""
    print(json.dumps(_plain(data), indent=2, default=str))


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def say(line: str) -> None:
    """A slow step begins."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def interruptible(folder: RunFolder, new: bool) -> Iterator[None]:
    """While a run works: Ctrl-C says how to go on, and a crash leaves its traceback with the run.

    Of a `new` run nothing stays before its first event, see `run.begun`: there is nothing to go on with.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise _left(folder, new) from None
    except AtollError:
        raise
    except Exception as error:
        if interrupted():
            raise _left(folder, new) from None
        begun = folder.has_begun
        note = write_traceback(error, folder.path if begun else None)
        if told := mendable(error, note, f"`atoll resume {folder.name}`" if begun else "run it again"):
            raise told from error
        raise Crashed(error, note) from error


def _left(folder: RunFolder, new: bool) -> Interrupted:
    if new and not folder.has_begun:
        return Interrupted("interrupted before it began; nothing was kept", remedy="run it again")
    what = "interrupted; the rounds that are done are kept"
    return Interrupted(what, where=str(folder.path), remedy=f"`atoll resume {folder.name}`")


REFUSALS = ("EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "EISDIR", "ENAMETOOLONG", "ENOSPC", "EDQUOT", "ENOENT")
"""What the system says of a place that the user chose, by errno's names."""


def mendable(error: Exception, note: Path | None, again: str) -> AtollError | None:
    """An error that the user can mend: in a part of their own, or at a file or folder. None for an error of ours."""
    from atoll.parts import own_failure

    if told := own_failure(error):
        traceback_in = f"; the traceback is in {note}" if note else ""
        told.details["remedy"] = f"mend it, then {again}{traceback_in}"
        return told
    if "No usable temporary directory" in str(error):
        return AtollError(
            "nothing can be written: the disk is full, or read-only", found=error, remedy="free some space"
        )
    refused = isinstance(error, OSError) and error.errno in {getattr(errno, name) for name in REFUSALS}
    if not (refused and isinstance(error, OSError) and error.filename):
        return None
    place = Path(os.fsdecode(error.filename)).absolute()
    if error.errno == errno.ENOENT and not _above_ours(place):
        return None
    return AtollError(
        "the system refuses a file or folder", where=str(place), found=error.strerror, remedy=_other_place(place)
    )


def _ours() -> tuple[tuple[str, str, Path], ...]:
    """The folders in which Atoll writes: by which variable they are chosen, what for, and where they are now."""
    from atoll.cache import home
    from atoll.record.folder import root

    return ("ATOLL_RUNS", "runs", root().absolute()), ("ATOLL_HOME", "the cache", home())


def _above_ours(place: Path) -> bool:
    """Whether one of them cannot be made because of a place above it; what is missing within is a mistake of ours."""
    return any(place == used or place in used.parents for _, _, used in _ours())


def _other_place(place: Path) -> str:
    for name, what, used in _ours():
        if place == used or used in place.parents or place in used.parents:
            return f"set {name} to a folder for {what} that can be written (now {used})"
    return "mend its permissions, or name another place"


def write_traceback(error: BaseException, folder: Path | None = None) -> Path | None:
    """The traceback in a file of its own in `folder` (the cache by default); None where nothing can be written."""
    from atoll.cache import home

    note = (folder or home() / "errors") / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return None
    return note
