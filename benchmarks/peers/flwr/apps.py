"""Flower apps of the benchmarks, by its current message API. In a module of its own, which Ray's actors import."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch.nn.functional import cross_entropy

from benchmarks.cnn import BATCH, CNN, LR, data, seeded_cnn

cnn_app, standin_app = ClientApp(), ClientApp()
warm: dict[str, Any] = {}
"""What an actor keeps between clients: examples make a new model each time, which would be slower."""


def reply(message: Message, state: dict[str, torch.Tensor], examples: int, seconds: float) -> Message:
    """Params, how many examples, and how long the local steps took."""
    metrics = MetricRecord({"num-examples": examples, "seconds": seconds, "at": time.perf_counter()})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)


@cnn_app.train()
def train_cnn(message: Message, context: Context) -> Message:
    """One epoch of SGD over the user's own images."""
    config = message.content["config"]
    if not warm:
        torch.set_num_threads(config["threads"])
        warm.update(model=seeded_cnn(), data=data(config["users"]))
    model: CNN = warm["model"]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = (array[context.node_config["partition-id"]] for array in warm["data"])
    started = time.perf_counter()
    epoch(model, torch.from_numpy(np.array(images)), torch.from_numpy(labels))
    return reply(message, model.state_dict(), len(labels), time.perf_counter() - started)


def epoch(model: CNN, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One pass in batches."""
    optimizer = torch.optim.SGD(model.parameters(), LR)
    model.train()
    for batch in torch.randperm(len(labels)).split(BATCH):
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


@standin_app.train()
def pretend(message: Message, context: Context) -> Message:
    """Takes the adapter as tensors, sleeps for as long as local steps would take, gives an adapter back."""
    state = message.content["arrays"].to_torch_state_dict()
    time.sleep(message.content["config"]["sleep"])
    return reply(message, state, 1, message.content["config"]["sleep"])


class Timed(FedAvg):  # type: ignore[misc]
    """FedAvg that notes when rounds begin and end, and what clients say of their local steps."""

    def __init__(self, fraction: float, cohort: int) -> None:
        super().__init__(
            fraction_train=fraction, fraction_evaluate=0.0, min_train_nodes=cohort, min_available_nodes=cohort
        )
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.local: list[list[float]] = []

    def configure_train(self, *args: Any, **kwargs: Any) -> Any:
        self.begins.append(time.perf_counter())
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        self.local.append([float(r.content["metrics"]["seconds"]) for r in replies if not r.has_error()])
        self.ends.append(time.perf_counter())
        return result
