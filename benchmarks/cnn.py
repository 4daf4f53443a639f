"""The 1.6M-parameter CNN of pfl-research's CIFAR10 benchmark, and its data. Needs torch and numpy alone.

Architecture (apple/pfl-research, benchmarks/model/pytorch/cnn.py, `simple_cnn` for 32 x 32 x 3 and 10 classes): two 3 x 3
convolutions of 32 and 64 channels with ReLU, 2 x 2 max pooling, dropout 0.25, a hidden layer of 128 with ReLU, dropout 0.5,
10 outputs; 1,626,442 parameters, Xavier-uniform. Written anew here; images come as [N, 32, 32, 3].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.samples import inputs_folder

LR = 0.1
BATCH = 10


class CNN(nn.Module):
    """Images [N, 32, 32, 3] -> logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.classify = nn.Sequential(
            nn.Dropout(0.25), nn.Flatten(), nn.Linear(14 * 14 * 64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, images_NHWC: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.features(images_NHWC.permute(0, 3, 1, 2)))
        return logits


def seeded_cnn(seed: int = 0) -> CNN:
    """The same values for every contestant."""
    torch.manual_seed(seed)
    return CNN()


def data(users: int) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [users, samples, 32, 32, 3], memory-mapped, and labels int64 [users, samples]."""
    folder = inputs_folder()
    images = np.load(folder / f"images-{users}.npy", mmap_mode="r", allow_pickle=False)
    return images, np.load(folder / f"labels-{users}.npy", allow_pickle=False)
