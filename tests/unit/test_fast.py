"""Accelerated models: loss and gradients of the plain ones, whatever the family; what cannot be swapped says why."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import (
    FAMILIES,
    NOT_PACKABLE,
    assert_same_gradients,
    build,
    gradients,
    plain_losses,
    samples,
    with_lora,
)
from torch import nn

from atoll.data.collate import Batch, Sample, pack, packable, pad
from atoll.local.objectives import token_losses
from atoll.models.fast import accelerate, attention, memory
from atoll.models.fast.norm import form_of

LEFT = {
    "gpt2": {"linear", "norm"},
    "gpt-neox": {"norm"},
    "opt": {"norm"},
    "bloom": {"attention", "norm"},
    "phi": {"norm"},
    "cohere": {"norm"},
    "mamba": {"attention"},
    "qwen3-next": {"attention"},
}
LENGTHS = (7, 3, 20, 7, 1, 18, 33)


def collate(family: str, batch: list[Sample]) -> Batch:
    return pad(batch, 0) if family in NOT_PACKABLE else pack(batch)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_plain_models(family: str, train: str) -> None:
    model = with_lora(build(family)) if train == "lora" else build(family)
    batch = samples(LENGTHS)
    expected = torch.stack(plain_losses(model, batch))
    expected_gradients = gradients(model, expected.sum())
    report = accelerate(model)
    losses, owner = token_losses(model, collate(family, batch))
    found = torch.zeros(len(batch)).index_add(0, owner, losses)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(model, losses.sum()), expected_gradients)
    left = LEFT.get(family, set()) | ({"linear"} if train == "full" else set())
    assert (set(report.left), set(report.swapped)) == (left, {"attention", "linear", "norm"} - left), str(report)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3"])
def test_bf16_differs_by_bf16_rounding_only(family: str) -> None:
    model = with_lora(build(family, torch.bfloat16))
    batch = samples(LENGTHS)
    expected = torch.stack(plain_losses(model, batch)).sum()
    expected_gradients = gradients(model, expected)
    assert set(accelerate(model).swapped) == {"attention", "linear", "norm"}
    losses, _ = token_losses(model, pack(batch))
    torch.testing.assert_close(losses.sum(), expected.float(), rtol=0.02, atol=0)
    assert_same_gradients(gradients(model, losses.sum()), expected_gradients, tolerance=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_leaves_names_packing_and_generation_as_they_were(family: str) -> None:
    model = with_lora(build(family)).eval()
    names, could_pack = list(model.state_dict()), packable(model)
    prompt = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    generated = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    accelerate(model)
    assert list(model.state_dict()) == names
    assert packable(model) == could_pack
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False), generated)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-neox"])
def test_a_padding_mask_is_still_heeded(family: str) -> None:
    model = build(family).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    with torch.no_grad():
        expected = model(**inputs).logits[:, 2:]
        accelerate(model)
        torch.testing.assert_close(model(**inputs).logits[:, 2:], expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(
    counts=st.tuples(st.integers(1, 9), st.integers(0, 12)),
    padding=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_attention_under_any_mask_is_the_masked_softmax(counts, padding, dtype) -> None:
    """Queries after a cache, behind padding: those that may look nowhere count for nothing."""
    (count, cached), rows = counts, len(padding)
    n = cached + count
    places = torch.arange(n)
    behind = torch.tensor(padding).clamp(max=n - 1)[:, None, None]
    mask = ((places[None, :] <= places[cached:, None]) & (places >= behind))[:, None]
    torch.manual_seed(0)
    shapes = ((rows, 4, count, 8), (rows, 2, n, 8), (rows, 2, n, 6))
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    real = mask.any(-1).transpose(1, 2)[..., None]
    weigh = torch.randn(rows, count, 4, 6, dtype=dtype) * real
    found = attention.masked_by_hand(q, k, v, mask, 0.3)
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~mask, -1e30)
    expected = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found * real, expected * real)
    for a, b in zip(
        torch.autograd.grad((found * weigh).sum(), (q, k, v)),
        torch.autograd.grad((expected * weigh).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = build("gemma3")
    accelerate(model)
    losses, _ = token_losses(model, pack(samples(LENGTHS)))
    expected = gradients(model, losses.sum())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses, _ = token_losses(model, pack(samples(LENGTHS)))
    assert_same_gradients(gradients(model, losses.sum()), expected)


def test_long_samples_go_to_sdpa_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("llama", "mistral"):
        model = with_lora(build(family))
        accelerate(model)
        losses, _ = token_losses(model, pack(samples(LENGTHS)))
        expected = gradients(model, losses.sum())
        with monkeypatch.context() as patched:
            patched.setattr(attention, "LONG", 0)
            losses, _ = token_losses(model, pack(samples(LENGTHS)))
            assert_same_gradients(gradients(model, losses.sum()), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_attention_dropout_keeps_samples_apart(family: str) -> None:
    model = build(family)
    accelerate(model)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = samples(LENGTHS)
    torch.manual_seed(0)
    one, owner = token_losses(model, pack(batch))
    torch.manual_seed(0)
    other, _ = token_losses(model, pack([*batch[:-1], samples(LENGTHS, seed=1)[-1]]))
    assert torch.equal(one[owner < len(batch) - 1], other[owner < len(batch) - 1])
    torch.manual_seed(1)
    assert not torch.equal(one, token_losses(model, pack(batch))[0])


@pytest.mark.parametrize("change", ["dropout", "dora", "disabled", "merged", "two adapters"])
def test_what_is_not_plain_lora_stays_pefts(change: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        lora_dropout=0.5 if change == "dropout" else 0.0,
        use_dora=change == "dora",
        init_lora_weights=False,
    )
    model = get_peft_model(build("llama"), config)
    if change == "two adapters":
        model.add_adapter("other", config)
    plain = copy.deepcopy(model)
    accelerate(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    for each in (model, plain):
        if change == "merged":
            each.merge_adapter()
        elif change == "two adapters":
            each.base_model.set_adapter(["default", "other"])
    answers = []
    for each in (model, plain):
        torch.manual_seed(3)
        if change == "disabled":
            with each.disable_adapter():
                answers.append(each(input_ids=ids).logits)
        else:
            answers.append(each(input_ids=ids).logits)
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def test_a_deep_copy_of_an_accelerated_model_has_its_own_weights() -> None:
    model = with_lora(build("llama"))
    accelerate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).logits.abs().max() > 0 == twin(input_ids=ids).logits.abs().max()


class Wrong(nn.Module):
    """Looks like an RMS norm, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True))


