"""Flower's simulation (Ray): the CNN's clients a second, and a stand-in client's time outside local steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from benchmarks.cnn import seeded_cnn
from benchmarks.peers.flwr.apps import Timed, cnn_app, standin_app
from benchmarks.samples import inputs_folder
from benchmarks.worker import Measure, serve

PACKAGES = ("flwr", "ray", "torch")


def prepare(config: Mapping[str, Any]) -> Measure:
    """Each measurement is a simulation from its beginning: Ray starts anew."""
    return {"simulation": simulation, "overhead": overhead}[config["what"]](config)


def simulate(config: Mapping[str, Any], client_app: Any, arrays: ArrayRecord, said: Mapping[str, Any]) -> Timed:
    """Runs `config["rounds"]` rounds with `config["cores"]` cores a client; gives the strategy with its times."""
    strategy = Timed(config["cohort"] / config["users"], config["cohort"])
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        strategy.start(
            grid=grid, initial_arrays=arrays, num_rounds=config["rounds"], train_config=ConfigRecord(dict(said))
        )

    run_simulation(
        server_app=server,
        client_app=client_app,
        num_supernodes=config["users"],
        backend_config={"client_resources": {"num_cpus": config["cores"], "num_gpus": 0.0}},
    )
    return strategy


def simulation(config: Mapping[str, Any]) -> Measure:
    """Clients a second from the end of the first round to the end of the last."""

    def measure() -> Mapping[str, Any]:
        arrays = ArrayRecord(seeded_cnn().state_dict())
        times = simulate(config, cnn_app, arrays, {"users": config["users"], "threads": config["cores"]})
        heard = sum(len(seconds) for seconds in times.local[1:])
        return {"clients_per_s": heard / (times.ends[-1] - times.ends[0]), "clients": heard}

    return measure


def overhead(config: Mapping[str, Any]) -> Measure:
    """A round's time less its local steps, per client; clients that run side by side share their local time."""
    from safetensors.torch import load_file

    def measure() -> Mapping[str, Any]:
        adapter = load_file(inputs_folder() / config["start"])
        times = simulate(config, standin_app, ArrayRecord(adapter), {"sleep": config["sleep"]})
        local = max if config["cores"] == 1 else sum
        outside = [
            1000 * (end - begin - local(seconds)) / config["cohort"]
            for begin, end, seconds in zip(times.begins, times.ends, times.local, strict=True)
        ]
        return {"outside_ms": statistics.median(outside[1:]), "first_round_ms": outside[0]}

    return measure


if __name__ == "__main__":
    serve(prepare, PACKAGES)
