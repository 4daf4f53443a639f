"""Chat: the tuned and the base model answer as plain transformers and peft would, word by word."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.chat import Chat, converse
from atoll.models.tiny import tiny as tiny_model
from atoll.record.folder import RunFolder
from atoll.result import Result, load_result
from support import Atoll

QUESTION = "What color is item 3?"
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def result(finished: Path) -> Result:
    return load_result(RunFolder(finished))


def greedy(model: Any, tokenizer: Any, text: str, count: int = 12) -> str:
    """The most likely tokens, one forward pass each: no generate(), no cache."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_tuned_model_answers_as_plain_peft_does(result: Result, finished: Path) -> None:
    from peft import PeftModel

    plain, tokenizer = tiny_model("llama")
    tuned = PeftModel.from_pretrained(plain, finished / "adapter").eval()
    assert Chat(result, max_tokens=12).answer(QUESTION, lambda piece: None) == greedy(tuned, tokenizer, PROMPT)


def test_base_model_answers_as_if_nothing_had_been_trained(result: Result) -> None:
    plain, tokenizer = tiny_model("llama")
    chat = Chat(result, max_tokens=12, base=True)
    expected = greedy(plain, tokenizer, PROMPT)
    assert chat.answer(QUESTION, lambda piece: None) == expected
    assert chat.command("/base") == "now the tuned model answers"
    chat.command("/new")
    assert chat.answer(QUESTION, lambda piece: None) != expected


def test_answer_comes_in_pieces_and_is_remembered(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Chat, "_generate", lambda self, text, media, write: (asked.append(text), write("ab"), "ab")[-1])
    chat, pieces = Chat(result), list[str]()
    chat.answer("one?", pieces.append)
    chat.answer("two?", pieces.append)
    assert asked[1].startswith(asked[0] + "ab<|im_end|>\n<|im_start|>user\ntwo?")
    assert pieces == ["ab", "ab"]
    chat.command("/new")
    chat.answer("one?", pieces.append)
    assert asked[2] == asked[0]


def test_streamed_pieces_are_the_answer(result: Result) -> None:
    pieces: list[str] = []
    answer = Chat(result, max_tokens=12).answer(QUESTION, pieces.append)
    assert "".join(pieces) == answer


def test_a_model_of_plain_text_continues_it(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    written = result.outcome.recipe
    work = written.finetune.model_copy(update={"objective": "causal_lm"})
    raw = replace(result, outcome=replace(result.outcome, recipe=written.model_copy(update={"finetune": work})))
    asked: list[str] = []
    monkeypatch.setattr(Chat, "_generate", lambda self, text, media, write: asked.append(text) or "x")
    chat = Chat(raw)
    chat.answer("The reef", lambda piece: None)
    chat.answer("The reef", lambda piece: None)
    assert asked == ["The reef", "The reef"]


def test_temperature_draws(result: Result) -> None:
    torch.manual_seed(0)
    answers = {Chat(result, max_tokens=8, temperature=5.0).answer(QUESTION, lambda piece: None) for _ in range(5)}
    assert len(answers) > 1


def test_conversation_ends_at_quit(result: Result) -> None:
    said, told = list[str](), list[str]()
    converse(Chat(result, max_tokens=1), ["", "/what", "/base", "/quit", "never"], said.append, told.append)
    assert said == []
    assert told[0].startswith("/base switches")
    assert told[1] == "now the base model answers"


def test_command_answers_on_stdout_alone(
    atoll: Atoll, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Result
) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "tiny-1")
    said = atoll("chat", "latest", QUESTION, "--max-tokens", "12")
    assert said.out == Chat(result, max_tokens=12).answer(QUESTION, lambda piece: None) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n/base\n{QUESTION}\n"))
    talk = atoll("chat", "tiny-1", "--max-tokens", "12")
    assert talk.status == 0
    assert talk.out.startswith(said.out)
    assert "now the base model answers" in talk.err


def test_run_without_a_checkpoint_has_no_result(atoll: Atoll, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "tiny-1")
    (tmp_path / "runs/tiny-1/checkpoint.safetensors").unlink()
    said = atoll("chat", "tiny-1", "hello")
    assert said.status == 1
    assert "the run has no result yet" in said.err
    assert "`atoll resume tiny-1`" in said.err
