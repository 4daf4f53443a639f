"""What stages and runs hand to each other: nothing is begun with, taken over or judged by that is not what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import atoll
from atoll import sweep
from atoll.data.read import Record, open_source
from atoll.data.sources import ClientSource, digest
from atoll.errors import AtollError, Interrupted
from atoll.export import export_adapter
from atoll.judged import best
from atoll.leakage.inversion import updates
from atoll.leakage.seen import overheard
from atoll.leakage.subject import open_run
from atoll.models.spaces import full
from atoll.models.tiny import tiny
from atoll.outcome import outcome
from atoll.params import equal
from atoll.planning import pinned, plan
from atoll.record.checkpoint import save_start
from atoll.record.events import Event, RoundEnded
from atoll.record.folder import RunFolder, find
from atoll.record.story import read_story
from atoll.result import load_result
from atoll.run import begun, execute
from atoll.tasks import beneath, trained_on

RECIPE = """
recipe: 1
name: one
model: tiny:llama
data: {{use: folders, path: {data}, held_out: 0.3}}
finetune: {{rounds: 2, local_steps: 2, batch_size: 4, optimizer: {{use: adamw, lr: 1.0e-2}}}}
evaluate: {{every: 0}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for site, first in {"north": 0, "south": 30}.items():
        rows = [
            {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"{i}!"} for i in range(first, first + 24)
        ]
        (tmp_path / "data" / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "one.yaml"
    path.write_text(RECIPE.format(data=tmp_path / "data"))
    return path


def a_model(folder: Path, seed: int) -> None:
    model, tokenizer = tiny("llama", seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


FROM = ["from=one-1", "name=two"]
STAGES = ["stages=[finetune, align]", "align.rounds=1"]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["fleet={use: inprocess, seconds: {north: 1}}"], ["fleet={use: inprocess, seconds: {north: 9}}"]),
        ([], ["fleet={use: processes, workers: 1}"]),
    ],
    ids=["other speeds", "another fleet"],
)
def test_a_stage_is_not_taken_over_from_another_fleet(recipe: Path, first: list[str], then: list[str]) -> None:
    said: list[str] = []
    for settings in (first, then, then):
        atoll.run(recipe, [*STAGES, *settings], say=said.append)
    assert [line for line in said if "taken over" in line] == [
        "as in one-2/finetune, of the same plan and data from the same params: it is taken over"
    ]


def test_a_stage_is_not_taken_over_from_other_code(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    atoll.run(recipe, STAGES)
    monkeypatch.setattr("atoll.identity.code", lambda: "newer")
    atoll.run(recipe, STAGES, say=said.append)
    assert not any("taken over" in line for line in said)


def test_what_clients_keep_is_taken_over_too(recipe: Path) -> None:
    settings = [*STAGES, "align.from=base", "finetune.personal=[lora_A]", "align.personal=[]"]
    first, second = atoll.run(recipe, settings), atoll.run(recipe, settings)
    one, other = (outcome(folder.stage("finetune")).own("north") for folder in (first, second))
    assert one
    assert equal(one, other)


def test_a_frozen_factor_that_another_seed_drew_is_not_begun_with(recipe: Path) -> None:
    atoll.run(recipe, ["finetune.space=ffa-lora"])
    plan(recipe, [*FROM, "finetune.space=ffa-lora"])
    with pytest.raises(AtollError, match="another seed") as caught:
        plan(recipe, [*FROM, "finetune.space=ffa-lora", "seed=1"])
    assert caught.value.details["found"] == "one-1: 0"


def test_a_model_that_is_another_in_the_same_folder_is_told_of(recipe: Path, tmp_path: Path) -> None:
    a_model(tmp_path / "model", 0)
    folder = atoll.run(recipe, ["model=./model"])
    load_result(folder)
    a_model(tmp_path / "model", 1)
    with pytest.raises(AtollError, match="the model has changed"):
        load_result(folder)
    with pytest.raises(AtollError, match="trained on another model") as caught:
        atoll.run(recipe, [*FROM, "model=./model"])
    assert caught.value.details["where"] == "from"
    assert not (tmp_path / "runs" / "two-1").exists()


def stopping(reference: str) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded):
            find(reference).ask_to_stop()

    return stop


def test_a_run_that_is_learning_is_not_begun_with_and_one_that_was_stopped_is(recipe: Path) -> None:
    with pytest.raises(Interrupted):
        atoll.run(recipe, sinks=[stopping("one-1")])
    with find("one-1").locked(), pytest.raises(AtollError, match="is still learning") as caught:
        plan(recipe, FROM)
    assert "`atoll stop one-1`" in caught.value.details["remedy"]
    assert read_story(atoll.run(recipe, FROM)).ended.rounds == 2


