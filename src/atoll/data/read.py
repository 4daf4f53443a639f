"""What a client holds, as records: chat, prompt and completion, preferences, or plain text; checked, never all in memory.

A source is a file, a folder of files, or a Hugging Face `datasets` directory. In a folder, files named `train` and
`test` (also validation, dev, eval, held_out) name the two splits; otherwise a held-out share is split off by a hash of
each record's content, so that the same text never lies on both sides, whatever the order and the number of copies.

Two kinds of mistake are told apart. What makes the source unreadable (not JSON, not UTF-8, no known columns, mixed
formats, wrong types) stops with its place: guessing would train on the wrong thing. What is wrong with one record (no
answer, empty text) leaves that record out; `Report` counts it under its reason, with the place of the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Literal, NamedTuple

from atoll.data.files import READERS, Row, rows
from atoll.data.formats import FORMS, Form, Message, content_of, form_of, known_columns, renaming
from atoll.data.media import COLUMNS as MEDIA_COLUMNS
from atoll.data.media import MEDIA_SUFFIXES, Medium, Missing, Unusable, named_media
from atoll.errors import AtollError, closest

Split = Literal["train", "test"]
Labels = Literal["sft", "causal_lm", "preference", "selector"]
"""Where an objective puts the loss: on a chat's answers, on every token, on each of the answers that a question allows, on
the letters under which a question shows them."""
LABELS: dict[Form, Labels] = {
    "preference": "preference",
    "chat": "sft",
    "prompt_completion": "sft",
    "text": "causal_lm",
}
"""Where the loss is on records of a format, unless an objective says otherwise."""

HELD_OUT = 0.1
"""The share of records kept for evaluation, where neither a file nor the recipe says."""

ALSO_HELD_OUT = "also in the held-out split"

_TEST_NAME = re.compile(r"(test|validation|valid|val|dev|eval|held[-_]?out)([-_.].*)?$", re.IGNORECASE)


class Record(NamedTuple):
    """One record: the `messages` of a chat (prompt and completion make two, plain text one without a role).

    A preference is the chat with the chosen answer, and both answers as `choices`.

    `row` counts the rows of the source from 0 in reading order, those left out included: it addresses `column`. Those
    of planted records are -1, -2, ...
    """

    form: Form
    messages: list[Message]
    split: Split
    row: int
    place: str
    media: tuple[Medium, ...] = ()
    choices: tuple[str, ...] = ()
    """The answers that the last question allows; the answer is among them."""


@dataclass
class Report:
    """What became of a source's records: `left_out` maps a reason to (how many, the first one's place)."""

    form: str = ""
    read: int = 0
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    unused_columns: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Records that were read and not left out."""
        return self.read - sum(count for count, _ in self.left_out.values())

    @property
    def usable(self) -> bool:
        """Whether anything is left to train or evaluate on; a client without is left out by the caller."""
        return self.kept > 0

    def see(self, row: Row) -> None:
        """Notes a row's columns that are not read."""
        known = known_columns(self.form)
        new = [name for name in row if name not in known and name not in self.unused_columns]
        self.unused_columns = (*self.unused_columns, *new)

    def leave_out(self, reason: str, place: str) -> None:
        """Count one record under `reason`, keeping the place of the first."""
        count, first = self.left_out.get(reason, (0, place))
        self.left_out[reason] = (count + 1, first)

    def __str__(self) -> str:
        """One line a reason.

        >>> report = Report("text", read=3)
        >>> report.leave_out("empty text", "notes.jsonl:2")
        >>> print(report)
        2 of 3 records kept (text)
        1 left out: empty text, first at notes.jsonl:2
        """
        if not self.read:
            return "no records"
        head = f"{self.kept} of {self.read} records kept ({self.form})"
        return "\n".join(
            [head, *(f"{count} left out: {why}, first at {place}" for why, (count, place) in self.left_out.items())]
        )


class Planted(NamedTuple):
    """A question and its answer that lie in no file: a canary, see canaries.py."""

    question: str
    answer: str


@dataclass(frozen=True)
class Source:
    """A client's data: its files in reading order, the split each names, and the share held out where none is named.

    `planted` are trained on after the files' own records, in the files' format, and never held out.
    """

    path: Path
    files: tuple[tuple[Path, Split | None], ...]
    held_out: float = HELD_OUT
    planted: tuple[Planted, ...] = ()
    missing: Missing | None = None
    """Of what is trained on."""


def open_source(path: str | Path, held_out: float = HELD_OUT) -> Source:
    """Find the data files at `path`: a file, a folder of files, or a `datasets` directory. An empty folder has none.

    Args:
        path: the file or folder.
        held_out: the share of records kept for evaluation where no file is named for it, in [0, 1).

    Raises:
        AtollError: there is no such path, or what is there cannot be read.
    """
    path = Path(path)
    if not 0 <= held_out < 1:
        raise AtollError("the held-out share is out of range", found=held_out, allowed="at least 0, less than 1")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir() if _could_be(p)] if path.parent.is_dir() else []
        remedy = closest(path.name, beside) if beside else f"check the path: {path.absolute()}"
        raise AtollError("there is no such file or folder", where=str(path), remedy=remedy)
    return Source(path, _splits(_files(path)), held_out)


