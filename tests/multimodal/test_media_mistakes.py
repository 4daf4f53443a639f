"""What can be said wrongly of a model of parts and its data, and how it is told."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from of_parts import MLP, write
from transformers import ASTFeatureExtractor
from transformers import CLIPImageProcessorPil as CLIPImageProcessor

from atoll import recipe as recipes
from atoll.chat import Chat, converse
from atoll.data.media import read_image, read_sound
from atoll.data.media_sets import write_glyphs
from atoll.errors import AtollError
from atoll.models.assembled import assembled
from atoll.models.encoders import load_preparation, refuse_preparation
from atoll.models.load import load_model
from atoll.models.tiny import tiny_encoder
from atoll.policy import model_names
from atoll.record.folder import find
from atoll.result import load_result
from support import Atoll


def test_a_plan_names_whom_the_model_leaves_out(sites, atoll: Atoll):
    blind = atoll("plan", str(sites / "mine.yaml"), "--set", "model.image=null", "--json")
    assert blind.status == 0
    [warning] = [one for one in json.loads(blind.out)["warnings"] if "left out" in one]
    assert warning == "see: image, which the model does not take, in 6 of the first 12 records: they are left out"
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


@pytest.mark.parametrize(("module", "use"), [
    ("PIL", lambda media: read_image(media[0].path)), ("soundfile", lambda media: read_sound(media[2].path, 8000, 9.0)),
    ("fontTools", lambda media: write_glyphs(media[0].path, media[0].path.parent)),
])  # fmt: skip
def test_a_library_that_is_not_installed_is_told(media, monkeypatch, module, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AtollError, match=r"pip install 'atoll\[multimodal\]'"):
        use(media)


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


@pytest.mark.parametrize(("modality", "processor", "said"), [
    ("image", lambda: CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False), "sizes of their own"),
    ("audio", lambda: ASTFeatureExtractor(), "at most 10"),
])  # fmt: skip
def test_preprocessing_that_no_encoder_can_be_given_is_refused(tmp_path, modality, processor, said):
    processor().save_pretrained(tmp_path)
    prepare = load_preparation(modality, tmp_path, 30.0)
    with pytest.raises(AtollError) as error:
        refuse_preparation(prepare, tmp_path)
    assert said in str(error.value)
    whole = tiny_encoder("tiny:clip" if modality == "image" else "tiny:whisper", modality)
    refuse_preparation(load_preparation(modality, whole, 30.0), whole)


def test_connectors_that_do_not_train_are_warned_of(sites, atoll: Atoll):
    heard = atoll("plan", str(sites / "mine.yaml"), "--set", "finetune.space={use: lora, rank: 2, modules: []}")
    assert heard.status == 0
    assert "connectors stay as they were drawn" in heard.out + heard.err


def test_a_policy_hears_of_every_model_that_a_plan_names():
    named = {"use": "assembled", "language": "a", "image": {"encoder": "b", "connector": {"use": "llava", "of": "c"}}}
    assert model_names(named) == ["a", "b", "c"]
    assert model_names({**named, "image": {"connector": "mlp"}}) == ["a"]
