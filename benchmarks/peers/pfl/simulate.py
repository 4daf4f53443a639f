"""One simulation by pfl-research: `python -m benchmarks.peers.pfl.simulate CONFIG RESULT`, alone or under torchrun.

As pfl-research's own CIFAR10 benchmark does it: PyTorchModel, SimulatedBackend, FederatedAveraging, weights by data points,
torch tensors in the users' datasets. Its evaluation of users runs in the first round alone, which is not counted.
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch.nn.functional import cross_entropy

from benchmarks.cnn import BATCH, LR, data, seeded_cnn

NEVER = 10**6


class Ends(TrainingProcessCallback):  # type: ignore[misc]
    """Notes when each round has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        self.times.append(time.perf_counter())
        return False, Metrics()


def users(count: int) -> Any:
    """The federated data set; a user's tensors are made when the user is drawn."""
    images, labels = data(count)

    def user(number: int) -> Any:
        tensors = [torch.from_numpy(np.array(images[number])), torch.from_numpy(labels[number])]
        return Dataset(raw_data=tensors, user_id=str(number))

    return FederatedDataset(user, get_user_sampler("minimize_reuse", list(range(count))))


def model() -> Any:
    """The CNN with the two methods that pfl-research asks for."""
    cnn = seeded_cnn()

    def loss(self: Any, inputs: torch.Tensor, targets: torch.Tensor, eval: bool = False) -> torch.Tensor:
        self.eval() if eval else self.train()
        return cross_entropy(self(inputs), targets)

    @torch.no_grad()
    def metrics(self: Any, inputs: torch.Tensor, targets: torch.Tensor, eval: bool = True) -> Any:
        self.eval() if eval else self.train()
        return {"loss": Weighted(cross_entropy(self(inputs), targets, reduction="sum").item(), len(inputs))}

    cnn.loss, cnn.metrics = types.MethodType(loss, cnn), types.MethodType(metrics, cnn)
    return PyTorchModel(
        model=cnn,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(cnn.parameters(), 1.0),
    )


def simulate(config: dict[str, Any]) -> dict[str, float]:
    """Clients a second from the end of the first round to the end of the last."""
    torch.set_num_threads(config["threads"])
    federated, ends = users(config["users"]), Ends()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=config["rounds"],
            evaluation_frequency=NEVER,
            train_cohort_size=config["cohort"],
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=federated, val_data=federated, postprocessors=[WeightByDatapoints()]),
        model=model(),
        model_train_params=NNTrainHyperParams(local_learning_rate=LR, local_num_epochs=1, local_batch_size=BATCH),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[ends],
    )
    return {"clients_per_s": (len(ends.times) - 1) * config["cohort"] / (ends.times[-1] - ends.times[0])}


if __name__ == "__main__":
    found = simulate(json.loads(sys.argv[1]))
    if pytorch_ops.distributed.global_rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
