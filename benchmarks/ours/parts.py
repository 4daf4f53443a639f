"""Parts of our recipes that are the benchmarks' own, named in them as `benchmarks.ours.parts:NAME`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from atoll.data.sources import ClientData
from atoll.local.work import Measured, Objective, draw
from benchmarks.cnn import CNN, data
from benchmarks.samples import Sample, inputs_folder, load

KEY = 1
"""The key of the benchmark's tasks, from which the order of samples follows."""


def token_clients(file: str, batch_size: int, clients: int = 1) -> dict[str, ClientData]:
    """`clients` clients, each with all samples of a file under the inputs; one holds one sample out."""
    samples = in_order(load(inputs_folder() / file), batch_size)
    return {f"client-{i:02}": ClientData(samples, samples[:1] if i == 0 else ()) for i in range(clients)}


def in_order(samples: Sequence[Sample], batch_size: int) -> list[Sample]:
    """Laid out so that a task with the key KEY draws them in the order given: peers read them in that order."""
    steps = islice(draw(len(samples), batch_size, 1, KEY), -(-len(samples) // batch_size))
    drawn = [number for step in steps for batch in step for number in batch]
    laid_out = list(samples)
    for sample, place in zip(samples, drawn, strict=True):
        laid_out[place] = sample
    return laid_out


class OwnCNN(CNN):
    """The CNN, able to save itself as a run does at its end."""

    def save_pretrained(self, folder: Path) -> None:
        """Writes its values."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")


def cnn() -> nn.Module:
    """The model of the simulation."""
    torch.manual_seed(0)
    return OwnCNN()


def image_clients(users: int) -> dict[str, ClientData]:
    """Simulated clients with their images, none of which is read yet; one holds one sample out."""
    images, labels = data(users)
    held_out = {0: Pictures(images[0][:1], labels[0][:1])}
    return {f"user-{i:04}": ClientData(Pictures(images[i], labels[i]), held_out.get(i, ())) for i in range(len(images))}


class Pictures(Sequence[tuple[np.ndarray, int]]):
    """A client's (image, label) samples."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index], self.labels[index]


class Classification:
    """Cross-entropy over classes."""

    def bind(self, model: nn.Module, tokenizer: Any) -> Objective:
        """The objective; it needs nothing of the model."""
        return Objective(collate, summed_loss, lambda batch: len(batch[1]), measure)


def collate(samples: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """Images [N, 32, 32, 3] and labels [N]."""
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.array(labels))


def summed_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """The sum over the batch."""
    return cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def measure(model: nn.Module, samples: Sequence[tuple[np.ndarray, int]]) -> Measured:
    """Each sample's own loss."""
    images, labels = collate(samples)
    return Measured(cross_entropy(model(images), labels, reduction="none"))


class Pause:
    """No local work but a pause of `seconds`. Its gradients are noise, drawn by the task's own key.

    Updates of equal bytes would travel once for all: Flower's store takes an object once, whoever sends it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def bind(self, model: nn.Module, tokenizer: Any) -> Objective:
        """The objective, for whatever samples."""

        def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
            time.sleep(self.seconds)
            drawn = [(x * torch.randn_like(x)).sum() for x in model.parameters() if x.requires_grad]
            return torch.stack(drawn).sum(), 1

        return Objective(list, loss, lambda batch: 1, lambda model, samples: Measured(torch.zeros(len(samples))))
