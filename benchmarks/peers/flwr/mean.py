"""Flower's means: of ArrayRecords as its current strategies do it, and of lists of arrays as its older ones do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from benchmarks.updates import gigabytes, repeated, updates
from benchmarks.worker import Measure, serve

DISTINCT = 4


def prepare(config: Mapping[str, Any]) -> Measure:
    """Both want every update at once: they are ready before the time starts."""
    made = enumerate(updates({**config, "updates": DISTINCT}))
    if config["api"] == "arrayrecords":
        records = repeated([record(update, number) for number, update in made], config["updates"])

        def run() -> object:
            return aggregate_arrayrecords(records, "num-examples")
    else:
        lists = repeated([(list(update.values()), 1 + number) for number, update in made], config["updates"])

        def run() -> object:
            return aggregate(lists)

    def measure() -> Mapping[str, Any]:
        started = time.perf_counter()
        run()
        return {"gb_per_s": gigabytes(config) / (time.perf_counter() - started)}

    return measure


def record(update: Mapping[str, Any], number: int) -> RecordDict:
    """A reply of a client."""
    arrays = ArrayRecord.from_numpy_ndarrays(list(update.values()))
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1 + number})})


if __name__ == "__main__":
    serve(prepare, ("flwr", "numpy"))
