"""What the benchmarks make of our own parts still works: sizes are small, and nothing is timed."""

from __future__ import annotations

import pytest
from benchmarks import masked
from benchmarks.ours import mean
from benchmarks.peers.flwr import masks


@pytest.mark.parametrize("what", ["aggregator", "driver", "torch"])
def test_the_contestants_of_the_mean_run(what):
    assert mean.prepare({"what": what, "updates": 2, "mebibytes": 8})()


def rounds_of_masks(dropped):
    setting = {"dropped": dropped, "threshold": 3, "bits": 16, "clip": 8.0, "seed": 0}
    return masks.prepare({"clients": 5, "values": 100, "setting": setting})


def test_the_peers_masks_come_off_with_some_clients_gone():
    result = rounds_of_masks([1, 3])()
    assert result["error_in_steps"] < 1
    assert result["upload_bytes"] > 8 * 100  # of int64
    assert result["server_s"] > 0
    assert result["client_s"] > 0


def test_a_round_of_masks_that_too_few_survive_is_not_measured():
    with pytest.raises(RuntimeError, match="halted"):
        rounds_of_masks([0, 1, 2])


def test_a_masked_value_needs_the_bits_of_a_sum():
    assert masked.needed_bytes(10, 16) == 2.5
    assert masked.needed_bytes(8, 16) == 19 / 8
