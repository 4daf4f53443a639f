"""Preferences as records: what a chosen and a rejected answer may look like, and what is left out and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.data.formats import EQUAL_ANSWERS, MORE_THAN_WORDS, NO_PROMPT, UNLIKE_BEFORE
from atoll.data.preview import preview
from atoll.data.read import Report, open_source, records
from atoll.data.tokenize import NO_OTHER_ANSWER, TOO_LONG, prepare
from atoll.errors import AtollError
from atoll.models.tiny import byte_tokenizer

Q, YES, NO = "Is it?", "It is.", "No."
USER = {"role": "user", "content": Q}
SYSTEM = {"role": "system", "content": "Be brief."}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> tuple[list[Any], Report]:
    report = Report()
    return list(records(open_source(path, held_out=0), report)), report


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": Q, "chosen": YES, "rejected": NO}, [USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [answer(YES)], "rejected": [answer(NO)]}, [SYSTEM, USER]),
        ({"chosen": [USER, answer(YES)], "rejected": [USER, answer(NO)]}, [USER]),
        ({"prompt": Q, "chosen": [USER, answer(YES)], "rejected": [USER, answer(NO)], "messages": []}, [USER]),
        ({"prompt": json.dumps([SYSTEM, USER]), "chosen": json.dumps([answer(YES)]), "rejected": NO}, [SYSTEM, USER]),
    ],
    ids=["texts", "messages", "whole conversations", "prompt in both sides", "JSON in a cell"],
)
def test_a_preference_is_the_chat_with_the_chosen_answer_and_both_as_choices(
    tmp_path: Path, row: dict[str, Any], before: list[dict[str, str]]
) -> None:
    (one,), report = read(written(tmp_path, row))
    assert report.form == "preference"
    assert one.messages == [*before, answer(YES)]
    assert one.choices == (YES, NO)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": Q, "chosen": YES, "rejected": YES}, EQUAL_ANSWERS),
        ({"prompt": Q, "chosen": YES, "rejected": ""}, "no rejected answer"),
        ({"prompt": Q, "chosen": None, "rejected": NO}, "no chosen answer"),
        ({"prompt": Q, "chosen": [answer(" ")], "rejected": NO}, "no chosen answer"),
        ({"prompt": " ", "chosen": YES, "rejected": NO}, NO_PROMPT),
        ({"chosen": YES, "rejected": NO}, NO_PROMPT),
        ({"chosen": [USER, answer(YES)], "rejected": [SYSTEM, answer(NO)]}, UNLIKE_BEFORE),
        ({"prompt": Q, "chosen": [answer(YES), USER], "rejected": NO}, UNLIKE_BEFORE),
    ],
)
def test_what_cannot_be_compared_is_left_out_and_counted(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    usable = {"prompt": Q, "chosen": YES, "rejected": NO}
    found, report = read(written(tmp_path, usable, row))
    assert len(found) == 1
    assert report.left_out == {why: (1, "pairs.jsonl:2")}


def test_an_answer_that_is_json_is_a_text(tmp_path: Path) -> None:
    row = {"prompt": Q, "chosen": '[{"name": 1}]', "rejected": "[{}]"}
    (one,), _ = read(written(tmp_path, row))
    assert one.choices == ('[{"name": 1}]', "[{}]")


def test_answers_that_are_more_than_words_are_left_out(tmp_path: Path) -> None:
    call = answer("") | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    _, report = read(written(tmp_path, {"prompt": Q, "chosen": [call], "rejected": NO}))
    assert report.left_out == {MORE_THAN_WORDS: (1, "pairs.jsonl:1")}


def test_without_a_template_an_answer_is_closed_once(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    source = open_source(written(tmp_path, {"prompt": Q, "chosen": YES, "rejected": NO}), 0)
    (sample,) = prepare(source, tokenizer, 64, "sft", tmp_path / "cache").train
    assert list(sample.labels).count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(sample.labels[sample.labels >= 0]) == YES + tokenizer.eos_token


def test_a_side_of_the_wrong_type_stops_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(AtollError, match="chosen has the wrong type") as caught:
        read(written(tmp_path, {"prompt": Q, "chosen": 7, "rejected": NO}))
    assert "pairs.jsonl:1" in caught.value.details["where"]


def test_both_answers_are_tokenized_after_the_prompt_that_they_share(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = [{"prompt": Q, "chosen": YES, "rejected": NO}, {"prompt": Q, "chosen": "Yes.", "rejected": "n" * 80}]
    found = prepare(open_source(written(tmp_path, *rows), 0), tokenizer, 64, "preference", tmp_path / "cache")
    (sample,) = found.train
    assert found.report.left_out == {TOO_LONG: (1, "pairs.jsonl:2")}, "its rejected answer is"
    assert sample.choices is not None
    assert sample.choices.right == 0
    for rest, labeled, text in zip(sample.choices.rest, sample.choices.labeled, (YES, NO), strict=True):
        whole = [*sample.ids[: sample.choices.shared], *rest]
        expected = tokenizer.apply_chat_template([USER, answer(text)], tokenize=False)
        assert tokenizer.decode(whole) == expected
        assert tokenizer.decode(rest[labeled]) == f"{text}<|im_end|>"


def test_questions_with_choices_are_preferences_too_and_chats_without_are_left_out(tmp_path: Path) -> None:
    rows = [{"messages": [USER, answer("b")], "choices": ["a", "b", "c"]}, {"messages": [USER, answer(YES)]}]
    source = open_source(written(tmp_path, *rows), 0)
    found = prepare(source, byte_tokenizer(), 64, "preference", tmp_path / "cache")
    (sample,) = found.train
    assert sample.choices is not None
    assert (sample.choices.right, len(sample.choices.rest)) == (1, 3)
    assert found.report.left_out == {NO_OTHER_ANSWER: (1, "pairs.jsonl:2")}


def test_fine_tuning_learns_the_chosen_answers_of_preferences(tmp_path: Path) -> None:
    source = open_source(written(tmp_path, {"prompt": Q, "chosen": YES, "rejected": NO}), 0)
    (sample,) = prepare(source, byte_tokenizer(), 64, "sft", tmp_path / "cache").train
    assert sample.choices is None
    assert byte_tokenizer().decode(sample.labels[sample.labels >= 0]) == f"{YES}<|im_end|>"


def test_a_preview_reads_preferences_as_such(tmp_path: Path) -> None:
    found = preview(written(tmp_path, {"prompt": Q, "chosen": YES, "rejected": NO}), byte_tokenizer(), context=64)
    assert (found.objective, found.samples["train"] + found.samples["test"]) == ("preference", 1)
