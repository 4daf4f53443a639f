"""Runs of several stages: each begins with what the one before came to, and a stop in any of them loses nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import atoll
from atoll.aggregate.fuse import average, ties
from atoll.assemble import check_data
from atoll.cli import call
from atoll.commands.compared import settings
from atoll.data.prepared_tasks import task
from atoll.data.read import Source
from atoll.data.sources import FIRST
from atoll.errors import AtollError, Interrupted
from atoll.exchange import Refused
from atoll.models.tiny import tiny
from atoll.outcome import outcome
from atoll.params import equal
from atoll.planning import plan, plan_again
from atoll.record.checkpoint import load_state
from atoll.record.events import Event, RoundEnded, RunStarted
from atoll.record.folder import RunFolder, find
from atoll.record.measured import accuracy_table
from atoll.record.plots import accuracies
from atoll.record.story import read_story
from atoll.record.tasks import read_scores
from atoll.record.views import details, summarize
from atoll.result import load_result
from atoll.stage import stop_if_hopeless
from atoll.stream import UPDATE
from atoll.tasks import evaluate_tasks, trained_on
from atoll.transforms.chain import Payload
from atoll.wire import size

RECIPE = """
recipe: 1
name: both
model: tiny:llama
data: {{use: folders, path: {data}, held_out: 0.3}}
stages: [finetune, align]
finetune: {{rounds: 2, local_steps: 3, batch_size: 4, optimizer: {{use: adamw, lr: 1.0e-2}}}}
align: {{rounds: 3, objective: {{use: dpo, beta: 0.5}}}}
evaluate: {{every: 0}}
baselines: [local]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"{i}!"} for i in range(24)]
    for site in ("north", "south"):
        (tmp_path / "data" / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "both.yaml"
    path.write_text(RECIPE.format(data=tmp_path / "data"))
    return path


def result(folder: RunFolder) -> dict:
    return load_state(folder.checkpoint).params[UPDATE]


def test_a_stage_begins_with_what_the_one_before_came_to(recipe: Path) -> None:
    heard: list[Event] = []
    folder = atoll.run(recipe, sinks=[heard.append])
    first, story = read_story(folder.stage("finetune")), read_story(folder)
    assert first
    assert story
    started = [(one.name, one.rounds, list(one.baselines)) for one in heard if isinstance(one, RunStarted)]
    assert started[:2] == [("both.finetune", 2, []), ("both", 3, ["local-north", "local-south"])]
    assert (first.started.recipe["finetune"]["objective"], story.started.recipe["finetune"]["batch_size"]) == ("sft", 4)
    assert equal(load_file(folder.start), result(folder.stage("finetune")))
    assert folder.baseline("local-north").start == folder.start, "it begins with what its run began with"
    assert story.base
    assert first.final
    assert [one["accuracy"] for one in story.base.clients.values()] == [
        one["accuracy"] for one in first.final.clients.values()
    ]
    assert find(f"{folder.name}/finetune").path == folder.stage("finetune").path
    assert find(folder.name).path == folder.path
    (before,) = [
        line for line in folder.card.read_text().splitlines() if line.startswith("Before that, finetune: down ")
    ]
    assert "in 2 rounds" in before
    assert (folder.path / before.partition("](")[2].partition(")")[0]).exists()


def test_under_masks_the_models_of_all_stages_are_in_one_table(recipe: Path) -> None:
    folder = atoll.run(recipe, ["align.exchange={use: secure-aggregation, survivors: 2}", "baselines=[local]"])
    story = read_story(folder)
    table = accuracy_table(story)
    assert table.columns == ["everybody"]
    assert [name for name, _ in table.rows] == [
        "chance", "base", "after finetune", "north alone", "south alone", "federated"
    ]  # fmt: skip
    each = story.before["finetune"].final.clients  # in the clear
    alone = sum(one["accuracy"] * one["questions"] for one in each.values()) / sum(
        one["questions"] for one in each.values()
    )
    assert dict(table.rows)["after finetune"][0][0] == pytest.approx(alone, abs=1e-6)
    assert [model for model, *_ in accuracies(story, [])["everybody"]] == ["base", "after finetune", "federated"]


@pytest.mark.parametrize("rounds", [1, 3], ids=["in the first stage", "in the second"])
def test_a_run_that_is_stopped_in_a_stage_goes_on_to_the_same_result(
    recipe: Path, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Event] = []

    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded):
            seen.append(event)
            if len(seen) == rounds:
                find("both-1").ask_to_stop()

    with pytest.raises(Interrupted, match="stopped as asked"):
        atoll.run(recipe, ["baselines=[]"], sinks=[stop])
    assert len(seen) == rounds
    resumed = atoll.resume("both-1")
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "others"))  # where there is no stage to take over
    whole = atoll.run(recipe, ["baselines=[]"])
    assert equal(result(resumed), result(whole))
    assert equal(result(resumed.stage("finetune")), result(whole.stage("finetune")))
    moved = [[one.bytes_down for one in read_story(folder).rounds] for folder in (resumed, whole)]
    assert moved[0] == moved[1], "the reference is sent once, also by a run that was stopped"


