"""Whole runs at their edges: baselines of odd plans, odd names, stops, changed recipes, clients that fail or forget."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from atoll import run
from atoll.assemble import assemble
from atoll.data.sources import ClientData
from atoll.errors import AtollError, Interrupted
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder, find
from atoll.record.measured import loss_table, of_everybody
from atoll.record.story import read_story
from atoll.schema import POOLED

RECIPE = """
recipe: 1
name: edge
model: tiny:llama
data: {{use: folders, path: {data}}}
finetune: {{rounds: 2, local_steps: 2}}
evaluate: {{every: 0, final_samples: 4}}
"""


@pytest.fixture
def edge(tmp_path, monkeypatch, sites):
    """Runs the recipe with settings."""
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "edge.yaml"
    path.write_text(RECIPE.format(data=sites))
    return lambda *settings, **more: run.run(str(path), settings, **more)


@pytest.mark.parametrize(
    "settings",
    [
        ["finetune.schedule={use: synchronous, cohort: 2}"],
        ["finetune.schedule={use: buffered, concurrency: 3, buffer: 2}"],
        [
            "finetune.correction=scaffold",
            "finetune.optimizer=sgd",
            "finetune.clip_norm=null",
            "finetune.weighting=uniform",
        ],
        ["finetune.outer={use: adam, lr: 0.1}", "finetune.up=[int8]", "fleet={use: faults, drop: 0.5}"],
    ],
    ids=["sampled", "asynchronous", "scaffold", "adam, int8, faults"],
)
def test_baselines_train_plainly_whatever_the_plan(edge, settings):
    story = read_story(edge("baselines=[local, pooled]", *settings))
    assert [row[0] for row in loss_table(story).rows] == [
        "base", "north alone", "south alone", "west alone", "federated", "pooled"
    ]  # fmt: skip
    plain = read_story(edge("baselines=[local]", "finetune.optimizer=" + str(_said(settings, "finetune.optimizer"))))
    if "finetune.optimizer=sgd" not in settings:
        assert story.baselines["local-north"].final.mean == pytest.approx(plain.baselines["local-north"].final.mean)


MASKS = "finetune.exchange={use: secure-aggregation, metrics: [%s]}"


def test_under_masks_tables_are_of_everybody_unless_the_recipe_names_the_loss(edge):
    told = read_story(edge("baselines=[pooled]", MASKS % "loss, standard_error, samples"))
    partly = read_story(edge("name=partly", MASKS % "loss"))
    assert {*partly.replies[0].metrics} == {"loss"}, "of training"
    assert [*partly.final.clients] == ["everybody"]
    assert set(told.final.clients["north"]) == {"loss", "standard_error", "samples"}
    folder = edge("name=hidden", "baselines=[pooled]", "evaluate.every=1", MASKS % "")
    hidden = read_story(folder)
    assert [list(one.clients) for one in hidden.evaluations] == [["everybody"]] * 3
    table = loss_table(hidden)
    assert (table.columns, [name for name, _ in table.rows]) == (["everybody"], ["base", "federated", "pooled"])
    for name, ((loss, error),) in table.rows:
        same = of_everybody(
            {"base": told.base, "federated": told.final, "pooled": told.baselines["pooled"].final}[name]
        )
        metrics = same.clients["everybody"]
        assert (loss, error) == pytest.approx((metrics["loss"], metrics["standard_error"]), rel=1e-4)
    for text in (folder.record.read_text().partition('"RunEnded"')[0], folder.card.read_text()):
        assert not any(f'"{name}": {{"loss"' in text for name in ("north", "south", "west"))
    assert "| held-out loss | everybody |" in folder.card.read_text()


def _said(settings, key):
    return next((s.partition("=")[2] for s in settings if s.startswith(key)), "adamw")


def test_no_client_may_be_called_as_the_pooled_one(edge, tmp_path, sites):
    odd = tmp_path / "odd"
    shutil.copytree(sites, odd)
    (odd / "north.jsonl").rename(odd / f"{POOLED}.jsonl")
    with pytest.raises(AtollError, match="may not be called so"):
        edge(f"data.path={odd}")


def test_names_from_data_neither_leave_the_folder_nor_meet(tmp_path):
    folder = RunFolder(tmp_path / "run")
    names = ["../../x", "a/b", "a%2fb", "/b", "˻", "..", "x" * 60, "äöü"]
    files = [folder.client(name) for name in names]
    assert all(file.resolve().parent == folder.path / "clients" for file in files)
    assert len(set(files)) == len(names)
    assert all(
        folder.baseline(name).path.resolve().parent == folder.path / "baselines" for name in names if name != ".."
    )


def test_a_baseline_stops_when_the_run_is_asked_to(edge):
    asked = []

    def ask(event):
        if type(event).__name__ == "RunEnded" and not asked:
            asked.append(True)
            find("latest").ask_to_stop()

    with pytest.raises(Interrupted, match="stopped as asked"):
        edge("baselines=[pooled]", sinks=[ask])
    story = read_story(run.resume("latest"))
    assert story.baselines["pooled"].final


def test_a_baseline_is_found_by_its_name(edge):
    folder = edge("baselines=[pooled]")
    assert find(f"{folder.name}/pooled").record.exists()


def test_a_recipe_that_changed_since_the_run_began_is_refused(edge):
    def ask(event):
        if type(event).__name__ == "RoundEnded":
            find("latest").ask_to_stop()

    with pytest.raises(Interrupted):
        edge(sinks=[ask])
    folder = find("latest")
    folder.recipe.write_text(folder.recipe.read_text().replace("local_steps: 2", "local_steps: 3"))
    with pytest.raises(AtollError, match="has changed"):
        run.resume("latest")


def test_a_client_that_lost_its_state_is_told_so_and_starts_anew(edge):
    feedback = "finetune.up=[{use: error-feedback, chain: [{use: topk, fraction: 0.1}]}]"

    def lose(event):
        if type(event).__name__ == "RoundEnded" and event.round == 0:
            find("latest").client("north").unlink()

    story = read_story(edge(feedback, "finetune.rounds=4", sinks=[lose]))
    assert [(m.round, m.client) for m in story.missing] == [(1, "north")]
    assert "state is lost" in story.missing[0].reason
    assert sum(r.client == "north" for r in story.replies) == 3


def stumbling(at: str = "loss"):
    """An objective that raises, where it trains or, `at` measure, where it measures, over an odd number of tokens."""
    from atoll.local.language import Language

    class Stumbling(Language):
        def bind(self, model, tokenizer):
            inner = super().bind(model, tokenizer)

            def stumble(model, given):
                batch = inner.collate(given) if at == "measure" else given
                if batch.tokens % 2:
                    raise KeyError("no such label")
                return getattr(inner, at)(model, given)

            return inner._replace(**{at: stumble})

    return Stumbling("sft")


def test_what_a_client_raises_is_its_refusal_and_not_the_end_of_the_run(edge, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    story = read_story(edge("finetune.objective=test_runs:stumbling", "finetune.rounds=3", "finetune.batch_size=1"))
    assert story.ended.reason == "finished"
    assert story.missing
    assert all(m.refused and "KeyError: 'no such label'" in m.reason for m in story.missing)


def test_a_client_that_cannot_measure_is_named_in_the_tables(edge, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    odd = "finetune.objective={use: test_runs:stumbling, at: measure}"
    story = read_story(edge(odd, "evaluate.final_samples=1", "data.held_out=0.3"))
    table = loss_table(story)
    asked = {name for name, count in story.started.held_out.items() if count}
    assert set(story.final.absent) | set(story.final.clients) == asked
    assert story.final.absent
    assert all("KeyError: 'no such label'" in reason for reason in story.final.absent.values())
    assert all(
        any(note.startswith(f"{name}: told nothing of federated: ") for note in table.notes)
        for name in story.final.absent
    )


def test_a_client_without_samples_is_left_out_and_the_plan_checked_without_it(edge, tmp_path, sites):
    mixed = tmp_path / "mixed"
    shutil.copytree(sites, mixed)
    (mixed / "west.jsonl").write_text(json.dumps({"prompt": "What?", "completion": ""}) + "\n")
    story = read_story(edge(f"data.path={mixed}"))
    assert [one.client for one in story.left_out] == ["west"]
    assert list(story.started.clients) == ["north", "south"]
    with pytest.raises(AtollError, match="more clients asked"):
        edge(f"data.path={mixed}", "finetune.schedule={use: synchronous, cohort: 3}")


def own_clients():
    """A data factory with a client that has nothing."""
    import numpy as np

    sample = (np.arange(5, 15, dtype=np.int32), np.arange(5, 15, dtype=np.int32))
    return {
        "full": ClientData([sample] * 4, [sample]),
        "empty": ClientData((), ()),
        "untested": ClientData([sample], ()),
    }


def test_an_empty_client_of_an_own_factory_is_left_out_too(edge, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    story = read_story(edge("data=test_runs:own_clients"))
    assert [one.client for one in story.left_out] == ["empty"]
    assert set(story.final.clients) == {"full"}


@pytest.mark.parametrize(
    ("schedule", "share"),
    [("synchronous", 1.0), ("{use: synchronous, cohort: 2}", 2 / 3), ("{use: poisson, rate: 0.25}", 0.25),
     ("{use: buffered, concurrency: 3, buffer: 1}", 1 / 3)],
)  # fmt: skip
def test_scaffolds_variate_moves_by_the_share_of_clients_that_answer(schedule, share, tmp_path, sites):
    path = tmp_path / "share.yaml"
    path.write_text(RECIPE.format(data=sites))
    said = ["correction=scaffold", "optimizer=sgd", "clip_norm=null", "weighting=uniform", f"schedule={schedule}"]
    plan = run.plan(str(path), [f"finetune.{one}" for one in said])
    control = plan.rounds.streams[1]
    zero, one = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    total = control.aggregate.init(zero)
    for _ in range(round(3 * share)):
        total = control.aggregate.add(total, one, {"all": 1.0})
    update = control.aggregate.finish(total, lambda sums: sums)
    assert float(control.outer.step({}, zero, update)[1]["w"]) == pytest.approx(round(3 * share) / 3)
    assert not control.ages


def test_the_pooled_client_does_the_steps_of_a_whole_cohort(tmp_path, sites):
    path = tmp_path / "pooled.yaml"
    path.write_text(RECIPE.format(data=sites))
    said = ["baselines=[pooled]", "finetune.local_steps=null", "finetune.epochs=2"]
    plan = run.plan(str(path), [*said, "finetune.schedule={use: synchronous, cohort: 1}"])
    things = assemble(plan)
    ((_, pooled),) = run.baselines(plan, things, 3)
    each = [2 * math.ceil(len(data.train) / plan.recipe.finetune.batch_size) for data in things.data.values()]
    assert pooled.recipe.finetune.local_steps == round(sum(each) / len(each))


def test_staleness_counts_even_when_every_update_of_a_round_is_as_old(edge):
    """With one update a round the mean's own weights would cancel any discount: it is on the update itself."""
    common = ("finetune.schedule={use: buffered, concurrency: 3, buffer: 1, exponent: %s}", "fleet={use: inprocess}")
    a, b = (
        load_state(edge(common[0] % exponent, common[1], "finetune.rounds=3").checkpoint).params["update"]
        for exponent in (0, 2)
    )
    assert not any(torch.equal(a[name], b[name]) for name in a if name.endswith("lora_B.weight"))


def test_early_stopping_compares_like_with_like(edge):
    story = read_story(
        edge("finetune.rounds=8", "evaluate={every: 1, samples: 2, final_samples: 4, patience: 2, min_delta: 100}")
    )
    assert story.ended.rounds == 3
    assert "no better held-out loss in 2 evaluations" in story.ended.reason
    assert story.final.final
