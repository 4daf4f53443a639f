"""Records that name media: what is read, what is missing, and what leaves its record out."""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from of_parts import RECORD, final, parts, write
from PIL import Image

import atoll
from atoll.assemble import assemble
from atoll.data.collate import media_in
from atoll.data.media import MOST_PIXELS, Unusable, placed_media, read_image, read_sound
from atoll.data.read import Report, open_source, records
from atoll.data.sources import holders
from atoll.data.tokenize import prepare
from atoll.errors import AtollError
from atoll.models.features import features_of
from atoll.models.load import load_model


def test_broken_hostile_and_foreign_media_are_named_and_left_out(tmp_path, media, monkeypatch):
    folder = tmp_path / "site"
    write(folder, [])
    for medium in media:
        (folder / medium.path.name).write_bytes(medium.path.read_bytes())
    (tmp_path / "outside.png").write_bytes(media[0].path.read_bytes())
    (folder / "cut.png").write_bytes(media[0].path.read_bytes()[:60])
    (folder / "text.wav").write_text("no sound")
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("1", (side, side)).save(folder / "bomb.png")  # a few kB that unpack to 64 MB
    soundfile.write(folder / "long.wav", np.zeros(16000), 8000)
    soundfile.write(folder / "wide.wav", np.zeros((800, 17)), 8000)
    Image.new("L", (1, 60000)).save(folder / "thin.png")  # preprocessing that makes the short side 224 makes 3 GB of it
    wrong = {
        "nope.png": "image that is not there", "../outside.png": "image outside the folder",
        "cut.png": "image that is broken", "thin.png": "image more than 50 times as long",
        "noise.wav": "image that is not of a known format", "bomb.png": "image of more than 64 million pixels",
    }  # fmt: skip
    wrong_sounds = {
        "text.wav": "audio that is broken, or not of a known format", "long.wav": "audio of more than 1 s",
        "wide.wav": "audio of more than 16 channels",
    }  # fmt: skip
    good = [{"images": ["noise.png", "clear.png"]}, {"audio": "noise.wav"}, {}]
    marked = [{"messages": [{"role": "user", "content": "<image>?"}, RECORD["messages"][1]]}]
    write(folder, [{"images": [n]} for n in wrong] + [{"audio": n} for n in wrong_sounds] + marked + good)
    model, tokenizer = load_model(parts())
    found = prepare(folder, tokenizer, 512, cache_root=tmp_path, senses=features_of(model).senses)
    reasons = set(found.report.left_out)
    for reason in (*wrong.values(), *wrong_sounds.values(), "a place for image that it does not name"):
        assert any(one.startswith(reason) for one in reasons), (reason, reasons)
    assert found.report.kept == 3
    assert found.report.unused_columns == ()
    both = [*found.train, *found.test]
    assert sorted(len(sample[2]) for sample in both) == [0, 1, 2]
    plain, text_tokenizer = load_model("tiny:llama")
    without = prepare(folder, text_tokenizer, 512, cache_root=tmp_path)
    assert "image that this model cannot take" in set(without.report.left_out)
    assert plain.config.model_type == "llama"


def test_media_in_a_column_that_is_not_read_leave_their_record_out(tmp_path, media):
    shutil.copy(media[0].path, tmp_path / "a.png")
    (tmp_path / "a.mp4").write_bytes(b"")
    texts = [{"source": "nowhere.png"}, {"topic": "red"}, {"page": 3}]
    write(tmp_path, [{"pictures": ["a.png"]}, {"video": "a.mp4"}, *texts])
    report = Report()
    assert [one.row for one in records(open_source(tmp_path), report)] == [2, 3, 4]
    assert list(report.left_out) == [
        f"media in the column '{name}', which is not read: images, audio are" for name in ("pictures", "video")
    ]
    assert report.unused_columns == ("pictures", "video", "source", "topic", "page")