def test_data_that_change_between_stages_are_refused(recipe: Path, tmp_path: Path) -> None:
    def cut(event: Event) -> None:
        if isinstance(event, RunStarted) and event.name == "both":
            raise KeyboardInterrupt  # in the second stage, before its first checkpoint

    with pytest.raises(KeyboardInterrupt):
        atoll.run(recipe, ["baselines=[]"], sinks=[cut])
    file = tmp_path / "data" / "north.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:12]))
    with pytest.raises(AtollError, match="data have changed since the run began") as caught:
        atoll.resume("both-1")
    assert caught.value.details["found"] == "north: holds other records"
    file.write_text(whole)
    assert read_story(atoll.resume("both-1")).ended


def test_a_stage_is_left_out_by_null_and_told_when_it_begins(recipe: Path) -> None:
    said: list[str] = []
    atoll.run(recipe, ["baselines=[]"], say=said.append)
    assert [line for line in said if line.startswith("stage ")] == ["stage finetune (1 of 2)", "stage align (2 of 2)"]
    with pytest.raises(AtollError, match="a stage that is not run") as caught:
        plan(recipe, ["stages=[finetune]"])
    assert "--set align=null" in caught.value.details["remedy"]
    assert plan(recipe, ["stages=[finetune]", "align=null"]).recipe.stages == ["finetune"]


def test_processes_have_the_reference_for_all_rounds(recipe: Path) -> None:
    one = atoll.run(recipe, ["baselines=[]"])
    several = atoll.run(recipe, ["baselines=[]", "fleet={use: processes, workers: 2}"])
    for name, x in result(one).items():
        assert torch.allclose(result(several)[name], x, atol=1e-4)
    assert [r.bytes_down for r in read_story(one).rounds] == [r.bytes_down for r in read_story(several).rounds]


def test_the_reference_counts_once_a_client_however_long_its_answer_takes(recipe: Path) -> None:
    settings = ["baselines=[]", "align.schedule={use: buffered, concurrency: 2, buffer: 1}", "evaluate.every=1"]
    settings.append("fleet={use: inprocess, seconds: {north: 1, south: 5}}")
    sent, alone = (atoll.run(recipe, [*settings, f"align.from={start}"]) for start in ("finetune", "base"))
    more = read_story(sent).bytes_down - read_story(alone).bytes_down
    assert more == 2 * size(Payload(load_file(sent.start)))


def test_what_is_personal_in_a_later_stage_begins_with_what_all_shared(recipe: Path) -> None:
    folder = atoll.run(recipe, ["baselines=[]", "align.personal=[lora_A]"])
    story, shared, begun = read_story(folder), result(folder), result(folder.stage("finetune"))
    assert not any(".lora_A." in name for name in shared)
    assert all(one["reward_accuracy"] == 0.5 for one in story.base.clients.values())
    before = read_story(folder.stage("finetune")).final
    assert [one["accuracy"] for one in story.base.clients.values()] == [o["accuracy"] for o in before.clients.values()]
    own = [outcome(folder).own(name) for name in ("north", "south")]
    assert all(".lora_A." in name for name in own[0])
    assert not equal(*own)
    drift = [max(float((one[name] - begun[name]).abs().max()) for name in one) for one in own]
    assert 0 < max(drift) < 0.2, "three rounds from what fine-tuning came to, not from anywhere else"
    kept = outcome(folder).begun
    assert equal({name: x for name, x in kept.items() if ".lora_A." in name}, {n: begun[n] for n in own[0]})


