"""Small networks and data for the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracle import randomize

__all__ = ["Residual", "batches", "digits", "example", "network"]


class Residual(nn.Module):
    """x + bn(conv(relu(bn(conv(x)))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def network(seed: int = 0, width: int = 8) -> nn.Sequential:
    """A residual network for images (N, 1, 8, 8) and 10 classes, in train mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Residual(width),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            Residual(2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )
    return randomize(model, seed).train()  # type: ignore[return-value]


def example() -> Tensor:
    """An input to trace with."""
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))


def batches(
    count: int, size: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Random minibatches (images, classes)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.rand(size, 1, 8, 8, generator=generator).to(dtype),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


class _Shuffled:
    """Minibatches in a new order each time, the same in every run."""

    def __init__(self, images: Tensor, classes: Tensor, size: int) -> None:
        self.images, self.classes, self.size = images, classes, size
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for index in order.split(self.size):
            yield self.images[index], self.classes[index]


def digits(size: int = 32) -> tuple[Any, tuple[Tensor, Tensor]]:
    """scikit-learn's digits: (training minibatches, (test images, test classes))."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    classes = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return _Shuffled(images[train], classes[train], size), (images[test], classes[test])
