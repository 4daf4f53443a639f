"""Files to rows: JSONL, CSV, Parquet and Hugging Face `datasets` directories, one row at a time.

Nothing here knows what a row means (`read.py` does); it yields (place, row) so that whatever is wrong later can be
named as `file:line`. No reader holds more than a batch of rows: a site may have more text than memory. What breaks the
*file* - a line that is not JSON, bytes that are not UTF-8, a CSV row of the wrong width, a date that no calendar holds -
stops here, with the place.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atoll.errors import AtollError

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]

BATCH = 16
"""Rows of a columnar file in memory at a time: few, for a row may be a book. 1,024 save 5 microseconds a row, a tenth
of what tokenizing it takes."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1, line ends kept; a byte order mark is dropped.

    Raises:
        AtollError: at the first byte that is not UTF-8, with its offset in the file.
    """
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                raise AtollError(
                    "the file is not UTF-8",
                    where=f"{path}:{number}, byte offset {offset + error.start}",
                    found=f"byte 0x{raw[error.start]:02x} ({error.reason})",
                    remedy="convert it: iconv -f LATIN1 -t UTF-8 FILE (give the encoding it really has)",
                ) from None
            offset += len(raw)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def jsonl_rows(path: Path) -> Rows:
    """One JSON object a line; blank lines are skipped."""
    for number, line in lines(path):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _json_object(line, place)


def _json_object(line: str, place: str) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise AtollError(
            "a line is not JSON", where=place, found=f"{_short(line)} ({error})", allowed="one JSON object a line"
        ) from None
    if not isinstance(row, dict):
        raise AtollError(
            f"a line is a JSON {type(row).__name__}, not an object",
            where=place,
            found=_short(line),
            allowed='one JSON object a line, such as {"prompt": "...", "completion": "..."}',
            remedy="an array of objects becomes lines with: jq -c '.[]' FILE > FILE.jsonl",
        )
    return row


def parse_json(text: str) -> object:
    """The value that a JSON text stands for.

    Raises:
        ValueError: it is not JSON, or no value that can be worked with: nested beyond Python's limit, an integer of
            thousands of digits, half a surrogate pair ("\\ud800"), which no encoding has bytes for.
    """
    try:
        value: object = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"half of a surrogate pair, {half!a}, stands for no character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def csv_rows(path: Path) -> Rows:
    """Comma-separated rows named by the first line; every value is a string."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than a document
    reader = csv.reader((line for _, line in lines(path)), strict=True)
    try:
        header = next(reader, [])
        for values in reader:
            place = f"{path}:{reader.line_num}"
            if values:
                yield place, _named(header, values, place)
    except csv.Error as error:
        raise AtollError(
            "a line is not CSV",
            where=f"{path}:{reader.line_num}",
            found=str(error),
            allowed='commas between fields, "quotes" around a field that holds commas or line ends, doubled inside it',
        ) from None


def _named(header: list[str], values: list[str], place: str) -> Row:
    if len(values) != len(header):
        raise AtollError(
            "a CSV row does not fit its header",
            where=place,
            found=f"{len(values)} fields: {_short(str(values))}",
            allowed=f"{len(header)} fields: {', '.join(header)}",
            remedy="put quotes around fields that hold commas",
        )
    return dict(zip((name.strip() for name in header), values, strict=True))


def parquet_rows(path: Path) -> Rows:
    """Rows of a Parquet file, a batch in memory at a time; places count rows from 1."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            yield from _table_rows(path, file.iter_batches(batch_size=BATCH))
    except (pyarrow.ArrowException, OSError) as error:
        raise AtollError("the file is not readable as Parquet", where=str(path), found=_short(str(error))) from None


def saved_rows(path: Path) -> Rows:
    """Rows of a `datasets` directory (`Dataset.save_to_disk`), memory-mapped."""
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path)).with_format("arrow")
    except Exception as error:  # the library raises many kinds for a damaged directory
        raise AtollError("the dataset is not readable", where=str(path), found=_short(str(error))) from None
    yield from _table_rows(path, dataset.iter(BATCH))


def _table_rows(path: Path, tables: Iterator[Any]) -> Rows:
    number = 0
    for table in tables:
        for row in _values(table, path, number):
            number += 1
            yield f"{path}: row {number}", row


def _values(table: Any, path: Path, before: int) -> list[Row]:
    """The rows of a table that `before` rows precede."""
    try:
        rows: list[Row] = table.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8 is a ValueError, too
        if len(table) > 1:  # one by one: which is it?
            return [row for at in range(len(table)) for row in _values(table.slice(at, 1), path, before + at)]
        names = [name for name, column in zip(table.schema.names, table.columns, strict=True) if _unreadable(column)]
        raise AtollError(
            "a value cannot be read",
            where=f"{path}: row {before + 1}",
            found=f"in column {', '.join(names)}: {_short(str(error))}",
            allowed="text in UTF-8, dates from year 1 to 9999",
            remedy="mend the value, or write the file without the column",
        ) from None
    return rows


def _unreadable(column: Any) -> bool:
    try:
        column.to_pylist()
    except (ValueError, OverflowError):
        return True
    return False


def _short(text: str, limit: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": jsonl_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
"""The reader for each suffix; a folder is read by `saved_rows`."""


def rows(path: Path) -> Rows:
    """(place, row) of one data file or `datasets` directory; none for an empty file, whatever its suffix.

    Raises:
        AtollError: it breaks off.
    """
    if path.is_dir():
        return saved_rows(path)
    return READERS[path.suffix.lower()](path) if path.stat().st_size else iter(())


def content(path: Path) -> list[Path]:
    """The files that hold the bytes of one data file or `datasets` directory, in a fixed order."""
    return sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
