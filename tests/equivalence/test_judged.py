"""A judge's choices in the place of the data's own: FedBis' two stages, and what cannot judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import atoll
from atoll.chat import refuse_judge
from atoll.data.read import Report, open_source, records
from atoll.errors import AtollError, Interrupted
from atoll.judged import Asking
from atoll.leakage.subject import Subject, open_run
from atoll.local.judges import Judge
from atoll.models.tiny import byte_tokenizer
from atoll.outcome import outcome
from atoll.params import equal
from atoll.planning import plan
from atoll.record.checkpoint import load_state
from atoll.record.events import Event, RoundEnded
from atoll.record.folder import RunFolder, find
from atoll.record.story import read_story
from atoll.stream import UPDATE

RECIPE = """
recipe: 1
name: bis
model: tiny:llama
data: {{use: folders, path: {data}, held_out: 0.3}}
stages: [finetune, align]
finetune: {{objective: {judge}, rounds: 4, local_steps: 8, optimizer: {{use: adamw, lr: 0.01}}, population: [north, south]}}
align: {{from: base, judge: finetune, rounds: 2, local_steps: 4, population: [server]}}
evaluate: {{every: 0}}
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sites that chose whole sentences, and a server whose file chose the others: a judge is to turn them round."""
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "data"
    folder.mkdir()
    for site, (first, last) in {"north": (0, 24), "south": (24, 48), "server": (60, 90)}.items():
        rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"{i}!"} for i in range(first, last)]
        if site == "server":
            rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(data: Path, judge: str) -> Path:
    path = data.parent / "bis.yaml"
    path.write_text(RECIPE.format(data=data, judge=judge))
    return path


def answers(folder: RunFolder, client: str, split: str) -> list[str]:
    source = open_source(folder.judged / client, 0.0)
    return [one.messages[-1]["content"] for one in records(source, Report()) if one.split == split]


def test_a_server_learns_what_the_sites_judge_chooses(data: Path) -> None:
    folder = atoll.run(recipe(data, "reward-model"))
    judged = answers(folder, "server", "train")
    assert len(judged) > 10
    assert all(one.startswith("It is") for one in judged), "as the sites choose, and not as its file has it"
    assert not any(one.startswith("It is") for one in answers(folder, "server", "test")), "these the data choose"
    assert len(answers(folder, "north", "train")) > 10
    story = read_story(folder)
    assert {one.client for one in story.replies} == {"server"}
    assert story.final.clients["north"]["reward_accuracy"] > story.base.clients["north"]["reward_accuracy"]


def test_a_judge_is_not_talked_to_and_what_learned_from_it_is(data: Path) -> None:
    folder = atoll.run(recipe(data, "reward-model"), ["align.rounds=1"])
    with pytest.raises(AtollError, match="this model judges answers") as caught:
        refuse_judge(outcome(folder.stage("finetune")))
    assert f"judge: {folder.name}/finetune" in str(caught.value)
    refuse_judge(outcome(folder))


def test_a_selectors_letters_become_the_answers_that_they_stand_for(data: Path) -> None:
    tokenizer = byte_tokenizer()

    def whole_sentences(model, samples, media):
        texts = [tokenizer.decode(one.ids) for one in samples]
        return [torch.tensor([float(f"{letter}: It is" in text) for letter in "AB"]) for text in texts]

    judge = Judge("mine", "selector", lambda tokenizer: whole_sentences)
    asked = Asking(SimpleNamespace(model=None, tokenizer=tokenizer), judge, 512)
    found = asked(list(records(open_source(data / "server.jsonl"), Report())))
    assert len(found) == 30
    assert all(one.messages[-1]["content"].startswith("It is") for one in found)


def test_what_a_judge_cannot_read_is_left_out(data: Path) -> None:
    judge = Judge("mine", "preference", lambda tokenizer: None)
    each = [one._replace(choices=()) for one in records(open_source(data / "server.jsonl"), Report())]
    assert Asking(SimpleNamespace(model=None, tokenizer=byte_tokenizer()), judge, 512)(each) == []


def test_the_choices_are_nobodys_but_the_runs(data: Path) -> None:
    (data / "north.jsonl").rename(data / "no rth.jsonl")
    folder = atoll.run(recipe(data, "reward-model"), ["finetune.population=[no rth, south]", "align.rounds=1"])
    assert folder.judged.stat().st_mode & 0o77 == 0
    assert {one.name for one in folder.judged.iterdir()} == {"no%20rth", "south", "server"}
    assert Subject in type(open_run(folder, lambda line: None)).__mro__, "attacks find the data that the run had"


def test_a_run_that_is_stopped_learns_the_same_choices_when_it_goes_on(data: Path, tmp_path: Path, monkeypatch) -> None:
    path = recipe(data, "reward-model")

    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded) and find("bis-1").judged.exists():
            find("bis-1").ask_to_stop()

    with pytest.raises(Interrupted, match="stopped as asked"):
        atoll.run(path, sinks=[stop])
    resumed = atoll.resume("bis-1")
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "others"))
    whole = atoll.run(path)
    assert equal(*(load_state(one.checkpoint).params[UPDATE] for one in (resumed, whole)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As workers have where there is one for each core: over other numbers of threads sums are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_worker_processes_learn_the_same_choices(data: Path, one_thread: None) -> None:
    path = recipe(data, "reward-model")
    here, there = atoll.run(path), atoll.run(path, ["fleet=processes"])
    assert equal(*(load_state(one.checkpoint).params[UPDATE] for one in (here, there)))


def test_another_run_may_judge(data: Path) -> None:
    text = recipe(data, "reward-model").read_text()
    alone = text.replace("[finetune, align]", "[finetune]").replace("name: bis", "name: judge")
    (data.parent / "judge.yaml").write_text("".join(line for line in alone.splitlines(True) if "align:" not in line))
    atoll.run(data.parent / "judge.yaml")
    later = text.replace("[finetune, align]", "[align]").replace("from: base, judge: finetune, ", "")
    (data.parent / "later.yaml").write_text(later + "judge: judge-1\n")
    folder = atoll.run(data.parent / "later.yaml")
    assert all(one.startswith("It is") for one in answers(folder, "server", "train"))


def test_pooled_data_are_judged(data: Path) -> None:
    folder = atoll.run(recipe(data, "reward-model"), ["align.population=pooled", "align.rounds=1"])
    assert all(one.startswith("It is") for one in answers(folder, "server", "train"))


def test_a_kill_while_the_judge_is_asked_loses_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(data, "reward-model")

    def killed(*_: object) -> None:
        (find("bis-1").path / ".judged.abc.partial" / "server").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("atoll.judged.rewrite", killed)
        with pytest.raises(KeyboardInterrupt):
            atoll.run(path, ["align.rounds=1"])
    folder = atoll.resume("bis-1")
    assert all(one.startswith("It is") for one in answers(folder, "server", "train"))
    assert not list(folder.path.rglob("*.partial"))


def test_a_judged_run_goes_on_where_it_was_moved(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = atoll.run(recipe(data, "reward-model"), ["align.rounds=1"])
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "moved"))
    (tmp_path / "moved" / folder.name / "card.md").unlink()
    assert atoll.resume(folder.name).card.exists()


def test_a_stage_by_itself_has_no_judge(data: Path) -> None:
    folder = atoll.run(recipe(data, "reward-model"), ["align.rounds=1"])
    with pytest.raises(AtollError, match="one of several stages") as caught:
        plan(folder.recipe)
    assert "whole.yaml" in caught.value.details["remedy"]


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        (["finetune.objective=sft"], "judge", "does not judge"),
        (["align.judge=fuse"], "align.judge", "no such stage before"),
        (["stages=[align]"], "align.judge", "no such stage before"),
        (["finetune.personal=[lora_B]", "align.personal=[]"], "align.judge", "stayed at its clients"),
    ],
)
def test_what_cannot_judge(data: Path, settings: list[str], where: str, what: str) -> None:
    with pytest.raises(AtollError, match=what) as caught:
        plan(recipe(data, "reward-model"), settings)
    assert where in caught.value.details["where"]