@pytest.mark.parametrize("becomes", ["learns on", "goes"])
def test_a_baseline_begins_with_what_its_run_began_with(recipe: Path, becomes: str) -> None:
    with pytest.raises(Interrupted):
        atoll.run(recipe, sinks=[stopping("one-1")])
    with pytest.raises(Interrupted):
        atoll.run(recipe, [*FROM, "baselines=[pooled]"], sinks=[stopping("two-1")])
    if becomes == "goes":
        shutil.rmtree(find("one-1").path)
    else:
        atoll.resume("one-1")
    folder = atoll.resume("two-1")
    (pooled,) = folder.baselines()
    assert outcome(pooled).progress.start == outcome(folder).progress.start
    assert read_story(folder).baselines["pooled"].ended


def test_what_is_learning_again_when_a_run_begins_is_not_begun_with(recipe: Path) -> None:
    with pytest.raises(Interrupted):
        atoll.run(recipe, sinks=[stopping("one-1")])
    ready = plan(recipe, FROM)
    with find("one-1").locked(), begun(ready) as folder, pytest.raises(AtollError, match="is still learning"):
        execute(ready, folder)


def test_a_stage_of_a_run_that_goes_on_is_begun_with_once_it_has_ended(recipe: Path) -> None:
    atoll.run(recipe, STAGES)
    with find("one-1").locked():
        assert plan(recipe, ["from=one-1/finetune", "name=two"]).recipe.starts[0].name == "one-1/finetune"


def test_a_run_goes_on_with_the_model_that_it_began_with(recipe: Path, tmp_path: Path) -> None:
    a_model(tmp_path / "model", 0)
    with pytest.raises(Interrupted):
        atoll.run(recipe, ["model=./model"], sinks=[stopping("one-1")])
    a_model(tmp_path / "model", 1)
    with pytest.raises(AtollError, match="the model has changed"):
        atoll.resume("one-1")
    a_model(tmp_path / "model", 0)
    (tmp_path / "model" / "trainer_state.json").write_text("{}")
    assert load_result(atoll.resume("one-1")).outcome.rounds == 2, "what lies beside a model is not the model"


