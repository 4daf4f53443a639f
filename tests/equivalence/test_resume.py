"""Killed with SIGKILL at any moment and resumed, a run ends as an undisturbed one: bit for bit, client state included."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atoll import run
from atoll.params import equal
from atoll.record.checkpoint import load_state
from atoll.record.events import read_events
from atoll.record.folder import RunFolder

STATEFUL = """
recipe: 1
name: {name}
model: tiny:llama
data: {{use: folders, path: {data}}}
finetune:
  rounds: 4
  local_steps: 2
  batch_size: 3
  space: {{use: lora, rank: 4}}
  optimizer: {{use: sgd, lr: 0.5}}
  clip_norm: null
  correction: scaffold
  weighting: uniform
  up: [{{use: error-feedback, chain: [{{use: topk, fraction: 0.1}}]}}]
  outer: {{use: nesterov, lr: 0.7}}
  schedule: {schedule}
evaluate: {{samples: 4, final_samples: 4}}
fleet: {{use: faults, kill_at: "{kill_at}"{inner}}}
"""


def write(tmp_path: Path, sites: Path, kill_at: str = "", schedule: str = "synchronous", inner: str = "") -> Path:
    recipe = tmp_path / f"{'killed' if kill_at else 'calm'}.yaml"
    text = STATEFUL.format(name=recipe.stem, data=sites, kill_at=kill_at, schedule=schedule, inner=inner)
    recipe.write_text(text)
    return recipe


def same(a: RunFolder, b: RunFolder) -> None:
    one, other = load_state(a.checkpoint), load_state(b.checkpoint)
    for part in ("params", "outer", "down"):
        for stream in one.params:
            assert equal(getattr(one, part)[stream], getattr(other, part)[stream]), f"{part} of {stream} differ"
    assert one.round == other.round
    assert one.acknowledged == other.acknowledged
    files = sorted(p.name for p in (a.path / "clients").iterdir())
    assert files == sorted(p.name for p in (b.path / "clients").iterdir())
    for name in files:
        assert (a.path / "clients" / name).read_bytes() == (b.path / "clients" / name).read_bytes(), f"{name} differs"
    assert losses(a) == losses(b)


def losses(folder: RunFolder) -> list[object]:
    """Everything in the record that is not a time."""
    timed = ("seconds", "spans", "metrics", "name", "plan")
    return [{k: v for k, v in vars(e).items() if k not in timed} for e in read_events(folder.record)]


@pytest.mark.parametrize(
    ("kill_at", "schedule", "inner"),
    [
        ("train:1:south", "synchronous", ""),
        ("train:0:north", "synchronous", ""),
        ("evaluate:2:south:4", "synchronous", ""),
        ("train:2:south", "{use: synchronous, cohort: 2}", ""),
        (
            "train:2:north",
            "{use: buffered, concurrency: 3, buffer: 2}",
            ", inner: {use: inprocess, seconds: {north: 1, south: 2.5, west: 4}}",
        ),
    ],
    ids=["in-a-round", "in-the-first", "in-an-evaluation", "sampled", "asynchronous"],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, sites, kill_at, schedule, inner):
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    recipe = write(tmp_path, sites, kill_at, schedule, inner)
    died = subprocess.run([sys.executable, "-c", f"from atoll import run; run.run({str(recipe)!r})"], check=False)
    assert died.returncode == -signal.SIGKILL, "the fault did not strike"
    killed = RunFolder(tmp_path / "runs" / "killed-1")
    killed.recipe.write_text(killed.recipe.read_text().replace(kill_at, "nobody"))
    run.resume(str(killed.path))
    calm = run.run(str(write(tmp_path, sites, "", schedule, inner)))
    same(killed, calm)


def test_a_finished_run_is_left_as_it_is(tmp_path, monkeypatch, sites):
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    folder = run.run(str(write(tmp_path, sites)))
    before = folder.record.read_bytes(), folder.checkpoint.read_bytes()
    run.resume(folder.name)
    assert (folder.record.read_bytes(), folder.checkpoint.read_bytes()) == before


def test_the_same_recipe_gives_the_same_bits_and_another_seed_others(tmp_path, monkeypatch, sites):
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    recipe = str(write(tmp_path, sites))
    one, two, other = run.run(recipe), run.run(recipe), run.run(recipe, ["seed=1"])
    same(one, two)
    a, b = (load_state(folder.checkpoint).params["update"] for folder in (one, other))
    assert not any(torch.equal(a[name], b[name]) for name in a)


def test_a_run_starts_from_anothers_result(tmp_path, monkeypatch, sites):
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    first = run.run(str(write(tmp_path, sites)))
    second = run.run(str(write(tmp_path, sites)), [f"from={first.name}", "finetune.rounds=1"])
    ends = [e for e in read_events(first.record) if type(e).__name__ == "Evaluated"][-1]
    starts = next(e for e in read_events(second.record) if type(e).__name__ == "Evaluated")
    assert starts.mean == pytest.approx(ends.mean)
