"""Tasks of the Language Model Evaluation Harness: asked of every model of a run, and scored as our own likelihoods say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import atoll
from atoll.data.collate import Choices, Sample
from atoll.errors import AtollError
from atoll.local.choices import in_full
from atoll.models.spaces import write
from atoll.record.folder import find
from atoll.record.tasks import Score, rows
from atoll.result import load_result
from atoll.tasks import evaluate_tasks, models

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    {"question": f"Which is number {i}?", "choices": [f"it is {i}", f"not {i + 3}", "who knows"], "answer": i % 3}
    for i in range(24)
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder with a task of its user's own."""
    folder = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOLL_RUNS", str(folder / "runs"))
        (folder / "site.jsonl").write_text('{"prompt": "Is it?", "completion": "it is 5"}\n' * 20)
        (folder / "mine.yaml").write_text(
            "recipe: 1\nname: mine\nmodel: tiny:llama\ndata: {use: clients, paths: {one: ./site.jsonl}}\n"
            "finetune: {rounds: 1, local_steps: 4, optimizer: {use: adamw, lr: 1e-2}}\n"
        )
        (folder / "capitals.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
        (folder / "capitals.yaml").write_text(TASK.format(file=folder / "capitals.jsonl"))
        atoll.run(folder / "mine.yaml")
    return folder


def test_the_harness_finds_what_our_own_likelihoods_do(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_RUNS", str(asked / "runs"))
    folder = find("mine-1")
    name = f"lm-eval:{asked / 'capitals.yaml'}"
    scores = evaluate_tasks(folder, [name], 20)
    assert [(one.task, one.measure, one.model, one.questions) for one in scores] == [
        (name, "acc", "base", 20),
        (name, "acc", "tuned", 20),
    ]
    result = load_result(folder)
    for score, params in zip(scores, models(folder, result).values(), strict=True):
        write(result.space, result.model, params)
        right = [int(likeliest(result, one) == one["answer"]) for one in QUESTIONS[:20]]
        assert score.value == pytest.approx(np.mean(right))
        assert score.error == pytest.approx(np.std(right, ddof=1) / 20**0.5)
    assert all(" | ".join(row) in folder.card.read_text() for row in rows(scores))


def likeliest(result, question) -> int:
    """The choice with the greatest likelihood after the harness's prompt."""
    ids = result.tokenizer(f"{question['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
    rest = [result.tokenizer(f" {one}", add_special_tokens=False)["input_ids"] for one in question["choices"]]
    start = np.array(ids, np.int32)
    choices = Choices(
        len(ids), tuple(np.array(r, np.int32) for r in rest), tuple(np.ones(len(r), bool) for r in rest), 0
    )
    with torch.no_grad():
        [found] = in_full(result.model.eval(), [Sample(start, start, (), choices)], lambda some: {})
    return int(found.argmax())


@pytest.mark.parametrize(
    ("name", "what", "said"),
    [
        ("lm-eval:hellaswagg", "lm-eval knows no such task", "hellaswag"),
        ("lm-eval:./nowhere.yaml", "there is no such file", "in YAML"),
        ("lm-eval:./broken.yaml", "lm-eval cannot load the task", "local files"),
    ],
)
def test_a_task_of_the_harness_that_cannot_be_asked(asked: Path, monkeypatch, name: str, what: str, said: str) -> None:
    monkeypatch.setenv("ATOLL_RUNS", str(asked / "runs"))
    monkeypatch.chdir(asked)
    (asked / "broken.yaml").write_text(TASK.format(file=asked / "gone.jsonl"))
    with pytest.raises(AtollError, match=what) as caught:
        evaluate_tasks(find("mine-1"), [name], 20)
    assert said in f"{caught.value.details}"


def test_a_measure_without_an_error_is_told_without() -> None:
    assert rows([Score("lm-eval:mine", "bleu", "base", 3.0, None, 8)])[0][3] == "3.000"
