"""DPO against TRL's, and against the formula written out; what the reference is and when it is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_choices import by_hand, drawn
from tiny_families import FAMILIES, assert_same_gradients, build, gradients, with_lora
from torch import Tensor, nn

import atoll
from atoll.data.collate import Choices, Sample
from atoll.local import reference as reference_module
from atoll.local.preferences import dpo
from atoll.local.reference import REMEMBERED, Reference, put, trained
from atoll.local.work import Objective
from atoll.models.fast import accelerate
from atoll.models.tiny import byte_tokenizer, tiny
from atoll.params import equal
from atoll.record.checkpoint import load_state
from atoll.record.story import read_story
from atoll.stream import UPDATE

BETA = 0.3


def moved(model: nn.Module, seed: int = 5) -> nn.Module:
    """The model some training later."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, x in sorted(trained(model)):
            x.add_(0.05 * torch.randn_like(x))
    return model


def bound(model: nn.Module) -> Objective:
    return dpo(BETA).bind(model, byte_tokenizer())


def loss_of(model: nn.Module, objective: Objective, samples: Sequence[Sample]) -> Tensor:
    return objective.loss(model, objective.collate(samples))[0]


def test_losses_and_gradients_are_trls(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": [{"role": "user", "content": q}], **{k: [{"role": "assistant", "content": a}] for k, a in sides.items()}}
        for q, sides in (
            ("What is 2 + 2?", {"chosen": "It is 4.", "rejected": "It is 5, I think."}),
            ("And 3 + 3?", {"chosen": "Six, of course: three twice.", "rejected": "6"}),
            ("Hello!", {"chosen": "Good morning.", "rejected": "What?"}),
        )
    ]  # fmt: skip
    theirs, ours = (with_lora(tiny("llama")[0]).train() for _ in range(2))
    wanted = DPOConfig(output_dir=str(tmp_path), beta=BETA, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
                       gradient_checkpointing=False, per_device_train_batch_size=3, max_length=None)  # fmt: skip
    trainer = DPOTrainer(theirs, args=wanted, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer())
    tokens = list(trainer.train_dataset)
    objective = bound(ours)
    with torch.no_grad():  # the reference of both is the adapter as it began
        for (name, x), (other, y) in zip(trained_by(theirs, "default"), trained_by(ours, "default"), strict=True):
            assert name == other
            torch.manual_seed(len(name))
            y.copy_(x.add_(0.05 * torch.randn_like(x)))
    theirs_loss = trainer.compute_loss(trainer.model, trainer.data_collator(tokens))
    ours_loss = loss_of(ours, objective, [of_trl(one) for one in tokens]) / len(tokens)
    assert abs(float(theirs_loss) - np.log(2)) > 0.01, "the model has moved away from its reference"
    torch.testing.assert_close(ours_loss, theirs_loss.double(), rtol=1e-5, atol=1e-6)
    expected = {n: x for n, x in gradients(theirs, theirs_loss).items() if ".default." in n}
    assert_same_gradients(gradients(ours, ours_loss), expected, tolerance=1e-5)


def trained_by(model: nn.Module, adapter: str) -> list[tuple[str, nn.Parameter]]:
    return [(name, x) for name, x in model.named_parameters() if f".{adapter}." in name]


def of_trl(tokens: dict[str, Any]) -> Sample:
    """A pair as TRL tokenized it: it counts every token of both answers."""
    prompt, *rest = (np.array(tokens[f"{name}_ids"], np.int32) for name in ("prompt", "chosen", "rejected"))
    labeled = tuple(np.ones(len(one), bool) for one in rest)
    return Sample(np.concatenate([prompt, rest[0]]), prompt, (), Choices(len(prompt), tuple(rest), labeled, 0))


PLAIN = [("llama", False, False), ("gpt2", False, False), ("llama", False, True), ("gpt2", False, True)]


@pytest.mark.parametrize(("family", "swapped", "checkpointing"), [*((name, True, False) for name in FAMILIES), *PLAIN])
def test_losses_and_gradients_are_those_of_the_formula(family: str, swapped: bool, checkpointing: bool) -> None:
    model = with_lora(build(family))
    if swapped:
        accelerate(model)
    if checkpointing:  # which keeps no keys and values while it trains
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    samples = [drawn(seed, 5 + 3 * seed, lengths) for seed, lengths in enumerate([(1, 1), (4, 7), (3, 3, 3, 9)])]
    objective = bound(model)
    with torch.no_grad():
        before = [by_hand(model, sample) for sample in samples]
    found = loss_of(moved(model), objective, samples)
    after = [by_hand(model, sample) for sample in samples]
    each = torch.stack([-torch.log_softmax(BETA * (a - b), 0)[0] for a, b in zip(after, before, strict=True)])
    expected, still = each.sum(), torch.tensor([2.0, 2.0, 4.0]).log()
    assert float((each.detach() - still).abs().max()) > 1e-3, "the model has moved away from its reference"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(model, found), gradients(model, expected), tolerance=1e-3)