def test_a_stage_that_has_not_changed_is_taken_over(recipe: Path) -> None:
    said: list[str] = []
    first = atoll.run(recipe, ["baselines=[]"])
    second = atoll.run(recipe, ["baselines=[]", "align.objective.beta=0.1"], say=said.append)
    other = atoll.run(recipe, ["baselines=[]", "finetune.local_steps=2"], say=said.append)
    taken = [line for line in said if "taken over" in line]
    assert taken == ["as in both-1/finetune, of the same plan and data from the same params: it is taken over"]
    inner = [one.stage("finetune") for one in (first, second, other)]
    assert equal(result(inner[0]), result(inner[1]))
    assert not equal(result(inner[0]), result(inner[2]))
    assert inner[1].record.read_bytes() == inner[0].record.read_bytes()
    assert not equal(result(first), result(second))
    (recipe.parent / "data" / "north.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9)
    assert not equal(result(atoll.run(recipe, ["baselines=[]"]).stage("finetune")), result(inner[0]))


@pytest.mark.parametrize(
    "settings",
    [["fleet={use: faults, scale: {north: 0.5}}"], ["finetune.objective=test_stages:own"], ["model=./model"]],
    ids=["a fleet that misbehaves", "code of one's own", "another model in the same folder"],
)
def test_a_stage_is_not_taken_over_where_not_all_of_it_is_known(
    recipe: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    results = []
    for seed in (0, 1):
        model, tokenizer = tiny("llama", seed)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        said: list[str] = []
        folder = atoll.run(recipe, ["baselines=[]", *settings], say=said.append)
        results.append(result(folder.stage("finetune")))
        assert not any("taken over" in line for line in said)
    assert equal(*results) == ("model" not in settings[0])


def own():
    from atoll.local.language import sft

    return sft()


def test_a_stage_whose_taking_over_was_cut_off_is_taken_over_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoll.run(recipe, ["baselines=[]"])
    whole = shutil.copyfile

    def cut(source: Path, target: Path, **more: bool) -> None:
        if "checkpoint" in str(target):
            Path(target).write_bytes(Path(source).read_bytes()[:100])
            raise KeyboardInterrupt
        whole(source, target, **more)

    monkeypatch.setattr("atoll.record.folder.shutil.copyfile", cut)
    with pytest.raises(KeyboardInterrupt):
        atoll.run(recipe, ["baselines=[]"])
    monkeypatch.setattr("atoll.record.folder.shutil.copyfile", whole)
    resumed = atoll.resume("both-2")
    assert equal(result(resumed), result(find("both-1")))
    assert "both-2/finetune" in resumed.stage("finetune").card.read_text()


def test_the_folder_has_a_recipe_of_all_stages_that_runs_again(recipe: Path) -> None:
    first = atoll.run(recipe, ["baselines=[]"])
    again = atoll.run(first.whole)
    assert equal(result(first), result(again))
    with pytest.raises(AtollError, match="one of several stages") as caught:
        plan(first.recipe)
    assert "whole.yaml" in caught.value.details["remedy"]


def test_stages_spend_one_budget(recipe: Path) -> None:
    private = "finetune.privacy={use: central, clip: 0.1, noise_multiplier: 1.0, delta: 0.1}"
    settings = ["baselines=[]", private, "finetune.weighting=uniform", "finetune.optimizer={use: sgd, lr: 0.1}"]
    folder = atoll.run(recipe, settings)
    first, last = read_story(folder.stage("finetune")), read_story(folder)
    assert last.spent[0].epsilon > first.spent[-1].epsilon, "the second stage goes on from what the first has spent"


def test_a_run_in_its_first_stage_is_told_of(recipe: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded):
            find("both-1").ask_to_stop()

    with pytest.raises(Interrupted):
        atoll.run(recipe, ["baselines=[]"], sinks=[stop])
    told = summarize(find("both-1"))
    assert (told.name, told.state, told.round, told.rounds) == ("both-1", "stopped", 1, 2)
    assert details(find("both-1"))["ended"] is None


def test_a_run_whose_second_stage_cannot_begin_keeps_the_first(recipe: Path) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, RunStarted) and event.name == "both":
            raise KeyError("a sink")

    with pytest.raises(KeyError):
        atoll.run(recipe, ["baselines=[]"], sinks=[fail])
    assert find("both-1").stage("finetune").card.exists()
    assert read_story(atoll.resume("both-1")).ended.rounds == 3


def test_the_plan_has_every_stage_and_is_made_again_from_the_folder(recipe: Path) -> None:
    ready = plan(recipe)
    assert list(ready.before) == ["finetune"]
    assert (ready.recipe.start, ready.recipe.finetune.objective) == ("stage:finetune", {"use": "dpo", "beta": 0.5})
    folder = atoll.run(recipe, ["baselines=[]", "align.rounds=1"])
    again = plan_again(folder)
    assert (again.recipe.finetune.rounds, again.before["finetune"].recipe.finetune.rounds) == (1, 2)


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        (["align.space=full"], "from", "another space"),
        (["align.batch_size=0"], "align.batch_size", "wrong value"),
        (["align.objective=dpoo"], "align.objective", "unknown objective"),
        (["align.rund=3"], "align.rund", "unknown key"),
        (["stages=[align, align]"], "stages", "wrong value"),
        (["stages=[]"], "stages", "wrong value"),
        (["stages=[train]"], "stages", "wrong value"),
        (["stages=[finetune]"], "align", "a stage that is not run"),
        (["align.data={use: folders, path: nowhere}"], "path", "no such folder"),
        (["align.data={use: folders, path: {chats}}"], "align.objective", "nobody's records have answers to compare"),
        (["align.objective={use: grpo, reward: 'nowhere:at_all'}"], "align.objective.reward", "cannot be made"),
    ],
)
def test_what_is_wrong_in_a_stage_is_told_with_its_section(
    recipe: Path, settings: list[str], where: str, what: str
) -> None:
    (recipe.parent / "chats").mkdir()
    for site in ("north", "south"):
        chat = '{"prompt": "What is 1?", "completion": "It is 1."}\n'
        (recipe.parent / "chats" / f"{site}.jsonl").write_text(chat * (FIRST + 1))
    with pytest.raises(AtollError, match=what) as caught:
        plan(recipe, [one.replace("{chats}", str(recipe.parent / "chats")) for one in settings])
    assert where in caught.value.details["where"]


