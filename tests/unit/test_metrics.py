"""Metrics as sums: what clients tell one by one and what their sums say is the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

from atoll.local.work import Answered, told
from atoll.metrics import read_back, sums, zeros

NUMBER = st.floats(-50, 50, width=32)
ANSWER = st.none() | st.builds(Answered, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.25, 0.5]), st.none())
CLIENT = st.lists(st.tuples(NUMBER, ANSWER), min_size=1, max_size=5)


def of(samples: list[tuple[float, Answered | None]], kind: str) -> dict[str, float]:
    losses, answers = zip(*samples, strict=True)
    return told(torch.tensor(losses, dtype=torch.float64), answers) | told(torch.tensor(losses), answers, kind)


@drawn(clients=st.lists(CLIENT, min_size=1, max_size=4), kind=st.sampled_from(["/text", "/image", "/audio"]))
def test_sums_over_clients_say_what_all_samples_together_do(clients, kind) -> None:
    total = zeros()
    for client in clients:
        total = {name: x + total[name] for name, x in sums(of(client, kind)).items()}
    everybody = of([sample for client in clients for sample in client], kind)
    assert read_back(total) == pytest.approx(everybody, rel=1e-5, abs=1e-4)


def test_what_is_not_told_whole_is_in_no_sum() -> None:
    assert read_back(sums({"loss": 1.0, "samples": 3.0, "accuracy": 0.5, "chance": 0.5})) == {}