def test_the_reference_is_the_model_as_it_was_and_is_asked_once_a_sample() -> None:
    model = with_lora(build("llama"))
    samples = [drawn(seed, 6, (3, 4)) for seed in range(3)]
    objective = bound(model)
    at_first = objective.collate(samples).reference
    measured = objective.measure(model, samples)
    assert measured.rewarded == [0.5, 0.5, 0.5], "it prefers nothing yet"
    likely = [by_hand(model, sample) for sample in samples]
    assert measured.right == [float(each[0] > each[1]) for each in likely]
    assert measured.losses.tolist() == pytest.approx([np.log(2)] * 3)
    kept = {name: x.detach().clone() for name, x in trained(moved(model))}
    later = objective.collate([*samples, drawn(9, 6, (3, 4))]).reference
    assert all(torch.equal(x, kept[name]) for name, x in trained(model)), "the model itself is as it was"
    torch.testing.assert_close(list(later[:3]), list(at_first))
    assert objective.refer is not None
    objective.refer(model)
    assert not torch.allclose(objective.collate(samples).reference[0], at_first[0], rtol=1e-3)


def test_what_a_reference_said_is_shared_by_all_that_refer_to_the_same_params(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = with_lora(build("llama")), []
    samples = [drawn(seed, 6, (3, 4)) for seed in range(3)]
    real = reference_module.log_likelihoods
    monkeypatch.setattr(reference_module, "log_likelihoods", lambda *a: asked.append(1) or real(*a))
    first = bound(model).collate(samples).reference
    begun = {name: x.detach().clone() for name, x in trained(model)}
    other = bound(moved(model))
    assert not torch.allclose(other.collate(samples).reference[0], first[0])
    assert len(asked) == 6, "of another model it is asked anew"
    put(model, begun)
    again = bound(model)
    assert [bool(torch.equal(*pair)) for pair in zip(again.collate(samples).reference, first, strict=True)] == [
        True
    ] * 3
    assert len(asked) == 6
    for step in range(REMEMBERED):
        bound(moved(model, step + 1)).collate(samples)
    put(model, begun)
    bound(model).collate(samples)
    assert len(asked) == 12 + 3, "the oldest is forgotten"


def test_a_sample_is_known_by_its_question_and_all_of_its_answers() -> None:
    model, one, other = with_lora(build("llama")), drawn(1, 6, (3, 4)), drawn(2, 6, (3, 4))
    assert one.choices is not None
    assert other.choices is not None
    reference = Reference(model, lambda samples: {})
    mixed = one._replace(choices=Choices(6, (one.choices.rest[0], other.choices.rest[1]), one.choices.labeled, 0))
    each = [reference(model, [sample])[0] for sample in (one, mixed, other)]
    assert len(reference.said) == 3
    torch.testing.assert_close(each[0][0], each[1][0])
    assert not torch.allclose(each[0][1], each[1][1])


def pairs(folder: Path, count: int = 24) -> Path:
    folder.mkdir(parents=True)
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"{i}!"} for i in range(count)]
    for site in ("north", "south"):
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_that_starts_from_another_measures_against_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOLL_RUNS", str(tmp_path / "runs"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "recipe: 1\nname: mine\nmodel: tiny:llama\n"
        f"data: {{use: folders, path: {pairs(tmp_path / 'data')}, held_out: 0.3}}\n"
        "finetune: {rounds: 2, local_steps: 3, optimizer: {use: adamw, lr: 1e-2}}\nevaluate: {every: 0}\n"
    )
    first = atoll.run(recipe)
    after = atoll.run(recipe, ["from=mine-1", "finetune.objective=dpo"])
    anew = atoll.run(recipe, ["finetune.objective=dpo"])
    stories = [read_story(folder) for folder in (first, after, anew)]
    assert all(story and story.base and story.final for story in stories)
    _, aligned, alone = stories
    for story in (aligned, alone):
        assert story.base.mean == pytest.approx(np.log(2), abs=1e-6), "the model begins as its reference"
        assert all(one["reward_accuracy"] == 0.5 for one in story.base.clients.values())
        assert story.final.mean < np.log(2)
    sent = [[round.bytes_down for round in story.rounds] for story in (aligned, alone)]
    assert sent[0] == sent[1], "the reference goes down to each client once"
    once = [story.bytes_down - sum(story_sent) for story, story_sent in zip((aligned, alone), sent, strict=True)]
    assert once[0] == pytest.approx(alone.evaluations[0].bytes_down, rel=0.1)
    assert once[1] == 0
    assert equal(load_file(after.start), load_state(first.checkpoint).params[UPDATE])
    assert aligned.final.mean != alone.final.mean
