"""Models of parts: whatever they are of, they say what the parts say, and media stand where the text has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from of_parts import EYES, LANGUAGES, asked, final, parts
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig

import atoll
from atoll.data.collate import pack, pad
from atoll.errors import AtollError
from atoll.local.objectives import token_losses
from atoll.models.assembled import assembled
from atoll.models.features import features_of
from atoll.models.load import load_model
from atoll.models.processor import MultimodalProcessor
from atoll.models.tiny import byte_tokenizer
from atoll.record.story import read_story


@pytest.mark.parametrize(("language", "eyes", "ears"), [
    *[(language, "clip", "whisper") for language in LANGUAGES],
    *[("llama", eyes, "whisper") for eyes in EYES[1:]],
    ("llama", "clip", "wav2vec2"),
])  # fmt: skip
def test_any_parts_go_together_and_media_stand_where_the_text_has_them(language, eyes, ears, media):
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


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_is_continued_as_by_the_language_model_alone(language):
    model, tokenizer = load_model(parts(language))
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        said = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        alone = model.language_model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(said[:, -5:], alone[:, -5:])


@pytest.mark.parametrize("language", LANGUAGES)
def test_tokens_of_media_begin_as_loud_as_words(language):
    model, _ = load_model(parts(language))
    said = model.config.image
    with torch.no_grad():
        words = model.get_input_embeddings()(torch.arange(256))
        tokens = model.tokens("image", torch.randn(4, said["positions"], said["features"]))
    loudness = [float(x.square().mean().sqrt()) for x in (words, tokens)]
    assert loudness[1] == pytest.approx(loudness[0], rel=0.2)


def test_placeholders_are_not_generated_where_the_vocabulary_has_their_ids(tmp_path):
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    byte_tokenizer().save_pretrained(tmp_path / "wide")
    model, tokenizer = load_model(assembled(str(tmp_path / "wide"), {"encoder": "tiny:clip", "connector": "mlp"}))
    place = model.config.image["token_id"]
    assert place < 320
    with torch.no_grad():
        model.language_model.lm_head.weight[place] *= 1000  # the likeliest of all, or the least likely
    ids = tokenizer(["a", "b", "c", "d"], return_tensors="pt")["input_ids"]
    made = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert not (made == place).any()


def test_the_type_of_a_model_is_its_language_models():
    model, _ = load_model(parts(), dtype="bfloat16")
    assert (model.dtype, model.vision_encoder.dtype) == (torch.bfloat16, torch.float32)


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


def test_packed_samples_with_media_have_the_losses_they_have_alone(media):
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


def test_as_many_places_as_media_or_a_reason(media):
    model, tokenizer = load_model(parts())
    ids = asked(model, "<image><image>", tokenizer)
    with pytest.raises(ValueError, match="placeholders of image for 1 media"):
        model(input_ids=ids, image_features=features_of(model).of(media[:1])["image"])
    with pytest.raises(ValueError, match="placeholders of audio for 0 media"):
        model(input_ids=asked(model, "<audio>", tokenizer))


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


def test_rows_padded_on_the_left_say_what_they_say_alone_where_positions_are_learned(media):
    model, tokenizer = load_model(parts("gpt2"))
    processor = MultimodalProcessor(tokenizer, model.config)
    texts = ["<image> what is it?", "a much longer question on this <image>, is it?"]
    files = [medium.path for medium in media[:2]]
    both = model.generate(**processor(texts, images=files), max_new_tokens=5, do_sample=False)
    for row, text, file in zip(both, texts, files, strict=True):
        alone = model.generate(**processor(text, images=[file]), max_new_tokens=5, do_sample=False)
        assert torch.equal(row[-5:], alone[0, -5:])
