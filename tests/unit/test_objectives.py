"""token_losses and its gradients equal the plain model's own loss, one sample at a time, for every family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_families import (
    FAMILIES,
    NOT_PACKABLE,
    VOCABULARY,
    assert_same_gradients,
    build,
    gradients,
    plain_losses,
    samples,
    with_lora,
)

from atoll.data.collate import Batch, Sample, pack, pad
from atoll.local import objectives
from atoll.local.language import sft
from atoll.local.objectives import cross_entropy, token_losses


def collate(family: str, batch: list[Sample]) -> Batch:
    return pad(batch, 0) if family in NOT_PACKABLE else pack(batch)


def per_sample(losses: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(count).index_add(0, owner, losses)


@pytest.fixture(params=[1 << 24, 5 * VOCABULARY], ids=["one chunk", "chunks of 5"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_plain_models(family: str, train: str) -> None:
    model = with_lora(build(family)) if train == "lora" else build(family)
    batch = samples()
    expected = plain_losses(model, batch)
    losses, owner = token_losses(model, collate(family, batch))
    torch.testing.assert_close(per_sample(losses, owner, len(batch)), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(model, losses.sum()), gradients(model, torch.stack(expected).sum()))


@pytest.mark.parametrize("train", ["lora", "full"])
def test_any_weighting_of_tokens_reaches_the_gradient(train: str) -> None:
    model = with_lora(build("llama")) if train == "lora" else build("llama")
    batch = samples()
    weights = torch.tensor([0.5, -2.0, 3.0, 1.0, 0.0])
    expected = (torch.stack(plain_losses(model, batch)) * weights).sum()
    losses, owner = token_losses(model, pack(batch))
    assert_same_gradients(gradients(model, (losses * weights[owner]).sum()), gradients(model, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_see_its_neighbors(family: str) -> None:
    model = build(family).eval()
    batch = samples()
    changed = [*batch[:2], samples(seed=1)[2], *batch[3:]]
    with torch.no_grad():
        (before, owner), (after, _) = (token_losses(model, collate(family, each)) for each in (batch, changed))
    torch.testing.assert_close(before[owner != 2], after[owner != 2], rtol=1e-5, atol=1e-6)
    assert (before[owner == 2] - after[owner == 2]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_mean_over_samples_counts_each_answer_once(family: str) -> None:
    model = with_lora(build(family))
    batch = samples()
    counts = torch.tensor([4.0, 2.0, 6.0, 4.0])
    expected = (torch.stack(plain_losses(model, batch)[:4]) / counts).mean()  # the last has no labeled token
    objective = sft(mean_over="samples").bind(model, SimpleNamespace(pad_token_id=0))
    made = objective.collate(batch)
    loss, count = objective.loss(model, made)
    assert count == objective.terms(made) == 4
    torch.testing.assert_close(loss / count, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(model, loss / count), gradients(model, expected))


def test_cross_entropy_is_the_sum_and_the_count() -> None:
    model, batch = build("llama"), pack(samples())
    loss, count = cross_entropy(model, batch)
    losses, _ = token_losses(model, batch)
    assert count == len(losses) == 4 + 2 + 6 + 4 + 0
    torch.testing.assert_close(loss, losses.sum())


def test_a_batch_without_labels_has_zero_loss_and_zero_gradient() -> None:
    model = with_lora(build("llama"))
    loss, count = cross_entropy(model, pack(samples(lengths=(1, 1))))
    loss.backward()
    assert (float(loss.detach()), count) == (0.0, 0)


def test_evaluation_keeps_nothing_for_a_backward_pass() -> None:
    with torch.no_grad():
        losses, _ = token_losses(build("llama"), pack(samples()))
    assert not losses.requires_grad


def test_lora_on_the_head_is_trained() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["lm_head", "q_proj"]))
    torch.nn.init.normal_(model.get_output_embeddings().lora_B["default"].weight)
    batch = samples()
    losses, _ = token_losses(model, pack(batch))
    assert_same_gradients(
        gradients(model, losses.sum()), gradients(model, torch.stack(plain_losses(model, batch)).sum())
    )


def test_a_family_with_an_unknown_step_after_its_head_makes_its_own_logits() -> None:
    model = build("llama")
    own = type(model).forward

    def squared(*args: object, **kwargs: object) -> object:
        output = own(model, *args, **kwargs)
        output.logits = output.logits.sign() * output.logits**2
        return output

    model.forward = squared
    batch = pack(samples())
    losses, _ = token_losses(model, batch)
    keep = batch.targets != -100
    expected = torch.nn.functional.cross_entropy(
        squared(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[keep],
        batch.targets[keep],
        reduction="none",
    )
    torch.testing.assert_close(losses, expected)
    assert_same_gradients(gradients(model, losses.sum()), gradients(model, expected.sum()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba"])
def test_bf16_differs_by_bf16_rounding_only(family: str) -> None:
    model = with_lora(build(family, torch.bfloat16))
    batch = samples()
    expected = torch.stack(plain_losses(model, batch)).sum()
    loss, _ = cross_entropy(model, collate(family, batch))
    torch.testing.assert_close(loss, expected.float(), rtol=0.02, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected), tolerance=0.1)
