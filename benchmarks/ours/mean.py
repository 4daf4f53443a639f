"""The streaming mean: the aggregator alone, the driver around it, and the limit: torch's addition in place, nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from atoll.aggregate.base import ALL
from atoll.aggregate.mean import mean
from atoll.exchange import Reply, Task
from atoll.params import Params, zeros_like
from atoll.round import RoundPlan, initial, run_round
from atoll.stream import UPDATE, Stream
from atoll.transforms.chain import Chain, Payload
from benchmarks.updates import Stopwatch, gigabytes, updates
from benchmarks.worker import Measure, peak_rss_bytes, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Each update comes as new memory, is added, and is let go; only the aggregation is timed."""
    run = {"aggregator": ours, "driver": driver, "torch": limit}[config["what"]]
    before = resident_bytes()
    run({**config, "updates": 2})

    def measure() -> Mapping[str, Any]:
        seconds = run(config)
        models = (peak_rss_bytes() - before) / (config["mebibytes"] << 20)
        return {"gb_per_s": gigabytes(config) / seconds, "peak_models": models, "threads": torch.get_num_threads()}

    return measure


def resident_bytes() -> int:
    """What this process has resident now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors(config: Mapping[str, Any]) -> Iterator[Params]:
    """Updates as tensors, each let go before the next one is made."""
    source = updates(config)
    for _ in range(config["updates"]):
        yield {name: torch.from_numpy(x) for name, x in next(source).items()}


def ours(config: Mapping[str, Any]) -> float:
    """Seconds of our aggregator, from its first zero to the mean."""
    watch, aggregator, source = Stopwatch(), mean(), tensors(config)
    first = next(source)
    with watch:
        total = aggregator.add(aggregator.init(first), first, {ALL: 1.0})
    del first
    for number in range(1, config["updates"]):
        update = next(source)
        with watch:
            aggregator.add(total, update, {ALL: 1.0 + number})
        del update
    with watch:
        aggregator.finish(total, Chain().decode_sum)
    return watch.seconds


def limit(config: Mapping[str, Any]) -> float:
    """Seconds of add_ with a factor, in place, tensor by tensor."""
    watch, source = Stopwatch(), tensors(config)
    with watch:
        total = zeros_like(next(tensors({**config, "updates": 1})))
    for number in range(config["updates"]):
        update = next(source)
        with watch:
            for name, x in update.items():
                total[name].add_(x, alpha=1.0 + number)
        del update
    return watch.seconds


def driver(config: Mapping[str, Any]) -> float:
    """Seconds of a whole round less what making the updates takes: decoding, checks and the outer step are inside."""
    watch, fleet = Stopwatch(), Updates(config)
    plan = RoundPlan("plan", 0, (Stream(),))
    params = zeros_like(next(tensors({**config, "updates": 1})))
    state = initial(plan, params)
    with watch:
        run_round(plan, state, fleet)
    return watch.seconds - fleet.making.seconds


class Updates:
    """A fleet whose clients have their updates ready."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.names = [f"client-{i:02}" for i in range(config["updates"])]
        self.source, self.making = tensors(config), Stopwatch()
        self.tasks: list[Task] = []

    def clients(self) -> list[str]:
        return self.names

    def lanes(self) -> int:
        return 1

    def now(self) -> float:
        return 0.0

    def submit(self, tasks: Sequence[Task]) -> None:
        self.tasks = list(tasks)

    def receive(self, tasks: Collection[str], until: float = math.inf) -> Reply:
        task = self.tasks.pop(0)
        with self.making:
            update = next(self.source)
        return Reply(task.id, task.client, task.plan, 0, {UPDATE: Payload(update)}, {ALL: 1.0})

    def reduce(self, total: Params) -> Params:
        return total

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(prepare, ("atoll", "torch"))