def test_clients_without_answers_to_compare_are_warned_of_together(recipe: Path) -> None:
    with (recipe.parent / "data" / "north.jsonl").open("a") as file:
        file.write('{"prompt": "What is 1?", "chosen": "It is 1.", "rejected": ""}\n')
    for site in ("east", "west"):
        (recipe.parent / "data" / f"{site}.jsonl").write_text('{"prompt": "What is 1?", "completion": "It is 1."}\n')
    assert check_data(plan(recipe)) == [
        "east, west: no answer to compare with in 1 of the first 1 records: they are left out"
    ]


def test_a_client_without_a_usable_record_is_warned_of_with_the_plan(recipe: Path) -> None:
    (recipe.parent / "data" / "equal.jsonl").write_text(
        '{"prompt": "What is 1?", "chosen": "1.", "rejected": "1."}\n' * 9
    )
    (warned,) = check_data(plan(recipe))
    assert warned.startswith("equal: nothing that can be used among the first records: equal answers")


def test_what_a_judge_cannot_compare_is_refused_with_the_plan(recipe: Path) -> None:
    (recipe.parent / "chats").mkdir()
    (recipe.parent / "chats" / "north.jsonl").write_text('{"prompt": "What is 1?", "completion": "It is 1."}\n')
    chats = f"align.data={{use: folders, path: {recipe.parent / 'chats'}}}"
    judging = [
        "finetune.objective=selector",
        "align.from=base",
        "align.judge=finetune",
        "align.objective=sft",
        "baselines=[]",
    ]
    plan(recipe, judging)
    with pytest.raises(AtollError, match="nobody's records have answers to compare"):
        plan(recipe, [*judging, chats])


def test_a_run_stops_where_everybody_was_refused_again_and_again_and_nobody_is_at_work() -> None:
    at = SimpleNamespace(
        ready=SimpleNamespace(trainers=["a", "b"]), folder=RunFolder(Path("x")), outer=RunFolder(Path("x"))
    )
    each = [Refused(client, f"{client}-{number}", "no") for number in range(3) for client in ("a", "b")]
    idle, busy = SimpleNamespace(in_flight=[]), SimpleNamespace(in_flight=["a task"])
    stop_if_hopeless(at, busy, each)
    stop_if_hopeless(at, idle, [*each[:5], each[0]])
    with pytest.raises(AtollError, match="refused 3 times"):
        stop_if_hopeless(at, idle, each)


