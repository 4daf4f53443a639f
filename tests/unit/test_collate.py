"""pack and pad keep every token and label, and shift labels within samples only; packable asks the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import FAMILIES, NOT_PACKABLE, build

from atoll.data.collate import IGNORE, Batch, Sample, pack, packable, pad
from atoll.errors import AtollError


@st.composite
def sample(draw: st.DrawFn) -> Sample:
    ids = np.array(draw(st.lists(st.integers(1, 50), min_size=1, max_size=9)), np.int32)
    mask = np.array(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    return Sample(ids, np.where(mask, ids, IGNORE).astype(np.int32))


def next_labels(samples: list[Sample]) -> list[tuple[int, int, int]]:
    """(owner, token, target) for each position with something to predict: the shift, one sample at a time."""
    return [
        (owner, int(ids[i]), int(labels[i + 1]))
        for owner, (ids, labels, *_) in enumerate(samples)
        for i in range(len(ids) - 1)
        if labels[i + 1] != IGNORE
    ]


def found_labels(batch: Batch) -> list[tuple[int, int, int]]:
    keep = batch.targets != IGNORE
    return list(
        zip(batch.owners[keep].tolist(), batch.input_ids[keep].tolist(), batch.targets[keep].tolist(), strict=True)
    )


@given(st.lists(sample(), min_size=1, max_size=6))
def test_pack_predicts_what_each_sample_alone_predicts(samples: list[Sample]) -> None:
    batch = pack(samples)
    assert found_labels(batch) == next_labels(samples)
    assert batch.input_ids.tolist() == [np.concatenate([ids for ids, *_ in samples]).tolist()]
    assert batch.position_ids.tolist() == [[i for ids, *_ in samples for i in range(len(ids))]]
    assert batch.packed
    assert batch.tokens == batch.input_ids.numel()


@given(st.lists(sample(), min_size=1, max_size=6))
def test_pad_predicts_what_each_sample_alone_predicts(samples: list[Sample]) -> None:
    batch = pad(samples, pad_id=99)
    assert found_labels(batch) == next_labels(samples)
    assert batch.lengths == tuple(len(ids) for ids, *_ in samples)
    assert int((batch.input_ids != 99).sum()) == batch.tokens
    assert not batch.packed


@pytest.mark.parametrize("samples", [[], [Sample(np.zeros(0, np.int32), np.zeros(0, np.int32))]])
def test_nothing_to_batch_is_refused(samples: list[Sample]) -> None:
    with pytest.raises(AtollError, match="at least one"):
        pack(samples)
    with pytest.raises(AtollError, match="at least one"):
        pad(samples, 0)


def test_to_moves_every_tensor() -> None:
    ids = np.array([1, 2], np.int32)
    moved = pack([(ids, ids)]).to("meta")
    assert {moved.input_ids.device.type, moved.labels.device.type, moved.position_ids.device.type} == {"meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_packable_is_what_the_family_can_do_and_leaves_its_mode_alone(family: str) -> None:
    model = build(family)
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    assert packable(model) == (family not in NOT_PACKABLE)
    assert [module.training for module in model.modules()] == modes


def test_a_model_that_ignores_sample_boundaries_is_not_packable() -> None:
    class Leaky(torch.nn.Module):
        """Accepts positions, but sums over the whole row."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(9, 9)

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> object:
            return type("Output", (), {"logits": self.embed(input_ids).cumsum(1)})

    assert not packable(Leaky())
