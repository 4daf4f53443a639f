"""The streaming mean: ours, and the limit: torch's in-place addition on the same updates, with nothing around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from atoll.aggregate.base import ALL
from atoll.aggregate.mean import mean
from benchmarks.updates import Stopwatch, Update, gigabytes, updates
from benchmarks.worker import Measure, peak_rss_bytes, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Each update comes as new memory, is added, and is let go; only the aggregation is timed."""
    run = {"atoll": ours, "torch": limit}[config["what"]]
    run({**config, "updates": 2})
    before = resident_bytes()

    def measure() -> Mapping[str, Any]:
        seconds = run(config)
        models = (peak_rss_bytes() - before) / (config["mebibytes"] << 20)
        return {"gb_per_s": gigabytes(config) / seconds, "peak_models": models, "threads": torch.get_num_threads()}

    return measure


def resident_bytes() -> int:
    """What this process has resident now."""
    import os

    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors(update: Update) -> dict[str, torch.Tensor]:
    """The same memory as tensors."""
    return {name: torch.from_numpy(x) for name, x in update.items()}


def ours(config: Mapping[str, Any]) -> float:
    """Seconds of our aggregator, from its first zero to the mean."""
    watch, total, aggregator = Stopwatch(), None, mean()
    for number, update in enumerate(map(tensors, updates(config))):
        with watch:
            total = aggregator.init(update) if total is None else total
            total = aggregator.add(total, update, {ALL: 1.0 + number})
    assert total is not None
    with watch:
        aggregator.finish(total)
    return watch.seconds


def limit(config: Mapping[str, Any]) -> float:
    """Seconds of add_ with a factor, in place, tensor by tensor."""
    watch, total = Stopwatch(), None
    for number, update in enumerate(map(tensors, updates(config))):
        with watch:
            if total is None:
                total = {name: torch.zeros_like(x) for name, x in update.items()}
            for name, x in update.items():
                total[name].add_(x, alpha=1.0 + number)
    return watch.seconds


if __name__ == "__main__":
    serve(prepare, ("atoll", "torch"))
