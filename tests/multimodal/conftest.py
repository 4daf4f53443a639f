"""Media, and sites that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from of_parts import RECIPE, SITES, write
from PIL import Image

from atoll.data.media import Medium


@pytest.fixture(autouse=True)
def cache(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOLL_HOME", str(shared_home))


@pytest.fixture
def media(tmp_path: Path) -> list[Medium]:
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    soundfile.write(tmp_path / "noise.wav", draw.normal(size=4000).astype("float32") / 9, 8000)
    return [
        Medium("image", tmp_path / "noise.png"),
        Medium("image", tmp_path / "clear.png"),
        Medium("audio", tmp_path / "noise.wav"),
    ]


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name, kinds in SITES.items():
        records = []
        for i in range(12):
            answer = [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": str(i)}]
            records.append({"messages": answer} | {k: [v[0].format(i)] for k, v in kinds[i % len(kinds)].items()})
        write(tmp_path / "sites" / name, records)
        for i in range(12):
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                tmp_path / "sites" / name / f"p{i}.png"
            )
            soundfile.write(tmp_path / "sites" / name / f"s{i}.wav", draw.normal(size=4000) / 9, 8000)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path
