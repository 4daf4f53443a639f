"""The preview shows what a run would train on: the same samples and the same loss as `prepare` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atoll.data.collate import IGNORE
from atoll.data.formats import NO_ANSWER
from atoll.data.preview import Preview, preview, render
from atoll.data.tokenize import TOO_LONG, prepare
from atoll.errors import AtollError
from atoll.models.tiny import byte_tokenizer

ROWS = [
    {"prompt": "2 + 2?", "completion": "four é 漢!", "topic": "sums"},
    {"prompt": "3 + 3?", "completion": "", "topic": "sums"},
    {"prompt": "why?", "completion": "because " * 40, "topic": "talk"},
    *({"prompt": f"{n}?", "completion": f"yes {n}", "topic": "talk"} for n in range(60)),
]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(tmp_path / "home"))


@pytest.fixture
def shown(tmp_path: Path) -> Preview:
    write(tmp_path / "clinic" / "a.jsonl", ROWS)
    return preview(tmp_path / "clinic", byte_tokenizer(), 128, show=2)


def test_it_counts_what_prepare_keeps(shown: Preview, tmp_path: Path) -> None:
    prepared = prepare(tmp_path / "clinic", byte_tokenizer(), 128, cache_root=tmp_path / "cache")
    assert shown.samples == {"train": len(prepared.train), "test": len(prepared.test)}
    assert shown.tokens == prepared.train.tokens + prepared.test.tokens
    assert shown.labeled_tokens == prepared.train.labeled_tokens + prepared.test.labeled_tokens
    assert 0 < shown.labeled_share < 1
    assert shown.report == prepared.report
    assert shown.report.left_out == {NO_ANSWER: (1, "clinic/a.jsonl:2"), TOO_LONG: (1, "clinic/a.jsonl:3")}
    every = sorted([*prepared.train.lengths, *prepared.test.lengths])
    assert shown.lengths[0.0] == every[0]
    assert shown.lengths[0.5] == every[len(every) // 2]
    assert shown.lengths[1.0] > 128  # the length of what does not fit helps to choose a context


def test_tokens_are_marked_and_give_the_text_back(shown: Preview) -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four é 漢!"}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    first = shown.shown[0]
    assert len(shown.shown) == 2
    assert len(first) == len(tokenizer(text)["input_ids"])
    assert "".join(token.text for token in first) == text
    assert "".join(token.text for token in first if token.labeled) == "four é 漢!<|im_end|>"


def test_tokens_keep_the_spaces_that_a_decoder_drops_at_the_start(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"▁two": 0, "▁is": 1, "▁even": 2, "?": 3}, unk_token="?"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    write(tmp_path / "a.jsonl", [{"prompt": "two is", "completion": " even"}])
    [sample] = preview(tmp_path, PreTrainedTokenizerFast(tokenizer_object=core), 64).shown
    assert [(token.text, token.labeled) for token in sample] == [("two", False), (" is", False), (" even", True)]


def test_the_terminal_shows_every_fact_and_the_samples(shown: Preview) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(shown))
    text = console.export_text(clear=False)
    facts = [
        "clinic/a.jsonl",
        "prompt_completion",
        "sft",
        "61 kept of 63",
        "1 no answer, first at clinic/a.jsonl:2",
        "topic",
    ]
    for fact in [*facts, "four é 漢!", f"{shown.labeled_share:.1%} with a loss"]:
        assert fact in text
    assert "\x1b[1;32mfour é 漢!" in console.export_text(styles=True)


def test_it_is_plain_data_for_json(shown: Preview) -> None:
    plain = json.loads(json.dumps(shown.as_dict()))
    assert plain["report"]["kept"] == shown.report.kept
    assert plain["samples"] == shown.samples
    assert plain["labeled_share"] == shown.labeled_share
    assert next(text for text, labeled in plain["shown"][0] if labeled) == "f"


def test_plain_text_is_previewed_as_windows(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a" * 99}])
    write(tmp_path / "test.jsonl", [{"text": "b" * 9}])
    found = preview(tmp_path, byte_tokenizer(), 20)
    assert found.objective == "causal_lm"
    assert found.samples == {"train": 5, "test": 1}
    assert found.labeled_share == 1.0
    assert found.files == {f"{tmp_path.name}/test.jsonl": "test", f"{tmp_path.name}/train.jsonl": "train"}
    assert found.lengths[1.0] == 100


def test_nothing_usable_is_a_preview_too(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": ""}])
    found = preview(tmp_path, byte_tokenizer(), 64)
    assert not found.report.usable
    assert (found.tokens, found.labeled_share, found.lengths, found.shown) == (0, 0.0, {}, ())
    assert render(found)


def test_mistakes_are_raised(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("oops\n")
    with pytest.raises(AtollError, match="not JSON"):
        preview(tmp_path, byte_tokenizer(), 64)


def test_labels_of_the_preview_are_those_of_training(shown: Preview, tmp_path: Path) -> None:
    prepared = prepare(tmp_path / "clinic", byte_tokenizer(), 128, cache_root=tmp_path / "cache")
    by_row = {
        int(row): sample
        for data in (prepared.train, prepared.test)
        for row, sample in zip(data.rows, data, strict=True)
    }
    assert [token.labeled for token in shown.shown[0]] == (by_row[0][1] != IGNORE).tolist()


@pytest.mark.parametrize("rows", [[], ROWS[1:2]])
def test_a_client_without_a_usable_record_is_called_so(tmp_path: Path, rows: list[Any]) -> None:
    write(tmp_path / "ward" / "a.jsonl", rows)
    found = preview(tmp_path / "ward", byte_tokenizer(), 128)
    screen = Console(width=100)
    with screen.capture() as printed:
        screen.print(render(found))
    lines = [" ".join(line.split()) for line in printed.get().splitlines()]
    assert "length -" in lines
    assert "usable no: a run leaves this client out" in lines


def test_a_preference_shows_both_its_sides(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "How much?", "chosen": "seven", "rejected": "a lot"}])
    found = preview(tmp_path, byte_tokenizer(), 128)
    assert found.shown_choices == (("a lot",),)
    assert found.as_dict()["shown_choices"] == (("a lot",),)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(found))
    text = console.export_text(styles=True)
    assert "green is chosen, red is not" in text
    assert "\x1b[1;32mseven" in text
    assert "\x1b[31mor: a lot" in text
