"""Reading: each file kind gives the same records; each mistake is named at its place, or counted under its reason."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from atoll.data.formats import EMPTY_TEXT, NO_ANSWER, NO_PROMPT
from atoll.data.read import ALSO_HELD_OUT, Record, Report, column, open_source, records
from atoll.errors import AtollError

PAIRS = [{"prompt": f"{n} + {n}, é?", "completion": f"it is\n{2 * n}", "topic": str(n % 3)} for n in range(2500)]
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_saved(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(path))


def read(path: Path, held_out: float = 0.1) -> tuple[list[Record], Report]:
    report = Report()
    return list(records(open_source(path, held_out), report)), report


def fails(path: Path) -> AtollError:
    with pytest.raises(AtollError) as caught:
        read(path)
    return caught.value


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("data.jsonl", write_jsonl),
        ("data.csv", write_csv),
        ("data.parquet", write_parquet),
        ("saved", write_saved),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name, PAIRS)
    found, report = read(tmp_path / name)
    texts = [tuple(message["content"] for message in record.messages) for record in found]
    assert texts == [(row["prompt"], row["completion"]) for row in PAIRS]
    assert [record.row for record in found] == list(range(len(PAIRS)))
    assert (report.form, report.read, report.kept, report.left_out) == ("prompt_completion", 2500, 2500, {})
    assert report.unused_columns == ("topic",)
    assert column(open_source(tmp_path / name), "topic") == [row["topic"] for row in PAIRS]


def test_a_chat_reads_the_same_from_jsonl_parquet_and_a_csv_cell(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [CHAT])
    write_parquet(tmp_path / "a.parquet", [CHAT])
    write_csv(tmp_path / "a.csv", [{"messages": json.dumps(CHAT["messages"])}])
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        [record] = read(tmp_path / name)[0]
        assert (record.form, record.messages) == ("chat", CHAT["messages"])


def test_a_dataset_dictionary_names_its_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = {"train": Dataset.from_list(PAIRS[:5]), "test": Dataset.from_list(PAIRS[5:7])}
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    found, _ = read(tmp_path / "saved")
    assert [record.split for record in found] == ["test"] * 2 + ["train"] * 5


def test_keys_that_parquet_fills_with_none_are_dropped(tmp_path: Path) -> None:
    call = [{"name": "clock"}]
    chat = [{"role": "user", "content": "time?"}, {"role": "assistant", "content": None, "tool_calls": call}]
    write_parquet(tmp_path / "a.parquet", [{"messages": chat}])
    [record] = read(tmp_path / "a.parquet")[0]
    assert record.messages == [chat[0], {"role": "assistant", "content": "", "tool_calls": call}]


# Splits


def test_files_name_the_splits_and_training_gives_up_what_is_held_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00.jsonl", PAIRS[:10])
    write_jsonl(tmp_path / "more.jsonl", PAIRS[10:12])
    write_jsonl(tmp_path / "validation.jsonl", PAIRS[8:10])
    found, report = read(tmp_path)
    prompts = {split: {r.messages[0]["content"] for r in found if r.split == split} for split in ("train", "test")}
    assert prompts["test"] == {row["prompt"] for row in PAIRS[8:10]}
    assert prompts["train"] == {row["prompt"] for row in PAIRS[:8] + PAIRS[10:12]}
    assert report.left_out == {ALSO_HELD_OUT: (2, f"{tmp_path.name}/train-00.jsonl:9")}
    assert (report.read, report.kept) == (14, 12)


def test_the_held_out_share_depends_on_content_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "x.jsonl", PAIRS)
    write_jsonl(tmp_path / "b" / "y.jsonl", [*reversed(PAIRS), *PAIRS])
    sides: list[dict[str, set[str]]] = []
    for name in ("a", "b"):
        side: dict[str, set[str]] = {"train": set(), "test": set()}
        for record in read(tmp_path / name, held_out=0.2)[0]:
            side[record.split].add(record.messages[0]["content"])
        assert not side["train"] & side["test"]
        sides.append(side)
    assert sides[0] == sides[1]
    # binomial: 2500 records, mean 500, standard deviation 20
    assert 400 < len(sides[0]["test"]) < 600


def test_a_lone_file_named_for_the_held_out_split_is_still_trained_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "dev.jsonl", PAIRS[:200])
    assert {record.split for record in read(tmp_path)[0]} == {"train", "test"}


def test_nothing_is_held_out_at_share_zero(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS[:50])
    assert {record.split for record in read(path, held_out=0.0)[0]} == {"train"}


# Records left out


def test_records_without_an_answer_are_counted_with_the_first_place(tmp_path: Path) -> None:
    rows = [*PAIRS[:2], {"prompt": "q", "completion": " \n"}, {"prompt": "q"}, {"prompt": "", "completion": "a"}]
    _, report = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert report.left_out == {
        NO_ANSWER: (2, "a.jsonl:3"),
        NO_PROMPT: (1, "a.jsonl:5"),
    }
    assert report.kept == 2
    assert "2 left out: no answer" in str(report)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "content": "q"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}],
        [
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": " "},
        ],
    ],
)
def test_chats_without_an_answer_are_left_out(tmp_path: Path, messages: list[Any]) -> None:
    found, report = read(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert not found
    assert not report.usable
    assert report.left_out[NO_ANSWER][0] == 1


def test_empty_text_is_left_out(tmp_path: Path) -> None:
    found, report = read(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "  "}, {"text": None}]))
    assert [record.messages for record in found] == [[{"content": "x"}]]
    assert report.left_out[EMPTY_TEXT][0] == 2


# Mistakes that stop


def test_missing_paths_suggest_what_is_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "clinic" / "a.jsonl", PAIRS[:1])
    assert "did you mean 'clinic'?" in str(fails(tmp_path / "clinik"))
    assert "no such file" in str(fails(tmp_path / "none" / "none"))


def test_folders_without_data_say_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_text("x")
    error = str(fails(tmp_path))
    assert "notes.docx" in error
    assert ".parquet" in error
    assert "no data files" in str(fails(tmp_path / "notes.docx"))


@pytest.mark.parametrize(
    ("suffix", "content"), [(".jsonl", ""), (".jsonl", "\n \n"), (".csv", ""), (".csv", "prompt,completion\n")]
)
def test_an_empty_file_holds_no_records(tmp_path: Path, suffix: str, content: str) -> None:
    (tmp_path / f"a{suffix}").write_text(content)
    report = Report()
    assert list(records(open_source(tmp_path), report)) == []
    assert not report.usable
    assert str(report) == "no records"


def test_an_empty_folder_and_an_empty_parquet_file_hold_no_records(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("x")
    assert list(records(open_source(tmp_path), Report())) == []
    (tmp_path / "a.parquet").touch()
    assert list(records(open_source(tmp_path), Report())) == []


def test_the_first_rows_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAIRS[:1] * 3)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("no json\n")
    assert len(list(records(open_source(tmp_path), Report(), first=3))) == 3
    assert "not JSON" in str(fails(tmp_path))


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n{"text": "y"\n')
    error = fails(path)
    assert error.what == "a line is not JSON"
    assert error.details["where"] == f"{path}:3"


def test_a_json_array_gets_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PAIRS[:3]))
    error = fails(path)
    assert error.what == "a line is a JSON list, not an object"
    assert "jq" in error.details["remedy"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_bytes_that_are_not_utf8_are_named_by_offset(tmp_path: Path, name: str) -> None:
    head = b'{"text": "\xc3\xa9"}\n{"text": "caf' if name.endswith("jsonl") else b"text\n\xc3\xa9\ncaf"
    path = tmp_path / name
    path.write_bytes(head + b'\xe9"}\n')
    error = fails(path)
    assert f"byte offset {len(head)}" in error.details["where"]
    assert "0xe9" in error.details["found"]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\nx\n")
    assert [record.messages[0]["content"] for record in read(tmp_path)[0]] == ["x"]


def test_unknown_columns_get_the_closest(tmp_path: Path) -> None:
    error = fails(write_jsonl(tmp_path / "a.jsonl", [{"promt": "q", "completion": "a"}]))
    assert error.what == "the format of the records is not recognized"
    assert error.details["found"] == "columns promt, completion"
    assert error.details["allowed"] == "chosen + rejected | messages | prompt + completion | text"
    assert "did you mean 'prompt'" in error.details["remedy"]


def test_a_csv_without_a_header_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("what is 2+2?,4\nwhat is 3+3?,6\n")
    assert "the first line of a CSV names its columns" in fails(tmp_path).details["remedy"]


def test_csv_rows_of_the_wrong_width_and_open_quotes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a\nb",c\nx,y,z\n')
    error = fails(path)
    assert error.what == "a CSV row does not fit its header"
    assert error.details["where"] == f"{path}:4"
    path.write_text('prompt,completion\na,"b\n')
    assert fails(path).what == "a line is not CSV"


def test_csv_fields_may_be_longer_than_the_default_limit(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"text": "x" * 200_000}])
    assert len(read(tmp_path)[0][0].messages[0]["content"]) == 200_000


@pytest.mark.parametrize("second", [{"text": "x"}, CHAT, {"other": 1}])
def test_mixed_formats_stop(tmp_path: Path, second: dict[str, Any]) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAIRS[:2])
    path = write_jsonl(tmp_path / "b.jsonl", [second])
    error = fails(tmp_path)
    assert error.what == "formats are mixed"
    assert error.details["where"] == f"{path}:1"
    assert error.details["allowed"].startswith("prompt_completion")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": 3}, "text has the wrong type"),
        ({"prompt": ["a"], "completion": "b"}, "prompt has the wrong type"),
        ({"messages": {"role": "user"}}, "messages has the wrong type"),
        ({"messages": "hello"}, "messages has the wrong type"),
        ({"messages": ["hello"]}, "a message has the wrong type"),
        ({"messages": [{"from": "human", "value": "x"}]}, "a message has the wrong type"),
        ({"messages": [{"role": "user", "content": 3}]}, "content has the wrong type"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "unknown role"),
    ],
)
def test_wrong_types_stop_at_their_place(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    error = fails(path)
    assert error.what == what
    assert error.details["where"].startswith(f"{path}:1")


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    if name == "saved":
        write_saved(tmp_path / name, PAIRS[:3])
        next((tmp_path / name).glob("*.arrow")).write_bytes(b"broken")
    else:
        (tmp_path / name).write_bytes(b"PAR1 broken")
    error = fails(tmp_path / name)
    assert "not readable" in error.what
    assert error.details["where"] == str(tmp_path / name)


def test_an_unknown_column_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS[:3])
    with pytest.raises(AtollError, match="no such column") as caught:
        column(open_source(path), "topik")
    assert "did you mean 'topic'?" in str(caught.value)


def test_a_held_out_share_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AtollError, match="out of range"):
        open_source(tmp_path, held_out=1.0)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"{n} " + "word " * 400} for n in range(10_000)]  # 20 MB
    path = tmp_path / f"a.{kind}"
    (write_jsonl if kind == "jsonl" else write_parquet)(path, rows)
    del rows
    tracemalloc.start()
    count = sum(1 for _ in records(open_source(path), Report()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 10_000
    assert peak < 8e6


def test_a_record_that_lacks_a_column_is_left_out_wherever_it_stands(tmp_path: Path) -> None:
    whole = {"prompt": "How much?", "chosen": "seven", "rejected": "a lot"}
    half = {"prompt": "How much?", "chosen": "seven"}
    for rows in ([half, whole], [whole, half]):
        write_jsonl(tmp_path / "a.jsonl", rows)
        report = Report()
        [one] = records(open_source(tmp_path / "a.jsonl"), report)
        assert one.choices == ("seven", "a lot")
        assert (report.read, report.left_out) == (2, {"no rejected answer": (1, f"a.jsonl:{rows.index(half) + 1}")})
