"""Runs, chats and exports of models that see and hear."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from of_parts import final, parts_of_recipe, write

import atoll
from atoll.assemble import assemble
from atoll.chat import Chat
from atoll.data.sources import holders
from atoll.estimate import as_data
from atoll.exchange import Broadcast, Task
from atoll.local.work import train
from atoll.models.load import load_model
from atoll.models.shapes import shapes
from atoll.record.folder import find
from atoll.record.measured import LOSS, by_modality, loss_table
from atoll.record.story import read_story
from atoll.result import load_result
from atoll.stream import UPDATE
from support import Atoll


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


def test_what_stands_for_missing_media_is_learned_by_those_who_have_none(sites, monkeypatch):
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    write(sites / "sites" / "blind", [{"images": [None]}] * 12)
    begun = assemble(atoll.plan(sites / "mine.yaml")).start
    after = final(atoll.run(sites / "mine.yaml", ["finetune.rounds=1", "finetune.population=[blind]"]))
    moved = {name for name, x in after.items() if "connectors.image." in name and not torch.equal(x, begun[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"null"}


def test_weights_under_privacy_of_examples_do_not_tell_who_has_pictures(sites, monkeypatch):
    private = [
        "finetune.privacy={use: examples, clip: 1, delta: 0.01, noise_multiplier: 1}",
        "finetune.weighting=uniform",
    ]
    plan = atoll.plan(sites / "mine.yaml", private)
    things = assemble(plan)
    work = plan.protection.guarded(partial(train, things.local))
    told = [
        work({UPDATE: things.start}, things.data[name], {}, Task("train", name, "", Broadcast(0, {}), 1)).weights
        for name in ("see", "text")
    ]
    assert told == [{"all": 1.0}, {"all": 1.0}]
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    assert atoll.run(sites / "mine.yaml", [*private, "finetune.rounds=1"]).checkpoint.exists()


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
    shutil.copy(sites / "sites/see/p1.png", "a.png")
    shutil.copy(sites / "sites/hear/s1.wav", "a.wav")
    blocks = (sites / "this-folder" / "README.md").read_text().split("```python\n")[1:]
    assert len(blocks) == (2 if to == "merged" else 1), "how it is loaded; and how it is asked"
    for block in blocks:
        exec(block.split("```")[0], namespace)
    result = load_result(find(str(sites / "runs" / "mine-1")))
    given = result.processor(
        "<image> or <audio>?", images=[sites / "sites/see/p1.png"], audio=[sites / "sites/hear/s1.wav"]
    )
    with torch.no_grad():
        said, expected = (model.eval()(**given).logits for model in (namespace["model"], result.model))
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said, load_model(parts_of_recipe())[0](**given).logits, atol=1e-3)


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


def test_a_buffered_run_goes_on_with_a_connector_that_nobody_held(sites, monkeypatch):
    monkeypatch.setenv("ATOLL_RUNS", str(sites / "runs"))
    buffered = ["finetune.schedule={use: buffered, concurrency: 2, buffer: 1}", "finetune.rounds=3"]
    assert len(read_story(atoll.run(sites / "mine.yaml", buffered)).rounds) == 3
