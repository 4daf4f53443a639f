"""The client: an adapter comes and another goes, or a question is answered with next to nothing, or with an update."""

from __future__ import annotations

import time
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Takes the adapter as tensors, pauses, gives another one back."""
    import torch

    state = message.content["arrays"].to_torch_state_dict()
    began = time.perf_counter()
    time.sleep(float(context.run_config["pause"]))
    state = {name: x + torch.randn_like(x) for name, x in state.items()}
    seconds = time.perf_counter() - began
    return answer(message, seconds, {"arrays": ArrayRecord(state)})


@app.query()
def query(message: Message, context: Context) -> Message:
    """An empty answer, or an update, the making of which is local work."""
    if message.content["config"]["what"] == "empty":
        return answer(message, 0.0, {})
    import torch

    began = time.perf_counter()
    tensors, size = int(context.run_config["tensors"]), int(context.run_config["bytes"])
    update = {f"layer-{i:02}": torch.randn(size // tensors // 4) for i in range(tensors)}
    seconds = time.perf_counter() - began
    return answer(message, seconds, {"arrays": ArrayRecord(update)})


def answer(message: Message, seconds: float, content: dict[str, Any]) -> Message:
    """With how long local work took."""
    metrics = MetricRecord({"num-examples": 1, "seconds": seconds})
    return Message(RecordDict({**content, "metrics": metrics}), reply_to=message)
