"""Models that see and hear: of whatever parts, they say what the parts say, and media stand where the text has them."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import LlamaConfig

import atoll
from atoll import recipe as recipes
from atoll.aggregate.base import modality_of
from atoll.assemble import assemble
from atoll.chat import Chat, converse
from atoll.data.collate import media_in, pack, pad
from atoll.data.media import MOST_PIXELS, Medium, Unusable, placed_media, read_image, read_sound
from atoll.data.media_sets import write_glyphs
from atoll.data.read import Report, open_source, records
from atoll.data.sources import holders
from atoll.data.tokenize import prepare
from atoll.errors import AtollError
from atoll.estimate import as_data
from atoll.exchange import Broadcast, Task
from atoll.local.objectives import token_losses
from atoll.local.work import train
from atoll.models.assembled import assembled
from atoll.models.connectors import Connector, make_connector
from atoll.models.features import Features, features_of, touched
from atoll.models.load import load_model
from atoll.models.multimodal import MultimodalModel
from atoll.models.processor import MultimodalProcessor
from atoll.models.shapes import shapes
from atoll.models.spaces import lora
from atoll.models.tiny import byte_tokenizer
from atoll.policy import model_names
from atoll.record.folder import find
from atoll.record.measured import LOSS, by_modality, loss_table
from atoll.record.story import read_story
from atoll.result import load_result
from atoll.stream import UPDATE
from support import Atoll

MLP, RESAMPLER = {"use": "mlp", "pool": 4}, {"use": "resampler", "queries": 3}
LANGUAGES = ["llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma", "qwen", "phi", "mamba"]
EYES, EARS = ["clip", "siglip", "vit", "dinov2"], ["whisper", "wav2vec2"]


def parts(language: str = "llama", eyes: str = "clip", ears: str = "whisper") -> Any:
    image, audio = {"encoder": f"tiny:{eyes}", "connector": MLP}, {"encoder": f"tiny:{ears}", "connector": RESAMPLER}
    return assembled(f"tiny:{language}", image, {**audio, "seconds": 1.0})


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


def asked(model: MultimodalModel, text: str, tokenizer: Any) -> torch.Tensor:
    """Tokens of a text, with as many placeholders as media have tokens."""
    features = features_of(model)
    assert features is not None
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    places = {sense.token_id: sense.tokens for sense in features.senses.values()}
    return ids.repeat_interleave(torch.tensor([places.get(int(one), 1) for one in ids]))[None]


@pytest.mark.parametrize(("language", "eyes", "ears"), [
    *[(language, "clip", "whisper") for language in LANGUAGES],
    *[("llama", eyes, "whisper") for eyes in EYES[1:]],
    ("llama", "clip", "wav2vec2"),
])  # fmt: skip
def test_any_parts_go_together_and_clips_stand_where_the_text_has_them(language, eyes, ears, media):
    model, tokenizer = load_model(parts(language, eyes, ears))
    features = features_of(model)
    ids = asked(model, "a <image> b <image><audio> c", tokenizer)
    given = {f"{name}_features": x for name, x in features.of(media).items()}
    with torch.no_grad():
        said = model(input_ids=ids, **given).logits
        tokens = {name: model.tokens(name, x) for name, x in features.of(media).items()}
        words = [
            model.get_input_embeddings()(tokenizer(text, return_tensors="pt").input_ids)[0]
            for text in ("a ", " b ", " c")
        ]
        by_hand = torch.cat([words[0], tokens["image"][0], words[1], tokens["image"][1], tokens["audio"][0], words[2]])
        expected = model.language_model(inputs_embeds=by_hand[None]).logits
    torch.testing.assert_close(said, expected)
    assert not torch.allclose(*tokens["image"])


def test_a_saved_model_is_read_by_transformers_and_generates_the_same(tmp_path, media):
    from transformers import AutoModelForImageTextToText

    model, tokenizer = load_model(parts())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    ids = asked(model, "<image> and <audio>?", tokenizer)
    found = features_of(model).of([media[0], media[2]])
    given = {f"{name}_features": x for name, x in found.items()}
    raw = {f"{n}_inputs": features_of(model).inputs(c)[None] for n, c in (("image", media[0]), ("audio", media[2]))}
    made = [
        one.generate(input_ids=ids, **how, max_new_tokens=5, do_sample=False)
        for one in (model, again)
        for how in (given, raw)
    ]
    slow = model.generate(input_ids=ids, **given, max_new_tokens=5, do_sample=False, use_cache=False)
    assert all(torch.equal(one, slow) for one in made)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny LLaVA as a folder, as `save_pretrained` writes it."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("llava") / "llava"
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    place = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(vocab_size=264, max_position_embeddings=256, initializer_range=0.1, **small)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **small)
    torch.manual_seed(3)
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=place)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder


def test_a_ready_made_model_says_the_same_by_its_parts(llava, media, sites):
    from transformers import LlavaForConditionalGeneration

    folder = str(llava)
    one = assembled(folder, {"encoder": folder, "connector": {"use": "llava", "of": folder}})
    model, tokenizer = load_model(one, dtype="float32")
    ready = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    ids = asked(model, "<image> or <image>?", tokenizer)
    pixels = torch.stack([features_of(model).inputs(medium) for medium in media[:2]])
    with torch.no_grad():
        expected = ready(input_ids=ids, pixel_values=pixels).logits
        for given in ({"image_inputs": pixels}, {"image_features": features_of(model).of(media[:2])["image"]}):
            torch.testing.assert_close(model(input_ids=ids, **given).logits, expected, rtol=1e-2, atol=2e-3)
    settings = [f"model={{use: assembled, language: {folder}, image: {{encoder: {folder}, connector: {{use: llava,"
                f" of: {folder}}}}}}}", "finetune.rounds=1", "name=ready"]  # fmt: skip
    run = atoll.run(sites / "mine.yaml", settings)
    assert read_story(run).rounds[0].accepted == 3
    assert any(".connectors.image.body.layers.0.weight" in name for name in final(run))


def test_a_connector_between_other_sizes_is_told(llava):
    one = assembled("tiny:llama", {"encoder": "tiny:clip", "connector": {"use": "llava", "of": "./nowhere"}})
    with pytest.raises(AtollError, match="there is no such folder"):
        load_model(one)
    from transformers import LlamaForCausalLM

    other = llava.parent / "wide"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=264, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(AtollError, match="between other sizes"):
        load_model(assembled(str(other), {"encoder": str(llava), "connector": {"use": "llava", "of": str(llava)}}))


def test_a_processor_makes_a_models_inputs_and_is_read_by_transformers(tmp_path, media):
    from transformers import AutoProcessor

    model, tokenizer = load_model(parts())
    processor = MultimodalProcessor(tokenizer, model.config)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    picture, clear, sound = (medium.path for medium in media)
    texts = ["<image> and <audio>?", "a longer question on <image>"]
    for side in ("left", "right"):
        made, same = (
            one(texts, images=[picture, clear], audio=[sound], padding_side=side) for one in (processor, again)
        )
        assert made.keys() == same.keys()
        assert all(torch.equal(made[name], same[name]) for name in made)
        rows = [row[mask.bool()] for row, mask in zip(made["input_ids"], made["attention_mask"], strict=True)]
        assert all(torch.equal(row, asked(model, text, tokenizer)[0]) for row, text in zip(rows, texts, strict=True))
        assert made["attention_mask"][:, 0 if side == "right" else -1].all()
        assert torch.isfinite(model(**made).logits).all()
    shown = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], tokenize=False
    )
    assert "<image>\nwhat?" in shown


def test_a_processor_takes_what_those_of_transformers_take(media):
    model, tokenizer = load_model(parts())
    processor = MultimodalProcessor(tokenizer, model.config)
    file = media[0].path
    chat = [{"role": "user", "content": [{"type": "image", "path": str(file)}, {"type": "text", "text": "what?"}]}]
    shown = {"type": "image", "image": Image.open(file)}
    in_memory = [{"role": "user", "content": [shown, {"type": "text", "text": "what?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    expected = processor(text, images=[file], add_special_tokens=False, return_tensors="pt", padding=True)
    for conversation in (chat, in_memory):
        made = processor.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in made)
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert torch.equal(ids, expected["input_ids"])
    tone = np.sin(np.arange(800) / 9).astype(np.float32)
    assert torch.isfinite(model(**processor("<audio> ?", audio=[tone])).logits).all()
    for options in ({"return_tensors": "np"}, {"truncation": True}):
        with pytest.raises(ValueError, match="whole texts"):
            processor("hello", **options)
    with pytest.raises(ValueError, match="the model takes text, image, audio"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(ValueError, match="without 'image' or 'path'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True)


def test_rows_of_a_padded_batch_say_what_they_say_alone(media):
    model, tokenizer = load_model(parts())
    features = features_of(model)
    rows = [asked(model, "<image> what?", tokenizer)[0], asked(model, "a longer one, <image>?", tokenizer)[0]]
    alone = [
        model.generate(
            input_ids=row[None], image_features=features.of([medium])["image"], max_new_tokens=4, do_sample=False
        )
        for row, medium in zip(rows, media, strict=False)
    ]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=259) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    both = model.generate(
        input_ids=ids,
        attention_mask=mask,
        image_features=features.of(media[:2])["image"],
        max_new_tokens=4,
        do_sample=False,
    )
    for row, one in zip(both, alone, strict=True):
        assert torch.equal(row[-4:], one[0, -4:])


def test_packed_samples_with_clips_have_the_losses_they_have_alone(media):
    model, tokenizer = load_model(parts())
    features = features_of(model)
    samples = []
    for text, some in (("<image> one", media[:1]), ("two", []), ("<audio><image> three", [media[2], media[1]])):
        ids = asked(model, text, tokenizer)[0].numpy().astype(np.int32)
        samples.append((ids, np.where(ids < 256, ids, -100), tuple(some)))

    def losses(some: list[Any], make: Any) -> torch.Tensor:
        batch = replace(make(some), media=features.of([medium for sample in some for medium in sample[2]]))
        with torch.no_grad():
            return token_losses(model, batch)[0]

    together = losses(samples, pack)
    alone = torch.cat([losses([one], lambda some: pad(some, 0)) for one in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_as_many_places_as_clips_or_a_reason(media):
    model, tokenizer = load_model(parts())
    ids = asked(model, "<image><image>", tokenizer)
    with pytest.raises(ValueError, match="placeholders of image for 1 media"):
        model(input_ids=ids, image_features=features_of(model).of(media[:1])["image"])
    with pytest.raises(ValueError, match="placeholders of audio for 0 media"):
        model(input_ids=asked(model, "<audio>", tokenizer))


@pytest.mark.parametrize("space", ["full", "{use: lora, modules: [connectors]}"])
def test_encoders_stay_as_they_are_while_the_rest_trains(sites, monkeypatch, space):
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    things = assemble(atoll.plan(sites / "mine.yaml", [f"finetune.space={space}"]))
    assert not [name for name in things.start if "_encoder." in name]
    inner = things.model.get_base_model() if hasattr(things.model, "get_base_model") else things.model
    before = {name: x.clone() for name, x in inner.state_dict().items() if name.startswith(("vision_", "audio_"))}
    task = Task("train", "see", "", Broadcast(0, {}), 1)
    done = train(things.local, {UPDATE: things.start}, things.data["see"], {}, task)
    assert any(
        float(x.abs().max()) > 0 for name, x in done.updates[UPDATE].items() if ".connectors.image." in f".{name}"
    )
    assert not inner.vision_encoder.training
    assert inner.connectors.training
    assert all(torch.equal(x, before[name]) for name, x in inner.state_dict().items() if name in before)


def test_beams_see_each_row_with_its_own_media(media):
    model, tokenizer = load_model(parts())
    features = features_of(model)
    ids = asked(model, "<image> or <image>?", tokenizer)
    both = features.of(media[:2])["image"]
    wide = model.generate(
        input_ids=ids.repeat(2, 1), image_features=torch.cat([both, both.flip(0)]), max_new_tokens=6, num_beams=3,
        num_return_sequences=1, do_sample=False,
    )  # fmt: skip
    single = [
        model.generate(input_ids=ids, image_features=one, max_new_tokens=6, num_beams=3, do_sample=False)
        for one in (both, both.flip(0))
    ]
    for row, one in zip(wide, single, strict=True):
        assert torch.equal(row[: one.shape[1]], one[0])


@pytest.mark.parametrize(
    ("written", "positions", "tokens"),
    [(MLP, 17, 5), ({"use": "mlp"}, 17, 17), (RESAMPLER, 17, 3), ({"use": "alignment", "stride": 5}, 17, 3)],
)
def test_a_connector_gives_the_tokens_it_says(written, positions, tokens):
    made = Connector(make_connector(written), positions, 6, 8)
    assert made(torch.randn(2, positions, 6), torch.randn(20, 8)).shape == (2, tokens + 2, 8)


def test_alignment_is_attention_over_the_embeddings_and_anchors_over_some_of_them():
    torch.manual_seed(0)
    features, embeddings = torch.randn(2, 17, 6), torch.randn(40, 8)
    exact = make_connector({"use": "alignment", "stride": 4, "heads": 2}).body(17, 6, 8)
    few = make_connector({"use": "alignment", "stride": 4, "heads": 2, "anchors": 5}).body(17, 6, 8)
    few.load_state_dict(exact.state_dict())
    queries = exact.norm(exact.reduce(features.transpose(1, 2)).transpose(1, 2))
    query, key, value = exact.attention.in_proj_weight.chunk(3)
    given = zip((queries, embeddings, embeddings), (query, key, value), strict=True)
    q, k, v = ((x @ w.T).unflatten(-1, (2, 4)).transpose(-3, -2) for x, w in given)
    mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
    by_hand = exact.attention.out_proj(mixed.transpose(-3, -2).flatten(-2))
    torch.testing.assert_close(exact(features, embeddings), by_hand)
    torch.testing.assert_close(few(features, embeddings), exact(features, embeddings[[0, 10, 20, 29, 39]]))


def test_adapters_are_for_text_and_connectors_train_whole():
    model, _ = load_model(parts())
    space = lora(rank=2, modules=["connectors"])
    planned = space.plan(shapes(parts()))
    trained = {name: tuple(p.shape) for name, p in space.trainable(space.prepare(model, 0)).items()}
    assert trained == planned
    assert {modality_of(name) for name in trained} == {"all", "image", "audio"}
    assert all(".language_model." in name or ".connectors." in name for name in trained)
    for where in (lambda: space_of("conectors").plan(shapes(parts())), lambda: space_of("conectors").prepare(model, 0)):
        with pytest.raises(AtollError, match="did you mean 'connectors'"):
            where()


def space_of(module: str) -> Any:
    return lora(modules=[module])


def test_features_are_made_once_and_no_more_is_kept_than_may_be(tmp_path, media):
    model, _ = load_model(parts())
    found = features_of(model)
    kept = Features(found.model, found.preparations, found.identities, tmp_path / "features")
    told: list[tuple[int, int]] = []
    assert kept.fill([*media, media[0]], lambda done, of: told.append((done, of))) == 0
    assert told[-1] == (3, 3)
    assert oct(kept.folder.stat().st_mode)[-3:] == "700"
    first = kept.of(media)
    model.encode = lambda *_: pytest.fail("a kept feature was made again")  # type: ignore[method-assign]
    assert all(torch.equal(x, first[name]) for name, x in kept.of(media).items())
    assert kept.fill(media) == 0
    del model.encode
    small = Features(found.model, found.preparations, found.identities, tmp_path / "features", most_bytes=1)
    small.fill([])
    assert not list((tmp_path / "features").rglob("*.npy"))
    assert all(torch.equal(x, first[name]) for name, x in small.of(media).items())


def test_no_more_features_are_kept_at_any_time(tmp_path, media):
    found, folder = features_of(load_model(parts())[0]), tmp_path / "features"
    images = [one for one in media if one.modality == "image"]
    kept = Features(found.model, found.preparations, found.identities, folder)
    kept.most_bytes = 2 * kept._size("image") - 1

    def held() -> int:
        return sum(path.stat().st_size for path in folder.rglob("*.npy"))

    told: list[tuple[int, int]] = []
    assert kept.fill(images, lambda done, of: told.append((done, of))) == len(images) - 1, "for one there is room"
    assert told == [(1, 1)]
    for one in images:
        kept.of([one])
        assert held() == kept._size("image")


def test_a_feature_that_another_process_takes_away_is_made_again(tmp_path, media, monkeypatch):
    found = features_of(load_model(parts())[0])
    kept = Features(found.model, found.preparations, found.identities, tmp_path / "features")
    first = kept.of(media[:1])["image"]
    (file,) = (tmp_path / "features").rglob("*.npy")
    with monkeypatch.context() as late:
        late.setattr("atoll.models.features.touched", lambda path: (file.unlink(), touched(path))[1])
        assert torch.equal(kept.of(media[:1])["image"], first), "it goes between reading and noting that it was read"
    assert torch.equal(kept.of(media[:1])["image"], first)
    kept.folder = SimpleNamespace(glob=lambda pattern: [file, tmp_path / "gone.npy"])  # type: ignore[assignment]
    kept._bound()
    assert file.is_file()


def test_a_connector_begins_alike_whatever_it_is_between():
    one = load_model(assembled("tiny:llama", {"encoder": "tiny:clip", "connector": RESAMPLER}))[0]
    other = load_model(assembled("tiny:gpt2", {"encoder": "tiny:siglip", "connector": RESAMPLER}))[0]
    mine, theirs = (dict(model.connector("image").body.named_parameters()) for model in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert float(mine["queries"].detach().std()) > 0


def test_dropout_is_as_said_of_one_folder():
    spared = [
        load_model(assembled("tiny:llama", {"encoder": "tiny:clip", "connector": MLP, "dropout": share}))[0]
        for share in (0.0, 0.25)
    ]
    assert [model.connector("image").dropout for model in spared] == [0.0, 0.25]
    assert [model.config.image["dropout"] for model in spared] == [0.0, 0.25]
    assert len({model.config._name_or_path for model in spared}) == 1


def test_a_damaged_feature_is_made_again(tmp_path, media):
    found = features_of(load_model(parts())[0])
    kept = Features(found.model, found.preparations, found.identities, tmp_path / "features")
    first = kept.of(media[:1])["image"]
    (file,) = (tmp_path / "features").rglob("*.npy")
    for left in (0, 40, 200):
        file.write_bytes(file.read_bytes()[:left])
        assert torch.equal(kept.of(media[:1])["image"], first)


def test_media_are_those_that_the_data_were_read_with(tmp_path, media):
    model, tokenizer = load_model(parts())
    found = features_of(model)
    kept = Features(found.model, found.preparations, found.identities, tmp_path / "features")
    write(tmp_path / "site", [{"images": ["a.png"]}])
    picture = tmp_path / "site" / "a.png"
    picture.write_bytes(media[0].path.read_bytes())
    data = prepare(tmp_path / "site", tokenizer, 256, cache_root=tmp_path / "home", senses=kept.senses)
    [(medium,)] = data.train.media
    first = kept.of([medium])["image"]
    picture.write_bytes(media[1].path.read_bytes())
    assert torch.equal(kept.of([medium])["image"], first), "as it was, while it is kept"
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(Unusable, match="image that has changed since the data were read"):
        kept.of([medium])
    picture.unlink()
    with pytest.raises(Unusable, match="image that is gone since the data were read"):
        kept.of([medium])


RECORD = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "it"}]}


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(RECORD | one) + "\n" for one in records))


def test_broken_hostile_and_foreign_clips_are_named_and_left_out(tmp_path, media, monkeypatch):
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
    assert [message["content"] for message in record.messages] == ["<image>What is it?", "A dog."]
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


def test_a_plan_names_whom_the_model_leaves_out(sites, atoll: Atoll):
    blind = atoll("plan", str(sites / "mine.yaml"), "--set", "model.image=null", "--json")
    assert blind.status == 0
    [warning] = [one for one in json.loads(blind.out)["warnings"] if "left out" in one]
    assert warning == "see has image in 6 of its first 12 records, which the model does not take: they are left out"
    write(sites / "only", [{"images": ["p0.png"]}] * 3)
    shutil.copy(sites / "sites/see/p0.png", sites / "only/p0.png")
    text = ["model=tiny:llama", "finetune.space=lora", f"data={{use: clients, paths: {{only: {sites}/only}}}}"]
    none = atoll("plan", str(sites / "mine.yaml"), *(word for one in text for word in ("--set", one)))
    assert none.status == 1
    assert "the model takes nobody's records" in none.err


def test_a_starter_for_sites_with_media_has_a_model_that_takes_them(sites, atoll: Atoll):
    recipe = str(sites / "new.yaml")
    assert atoll("init", recipe, "--data", str(sites / "sites")).status == 0
    written, _ = recipes.read(recipe)
    assert {"use", "language", "image", "audio"} == {*written.model}
    tiny = ["model.language=tiny:llama", "model.image.encoder='tiny:clip'", "model.audio.encoder='tiny:whisper'"]
    assert atoll("plan", recipe, *(word for one in tiny for word in ("--set", one))).status == 0


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


def test_clips_without_a_place_come_before_the_first_question(media):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "see <image>"}]
    assert placed_media(chat, media)[1]["content"] == "<audio>\n<image>\nsee <image>"


SITES = {"text": [{}], "see": [{}, {"images": ["p{}.png"]}], "hear": [{}, {"audio": ["s{}.wav"]}]}


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


RECIPE = """
recipe: 1
name: mine
extends: methods/fedavg-lora
model:
  use: assembled
  language: tiny:llama
  image: {encoder: "tiny:clip", connector: {use: mlp, pool: 4}}
  audio: {encoder: "tiny:whisper", connector: {use: resampler, queries: 3}, seconds: 1}