def _could_be(path: Path) -> bool:
    """Whether a path may be a client's: a data file, or a folder with one."""
    return path.suffix.lower() in READERS or (
        path.is_dir() and any(p.suffix.lower() in READERS for p in path.iterdir())
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        found = [path] if path.suffix.lower() in READERS else []
    elif (path / "dataset_dict.json").is_file():
        found = sorted(part for part in path.iterdir() if _is_saved(part))
    else:
        found = [path] if _is_saved(path) else sorted(p for p in path.iterdir() if p.suffix.lower() in READERS)
        if found != [path]:
            _refuse_nested(path)
    names = [path.name] if path.is_file() else sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    if names and not found:
        raise AtollError(
            "no data files",
            where=str(path),
            found=", ".join(names[:10]),
            allowed=f"{', '.join(READERS)}, or a folder written by datasets' save_to_disk",
        )
    return found


def _refuse_nested(path: Path) -> None:
    """Raise AtollError for data below a folder of files: they would be left out without a word."""
    below = (part for part in sorted(path.iterdir()) if part.is_dir() and not part.name.startswith((".", "_")))
    nested = [part.name for part in below if any(file.suffix.lower() in READERS for file in part.rglob("*"))]
    if nested:
        raise AtollError(
            "data in subfolders are not read",
            where=str(path),
            found=", ".join(nested),
            allowed="the data files of a client side by side in its folder",
            remedy=f"of a folder of clients name one: {path / nested[0]}; of a client's, move them up, or let the "
            "subfolder's name begin with _ to leave it out",
        )


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _splits(files: list[Path]) -> tuple[tuple[Path, Split | None], ...]:
    """Held-out files first: training records are compared with them. Nothing but held-out names names nothing."""
    tests = [file for file in files if _TEST_NAME.match(file.name)]
    trains = [file for file in files if file not in tests]
    if not tests or not trains:
        return tuple((file, None) for file in files)
    return (*((file, "test") for file in tests), *((file, "train") for file in trains))


def records(source: Source, report: Report, first: int | None = None) -> Iterator[Record]:
    """The usable records of `source`, one at a time; `report` is filled on the way and is complete at the end.

    With `first`, no more than so many rows of each file are read.

    Raises:
        AtollError: the source cannot be read for what it is: see the file's head.
    """
    form: Form | None = None
    held_out: set[int] = set()
    for path, named in source.files:
        for place, row in islice(rows(path), first):
            form = form or _recognize(path, row, place, report)
            report.see(row)
            report.read += 1
            where = place.removeprefix(f"{source.path.parent}/")  # a report holds for a copy of the data elsewhere
            try:
                (content, choices), media = content_of(form, row, place), tuple(named_media(row, path.parent, place))
                _refuse_unread_media(row, path.parent, report)
            except Unusable as reason:
                report.leave_out(str(reason), where)
                continue
            digest = _digest(content if not media else [*content, *({"medium": medium.key} for medium in media)])
            split = named or ("test" if digest < source.held_out * 2**64 else "train")
            if named == "test":
                held_out.add(digest)
            elif named == "train" and digest in held_out:
                report.leave_out(ALSO_HELD_OUT, where)
                continue
            if source.missing and split == "train":
                content, media = source.missing(content, media, digest)
            yield Record(form, content, split, report.read - 1, where, media, choices)
    if form:
        report.read += len(source.planted)
        yield from planted_records(source.planted, form)


def planted_records(planted: Iterable[Planted], form: Form) -> Iterator[Record]:
    """Planted questions and answers as records to train on, of the format that a source has."""
    for number, (question, answer) in enumerate(planted, 1):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages = [{"content": f"{question}\n{answer}"}] if form == "text" else chat
        yield Record(form, messages, "train", -number, f"planted record {number}")


def _refuse_unread_media(row: Row, folder: Path, report: Report) -> None:
    """Raises Unusable for a record that names pictures, sounds or films in a column that is not read: it would be blind."""
    for name in report.unused_columns:
        value = row.get(name)
        named = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        if any(
            isinstance(one, str) and one.lower().endswith(MEDIA_SUFFIXES) and _is_there(folder / one) for one in named
        ):
            read = ", ".join(dict.fromkeys(one.columns[0] for one in MEDIA_COLUMNS.values()))
            raise Unusable(f"media in the column '{name}', which is not read: {read} are")


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # what no file can be called
        return False


def media_of(path: Path) -> Iterator[Medium]:
    """The media that a data file names, those that can be used."""
    for place, row in rows(path) if _may_name_media(path) else ():
        with suppress(Unusable):
            yield from named_media(row, path.parent, place)


def _may_name_media(path: Path) -> bool:
    """Whether a file could name media: without parsing it where each row may have other columns."""
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json") and path.stat().st_size:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
            return any(text.find(f'"{name}"'.encode()) >= 0 for name in MEDIA_COLUMNS)
    first = next(iter(rows(path)), None)
    return first is not None and any(name in first[1] for name in MEDIA_COLUMNS)


def column(source: Source, name: str) -> list[Any]:
    """The value of column `name` for every row of `source`, in reading order: what partitioners go by.

    Raises:
        AtollError: a row has no such column.
    """
    values = []
    for path, _ in source.files:
        for place, row in rows(path):
            if name not in row:
                raise AtollError("no such column", where=place, found=name, remedy=closest(name, row))
            values.append(row[name])
    return values


def _recognize(path: Path, row: Row, place: str, report: Report) -> Form:
    """The format of a file whose first row this is: that of the first of its rows which has one."""
    form = next((form for _, one in islice(rows(path), LOOKED_AT) if (form := form_of(one))), None)
    if form is None:
        raise AtollError(
            "the format of the records is not recognized",
            where=place,
            found=f"columns {', '.join(map(str, row)) or '(none)'}",
            allowed=FORMS,
            remedy=renaming(row, place),
        )
    report.form = form
    return form


LOOKED_AT = 100
"""Rows that are looked at for a format: a record that lacks a column is left out wherever it stands."""


def _digest(messages: list[Message]) -> int:
    """64 bits of the content's hash, uniform: a share p of them lies below p * 2^64."""
    plain = json.dumps(messages, sort_keys=True, default=str).encode()
    return int.from_bytes(blake2b(plain, digest_size=8).digest())
