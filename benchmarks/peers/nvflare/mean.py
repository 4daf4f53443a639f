"""NVIDIA FLARE's streaming mean: the helper that its aggregators and its FedAvg controller add updates to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

from benchmarks.updates import Stopwatch, gigabytes, updates
from benchmarks.worker import Measure, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Each update comes as new memory and is let go, as on our side."""

    def measure() -> Mapping[str, Any]:
        watch, helper = Stopwatch(), WeightedAggregationHelper()
        for number, update in enumerate(updates(config)):
            with watch:
                helper.add(update, 1.0 + number, f"site-{number}", 0)
        with watch:
            helper.get_result()
        return {"gb_per_s": gigabytes(config) / watch.seconds}

    return measure


if __name__ == "__main__":
    serve(prepare, ("nvflare", "numpy"))