def test_answers_to_compare_may_come_late_in_a_file(recipe: Path) -> None:
    for site in ("north", "south"):
        rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(FIRST + 1)]
        rows[-1]["choices"] = [rows[-1]["completion"], "No."]
        (recipe.parent / "data" / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(check_data(plan(recipe))) == 1
    for site in ("north", "south"):
        path = recipe.parent / "data" / f"{site}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(AtollError, match="nobody's records have answers to compare"):
        plan(recipe)


def test_the_next_stage_does_not_begin_with_nothing_learned(recipe: Path) -> None:
    with pytest.raises(AtollError, match="nothing was learned") as caught:
        atoll.run(recipe, ["finetune.optimizer.lr=1e30"])
    assert "4 replies refused" in caught.value.details["found"]
    folder = find("both-1")
    assert read_story(folder) is None
    assert summarize(folder).state == "failed"
    assert "nothing was learned" in folder.stage("finetune").card.read_text()


def test_settings_of_a_stage_are_laid_over_those_of_fine_tuning(recipe: Path) -> None:
    ready = plan(recipe, ["finetune.optimizer={use: sgd, lr: 0.5}", "align.optimizer.lr=1e-4"]).recipe.finetune
    assert ready.optimizer == {"use": "sgd", "lr": 1e-4}
    alone = plan(recipe, ["stages=[align]"])
    assert (alone.before, alone.recipe.start, alone.recipe.finetune.rounds) == ({}, None, 3)


FUSED = ["stages=[finetune, align, fuse]", "align.from=base", "baselines=[]"]


def test_stages_beside_each_other_are_fused(recipe: Path) -> None:
    folder = atoll.run(recipe, [*FUSED, "fuse.by={use: ties, density: 0.5}", "fuse.objective={use: dpo, beta: 0.5}"])
    story, each = read_story(folder), {name: folder.stage(name) for name in ("finetune", "align")}
    assert list(story.before) == ["finetune", "align"], "in their order, not in that of their names"
    assert read_story(each["align"]).base.clients == {
        site: {**told, **{key: value for key, value in told.items() if "reward" not in key}}
        for site, told in read_story(each["align"]).base.clients.items()
    }
    base = load_result(folder).base
    fuse = ties(density=0.5)
    assert equal(result(folder), fuse(base, [result(one) for one in each.values()]))
    assert story.base is None, "there is no round before which it was anything else"
    assert not story.rounds
    assert all(one["reward_accuracy"] != 0.5 for one in story.final.clients.values()), "measured against the base"
    names = [name for name, _ in accuracy_table(story).rows]
    assert names == ["chance", "base", "after finetune", "after align", "federated"]
    assert find(folder.name).adapter.exists()
    again = atoll.run(recipe, [*FUSED, "fuse.by=average"])
    assert equal(result(again), average()(base, [result(one) for one in each.values()]))
    assert plan_again(again).before.keys() == {"finetune", "align"}


def test_a_stage_beside_another_begins_with_the_base(recipe: Path) -> None:
    beside = atoll.run(recipe, [*FUSED]).stage("align")
    alone = atoll.run(recipe, ["stages=[align]", "baselines=[]"])
    assert equal(result(beside), result(alone))


def test_results_of_several_runs_are_fused(recipe: Path) -> None:
    for name in ("one", "two"):
        atoll.run(recipe, ["stages=[align]", "baselines=[]", f"name={name}", f"align.rounds={1 + (name == 'two')}"])
    text = recipe.read_text().replace("stages: [finetune, align]", "stages: [fuse]\nfrom: [one-1, two-1]")
    recipe.write_text(text.replace("align: {rounds: 3", "fuse: {by: average"))
    fused = atoll.run(recipe, ["baselines=[]"])
    results = [result(find(f"{name}-1")) for name in ("one", "two")]
    assert equal(result(fused), average()(load_result(fused).base, results))


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        (["stages=[align, fuse]", "fuse.from=[align, finetun]"], "fuse.from", "no such stage before"),
        (["stages=[finetune, align]", "align.from=[finetune]"], "align.from", "become one in the stage"),
        (["stages=[evaluate, finetune]"], "stages", "wrong value"),
        (["fuse.by=average"], "fuse", "a stage that is not run"),
        ([*FUSED, "fuse.by=tis"], "fuse.by", "unknown fuse"),
        ([*FUSED, "baselines=[pooled]"], "baselines", "nothing to compare"),
        (["stages=[finetune, align, fuse]", "baselines=[]"], "fuse.from", "must have begun with the base"),
        (["stages=[finetune, fuse]", "align=3", "baselines=[]"], "align", "wrong value"),
        ([*FUSED, "fuse.from=[align]"], "fuse.from", "one result alone"),
        (["evaluate.tasks=[boolq]"], "evaluate", "in a stage of their own"),
        (["stages=[finetune, align, evaluate]", "evaluate.tasks=null"], "evaluate.tasks", "wrong value"),
        (
            ["finetune.weighting=uniform", "finetune.privacy={use: central, clip: 0.1, epsilon: 3, delta: 0.1}"],
            "align.privacy",
            "for all stages together",
        ),
        (["stages=[finetune, align, evaluate]", "evaluate.tasks=[boolk]"], "evaluate.tasks", "no such task"),
    ],
)
def test_stages_that_cannot_be(recipe: Path, settings: list[str], where: str, what: str) -> None:
    with pytest.raises(AtollError, match=what) as caught:
        plan(recipe, settings)
    assert where in caught.value.details["where"]


