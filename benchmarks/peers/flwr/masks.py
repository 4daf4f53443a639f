"""Flower's SecAgg+: its own `SecAggPlusWorkflow` and `secaggplus_mod`, the one calling the other in this process.

Nothing of theirs is written anew: `Clients` stands where their Grid would be, and hands each message to the mod of the
client that it is for. Messages become bytes and messages again in between, as on their way over a network; that is
nobody's time. Configuration, as their documentation and their example for secure aggregation have it:

- `num_shares` is the number of clients, which makes a full graph of masks, the same as `SecAggWorkflow`; the threshold is
  an integer.
- `quantization_range` is 2**bits; `modulus_range` stays at its default of 2**32, being larger than all sums, and
  `clipping_range` is the setting's. Their docs say that a large `max_weight` costs precision: it is 1, as in the example's
  demo, and every client has one example, so that the mean is of equal weights and no bit is lost to them.
- The strategy is the FedAvg of the example, without evaluation. The workflow gives it the mean once for each survivor, and
  it averages these; the time of the strategy is not counted, nor that of local training, nor is there a model in the
  broadcast: all in Flower's favor.
- An update is one flat array. As the 120 tensors of an adapter, each masked and serialized by itself, it would take longer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common.recorddict_compat import (
    arrayrecord_to_parameters,
    fitres_to_recorddict,
    parameters_to_arrayrecord,
)
from flwr.proto.message_pb2 import Message as Proto
from flwr.server.client_manager import SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.masked import Measured, Setting, rounds
from benchmarks.updates import Stopwatch
from benchmarks.worker import Measure, serve

RUN, SERVER = 1, 1
FIRST_NODE = 2


def prepare(config: Mapping[str, Any]) -> Measure:
    """Rounds over the values that all contestants have."""
    return rounds(measure, config)


def measure(values: np.ndarray, setting: Setting) -> Measured:
    """One round: the server's time is the workflow's, less what it spends in the clients and in the strategy."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, SERVER, RUN
    np.random.seed(setting.seed)  # of their rounding
    clients = Clients({FIRST_NODE + i: Client(update, i in setting.dropped) for i, update in enumerate(values)})
    strategy, context = server(clients)
    started = time.perf_counter()
    workflow(len(values), setting)(clients, context)
    seconds = time.perf_counter() - started
    if not strategy.ended:
        raise RuntimeError("the workflow halted: its log says why")
    survivors = [client for client in clients.nodes.values() if not client.drops]
    (mean,) = parameters_to_ndarrays(arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True))
    return Measured(
        server_s=seconds - clients.watch.seconds - strategy.watch.seconds,
        client_s=median(client.mod.seconds - client.training.seconds for client in survivors),
        upload_bytes=round(median(client.upload_bytes for client in survivors)),
        mean=mean,
    )


def workflow(clients: int, setting: Setting) -> SecAggPlusWorkflow:
    """As the top of this file says."""
    return SecAggPlusWorkflow(
        num_shares=clients,
        reconstruction_threshold=setting.threshold,
        max_weight=1.0,
        clipping_range=setting.clip,
        quantization_range=2**setting.bits,
    )


def packed(message: Message) -> bytes:
    """A message as it would travel."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def unpacked(data: bytes) -> Message:
    """What the other end has of it."""
    return message_from_proto(Proto.FromString(data))


@dataclass
class Client:
    """One client: the mod, whose context lasts from stage to stage, around a training that gives what is there."""

    update: np.ndarray
    drops: bool
    mod: Stopwatch = field(default_factory=Stopwatch)
    training: Stopwatch = field(default_factory=Stopwatch)
    upload_bytes: int = 0
    context: Context = field(default_factory=lambda: Context(RUN, 0, {}, RecordDict(), {}))

    def answer(self, data: bytes) -> bytes | None:
        """The reply to a message; none from a client that has dropped."""
        message = unpacked(data)
        masking = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE] == Stage.COLLECT_MASKED_VECTORS
        if masking and self.drops:
            return None
        with self.mod:
            reply = secaggplus_mod(message, self.context, self.train)
        sent = packed(reply)
        if masking:
            self.upload_bytes = len(sent)
        return sent

    def train(self, message: Message, context: Context) -> Message:
        """Where the app would train."""
        with self.training:
            done = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([self.update]), num_examples=1, metrics={})
            return Message(fitres_to_recorddict(done, keep_input=True), reply_to=message)


@dataclass
class Clients:
    """What the workflow needs of a Grid, with the clients behind it in turn."""

    nodes: Mapping[int, Client]
    watch: Stopwatch = field(default_factory=Stopwatch)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """All replies that there are."""
        with self.watch:
            replies = [self.nodes[one.metadata.dst_node_id].answer(packed(one)) for one in messages]
            return [unpacked(reply) for reply in replies if reply is not None]


class Untimed(FedAvg):  # type: ignore[misc]
    """FedAvg over all clients, which knows how long it took and whether it came to its end."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_fit_clients=clients, min_available_clients=clients)
        self.watch, self.ended = Stopwatch(), False

    def configure_fit(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch:
            return super().configure_fit(*args, **kwargs)

    def aggregate_fit(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch:
            self.ended = True
            return super().aggregate_fit(*args, **kwargs)


def server(clients: Clients) -> tuple[Untimed, LegacyContext]:
    """The strategy, and the context that `DefaultWorkflow` would make in the first round."""
    strategy, manager = Untimed(len(clients.nodes)), SimpleClientManager()
    for node in clients.nodes:
        manager.register(GridClientProxy(node, clients, RUN))
    state = RecordDict({MAIN_PARAMS_RECORD: parameters_to_arrayrecord(ndarrays_to_parameters([]), True)})
    context = LegacyContext(Context(RUN, SERVER, {}, state, {}), strategy=strategy, client_manager=manager)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    return strategy, context


if __name__ == "__main__":
    serve(prepare, ("flwr", "numpy", "cryptography", "pycryptodome"))
