"""Sites with unlike modalities over a network: each reads and encodes its own media, and masked sums weigh by modality."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
from machines import NAMES, Federation
from PIL import Image

from atoll.params import equal
from atoll.record.checkpoint import load_state
from atoll.record.folder import RunFolder
from atoll.record.measured import ACCURACY, LOSS, by_modality
from atoll.record.story import read_story
from atoll.stream import UPDATE

pytestmark = pytest.mark.network

RECIPE = """
recipe: 1
name: media
extends: methods/fedavg-lora
model:
  use: assembled
  language: tiny:llama
  image: {encoder: "tiny:clip", connector: {use: mlp, pool: 4}}
  audio: {encoder: "tiny:whisper", connector: {use: resampler, queries: 3}, seconds: 1}
data: {use: folders, path: ./media}
finetune: {rounds: 2, local_steps: 2, batch_size: 4, context: 256, space: {use: lora, rank: 2, modules: [connectors]}}
evaluate: {every: 0, final_samples: 4}
"""
MASKS = ("--set", "finetune.exchange=secure-aggregation")


@pytest.fixture(scope="module")
def unlike(bare: Federation) -> Federation:
    """North has texts, south pictures, west sounds."""
    draw = np.random.default_rng(0)
    for name, column in zip(NAMES, ("", "images", "audio"), strict=True):
        folder = bare.folder / "media" / name
        folder.mkdir(parents=True)
        rows = []
        for i in range(16):
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            soundfile.write(folder / f"{i}.wav", draw.normal(size=4000) / 9, 8000)
            medium = {"images": f"{i}.png", "audio": f"{i}.wav"}.get(column)
            row = {"prompt": f"{name} {i}?", "completion": "yes", "choices": ["yes", "no"]}
            rows.append(row | ({column: medium} if column else {}))
        for split, some in (("train", rows[:10]), ("test", rows[10:])):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (bare.folder / "media.yaml").write_text(RECIPE)
    bare.serve()
    for name in NAMES:
        bare.join(name, "--data", f"media/{name}")
    return bare


def run(federation: Federation, name: str, *settings: str) -> RunFolder:
    done = federation.run("run", "media.yaml", "--set", f"name={name}", *settings, timeout=240)
    assert done.returncode == 0, done.stderr
    return RunFolder(federation.folder / "runs" / f"{name}-1")


def test_masked_sites_with_unlike_media_give_what_one_process_gives(unlike: Federation) -> None:
    there, here = run(unlike, "there", "--fleet", unlike.address, *MASKS), run(unlike, "here", *MASKS)
    ours, theirs = (load_state(one.checkpoint).params[UPDATE] for one in (there, here))
    assert equal(ours, theirs)
    for measure in (LOSS, ACCURACY):
        far, near = (by_modality(read_story(one), measure) for one in (there, here))
        assert far.columns == ["audio", "image", "text"]
        assert far.rows == near.rows


def test_what_is_personal_stays_at_its_site(unlike: Federation) -> None:
    there = run(unlike, "own", "--fleet", unlike.address, "--set", "finetune.personal=[lora_A]")
    assert not any(".lora_A." in name for name in load_state(there.checkpoint).params[UPDATE])
    here = run(unlike, "mine", "--set", "finetune.personal=[lora_A]")
    losses = [{name: one["loss"] for name, one in read_story(each).final.clients.items()} for each in (there, here)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