def test_messages_of_parts_are_those_of_other_libraries(tmp_path, media):
    shutil.copy(media[0].path, tmp_path / "a.png")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
    shown = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    rows = [{"messages": [{"role": "user", "content": shown}, answer], "images": ["a.png"]}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [record] = records(open_source(tmp_path), Report())
    assert [message["content"] for message in record.messages] == ["<image>\nWhat is it?", "A dog."]
    for part in (
        {"type": "image", "path": "a.png"},
        {"type": "video"},
        {"type": "image_url"},
        "text",
        {"type": "text"},
    ):
        rows[0]["messages"][0]["content"] = [part]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(AtollError, match="name the files in the record's columns"):
            list(records(open_source(tmp_path), Report()))


def test_sounds_that_do_not_say_how_long_they_are_and_pictures_of_16_bits(tmp_path):
    wave = np.sin(np.arange(4000) / 9).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", wave, 8000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # of STREAMINFO the number of samples: unknown, as a pipe writes it
    (tmp_path / "piped.flac").write_bytes(content)
    assert len(read_sound(tmp_path / "a.flac", 8000, 1.0)) == 4000
    with pytest.raises(Unusable, match="does not say how long"):
        read_sound(tmp_path / "piped.flac", 8000, 1.0)
    gray = np.linspace(0, 65535, 64).astype(">u2").reshape(8, 8)
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + gray.tobytes())
    assert np.asarray(read_image(tmp_path / "a.pgm"))[..., 0].tolist() == (gray >> 8).tolist()


def test_a_changed_picture_is_another_source(tmp_path, media):
    from atoll.data.read import open_source
    from atoll.data.tokenize import source_hash

    write(tmp_path / "site", [{}, {"images": ["a.png"]}])
    Image.new("RGB", (4, 4), "red").save(tmp_path / "site" / "a.png")
    before = source_hash(open_source(tmp_path / "site"))
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "site" / "a.png")
    assert source_hash(open_source(tmp_path / "site")) != before


def test_pictures_are_on_white_and_sounds_at_the_models_rate(media):
    assert read_image(media[1].path).getpixel((0, 0)) == (255, 255, 255)
    assert len(read_sound(media[2].path, 16000, 1.0)) == 8000
    with pytest.raises(Unusable, match=r"more than 0\.1 s"):
        read_sound(media[2].path, 16000, 0.1)


def test_media_without_a_place_come_before_the_first_question(media):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "see <image>"}]
    assert placed_media(chat, media)[1]["content"] == "<audio>\n<image>\nsee <image>"


def without_media(sites: Path, instead: str) -> str:
    inner = f"{{use: folders, path: {sites}/sites, held_out: 0.3}}"
    return f"data={{use: without-media, inner: {inner}, share: 0.6, instead: {instead}}}"


@pytest.mark.parametrize("instead", ["nothing", "learned"])
def test_a_share_of_records_misses_its_media_and_held_out_ones_are_whole(sites, monkeypatch, instead):
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    each = ([], [without_media(sites, instead)])
    whole, less = (assemble(atoll.plan(sites / "mine.yaml", settings)).data["see"] for settings in each)
    there = [sum(bool(one and one[0].path) for one in data.train.media) for data in (whole, less)]
    assert 0 < there[1] < there[0]
    assert holders(less.train)["image"] == there[1]
    assert less.test.media == whole.test.media
    shorter = [len(a[0]) - len(b[0]) for a, b in zip(whole.train, less.train, strict=True)]
    assert any(shorter) == (instead == "nothing")  # a null takes the places that the picture took
    twice = (
        without_media(sites, instead)
        .replace("inner: ", "inner: {use: without-media, share: 0.5, inner: ")
        .replace("0.3}", "0.3}}")
    )
    with pytest.raises(AtollError, match="media are taken off once"):
        atoll.plan(sites / "mine.yaml", [twice])
    run = atoll.run(sites / "mine.yaml", ["finetune.rounds=1", without_media(sites, instead)])
    assert all(torch.isfinite(x).all() for x in final(run).values())