class Gated(nn.RMSNorm):
    """Takes more than what it normalizes."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * gate


def test_a_norm_is_known_by_what_it_computes() -> None:
    assert form_of(Wrong()) is None
    assert form_of(Gated(8, eps=1e-6)) is None
    assert form_of(nn.LayerNorm(8)) is None
    assert form_of(nn.RMSNorm(8, eps=1e-5)) == (1e-5, False)


def test_a_swap_that_changes_the_answers_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = model.config._attn_implementation
    own = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *a, **k: (own(*a, **k)[0] * 1.1, None))
    report = accelerate(model)
    assert "differs by" in report.left["attention"]
    assert model.config._attn_implementation == before


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 2),
    st.sampled_from([None, 1, 5]),
    st.sampled_from(["by hand", "by hand, capped", "by sdpa"]),
)
def test_attention_is_the_masked_softmax(lengths: list[int], rows: int, window: int | None, way: str) -> None:
    width = sum(lengths)
    layout = attention.layout_of((rows, width), tuple(lengths) * rows, window, torch.device("cpu"))
    shapes = ((rows, 4, width, 8), (rows, 2, width, 8), (rows, 2, width, 6))
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weigh = torch.randn(rows, width, 4, 6, dtype=torch.float64)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3
    if way == "by hand, capped":
        scores = 1.5 * torch.tanh(scores / 1.5)
    probabilities = scores.masked_fill(~layout.dense(), float("-inf")).softmax(-1)
    expected = (probabilities @ v.repeat_interleave(2, 1)).transpose(1, 2)
    if way == "by sdpa":
        found = attention.by_sdpa(q, k, v, layout, 0.3)
    else:
        found = attention.by_hand(q, k, v, layout, 0.3, softcap=1.5 if "capped" in way else None)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad((found * weigh).sum(), (q, k, v)),
        torch.autograd.grad((expected * weigh).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_keeping_freed_memory_says_whether_it_can() -> None:
    assert memory.keep_freed_memory() in (True, False)


def test_a_mask_that_leaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_sample_lengths", lambda allowed, rows, width, *rest: (width,) * rows)
    assert "differs by" in accelerate(build("llama")).left["attention"]


TEXTS = (
    "A patient comes to the clinic with a fever and a sore throat for three days. A viral infection is most likely.",
    "Question: if a train travels 60 miles in 1.5 hours, what is its average speed? Answer: 40 miles per hour.",
    "The council voted on Tuesday to extend the opening hours of the library, as students need a quiet place.",
)


@pytest.mark.real
def test_the_real_model_is_swapped_whole_and_its_bf16_gradients_are_as_close_to_fp32_as_the_plain_ones() -> None:
    """bf16 alone moves the gradients by 7 % of their norm, plain or accelerated."""
    from atoll.models.load import load_model

    def adapted(dtype: str) -> tuple[nn.Module, list[Sample]]:
        model, tokenizer = load_model("smollm2-135m", dtype=dtype)
        ids = [tokenizer(text, return_tensors="np").input_ids[0].astype("int32") for text in TEXTS]
        return with_lora(model).train(), [(each, each) for each in ids]

    def error(found: dict[str, torch.Tensor]) -> torch.Tensor:
        missed, size = (
            torch.stack([x.norm() for x in each]).norm()
            for each in ([found[name] - exact[name] for name in exact], exact.values())
        )
        return missed / size

    model, batch = adapted("float32")
    exact = gradients(model, torch.stack(plain_losses(model, batch)).sum())
    model, _ = adapted("bfloat16")
    plain = error(gradients(model, torch.stack(plain_losses(model, batch)).sum()))
    assert accelerate(model).swapped == {"attention": 30, "linear": 210, "norm": 61}
    assert packable(model)
    losses, _ = token_losses(model, pack(batch))
    assert error(gradients(model, losses.sum())) < 1.3 * plain
