"""Whole runs of ours, as `atoll run` makes them: record, checkpoints and card included."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from atoll.record.events import Event, RoundEnded
from atoll.run import run
from benchmarks.worker import Measure, peak_rss_bytes, serve


def prepare(config: Mapping[str, Any]) -> Measure:
    """Writes the recipe; each measurement is a run."""
    return {"simulation": simulation, "overhead": overhead, "rounds": whole_rounds}[config["what"]](config)


class Ends:
    """A sink that notes when each round has ended."""

    def __init__(self) -> None:
        self.rounds: list[tuple[float, RoundEnded]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundEnded):
            self.rounds.append((time.perf_counter(), event))


def rounds_of(recipe: Mapping[str, Any]) -> list[tuple[float, RoundEnded]]:
    """Runs the recipe in a folder that is thrown away; gives when each round ended, and its event."""
    folder = Path(tempfile.mkdtemp())
    os.environ["ATOLL_RUNS"] = str(folder / "runs")
    path, ends = folder / "recipe.yaml", Ends()
    write(recipe, path)
    run(str(path), sinks=[ends])
    shutil.rmtree(folder)
    return ends.rounds


def write(recipe: Mapping[str, Any], path: Path) -> None:
    """The recipe as a file."""
    from ruamel.yaml import YAML

    with path.open("w") as file:
        YAML().dump(dict(recipe), file)


def simulation(config: Mapping[str, Any]) -> Measure:
    """Clients a second from the end of the first round to the end of the last: checkpoints between them included."""

    def measure() -> Mapping[str, Any]:
        rounds = rounds_of(cnn_recipe(config))
        seconds = rounds[-1][0] - rounds[0][0]
        return {
            "clients_per_s": (len(rounds) - 1) * config["cohort"] / seconds,
            "local_steps_share": sum(event.spans["local_steps"] for _, event in rounds[1:]) / seconds,
            "peak_rss_mib": peak_rss_bytes() / (1 << 20),
        }

    return measure


def cnn_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """FedAvg of the CNN: SGD at 0.1, batches of 10, one epoch."""
    finetune = {
        "rounds": config["rounds"],
        "objective": "benchmarks.ours.parts:Classification",
        "space": "full",
        "optimizer": {"use": "sgd", "lr": 0.1},
        "batch_size": 10,
        "clip_norm": None,
        "schedule": {"use": "synchronous", "cohort": config["cohort"]},
    }
    data = {"use": "benchmarks.ours.parts:image_clients", "users": config["users"]}
    fleet = {"use": "processes", "workers": config["workers"]} if "workers" in config else "inprocess"
    return {
        **common("simulation"),
        "fleet": fleet,
        "model": "benchmarks.ours.parts:cnn",
        "data": data,
        "finetune": finetune,
    }


def common(name: str) -> dict[str, Any]:
    """A run without held-out data."""
    return {"recipe": 1, "name": name, "evaluate": {"every": 0}}


def overhead(config: Mapping[str, Any]) -> Measure:
    """Time outside local steps, per client: by the record's own spans, and by the clock with checkpoints inside."""

    def measure() -> Mapping[str, Any]:
        rounds = rounds_of(lora_recipe(config))
        outside = [1000 * event.spans["outside"] / config["cohort"] for _, event in rounds]
        elapsed, local = rounds[-1][0] - rounds[0][0], sum(event.spans["local_steps"] for _, event in rounds[1:])
        return {
            "outside_ms": median(outside[1:]),
            "first_round_ms": outside[0],
            "with_checkpoint_ms": 1000 * (elapsed - local) / config["cohort"] / (len(rounds) - 1),
        }

    return measure


def whole_rounds(config: Mapping[str, Any]) -> Measure:
    """Seconds of a round, all included, by the record; the first is left out."""

    def measure() -> Mapping[str, Any]:
        rounds = rounds_of(lora_recipe(config))
        return {"round_s": median(event.seconds for _, event in rounds[1:])}

    return measure


def lora_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """20 clients of which some work each round, on 4 x 128 tokens a local step."""
    data = {
        "use": "benchmarks.ours.parts:token_clients",
        "file": config["file"],
        "batch_size": 4,
        "clients": config["clients"],
    }
    finetune = {
        "rounds": config["rounds"],
        "space": {"use": "lora", "rank": 8, "alpha": 16},
        "batch_size": 4,
        "local_steps": config["steps"],
        "schedule": {"use": "synchronous", "cohort": config["cohort"]},
        **config.get("finetune", {}),
    }
    return {**common("overhead"), "model": config["model"], "data": data, "finetune": finetune}


if __name__ == "__main__":
    serve(prepare, ("atoll", "torch", "transformers", "peft"))
