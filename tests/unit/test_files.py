"""Files to rows: whatever a file holds, it is read in little memory, or refused with its place."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from atoll.data.files import parse_json, rows
from atoll.errors import AtollError


def write(path: Path, table: Any) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=20)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        from datasets import Dataset

        Dataset(table).save_to_disk(str(path))
    return path


def fails(path: Path) -> AtollError:
    with pytest.raises(AtollError) as caught:
        list(rows(path))
    return caught.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, name: str) -> None:
    table = pa.table({"text": [f"{n} " + "word " * 20_000 for n in range(400)]})  # 400 of 100 KB
    path = write(tmp_path / name, table)
    del table
    list(rows(write(tmp_path / f"first{path.suffix}", pa.table({"text": ["x"]}))))  # imports are not the rows'
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    arrow = max(pa.total_allocated_bytes() - before for _ in rows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
    assert arrow < 10e6


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"text": "a\\ud800"}', "half of a surrogate pair"),
        ('{"text": "x", "more": {"\\uDFFF": 1}}', "half of a surrogate pair"),
        ('{"text": "x", "n": ' + "9" * 5000 + "}", "digits"),
        ('{"text": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"text": ', "Expecting value"),
    ],
)
def test_json_that_nothing_can_work_with_is_named_by_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + text + "\n")
    error = fails(path)
    assert error.what == "a line is not JSON"
    assert error.details["where"] == f"{path}:2"
    assert why in error.details["found"]


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '"\\\\ud800"', '"\\\\uDead end"'])
def test_whole_pairs_and_escaped_escapes_are_text(text: str) -> None:
    assert parse_json(text) == json.loads(text)


def not_utf8(count: int, bad: int) -> Any:
    raw = [b"\xff" if n == bad else b"x" for n in range(count)]
    offsets = np.arange(count + 1, dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), count, [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(raw))])


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
@pytest.mark.parametrize("bad", [0, 29])
def test_values_that_cannot_be_read_are_named_by_row_and_column(tmp_path: Path, name: str, bad: int) -> None:
    far = [2**62 if n == bad else 0 for n in range(40)]
    for column in (not_utf8(40, bad), pa.array(far, pa.timestamp("us"))):
        folder = tmp_path / str(column.type)
        folder.mkdir()
        path = write(folder / name, pa.table({"text": ["x"] * 40, "seen": column}))
        error = fails(path)
        assert error.what == "a value cannot be read"
        assert error.details["where"] == f"{path}: row {bad + 1}"
        assert error.details["found"].startswith("in column seen: ")
