"""CIFAR-10: its images, and the two networks that have trained weights in the data folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from halp_fx.errors import InputError
from halp_fx.tools.experiments.accuracy_data import Images, existing
from halp_fx.tools.experiments.data import library

__all__ = ["NETWORKS", "VGG16", "ResNet56", "cifar_images", "cifar_network"]

_SIDE, _ACROSS, _DOWN = 32, 10, 100  # a mosaic has 1,000 images, in order


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet56(nn.Module):
    """The residual network for CIFAR of He et al. (CVPR 2016), section 4.2, with n = 9.

    Input (N, 3, 32, 32), values from 0 to 1; output (N, 10).

    Args:
        blocks: in each of the three stages.
        width: channels of the first stage.
    """

    def __init__(self, blocks: int = 9, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        y: torch.Tensor = self.linear(x.mean((2, 3)))
        return y


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(channels_in, channels, stride)
    return nn.Sequential(first, *(_Block(channels, channels, 1) for _ in range(blocks - 1)))


class VGG16(nn.Module):
    """VGG-16 with batch norm for CIFAR: (N, 3, 32, 32), values from 0 to 1, to (N, 10).

    Args:
        widths: channels of the five blocks; the first two have two convolutions, the others three.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 512)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels_in = 3
        for block, channels in enumerate(widths):
            convolutions = 2 if block < 2 else 3
            for i in range(convolutions):
                layers += [
                    nn.Conv2d(channels_in, channels, 3, padding=1),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.MaxPool2d(2) if i == convolutions - 1 else nn.Dropout(0.4 if block else 0.3),
                ]
                channels_in = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(channels_in, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classifier(self.features(x).flatten(1))
        return y


# Name -> (class, file of the weights, last layer, accuracy on the 10,000 test images).
NETWORKS: dict[str, tuple[type[nn.Module], str, str, float]] = {
    "resnet56": (ResNet56, "weights/resnet56_cifar10.safetensors", "linear", 0.9320),
    "vgg16": (VGG16, "weights/vgg16_cifar10.safetensors", "classifier.5", 0.9225),
}


def cifar_network(folder: Path, name: str) -> tuple[nn.Module, str]:
    """A trained network in eval mode, and the name of its last layer.

    Raises:
        InputError: there is no such network or file, or the weights don't fit.
    """
    if name not in NETWORKS:
        raise InputError(f"there is no network {name!r} for CIFAR-10: use {', '.join(NETWORKS)}")
    kind, file, head, _ = NETWORKS[name]
    path = existing(folder, file)
    network = kind()
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights in {file} don't fit {kind.__name__}: {error}") from error
    return network.eval(), head


def cifar_images(folder: Path, part: str) -> Images:
    """All images of `cifar10/PART_NN.webp`, in order; `part` is "train" or "test".

    Raises:
        InputError: there are none, or a file is no mosaic of 1,000 images.
        DependencyError: Pillow is not installed.
    """
    reader = library("PIL.Image", "pillow")
    labels = torch.from_numpy(np.load(existing(folder, f"cifar10/{part}_labels.npy")))
    mosaics = sorted((folder / "cifar10").glob(f"{part}_[0-9][0-9].webp"))
    if not mosaics:
        raise InputError(f"the data folder {str(folder)!r} has no cifar10/{part}_NN.webp")
    parts = []
    for path in mosaics:
        array = np.asarray(reader.open(path).convert("RGB"))
        if array.shape != (_DOWN * _SIDE, _ACROSS * _SIDE, 3):
            raise InputError(
                f"{path.name} has shape {array.shape}: it is no mosaic of 1,000 images"
            )
        tiles = array.reshape(_DOWN, _SIDE, _ACROSS, _SIDE, 3).transpose(0, 2, 4, 1, 3)
        parts.append(torch.from_numpy(tiles.reshape(-1, 3, _SIDE, _SIDE).copy()))
    pixels = torch.cat(parts)
    if len(pixels) != len(labels):
        raise InputError(f"{len(pixels)} images of {part}, but {len(labels)} labels")
    return Images(pixels, labels.long())
