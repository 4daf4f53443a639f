"""Fine-tuning and alignment over a network: sites that hold preferences get the reference, and masked sums stay exact."""

from __future__ import annotations

import json

import pytest
from machines import NAMES, Federation

from atoll.params import equal
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder
from atoll.record.story import read_story
from atoll.stream import UPDATE

pytestmark = pytest.mark.network

RECIPE = """
recipe: 1
name: aligned
extends: methods/fedavg-lora
model: tiny:llama
data: {use: folders, path: ./pairs, held_out: 0.3}
stages: [finetune, align]
finetune: {rounds: 1, local_steps: 2, batch_size: 4, space: {use: lora, rank: 2}, exchange: secure-aggregation}
align: {rounds: 2, objective: {use: dpo, beta: 0.5}}
evaluate: {every: 0, final_samples: 8}
"""


@pytest.fixture(scope="module")
def opinionated(bare: Federation) -> Federation:
    """Three sites with preferences of their own."""
    (bare.folder / "pairs").mkdir()
    for name in NAMES:
        rows = [{"prompt": f"{i}, {name}?", "chosen": f"{name} says {i}.", "rejected": f"{i}!"} for i in range(20)]
        (bare.folder / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (bare.folder / "aligned.yaml").write_text(RECIPE)
    bare.serve()
    for name in NAMES:
        bare.join(name, "--data", f"pairs/{name}.jsonl")
    return bare


def run(federation: Federation, name: str, *settings: str) -> RunFolder:
    done = federation.run("run", "aligned.yaml", "--set", f"name={name}", *settings, timeout=240)
    assert done.returncode == 0, done.stderr
    return RunFolder(federation.folder / "runs" / f"{name}-1")


def test_sites_align_against_the_reference_that_they_are_sent_as_one_process_does(opinionated: Federation) -> None:
    there, here = run(opinionated, "there", "--fleet", opinionated.address), run(opinionated, "here")
    for far, near in ((there.stage("finetune"), here.stage("finetune")), (there, here)):
        ours, theirs = (load_state(one.checkpoint).params[UPDATE] for one in (far, near))
        assert equal(ours, theirs)
    far, near = read_story(there), read_story(here)
    assert far.base.clients == near.base.clients
    assert far.final.clients == near.final.clients
    assert list(far.base.clients) == ["everybody"], "under masks there is no other"
    assert far.base.clients["everybody"]["reward_accuracy"] == pytest.approx(0.5), "against what they were sent"
    assert there.start.exists(), "the sites were sent what they align against"
