"""The server: rounds, of which it writes down how long each took and what clients say of their local work."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, once all clients are there."""
    config = context.run_config
    while len(list(grid.get_node_ids())) < int(config["clients"]):
        time.sleep(0.1)
    rounds = fedavg(grid, config) if config["what"] == "fedavg" else queries(grid, config)
    Path(str(config["out"])).write_text(json.dumps(rounds))


class Timed(FedAvg):
    """FedAvg that notes how long rounds take, from making the messages to the mean, and clients' local work."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.began = 0.0
        self.rounds: list[dict[str, Any]] = []

    def configure_train(self, *args: Any, **kwargs: Any) -> Any:
        self.began = time.perf_counter()
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        self.rounds.append(summed_up(time.perf_counter() - self.began, replies))
        return result


def summed_up(seconds: float, replies: list[Message]) -> dict[str, Any]:
    """A round: its seconds, and each client's local ones."""
    local = [one.content["metrics"]["seconds"] for one in replies if not one.has_error()]
    return {"seconds": seconds, "local": local}


def fedavg(grid: Grid, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """FedAvg on an adapter of so many tensors and bytes."""
    import torch

    size = config["bytes"] // config["tensors"] // 4
    adapter = {f"layer-{i:02}": torch.randn(size) for i in range(config["tensors"])}
    strategy = Timed(config["clients"])
    strategy.start(grid=grid, initial_arrays=ArrayRecord(adapter), num_rounds=config["rounds"])
    return strategy.rounds


def queries(grid: Grid, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rounds of one small question to each client."""
    rounds = []
    for _ in range(config["rounds"]):
        asked = RecordDict({"config": ConfigRecord({"what": config["what"]})})
        began = time.perf_counter()
        replies = list(grid.send_and_receive([Message(asked, node, "query") for node in grid.get_node_ids()]))
        rounds.append(summed_up(time.perf_counter() - began, replies))
    return rounds