def test_a_model_of_a_hub_is_named_with_its_commit(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    for seed, commit in enumerate(("0" * 40, "1" * 40)):
        a_model(repo / "snapshots" / commit, seed)
    (repo / "refs" / "main").write_text("0" * 40)
    folder = atoll.run(recipe, ["model={use: org/name, dtype: float32}"])
    (repo / "refs" / "main").write_text("1" * 40)
    found = load_result(folder)
    assert found.outcome.recipe.model == {"use": f"org/name@{'0' * 40}", "dtype": "float32"}
    written = json.loads((export_adapter(folder, tmp_path / "out") / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/name", "0" * 40)
    assert f'from_pretrained("org/name", revision="{"0" * 40}")' in (tmp_path / "out" / "README.md").read_text()
    (repo / "refs" / "main").write_text("0" * 40)
    recipe.write_text(recipe.read_text() + "from: one-1\n")
    recipe.write_text(recipe.read_text().replace("tiny:llama", "{use: org/name, dtype: float32}"))
    _, (tried,) = sweep.sweep(str(recipe), ["fedavg-lora"], {"": {"seed": [1]}})
    assert tried.run, "a trial names the commit as well, and begins with the run"
    parts = {
        "use": "assembled",
        "language": "org/name",
        "image": {"encoder": "tiny:efficientnet", "connector": "linear"},
    }
    assert pinned(SimpleNamespace(model=parts), {"model": parts})["model"] == parts | {
        "language": f"org/name@{'0' * 40}"
    }


def test_a_space_of_ones_own_need_not_say_that_it_draws_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    folder = atoll.run(recipe, ["finetune.space=test_handover:own_space", "finetune.optimizer.lr=1e-3"])
    assert read_story(folder).ended


def own_space() -> object:
    class Own:
        def __init__(self) -> None:
            self.prepare, self.trainable = full().prepare, full().trainable
            self.plan, self.save = full().plan, full().save

    return Own()


def test_a_sweep_over_data_is_another_one_where_one_of_them_has_changed(recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "data", tmp_path / "other")

    def name() -> str:
        grid = {"": {"data.path": [str(tmp_path / "data"), str(tmp_path / "other")]}}
        return sweep.sweep(str(recipe), ["fedavg-lora"], grid)[0].name

    first = name()
    rows = (tmp_path / "data" / "north.jsonl").read_text().replace("It is", "It was")
    (tmp_path / "data" / "north.jsonl").write_text(rows)
    assert name() != first


def test_own_code_is_a_part_of_what_a_sweep_is_made_of(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "ownrate.py").write_text("def same():\n    return lambda step, steps: 1.0\n")
    before = sweep.made_of(plan(recipe, ["finetune.rate=ownrate:same"]))
    assert sweep.made_of(plan(recipe, ["finetune.rate=ownrate:same"])) == before
    (tmp_path / "ownrate.py").write_text("def same():\n    return lambda step, steps: 0.5\n")
    assert sweep.made_of(plan(recipe, ["finetune.rate=ownrate:same"])) != before


def test_a_full_disk_while_a_stage_is_taken_over_is_told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atoll.run(recipe, STAGES)

    def full(source: object, target: object, **more: object) -> None:
        raise shutil.Error([(str(source), str(target), "[Errno 28] No space left on device")])

    monkeypatch.setattr("atoll.record.folder.shutil.copytree", full)
    with pytest.raises(AtollError, match="no space on disk"):
        atoll.run(recipe, STAGES)


def test_a_stage_is_not_taken_over_from_another_number_of_threads(recipe: Path) -> None:
    said: list[str] = []
    atoll.run(recipe, STAGES)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        atoll.run(recipe, STAGES, say=said.append)
    finally:
        torch.set_num_threads(threads)
    assert not any("taken over" in line for line in said)


@pytest.mark.parametrize("name", ["stages", "baselines"])
def test_runs_may_lie_in_a_folder_of_any_name(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / name))
    folder = atoll.run(recipe, [*STAGES, "baselines=[local]"])
    assert folder.outermost == folder
    assert folder.stage("finetune").is_stage
    assert folder.baseline("local-north").is_baseline


def test_a_sweep_is_another_one_where_what_it_is_made_of_has_changed(recipe: Path, tmp_path: Path) -> None:
    a_model(tmp_path / "model", 0)
    with pytest.raises(Interrupted):
        atoll.run(recipe, ["model=./model"], sinks=[stopping("one-1")])
    recipe.write_text(recipe.read_text().replace("tiny:llama", "./model") + "from: one-1\n")

    def names() -> str:
        return sweep.sweep(str(recipe), ["fedavg-lora"], {"": {"seed": [1]}})[0].name

    first = names()
    assert names() == first
    atoll.resume("one-1")
    second = names()
    recipe.write_text(recipe.read_text().replace("from: one-1", ""))
    third = names()
    a_model(tmp_path / "model", 1)
    assert len({first, second, third, names()}) == 4


def test_what_is_personal_and_was_begun_with_is_exported(recipe: Path, tmp_path: Path) -> None:
    begun_with = outcome(atoll.run(recipe)).params
    folder = atoll.run(recipe, [*FROM, "finetune.personal=[lora_A]"])
    for name, client in (("all", None), ("one", "north")):
        export_adapter(folder, tmp_path / name, client=client)
    assert sorted(path.name for path in folder.adapter.iterdir() if path.suffix == ".md") == []
    shared, own = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("all", "one"))
    (name,) = [one for one in begun_with if "layers.0.mlp.down_proj.lora_A" in one]
    assert torch.equal(shared[name], begun_with[name])
    assert not torch.equal(own[name], begun_with[name])
    shutil.rmtree(folder.adapter)
    export_adapter(folder, tmp_path / "again")
    assert equal(load_file(tmp_path / "again" / "adapter_model.safetensors"), shared)


def test_attacks_measure_against_what_a_run_began_with(recipe: Path) -> None:
    with pytest.raises(Interrupted):
        atoll.run(recipe, sinks=[stopping("one-1")])
    folder = atoll.run(recipe, FROM)
    before = load_file(folder.start)
    atoll.resume("one-1")
    assert not equal(before, outcome(find("one-1")).params)
    assert equal(open_run(folder, lambda line: None).base, before)
    save_start(folder.start, {name: x + 1 for name, x in before.items()})
    with pytest.raises(AtollError, match="what the run began with has changed"):
        open_run(folder, lambda line: None)
    with pytest.raises(AtollError, match="what the run began with has changed"):
        atoll.resume(folder.name)


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "flipped"])
def test_a_beginning_that_is_damaged_is_told_and_made_again(recipe: Path, damage: str) -> None:
    atoll.run(recipe)
    with pytest.raises(Interrupted):
        atoll.run(recipe, [*FROM, "finetune.personal=[lora_A]"], sinks=[stopping("two-1")])
    start, whole = find("two-1").start, find("two-1").start.read_bytes()
    damaged = {"empty": b"", "cut": whole[:5000], "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]}
    start.unlink() if damage == "gone" else start.write_bytes(damaged[damage])
    with pytest.raises(AtollError, match="cannot be had from its folder") as caught:
        load_result(find("two-1"))
    assert caught.value.details["where"] == str(start)
    if damage != "gone":
        with pytest.raises(AtollError, match="cannot be had from its folder"):
            atoll.resume("two-1")
        start.unlink()
    assert equal(load_file(atoll.resume("two-1").start), outcome(find("one-1")).params)


@pytest.mark.parametrize("protection", ["plain", "masks", "from"])
def test_attacks_on_runs_with_personal_params(recipe: Path, protection: str) -> None:
    settings = ["finetune.personal=[lora_A]", "finetune.local_steps=1", "finetune.optimizer.lr=1e-3"]
    if protection == "masks":
        settings.append("finetune.exchange={use: secure-aggregation, survivors: 2}")
    if protection == "from":
        atoll.run(recipe)
        settings += FROM
    subject = open_run(atoll.run(recipe, settings), lambda line: None)
    samples = {name: data.train[0] for name, data in subject.things.data.items()}
    (site, views), *_ = overheard(subject, samples, RunFolder(recipe.parent / "seen"))
    seen, *_ = views.values()
    assert all(".lora_B." in name for name in seen)
    (made,) = updates(subject, site, [samples[site]], SimpleNamespace(more=lambda: None))
    assert made.keys() == seen.keys()
    if protection != "masks":
        assert all(torch.allclose(made[name], seen[name], atol=1e-5) for name in made), (
            "the attacker's own is what is seen"
        )


def test_a_trial_of_a_sweep_learns_what_its_judge_chooses(recipe: Path, tmp_path: Path) -> None:
    atoll.run(recipe, ["finetune.objective=selector", "name=judge"])
    recipe.write_text(recipe.read_text() + "judge: judge-1\n")
    settings = {"": {"finetune.population": [["north"], ["south"]], "finetune.batch_size": [4]}}
    _, found = sweep.sweep(str(recipe), ["fedavg-lora"], settings)
    for one in found:
        folder = RunFolder(Path(one.run))
        (learner,) = read_story(folder).started.recipe["finetune"]["population"]
        held = digest(ClientSource(open_source(folder.judged / learner, 0.0)))
        assert outcome(folder).progress.data[learner] == held, "learned is what the judge chose for this trial"
        assert sorted(path.name for path in folder.judged.iterdir()) == ["north", "south"]
    shutil.rmtree(find("judge-1").path)
    atoll.run(recipe, ["judge=null"])
    with pytest.raises(AtollError, match="there is no such run"):
        sweep.sweep(str(recipe), ["fedavg-lora"], {"": {"seed": [1]}})


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([2.0, 1.0], {"It is 7."}), ([1.0, 2.0], {"7!"}), ([1.0, 1.0], {"It is 7.", "7!"})],
    ids=["the first", "the second", "neither"],
)
def test_of_equal_scores_the_datas_own_answer_is_not_the_best(scores: list[float], expected: set[str]) -> None:
    found = set()
    for number in range(20):
        asked = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "It is 7."}]
        one = Record("prompt_completion", asked, "train", 0, "a:1")
        found.add(best(one, ["It is 7.", "7!"], torch.tensor(scores)))
    assert found == expected


def test_what_was_trained_on_is_asked_of_all_that_a_run_stands_on(recipe: Path, tmp_path: Path) -> None:
    atoll.run(recipe)
    more = tmp_path / "more"
    more.mkdir()
    (more / "east.jsonl").write_text('{"prompt": "Who?", "chosen": "I.", "rejected": "You."}\n' * 2)
    folder = atoll.run(recipe, [*FROM, f"data={{use: folders, path: {more}, held_out: 0}}"])
    assert {one.name for one in beneath(folder)} == {"one-1", "two-1"}
    assert "Who?" in trained_on(folder)
    assert any(one.startswith("What is") for one in trained_on(folder))
    (more / "east.jsonl").write_text("no JSON\n")
    said: list[str] = []
    assert "Who?" not in trained_on(folder, said.append), "what is damaged since is passed over, and told"
    assert said[0].startswith("two-1: what it was trained on cannot be read")
    shutil.rmtree(find("one-1").path)
    assert [one.name for one in beneath(folder)] == ["two-1"]