@pytest.mark.real
def test_the_stage_evaluate_asks_the_base_and_what_every_stage_came_to(recipe: Path) -> None:
    asked = [
        "stages=[finetune, align, evaluate]",
        "baselines=[]",
        "evaluate.tasks=[openbookqa]",
        "evaluate.questions=12",
    ]
    said: list[str] = []
    folder = atoll.run(recipe, asked, say=said.append)
    models = ["base", "after finetune", "tuned"]
    assert [one.model for one in read_scores(folder)] == [one for model in models for one in (model, model)]
    losses = {one.model: one.value for one in read_scores(folder) if one.measure == "loss"}
    assert len(set(losses.values())) == 3
    assert not folder.stage("finetune").tasks.exists()
    assert "| openbookqa | accuracy | 0.250 |" in folder.card.read_text()
    assert "![accuracy over stages](stages.svg)" in folder.card.read_text()
    lines = accuracies(read_story(folder), read_scores(folder))
    assert [model for model, *_ in lines["openbookqa accuracy, public"]] == ["base", "after finetune", "federated"]
    sites = {name: line for name, line in lines.items() if not name.endswith("public")}
    assert sites, "held-out questions, asked of all models"
    assert all([model for model, *_ in line] == ["base", "after finetune", "federated"] for line in sites.values())
    assert "after finetune" in (folder.path / "stages.svg").read_text(), "as a comment beside the drawn letters"
    folder.tasks.unlink()
    atoll.resume(folder.name, say=said.append)
    assert {one.model: one.value for one in read_scores(folder) if one.measure == "loss"} == losses
    before = len(said)
    atoll.resume(folder.name, say=said.append)
    assert "stage evaluate" not in said[before:], "it is not asked twice"


