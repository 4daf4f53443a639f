"""What the benchmarks make of our own parts still works: sizes are small, and nothing is timed."""

from __future__ import annotations

import pytest
from benchmarks.ours import mean


@pytest.mark.parametrize("what", ["aggregator", "driver", "torch"])
def test_the_contestants_of_the_mean_run(what):
    assert mean.prepare({"what": what, "updates": 2, "mebibytes": 8})()
