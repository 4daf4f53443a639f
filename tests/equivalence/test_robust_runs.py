"""Runs with a client that works against the others: what each aggregator makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import atoll
from atoll.errors import AtollError
from atoll.planning import plan
from atoll.record.story import read_story

RECIPE = """
recipe: 1
name: attacked
model: tiny:llama
data: {{use: folders, path: {data}, held_out: 0.3}}
finetune: {{rounds: 4, local_steps: 6, batch_size: 4, weighting: uniform, optimizer: {{use: adamw, lr: 1.0e-2}}}}
evaluate: {{every: 0}}
"""
ATTACK = "fleet={use: faults, scale: {site-4: -30}}"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    (tmp_path / "data").mkdir()
    for site in range(5):
        rows = [{"prompt": f"Twice {i}?", "completion": f"{2 * i} it is."} for i in range(site, 100, 5)]
        (tmp_path / "data" / f"site-{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "attacked.yaml"
    path.write_text(RECIPE.format(data=tmp_path / "data"))
    return path


def loss(recipe: Path, *settings: str) -> float:
    return float(read_story(atoll.run(recipe, settings)).final.mean)


def test_robust_aggregators_hold_where_the_mean_does_not(recipe: Path) -> None:
    honest, mean = loss(recipe), loss(recipe, ATTACK)
    base = float(read_story(atoll.run(recipe, ["finetune.rounds=1", "finetune.optimizer.lr=1e-9"])).final.mean)
    assert mean > base, "one client out of five undoes what the others learn"
    for rule in ("median", "{use: trimmed-mean, share: 0.2}", "krum", "multi-krum"):
        held = loss(recipe, ATTACK, f"finetune.aggregate={rule}")
        assert held < base - 0.5 * (base - honest), rule


def test_a_round_with_too_few_updates_for_krum_is_abandoned(recipe: Path) -> None:
    story = read_story(atoll.run(recipe, ["finetune.aggregate=krum", "fleet={use: faults, drop: 0.3, seed: 3}"]))
    given_up = [one for one in story.missing if "at least 5 are needed" in one.reason]
    assert given_up
    assert story.ended.reason == "finished"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (["finetune.aggregate={use: krum, bad: 2}"], "too few updates"),
        (["finetune.aggregate=median", "finetune.exchange=secure-aggregation"], "needs single updates"),
        (["finetune.aggregate={use: trimmed-mean, share: 0.5}"], "wrong value"),
        (["finetune.aggregate={use: trimmed-mean, share: 0.1}"], "too few updates"),
        (["finetune.aggregate=krum", "finetune.schedule={use: synchronous, quorum: 0.5}"], "too few updates"),
        (
            [
                "finetune.aggregate=median",
                "finetune.correction=scaffold",
                "finetune.optimizer={use: sgd, lr: 0.1}",
                "finetune.clip_norm=null",
            ],
            "correction's own stream",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_round(recipe: Path, settings: list[str], what: str) -> None:
    with pytest.raises(AtollError, match=what):
        plan(recipe, settings)


def test_a_client_that_there_is_not_cannot_be_scaled(recipe: Path) -> None:
    with pytest.raises(AtollError, match="no such client"):
        atoll.run(recipe, ["fleet={use: faults, scale: {site-9: 2}}"])


def test_baselines_of_one_client_take_the_mean(recipe: Path) -> None:
    folder = atoll.run(recipe, ["finetune.aggregate=krum", "baselines=[local, pooled]", "finetune.rounds=1"])
    assert all(story.ended for story in read_story(folder).baselines.values())
