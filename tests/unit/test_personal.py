"""Parts that stay at their clients: they train there and are never sent, and make each client's own model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import atoll
from atoll.client import FileStore
from atoll.params import Params, under
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder, find
from atoll.record.story import read_story
from atoll.result import load_result
from atoll.stream import UPDATE
from support import Atoll

RECIPE = """
recipe: 1
name: mine
extends: methods/fedvlm
model: "tiny:llama"
data: {use: folders, path: ./sites, held_out: 0.3}
finetune: {rounds: 2, local_steps: 3, batch_size: 4, context: 128, space: {use: lora, rank: 2}}
evaluate: {every: 1, final_samples: 8}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_home: Path) -> Path:
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    (tmp_path / "sites").mkdir()
    for name, word in (("east", "sunrise"), ("west", "sunset")):
        rows = [{"prompt": f"{i}?", "completion": f"{word} {i}"} for i in range(20)]
        (tmp_path / "sites" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def kept(run: RunFolder, client: str) -> Params:
    """What a client keeps."""
    store = FileStore(run.client(client))
    state = load_state(run.checkpoint)
    return under("update", store.settle(state.acknowledged[client])) or under(
        "work/personal", store.settle(state.acknowledged[client])
    )


def test_one_factor_travels_and_the_other_stays(site: Path) -> None:
    run = atoll.run(site / "mine.yaml")
    shared = load_state(run.checkpoint).params[UPDATE]
    assert shared
    assert all(".lora_B." in name for name in shared)
    east, west = (kept(run, name) for name in ("east", "west"))
    assert east.keys() == west.keys()
    assert all(".lora_A." in name for name in east)
    assert any(not torch.equal(east[name], west[name]) for name in east)
    whole = atoll.run(site / "mine.yaml", ["finetune.personal=[]", "name=whole"])
    sent, all_of_it = (read_story(one).bytes_up for one in (run, whole))
    assert sent < 0.7 * all_of_it


def test_it_is_what_a_client_trains_alone_where_nothing_is_shared_in_effect(site: Path) -> None:
    """With one client of the population, sharing and keeping are the same: the same model after every round."""
    one, other = (
        atoll.run(site / "mine.yaml", ["finetune.population=[east]", f"name={name}", f"finetune.personal={personal}"])
        for name, personal in (("kept", "[lora_A]"), ("sent", "[]"))
    )
    losses = [[e.clients["east"]["loss"] for e in read_story(run).evaluations] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    together = {**load_state(one.checkpoint).params[UPDATE], **kept(one, "east")}
    expected = load_state(other.checkpoint).params[UPDATE]
    assert together.keys() == expected.keys()
    for name, x in together.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [
    ["finetune.exchange={use: secure-aggregation, survivors: 2}"],
    ["finetune.up=[{use: error-feedback, chain: [{use: topk, fraction: 0.2}]}]"],
    ["finetune.correction=proximal"],
    ["fleet={use: processes, workers: 2}"],
    ["baselines=[local, pooled]"],
])  # fmt: skip
def test_it_goes_with_masks_compression_and_baselines(site: Path, settings: list[str]) -> None:
    run = atoll.run(site / "mine.yaml", [*settings, "finetune.rounds=1"])
    assert all(".lora_B." in name for name in load_state(run.checkpoint).params[UPDATE])
    story = read_story(run)
    assert story.final.mean < story.base.mean
    assert all(inner.final.mean < story.base.mean for inner in story.baselines.values())


@pytest.mark.parametrize(("change", "said"), [
    ("finetune.personal=[lora_C]", "no parameter has this in its name"),
    ("finetune.personal=[lora]", "nothing travels"),
    ("finetune={correction: scaffold, optimizer: sgd, clip_norm: null, weighting: uniform}", "about all that trains"),
])  # fmt: skip
def test_what_cannot_be_personal_is_told(site: Path, atoll: Atoll, change: str, said: str) -> None:
    heard = atoll("plan", str(site / "mine.yaml"), "--set", change)
    assert heard.status == 1
    assert said in heard.err


def test_chat_with_a_clients_own_model(site: Path, atoll: Atoll) -> None:
    assert atoll("run", str(site / "mine.yaml"), "--set", "finetune.rounds=1").status == 0
    assert atoll("chat", "mine-1", "1?", "--client", "east", "--max-tokens", "4").status == 0
    one, other = (load_result(find("mine-1"), client=name) for name in ("east", "west"))
    assert {n: x for n, x in one.tuned.items() if ".lora_A." in n}.keys() == kept(find("mine-1"), "east").keys()
    assert any(not torch.equal(one.tuned[n], other.tuned[n]) for n in one.tuned if ".lora_A." in n)
    assert all(torch.equal(one.tuned[n], other.tuned[n]) for n in one.tuned if ".lora_B." in n)
    assert "--client names one" in atoll("chat", "mine-1", "1?", "--max-tokens", "2").err
    wrong = atoll("chat", "mine-1", "1?", "--client", "eats")
    assert wrong.status == 1
    assert "did you mean 'east'" in wrong.err
    on = atoll("plan", str(site / "mine.yaml"), "--set", "from=mine-1")
    assert on.status == 1
    assert "stayed at its clients" in on.err
