"""Public tasks: real questions with choices, asked of a run's model and of its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import atoll
from atoll.data.answers import ends_of
from atoll.data.prepared_tasks import (
    TASKS,
    mixed,
    not_told,
    open_questions,
    questions,
    task,
    true_or_false,
    with_options,
)
from atoll.data.read import Report, records
from atoll.data.tokenize import prompting
from atoll.errors import AtollError
from atoll.local.rollouts import Sampling, completed
from atoll.models.tiny import tiny
from atoll.record.folder import find
from atoll.record.tasks import Score, read_scores, rows, write_scores
from atoll.tasks import evaluate_tasks, exact_match, rouge


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name, one in TASKS.items() if one.written])
def test_a_task_whose_answers_are_written_has_right_ones(name: str) -> None:
    found = open_questions(name)
    assert len(found) > 400
    assert all(one.prompt[-1] in ".?!" and one.references and all(one.references) for one in found)
    assert len({one.prompt for one in found}) == len(found)


@pytest.mark.parametrize(
    ("answer", "exact", "near"),
    [("The Eiffel Tower.", 1.0, 0.8), ("eiffel  tower", 1.0, 1.0), ("In Paris", 0.0, 0.0), ("", 0.0, 0.0)],
)
def test_what_is_written_is_compared_with_what_is_right(answer: str, exact: float, near: float) -> None:
    references = ["Eiffel Tower", "tour Eiffel"]
    assert exact_match(answer, references) == exact
    assert rouge()(answer, references) == pytest.approx(near)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_completion_is_transformers_own(family: str) -> None:
    model, tokenizer = tiny(family)
    prompts = [prompting(tokenizer)(text) for text in ("Who?", "And when was that?")]
    how = Sampling(1, 9, 0.0, ends_of(tokenizer))
    for asked, found in zip(prompts, completed(model, prompts, how), strict=True):
        ids = torch.tensor(asked.ids).long()[None]
        with torch.no_grad():
            wanted = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=list(how.ends), pad_token_id=0)
        assert wanted[0, len(asked.ids) :].tolist() == found.tolist()


@pytest.mark.real
@pytest.mark.parametrize("name", [name for name, one in TASKS.items() if not one.written])
def test_a_task_has_questions_with_one_right_choice(name: str) -> None:
    report = Report()
    found = list(records(task(name), report))
    assert len(found) > 400
    assert not report.left_out
    assert all(one.split == "test" and one.messages[-1]["content"] in one.choices for one in found)
    assert len({json.dumps(one.messages[0]) for one in found}) == len(found)


def test_what_is_not_told_and_what_is_false() -> None:
    row = {
        "passage": "Two came.",
        "question": "Who lied?\nPlease choose the correct option ",
        "options": "A. he\nB. Not known",
    }
    assert not_told(row | {"answer": ["Not known"]}) == (
        "Two came.\nWho lied?\nA. he\nB. Not known",
        "B. Not known",
        ["A. he", "B. Not known"],
    )
    assert not_told(row | {"answer": ["nobody"]}) is None
    asked = {"question": "who", "answer": ["x", "y"], "def_incorrect_predictions": ["z"]}
    assert true_or_false(asked) == ("who?", "x", ["x", "z"])
    assert true_or_false(asked | {"def_incorrect_predictions": []}) is None
    assert with_options({"question": "q", "options": "A. a\nB. b", "answer": "C. c"}) is None


def test_questions_are_different_and_mixed_by_their_hashes() -> None:
    each = [{"question": f"q{i % 7}", "answer": ["x"], "def_incorrect_predictions": ["z"]} for i in range(20)]
    lines = mixed(questions("false-answers", each))
    assert len(lines) == 7
    assert lines == mixed(questions("false-answers", reversed(each)))


@pytest.mark.real
def test_a_run_is_measured_and_its_card_keeps_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    (tmp_path / "site.jsonl").write_text('{"prompt": "Is it?", "completion": "It is."}\n' * 20)
    (tmp_path / "mine.yaml").write_text(
        "recipe: 1\nname: mine\nmodel: tiny:llama\ndata: {use: clients, paths: {one: ./site.jsonl}}\n"
        "finetune: {rounds: 1, local_steps: 4, optimizer: {use: adamw, lr: 1e-2}}\n"
    )
    folder = atoll.run(tmp_path / "mine.yaml")
    first = evaluate_tasks(folder, ["openbookqa", "truthfulqa"], 20)
    assert [(one.task, one.measure, one.model) for one in first] == [
        (task, measure, model)
        for task, measures in {"openbookqa": ("accuracy", "loss"), "truthfulqa": ("exact match", "ROUGE-L")}.items()
        for model in ("base", "tuned")
        for measure in measures
    ]
    assert {one.questions for one in first} == {20}
    assert {one.chance for one in first if one.measure == "accuracy"} == {0.25}
    assert first[1].value != first[3].value
    evaluate_tasks(folder, ["openbookqa"], 30)
    kept = read_scores(find("mine-1"))
    assert sorted({(one.task, one.questions) for one in kept}) == [("openbookqa", 30), ("truthfulqa", 20)]
    card = folder.card.read_text()
    assert "## Public tasks" in card
    assert all(" | ".join(row) in card for row in rows(kept))


def test_scores_of_the_same_task_replace_those_before(tmp_path: Path) -> None:
    from atoll.record.folder import RunFolder

    folder = RunFolder(tmp_path)
    one = Score("boolq", "accuracy", "base", 0.5, 0.1, 10, 0.5)
    write_scores(folder, [one, Score("mmlu", "accuracy", "base", 0.2, 0.1, 10, 0.25)])
    assert len(write_scores(folder, [Score("boolq", "accuracy", "base", 0.6, 0.1, 20, 0.5)])) == 2
    assert {(x.task, x.questions) for x in read_scores(folder)} == {("mmlu", 10), ("boolq", 20)}


@pytest.mark.parametrize(("names", "what"), [(["boolk"], "no such task"), ([], "no task is named")])
def test_tasks_that_there_are_not(names: list[str], what: str, tmp_path: Path) -> None:
    from atoll.record.folder import RunFolder

    with pytest.raises(AtollError, match=what) as caught:
        evaluate_tasks(RunFolder(tmp_path), names, 10)
    assert "boolq" in f"{caught.value.details}"
