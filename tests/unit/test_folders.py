"""A folder of clients: every file in it is somebody's, or it is refused by name; none is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atoll.data.read import Report, open_source, records
from atoll.data.sources import folders
from atoll.data.tokenize import HIDDEN_ANSWER, prepare
from atoll.errors import AtollError
from atoll.models.tiny import byte_tokenizer

PAIR = {"prompt": "q", "completion": "a"}


def write(path: Path, row: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row) + "\n" if path.suffix != ".csv" else "prompt,completion\nq,a\n")


def test_files_of_every_kind_are_clients(tmp_path: Path) -> None:
    for name in ("a/train.jsonl", "b.json", "c.ndjson", "d.csv", "e.jsonl", "notes.md", "_raw.jsonl"):
        write(tmp_path / name, PAIR)
    found = {name: client.source.files[0][0].name for name, client in folders(str(tmp_path)).items()}
    assert found == {"a": "train.jsonl", "b": "b.json", "c": "c.ndjson", "d": "d.csv", "e": "e.jsonl"}


def test_two_clients_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a/train.jsonl", "a.jsonl", "b.jsonl", "e.csv", "e.jsonl"):
        write(tmp_path / name, PAIR)
    with pytest.raises(AtollError, match="two clients have one name") as caught:
        folders(str(tmp_path))
    assert caught.value.details["found"] == "a: a, a.jsonl; e: e.csv, e.jsonl"


def test_data_below_a_clients_folder_are_refused_unless_set_aside(tmp_path: Path) -> None:
    write(tmp_path / "s1" / "y.jsonl", PAIR)
    write(tmp_path / "s1" / "2023" / "01" / "x.jsonl", PAIR)
    (tmp_path / "s1" / "pictures").mkdir()
    with pytest.raises(AtollError, match="data in subfolders are not read") as caught:
        folders(str(tmp_path))
    assert caught.value.details["where"] == str(tmp_path / "s1")
    assert caught.value.details["found"] == "2023"
    (tmp_path / "s1" / "2023").rename(tmp_path / "s1" / "_2023")
    assert [file.name for file, _ in folders(str(tmp_path))["s1"].source.files] == ["y.jsonl"]


@pytest.mark.parametrize("messages", ["[" * 100_000, '[{"role": "user", "content": "\\ud800"}]', "9" * 5000])
def test_messages_as_text_that_nothing_can_work_with_are_named_by_line(tmp_path: Path, messages: str) -> None:
    write(tmp_path / "a.jsonl", {"messages": messages})
    with pytest.raises(AtollError, match="messages has the wrong type") as caught:
        list(records(open_source(tmp_path), Report()))
    assert caught.value.details["where"] == f"{tmp_path / 'a.jsonl'}:1"


def test_a_conversation_whose_answer_is_not_found_is_counted(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]}
    write(
        tmp_path / "a.jsonl", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, call]}
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (  # the system text stands in the last question, if that is the last message
        "{% for m in messages[1:] %}{% if m.role == 'user' %}{{ 'Q: ' + (messages[0].content if loop.last else '') }}"
        "{{ m.content + '\n' }}{% else %}{{ m.tool_calls[0].name + eos_token }}{% endif %}{% endfor %}"
    )
    source = open_source(tmp_path / "a.jsonl", 0.0)
    result = prepare(source, tokenizer, 256, cache_root=tmp_path)
    assert result.report.left_out == {HIDDEN_ANSWER: (1, "a.jsonl:1")}
    whole = prepare(source, tokenizer, 256, "causal_lm", cache_root=tmp_path)
    assert len(whole.train) == 1


def test_a_path_that_is_not_there_is_told_of_data_beside_it_and_of_nothing_else(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("no data")
    with pytest.raises(AtollError) as told:
        open_source(tmp_path / "north.jsonl", 0.1)
    assert told.value.details["remedy"] == f"check the path: {tmp_path / 'north.jsonl'}"
    (tmp_path / "nort.jsonl").write_text("{}")
    with pytest.raises(AtollError) as told:
        open_source(tmp_path / "north.jsonl", 0.1)
    assert told.value.details["remedy"] == "did you mean 'nort.jsonl'?"