def test_a_record_may_say_that_its_picture_is_missing(tmp_path, media):
    model, tokenizer = load_model(parts())
    chat = [{"role": "user", "content": "Look: <image>"}, {"role": "assistant", "content": "yes"}]
    write(tmp_path, [{"messages": chat, "images": [None]}, {"messages": chat, "images": ["noise.png"]}])
    found = prepare(tmp_path, tokenizer, 256, cache_root=tmp_path / "home", senses=features_of(model).senses)
    both = [*found.train, *found.test]
    assert len({len(sample[0]) for sample in both}) == 1
    features = features_of(model).of([sample[2][0] for sample in both])["image"]
    assert sorted(bool(one.isnan().all()) for one in features) == [False, True]


def test_pictures_of_16_bits_are_gray_and_others_are_named(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    shown = np.asarray(read_image(tmp_path / "deep.png"))[..., 0]
    assert np.abs(shown.astype(int) - (ramp >> 8)).max() <= 1
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(Unusable, match="more than 16 bits"):
        read_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_whatever_bytes_a_picture_has_it_is_read_or_named(tmp_path, kind):
    draw = np.random.default_rng(0)
    path = tmp_path / f"one.{kind}"
    Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        broken = whole.copy()
        broken[draw.integers(len(broken), size=8)] = draw.integers(256, size=8)
        path.write_bytes(broken[: draw.integers(20, len(broken) + 1)].tobytes())
        with suppress(Unusable), warnings.catch_warnings(action="ignore"):
            assert read_image(path).mode == "RGB"


def test_a_medium_named_by_an_absolute_path_leaves_its_record_out(tmp_path, media, monkeypatch):
    chat = [{"role": "user", "content": "Look"}, {"role": "assistant", "content": "yes"}]
    write(tmp_path / "site", [{"messages": chat, "images": [str(media[0].path)]}])
    report = Report()
    assert not list(records(open_source(tmp_path / "site"), report))
    assert list(report.left_out) == ["image that is not named from the folder of its record"]


def test_a_text_with_media_that_is_too_long_for_the_context_is_left_out(tmp_path, media):
    model, tokenizer = load_model(parts())
    chat = [{"role": "user", "content": "Look " * 40}, {"role": "assistant", "content": "yes"}]
    write(tmp_path, [{"messages": chat, "images": ["noise.png"]}, {"messages": chat}])
    found = prepare(
        tmp_path, tokenizer, 64, "causal_lm", cache_root=tmp_path / "home", senses=features_of(model).senses
    )
    assert list(found.report.left_out) == ["longer than the context"]
    assert not any(media_in(sample) for sample in [*found.train, *found.test])


def test_words_that_make_a_place_leave_their_record_out(tmp_path):
    model, tokenizer = load_model(parts())
    rows = [("Write <ima", "ge>"), ("Well?", "yes")]
    lines = [json.dumps({"prompt": q, "completion": a}) for q, a in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    tokenizer.chat_template = None
    found = prepare(tmp_path, tokenizer, 256, cache_root=tmp_path / "home", senses=features_of(model).senses)
    assert len(found.train) + len(found.test) == 1
    assert "places for pictures or sounds" in str(found.report)


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0.png", "loop.png"])
def test_what_no_picture_can_be_called_leaves_its_record_out(tmp_path, name):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    chat = [{"role": "user", "content": "Look"}, {"role": "assistant", "content": "yes"}]
    write(tmp_path, [{"messages": chat, "images": [name]}])
    report = Report()
    assert not list(records(open_source(tmp_path), report))
    assert sum(count for count, _ in report.left_out.values()) == 1


def test_a_sound_of_an_absurd_rate_is_named_at_once(tmp_path):
    soundfile.write(tmp_path / "odd.wav", np.zeros(4), 99_999_989)
    with pytest.raises(Unusable, match="samples a second"):
        read_sound(tmp_path / "odd.wav", 16000, 1.0)
    soundfile.write(tmp_path / "loud.wav", np.full(800, 1e30, np.float32), 8000, subtype="FLOAT")
    with pytest.raises(Unusable, match="louder than full scale"):
        read_sound(tmp_path / "loud.wav", 16000, 1.0)
