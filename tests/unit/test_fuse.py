"""Fusing results: TIES is PEFT's where there is one parameter; what only one result has learned stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.merge_utils import ties as peft_ties

from atoll.aggregate.fuse import average, ties
from atoll.params import equal


@given(st.integers(2, 5), st.integers(1, 40), st.floats(0.1, 1.0), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_ties_is_pefts(count: int, size: int, density: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=draw)
    vectors = [torch.randn(size, generator=draw) for _ in range(count)]
    found = ties(density)({"w": base}, [{"w": base + one} for one in vectors])["w"]
    given_back = [(base + one) - base for one in vectors]  # as rounding leaves them
    wanted = peft_ties(given_back, torch.ones(count), density)
    torch.testing.assert_close(found, base + wanted)


def test_what_one_result_alone_has_learned_is_kept_whole_by_ties_and_halved_by_the_mean() -> None:
    base, learned = {"w": torch.zeros(4)}, {"w": torch.tensor([1.0, 0, 0, 0])}
    assert ties(1.0)(base, [learned, base])["w"].tolist() == [1, 0, 0, 0]
    assert average()(base, [learned, base])["w"].tolist() == [0.5, 0, 0, 0]


def test_of_contradicting_results_the_stronger_prevails() -> None:
    base = {"w": torch.zeros(1)}
    each = [{"w": torch.tensor([x])} for x in (3.0, -1.0, -1.0)]
    assert float(ties(1.0)(base, each)["w"]) == 3.0


@pytest.mark.parametrize("fuse", [ties(1.0), average()])
def test_one_result_is_itself_whatever_its_type(fuse) -> None:
    one = {"w": torch.randn(7).bfloat16()}
    fused = fuse({"w": torch.zeros(7).bfloat16()}, [one])
    assert equal(fused, one)