def test_results_that_did_not_begin_with_the_same_base_are_not_fused(recipe: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        atoll.run(recipe, ["stages=[align]", "baselines=[]", f"name={name}", f"seed={seed}", "align.rounds=1"])
    text = recipe.read_text().replace("stages: [finetune, align]", "stages: [fuse]\nfrom: [one-1, two-1]")
    recipe.write_text(text.replace("align: {rounds: 3", "fuse: {by: average"))
    with pytest.raises(AtollError, match="must have begun with this run's base") as caught:
        atoll.run(recipe, ["baselines=[]"])
    assert "two-1" in caught.value.details["found"], "whose LoRA began with other numbers"


def test_a_run_without_a_round_is_told_of_everywhere(recipe: Path) -> None:
    folder = atoll.run(
        recipe, ["stages=[finetune, align, fuse]", "align.from=base", "baselines=[]", "finetune.rounds=0"]
    )
    for one in (folder, folder.stage("finetune")):
        assert summarize(one).rounds == 0
        assert one.card.exists()
        assert "loss.svg" not in one.card.read_text()
    assert equal(result(folder.stage("finetune")), load_result(folder).base)
    assert summarize(folder).loss is not None


def test_settings_reach_into_a_stages_own_keys(recipe: Path) -> None:
    ready = plan(recipe, [*FUSED, "fuse.by.density=0.7"])
    assert ready.recipe.fuse.by == {"use": "ties", "density": 0.7}
    with pytest.raises(AtollError, match="unknown key"):
        plan(recipe, ["align.foo.bar=1"])


def test_compared_are_the_settings_of_all_stages(recipe: Path) -> None:
    runs = [atoll.run(recipe, ["baselines=[]", f"finetune.rounds={rounds}", "align.rounds=1"]) for rounds in (0, 1)]
    assert settings(runs) == {"finetune.rounds": {"both-1": 0, "both-2": 1}}


PRIVATE = ["finetune.weighting=uniform", "finetune.clip_norm=null", "baselines=[]"]
NOISE = "finetune.privacy={{use: central, clip: 0.1, noise_multiplier: 1.0, delta: 0.1{more}}}"


def test_a_budget_that_the_first_stage_spends_is_refused_before_it(recipe: Path) -> None:
    assert plan(recipe, [*PRIVATE, NOISE.format(more=", epsilon: 9")]).protection
    with pytest.raises(AtollError, match="leave nothing of the privacy budget") as caught:
        plan(recipe, [*PRIVATE, NOISE.format(more=", epsilon: 2.2")])
    assert caught.value.details["where"].endswith("align.privacy")


def test_what_all_stages_spend_is_told_of_the_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = atoll.run(recipe, [*PRIVATE, NOISE.format(more=""), "stages=[finetune, align, fuse]", "align.from=base"])
    card, told = folder.card.read_text(), summarize(folder)
    assert "no differential privacy" not in card
    assert "- stage finetune: " in card
    assert "- stage align: " in card
    spent = read_story(folder.stage("align")).spent[-1].epsilon
    assert told.epsilon == pytest.approx(spent)
    assert f"spent: epsilon {spent:.4g}" in card
    assert told.bytes_up == sum(read_story(one).bytes_up for one in folder.stages()) > 0
    assert call(["ledger", folder.name, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert max(row["epsilon"] for row in rows) == pytest.approx(spent, rel=0.02)


def test_of_other_questions_no_accuracy_stands_in_the_same_table(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "data", other)
    for file in other.iterdir():
        file.write_text(file.read_text().replace("What", "Which"))
    folder = atoll.run(recipe, [f"align.data={{use: folders, path: {other}, held_out: 0.3}}", "baselines=[]"])
    assert [name for name, _ in accuracy_table(read_story(folder)).rows] == ["chance", "after finetune", "federated"]


@pytest.mark.real
def test_public_tasks_are_asked_again_of_what_went_on_and_not_of_another_space(recipe: Path) -> None:
    asked = [
        "stages=[finetune, align, evaluate]",
        "baselines=[]",
        "evaluate.tasks=[openbookqa]",
        "evaluate.questions=12",
    ]

    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded) and find("both-1").record.exists():
            find("both-1").ask_to_stop()

    with pytest.raises(Interrupted):
        atoll.run(recipe, [*asked, "align.from=base", "align.space={use: lora, rank: 2}"], sinks=[stop])
    evaluate_tasks(find("both-1"), ["openbookqa"], 12)
    half = read_scores(find("both-1"))
    assert [one.model for one in half[::2]] == ["base", "tuned"], "fine-tuning was in another space"
    assert call(["resume", "both-1"]) == 0
    whole = read_scores(find("both-1"))
    assert {one.rounds for one in whole} == {3}
    assert [one.value for one in whole] != [one.value for one in half]
    find("both-1").tasks.unlink()
    assert call(["resume", "both-1"]) == 0
    assert read_scores(find("both-1")) == whole, "a run whose tasks are missing has not finished"


@pytest.mark.real
def test_public_questions_that_were_trained_on_are_not_asked(recipe: Path, tmp_path: Path, monkeypatch) -> None:
    lines = task("openbookqa").files[0][0].read_text().splitlines()[:60]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in lines))
    monkeypatch.setattr("atoll.tasks.task", lambda name, say: Source(tmp_path, ((few, "test"),), 0.0))
    first = [json.loads(line) for line in lines[:30]]
    rows = [{"prompt": one["prompt"], "chosen": one["choices"][0], "rejected": one["choices"][1]} for one in first]
    (tmp_path / "data" / "north.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = atoll.run(recipe, ["baselines=[]", "finetune.context=512"])
    seen = trained_on(folder)
    assert 10 < len(seen & {one["prompt"] for one in first}) < 30, "those that are held out are not trained on"
    assert evaluate_tasks(folder, ["openbookqa"], 20)[0].questions == 20
    left = {json.loads(line)["prompt"] for line in lines} - seen
    assert evaluate_tasks(folder, ["openbookqa"], 1000)[0].questions == len(left)