data: {use: folders, path: ./sites, held_out: 0.3}
finetune: {rounds: 2, local_steps: 2, batch_size: 4, context: 256, space: {use: lora, rank: 2, modules: [connectors]}}
evaluate: {every: 0, final_samples: 4}
"""


def final(run: Any) -> dict[str, torch.Tensor]:
    from atoll.record.checkpoint import load_state

    found: dict[str, torch.Tensor] = load_state(run.checkpoint).params["update"]
    return found


def test_a_connector_is_averaged_over_those_who_hold_its_modality(sites, monkeypatch):
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    together = final(atoll.run(sites / "mine.yaml", ["finetune.rounds=1"]))
    alone = final(atoll.run(sites / "mine.yaml", ["finetune.rounds=1", "finetune.population=[see]", "name=see"]))
    untouched = final(atoll.run(sites / "mine.yaml", ["finetune.rounds=1", "finetune.population=[text]", "name=text"]))
    begun = assemble(atoll.plan(sites / "mine.yaml")).start
    for name, x in together.items():
        if ".connectors.image." in name:
            torch.testing.assert_close(x, alone[name])  # one client of three holds pictures, and counts alone
        if ".connectors." in name:
            assert torch.equal(untouched[name], begun[name])  # nobody held it: it stays


def test_a_client_whose_picture_is_gone_says_so_and_the_others_go_on(sites, shared_home, monkeypatch):
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))

    def lose(event):
        if type(event).__name__ == "RoundEnded" and event.round == 0:
            shutil.rmtree(shared_home / "features")
            for one in (sites / "sites" / "see").glob("*.png"):
                one.unlink()

    story = read_story(atoll.run(sites / "mine.yaml", ["finetune.rounds=2"], sinks=[lose]))
    told = [(one.round, one.client, one.reason) for one in story.missing]
    assert told == [(1, "see", "image that is gone since the data were read")]
    assert story.final.absent["see"] == "image that is gone since the data were read"
    assert "see: told nothing of federated: image that is gone" in "".join(loss_table(story).notes)


def test_by_a_public_share_of_holders_a_connector_moves_as_far_as_if_all_held_it(sites, monkeypatch):
    """Clipped by a bound that nothing reaches, without noise: sums divided by what the recipe says of who holds what."""
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    private = "finetune.privacy={{use: central, clip: 1e6, delta: 0.1, noise_multiplier: 0, holders: {}}}"
    one_in_three = "{image: 0.33333333, audio: 0.33333333}"
    told, silent = (
        final(atoll.run(sites / "mine.yaml", [private.format(of), "finetune.rounds=1", "finetune.weighting=uniform"]))
        for of in (one_in_three, "{}")
    )
    plain = final(atoll.run(sites / "mine.yaml", ["finetune.rounds=1", "finetune.weighting=uniform"]))
    begun = assemble(atoll.plan(sites / "mine.yaml")).start
    for name, x in plain.items():
        torch.testing.assert_close(told[name], x, rtol=1e-4, atol=1e-6)
        if ".connectors." in name:
            torch.testing.assert_close(3 * (silent[name] - begun[name]), x - begun[name], rtol=1e-3, atol=1e-5)


def test_masked_sums_weigh_by_modality_too(sites, monkeypatch):
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    clear = final(atoll.run(sites / "mine.yaml", ["name=clear"]))
    masked = final(
        atoll.run(sites / "mine.yaml", ["name=masked", "finetune.exchange={use: secure-aggregation, bits: 24}"])
    )
    for name, x in clear.items():
        torch.testing.assert_close(masked[name], x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [
    ["finetune.outer=adam"], ["finetune.correction=proximal"],
    ["finetune.outer=nesterov", "finetune.up=[{use: error-feedback, chain: [{use: topk, fraction: 0.5}]}]"],
    ["finetune.privacy={use: central, clip: 1, delta: 0.1, epsilon: 50}"],
    ["finetune.exchange=secure-aggregation", "finetune.privacy={use: distributed, clip: 1, delta: 0.1, epsilon: 50}"],
    ["finetune.privacy={use: examples, clip: 1, delta: 0.1, noise_multiplier: 1}"],
    ["finetune.objective=causal-lm"], ["finetune.space={use: ffa-lora, modules: [connectors]}"],
    ["finetune.space=full"], ["fleet={use: processes, workers: 2}"],
])  # fmt: skip
def test_methods_go_with_modalities_that_not_all_hold(sites, monkeypatch, settings):
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    common = [
        "finetune.weighting=uniform",
        "finetune.local_steps=1",
        "evaluate.start=false",
        "evaluate.final_samples=2",
    ]
    run = atoll.run(sites / "mine.yaml", [*common, *settings])
    story = read_story(run)
    assert story is not None
    assert [one.accepted for one in story.rounds] == [3, 3]
    assert not story.missing
    assert all(torch.isfinite(x).all() for x in final(run).values())


def test_those_who_hold_a_modality_are_counted(sites):
    things = assemble(atoll.plan(sites / "mine.yaml"))
    counts = {name: holders(one.train) for name, one in things.data.items()}
    assert counts["text"] == {}
    assert set(counts["see"]) == {"image"}
    assert set(counts["hear"]) == {"audio"}


def test_chat_about_a_picture_and_a_sound(sites, atoll: Atoll):
    assert atoll("run", str(sites / "mine.yaml"), "--set", "finetune.rounds=1").status == 0
    picture, sound = sites / "sites/see/p1.png", sites / "sites/hear/s1.wav"
    with_both = atoll("chat", "mine-1", "what?", "--image", str(picture), "--audio", str(sound), "--max-tokens", "4")
    assert (with_both.status, atoll("chat", "mine-1", "what?", "--max-tokens", "4").status) == (0, 0)
    wrong = atoll("chat", "mine-1", "what?", "--image", str(sound))
    assert wrong.status == 1
    assert "image that is not of a known format (PNG, JPEG" in wrong.err


def test_a_question_that_fails_leaves_the_conversation_as_it_was(sites, atoll: Atoll, monkeypatch):
    assert atoll("run", str(sites / "mine.yaml"), "--set", "finetune.rounds=1").status == 0
    talk, picture = Chat(load_result(find("mine-1")), max_tokens=2), sites / "picture.png"
    shutil.copy(sites / "sites/see/p1.png", picture)
    talk.attach("image", picture)
    picture.unlink()
    with monkeypatch.context() as broken:
        broken.setattr(talk.result.model, "generate", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            talk.answer("what?", lambda piece: None)
    assert (talk.messages, talk.media, len(talk.waiting)) == ([], [], 1)
    talk.answer("what?", lambda piece: None)
    talk.answer("and now?", lambda piece: None)
    assert (len(talk.messages), len(talk.media), talk.waiting) == (4, 1, [])
    assert talk.messages[0]["content"].count("<image>") == 1


@pytest.mark.parametrize(("module", "use"), [
    ("PIL", lambda media: read_image(media[0].path)), ("soundfile", lambda media: read_sound(media[2].path, 8000, 9.0)),
    ("fontTools", lambda media: write_glyphs(media[0].path, media[0].path.parent)),
])  # fmt: skip
def test_a_library_that_is_not_installed_is_told(media, monkeypatch, module, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AtollError, match=r"pip install 'atoll\[multimodal\]'"):
        use(media)


def test_a_plan_counts_what_trains_once_and_encoders_in_float32(sites):
    recipe = str(sites / "mine.yaml")
    whole = as_data(atoll.plan(recipe, ["finetune.space=full"]))["memory"]
    known = shapes(parts_of_recipe()).params
    encoders = sum(math.prod(shape) for name, (shape, _) in known.items() if "_encoder." in name)
    assert whole["base"] == 4 * encoders > 0
    shared, own = (as_data(atoll.plan(recipe, [f"finetune.personal={words}"]))["memory"] for words in ([], ["lora_A"]))
    assert own["trained"] == shared["trained"]
    assert own["server"] < shared["server"]


@pytest.mark.parametrize("to", ["adapter", "merged"])
def test_an_export_is_loaded_as_its_card_says_and_answers_as_the_run(sites, atoll: Atoll, monkeypatch, to):
    assert atoll("run", str(sites / "mine.yaml"), "--set", "finetune.rounds=1").status == 0
    assert atoll("export", "mine-1", "--to", to, "--out", str(sites / "this-folder")).status == 0
    monkeypatch.chdir(sites)
    namespace: dict[str, Any] = {}
    exec((sites / "this-folder" / "README.md").read_text().split("```python\n")[1].split("```")[0], namespace)
    result = load_result(find(str(sites / "runs" / "mine-1")))
    given = result.processor(
        "<image> or <audio>?", images=[sites / "sites/see/p1.png"], audio=[sites / "sites/hear/s1.wav"]
    )
    with torch.no_grad():
        said, expected = (model.eval()(**given).logits for model in (namespace["model"], result.model))
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said, load_model(parts_of_recipe())[0](**given).logits, atol=1e-3)


def parts_of_recipe() -> Any:
    image, audio = {"encoder": "tiny:clip", "connector": MLP}, {"encoder": "tiny:whisper", "connector": RESAMPLER}
    return assembled("tiny:llama", image, {**audio, "seconds": 1})


@pytest.mark.parametrize(("change", "said"), [
    ("model={use: assembled, language: 'tiny:llama', image: null, audio: null}", "needs an encoder"),
    ("model.image.encoder=whisper-tiny.en", "this encoder takes no image"),
    ("model.image.encoder=efficientnet-lite", "did you mean 'efficientnet-lite0'"),
    ("model.image.encoder='tiny:clap'", "did you mean 'clip'"),
    ("model.image.connector={use: mpl}", "did you mean 'mlp'"),
    ("model.image.connector={use: 'os:system', command: ls}", "a connector is of a shipped kind"),
    ("model.image.connector={use: mlp, pool: 0}", "greater than or equal to 1"),
    ("model.audio.seconds=31", "less than or equal to 30"),
    ("model.sound={}", "has no such argument"),
    ("model.imag={}", "did you mean 'image'"),
    ("model.image.connector=mpl", "did you mean 'mlp'"),
    ("finetune.space.modules=[conectors]", "did you mean 'connectors'"),
    ("finetune.space.modules=[vision_encoder]", "the model has no such module"),
    ("finetune={correction: scaffold, optimizer: sgd, clip_norm: null, weighting: uniform}", "not all hold what"),
    ("finetune.privacy={use: central, clip: 1, delta: 0.1, epsilon: 9, holders: {images: 1}}", "did you mean 'image'"),
    ("finetune.privacy={use: central, clip: 1, delta: 0.1, epsilon: 9, holders: {image: 2}}", "less than or equal to 1"),
    ("finetune={weighting: uniform, privacy: {use: central, clip: 1, delta: 0.1, epsilon: 9, holders: {image: 0.01}}}",
     "fewer holders than one client"),
    ("finetune={space: {use: lora, rank: 2, modules: []}, weighting: uniform, privacy: {use: central, clip: 1,"
     " delta: 0.1, epsilon: 9, holders: {image: 0.5}}}", "none: no connector trains"),
])  # fmt: skip
def test_mistakes_in_the_parts_of_a_model_are_told(sites, atoll: Atoll, change, said):
    heard = atoll("plan", str(sites / "mine.yaml"), "--set", change)
    assert heard.status == 1
    assert said in heard.err


def test_a_language_model_is_one_and_not_assembled():
    from atoll.models.ref import encoder_folder, folder_of, resolve, resolve_encoder

    eyes = {"encoder": "tiny:clip", "connector": MLP}
    for folder, said in (
        (encoder_folder(resolve_encoder("tiny:clip", "image"), "image"), "not a causal language model"),
        (folder_of(resolve(assembled("tiny:llama", eyes))), "no other assembled one"),
    ):
        with pytest.raises(AtollError, match=said) as told:
            load_model(assembled(str(folder), eyes))
        assert "model.language" in str(told.value)


def test_a_connector_without_arguments_is_named_like_any_part():
    short, long = (
        assembled("tiny:llama", {"encoder": "tiny:clip", "connector": one}) for one in ("mlp", {"use": "mlp"})
    )
    assert short == long


def test_what_is_missing_is_learned_and_what_drops_out_is_taken_for_missing():
    torch.manual_seed(0)
    connector = Connector(make_connector(MLP), 8, 16, 32, dropout=0.5)
    embeddings, features = torch.randn(9, 32), torch.randn(6, 8, 16)
    torch.nn.init.normal_(connector.null)
    said = connector.eval()(features, embeddings)
    features[2] = float("nan")
    without = connector(features, embeddings)
    assert torch.equal(without[2, 1:-1], connector.null.expand(2, -1))
    assert all(torch.equal(without[i], said[i]) for i in (0, 1, 3, 4, 5))
    torch.manual_seed(1)
    trained = connector.train()(features, embeddings)
    dropped = [i for i in range(6) if torch.equal(trained[i, 1:-1], connector.null.expand(2, -1))]
    assert 2 in dropped
    assert 1 < len(dropped) < 6
    trained.sum().backward()
    assert torch.isfinite(connector.null.grad).all()
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in connector.parameters())


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


def test_what_a_policy_keeps_is_not_in_the_table(sites, monkeypatch):
    """Whatever part of the metrics of one client is missing: no error, and no picture counted as text."""
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    story = read_story(atoll.run(sites / "mine.yaml", ["finetune.rounds=1"]))
    whole = by_modality(story, LOSS)
    assert {"image", "text"} <= {*whole.columns}
    for kept in (["loss", "standard_error"], ["loss", "loss/image"], ["accuracy"], []):
        metrics = {name: x for name, x in story.base.clients["see"].items() if name in {*kept, "samples"}}
        base = replace(story.base, clients={**story.base.clients, "see": metrics})
        less = by_modality(replace(story, evaluations=[base, story.final]), LOSS)
        assert "image" not in less.columns
        assert all(name in ("text", "mean") for name in less.columns)


def test_media_in_the_words_of_a_question(sites, atoll: Atoll):
    assert atoll("run", str(sites / "mine.yaml"), "--set", "finetune.rounds=1").status == 0
    heard = atoll("chat", "mine-1", "what does the <audio> tag do?", "--max-tokens", "2")
    assert heard.status == 1
    assert "attach it: --image FILE" in heard.err
    talk = Chat(load_result(find("mine-1")), max_tokens=2)
    said: list[str] = []
    converse(talk, ["a <image>?", "what?"], lambda text: None, said.append)
    assert len(talk.messages) == 2  # the second was answered
    assert "attach it: --image FILE" in said[0]


def test_encoders_with_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from atoll.models.encoders import load_encoder
    from atoll.models.tiny import tiny_encoder

    folder = Path(shutil.copytree(tiny_encoder("tiny:clip", "image"), tmp_path / "clip"))
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "layers.1.mlp.fc1.weight" in name)
    save_file({k: x for k, x in tensors.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AtollError, match="lack params"):
        load_encoder("image", folder)


def test_another_preprocessing_is_another_model(tmp_path):
    from atoll.models.ref import resolve
    from atoll.models.tiny import tiny_encoder

    folder = Path(shutil.copytree(tiny_encoder("tiny:clip", "image"), tmp_path / "clip"))
    one = assembled("tiny:llama", {"encoder": str(folder), "connector": MLP})
    before = resolve(one).identity
    written = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(written | {"image_mean": [0.1, 0.1, 0.1]}))
    assert resolve(one).identity != before


def test_connectors_that_do_not_train_are_warned_of(sites, atoll: Atoll):
    heard = atoll("plan", str(sites / "mine.yaml"), "--set", "finetune.space={use: lora, rank: 2, modules: []}")
    assert heard.status == 0
    assert "connectors stay as they were drawn" in heard.out + heard.err


def test_a_buffered_run_goes_on_with_a_connector_that_nobody_held(sites, monkeypatch):
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    buffered = ["finetune.schedule={use: buffered, concurrency: 2, buffer: 1}", "finetune.rounds=3"]
    assert len(read_story(atoll.run(sites / "mine.yaml", buffered)).rounds) == 3


def test_words_that_make_a_place_leave_their_record_out(tmp_path):
    model, tokenizer = load_model(parts())
    rows = [("Write <ima", "ge>"), ("Well?", "yes")]
    lines = [json.dumps({"prompt": q, "completion": a}) for q, a in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    tokenizer.chat_template = None
    found = prepare(tmp_path, tokenizer, 256, cache_root=tmp_path / "home", senses=features_of(model).senses)
    assert len(found.train) + len(found.test) == 1
    assert "places for pictures or sounds" in str(found.report)


def test_rows_padded_on_the_left_say_what_they_say_alone_where_positions_are_learned(media):
    model, tokenizer = load_model(parts("gpt2"))
    processor = MultimodalProcessor(tokenizer, model.config)
    texts = ["<image> what is it?", "a much longer question on this <image>, is it?"]
    files = [medium.path for medium in media[:2]]
    both = model.generate(**processor(texts, images=files), max_new_tokens=5, do_sample=False)
    for row, text, file in zip(both, texts, files, strict=True):
        alone = model.generate(**processor(text, images=[file]), max_new_tokens=5, do_sample=False)
        assert torch.equal(row[-5:], alone[0, -5:])


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


def test_a_policy_hears_of_every_model_that_a_plan_names():
    named = {"use": "assembled", "language": "a", "image": {"encoder": "b", "connector": {"use": "llava", "of": "c"}}}
    assert model_names(named) == ["a", "b", "c"]
    assert model_names({**named, "image": {"connector": "mlp"}}) == ["a"]
