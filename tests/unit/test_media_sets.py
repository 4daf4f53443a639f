"""Sets of pictures and sounds from packages: what their files say becomes records, and whole media are held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
from PIL import Image

from atoll.data import media_sets
from atoll.data.media import read_image, read_sound
from atoll.data.media_sets import Asked, get, held_out, stamps_in, write_site
from atoll.data.prepared_media import multimodal_sites
from atoll.data.read import Report, open_source, records
from support import Atoll

MEDIA = Path(__file__).parents[1] / "data" / "media"


def test_real_media_are_read() -> None:
    assert read_image(MEDIA / "dog.png").size == (136, 128)
    assert 0.3 < len(read_sound(MEDIA / "uno.wav", 16000, 5.0)) / 16000 < 0.5


def test_stamps_are_pictures_with_a_short_caption(tmp_path: Path) -> None:
    (tmp_path / "animals").mkdir()
    for name, caption in (
        ("dog", "A dog (a small one).\nes.utf8=Un perro"),
        ("long", "A " + "very " * 9 + "long name"),
    ):
        (tmp_path / "animals" / f"{name}.txt").write_text(caption)
        Image.new("RGB", (4, 4)).save(tmp_path / "animals" / f"{name}.png")
    (tmp_path / "animals" / "alone.txt").write_text("No picture.")
    [one] = stamps_in(tmp_path)
    assert (one.shows, one.caption, one.category) == ("dog", "A dog (a small one).", "animals")


def test_a_site_names_its_media_and_reads_as_it_was_written(tmp_path: Path) -> None:
    asked = [
        Asked("What?", "dog", False, image=MEDIA / "dog.png", choices=["dog", "cat"]),
        Asked("What is said?", "uno", True, audio=MEDIA / "uno.wav"),
        Asked("Both?", "yes", False, image=MEDIA / "dog.png", audio=MEDIA / "uno.wav"),
    ]
    write_site(tmp_path / "site", asked)
    report = Report()
    found = list(records(open_source(tmp_path / "site"), report))
    assert not report.left_out
    assert sorted((r.split, tuple(m.modality for m in r.media)) for r in found) == [
        ("test", ("audio",)), ("train", ("image",)), ("train", ("image", "audio")),
    ]  # fmt: skip
    assert len(list((tmp_path / "site" / "media").iterdir())) == 2  # each once


def test_a_fifth_is_held_out_by_content_alone(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.bin" for i in range(600)]
    for i, path in enumerate(paths):
        path.write_bytes(i.to_bytes(4))
    out = [held_out(path) for path in paths]
    assert 0.14 < sum(out) / len(out) < 0.26
    (tmp_path / "other").mkdir()
    assert [held_out(path.rename(tmp_path / "other" / f"x{path.name}")) for path in paths] == out


@pytest.mark.parametrize(("words", "said"), [
    (["get", "tuxpant"], "did you mean 'tuxpaint'"),
    (["get"], "tuxpaint, asterisk, emoji"),
    (["there", "more"], "one path"),
    (["there", "--to", "here"], "one path"),
])  # fmt: skip
def test_mistakes_are_told(atoll: Atoll, words: list[str], said: str) -> None:
    heard = atoll("data", *words)
    assert heard.status != 0
    assert said in heard.err


def test_nothing_is_written_over(atoll: Atoll, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").write_text("kept")
    heard = atoll("data", "get", "emoji", "--to", str(tmp_path / "mine"))
    assert heard.status == 1
    assert "something is there" in heard.err


@pytest.mark.real
@pytest.mark.parametrize(("name", "least"), [("tuxpaint", 700), ("asterisk", 3000), ("emoji", 1300)])
def test_a_public_set_becomes_records_that_can_all_be_used(name: str, least: int, tmp_path: Path) -> None:
    folder = get(name, tmp_path / name)
    report = Report()
    found = list(records(open_source(folder), report))
    assert len(found) >= least
    assert sum(count for count, _ in report.left_out.values()) <= 5
    held = {m.key for r in found if r.split == "test" for m in r.media}
    assert held
    assert not held & {m.key for r in found if r.split == "train" for m in r.media}
    for one in found[:: len(found) // 20]:
        for medium in one.media:
            assert medium.path is not None
            read_image(medium.path) if medium.modality == "image" else soundfile.info(medium.path)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert all(row["messages"][1]["content"].strip() for row in rows)
    assert all(deb.name in (folder / "SOURCES.md").read_text() for deb in media_sets.SETS[name].debs)


@pytest.mark.real
def test_no_medium_of_the_four_sites_is_on_both_sides() -> None:
    sides: dict[str, set[str]] = {"train": set(), "test": set()}
    for site in ("gallery", "station", "school"):
        for one in records(open_source(multimodal_sites() / site), Report()):
            sides[one.split] |= {medium.key for medium in one.media}
    assert sides["test"]
    assert not sides["train"] & sides["test"]
