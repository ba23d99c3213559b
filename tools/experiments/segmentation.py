"""Segmentation of street scenes: a small DeepLabV3, or LR-ASPP on MobileNetV3."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halp_fx.errors import InputError
from halp_fx.tools.experiments.data import (
    Minibatches,
    data_folder,
    in_order,
    library,
    shuffled,
)
from halp_fx.tools.experiments.metrics import mean_iou
from halp_fx.tools.experiments.segmentation_data import CLASSES, VOID, load_scenes
from halp_fx.tools.experiments.task import Task, Tick

__all__ = ["NETWORKS", "Segmentation", "small_deeplab"]


class Segmentation(Task):
    """A network of `NETWORKS` on CamVid, 240x180.

    Args:
        data: folder of all data; None: the environment variable HALP_FX_DATA.
        network: a name in `NETWORKS`.
        batch: images a minibatch, at least 2: some batch norms see one pixel an image.
        train_images, test_images: use so many; None: all.

    Raises:
        InputError: the data are missing, or there is no such network.
    """

    name = "segmentation"
    metrics = ("mIoU", "pixels")

    def __init__(
        self,
        data: Path | None = None,
        *,
        network: str = "deeplab",
        batch: int = 8,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        if network not in NETWORKS:
            raise InputError(f"there is no network {network!r}: pass {' or '.join(NETWORKS)}")
        folder = data_folder(data, "camvid")
        self._train = load_scenes(folder, "train", train_images)
        self._test = load_scenes(folder, "test", test_images)
        self._network = network
        self._batch = min(batch, len(self._train))
        if self._batch < 2:
            raise InputError("a minibatch must have 2 images at least: pass a larger --batch")

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return NETWORKS[self._network]()

    def example(self) -> Tensor:
        return self._test.plain(0)[0][None]

    def epoch(self, seed: int, number: int) -> Minibatches:
        def augmented(indices: list[int]) -> tuple[Tensor, Tensor]:
            return _stacked(self._train.augmented(i, (seed, number)) for i in indices)

        return Minibatches(shuffled(len(self._train), seed, number), self._batch, augmented)

    def calm(self, seed: int, batches: int) -> list[Any]:
        plain = Minibatches(
            shuffled(len(self._train), seed, 0)[: batches * self._batch],
            self._batch,
            lambda indices: _stacked(self._train.plain(i) for i in indices),
        )
        return list(plain)

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        return _cross_entropy(network(images), labels)

    def scoring(self) -> dict[str, Any]:
        return {"loss": _cross_entropy}

    def recalibration(self, batches: list[Any]) -> list[Any]:
        return batches

    @torch.no_grad()
    def evaluate(self, network: nn.Module, tick: Tick) -> dict[str, float]:
        network.eval()

        def pairs() -> Iterable[tuple[Tensor, Tensor]]:
            for indices in in_order(len(self._test), self._batch):
                images, labels = _stacked(self._test.plain(i) for i in indices)
                yield network(images)["out"].argmax(1), labels
                tick(indices[-1] + 1, len(self._test))

        return mean_iou(pairs(), CLASSES)

    def core(self, network: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
        return network.eval(), (self.example(),)

    def test_count(self) -> int:
        return len(self._test)

    def facts(self) -> dict[str, Any]:
        return {
            "network": self._network,
            "batch": self._batch,
            "train_images": len(self._train),
        }


def small_deeplab() -> nn.Module:
    """DeepLabV3 with residual blocks of 32, 64 and 128 channels at an output stride of 8.

    Raises:
        DependencyError: torchvision is not installed.
    """
    models = "torchvision.models"
    block = library(f"{models}.resnet", "torchvision").BasicBlock
    deeplab = library(f"{models}.segmentation.deeplabv3", "torchvision")

    def stage(channels_in: int, channels: int, stride: int) -> nn.Module:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        )
        first = block(channels_in, channels, stride, shortcut)
        return nn.Sequential(first, block(channels, channels))

    body = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(*_unit(3, 32, 2)),
            layer1=stage(32, 32, 2),
            layer2=stage(32, 64, 2),
            layer3=stage(64, 128, 1),
        )
    )
    head = nn.Sequential(
        deeplab.ASPP(128, [3, 6, 9], out_channels=64), *_unit(64, 64, 1), nn.Conv2d(64, CLASSES, 1)
    )
    network: nn.Module = deeplab.DeepLabV3(_Named(body), head)
    return network


def _lraspp() -> nn.Module:
    make = library("torchvision.models.segmentation", "torchvision").lraspp_mobilenet_v3_large
    network: nn.Module = make(weights=None, weights_backbone=None, num_classes=CLASSES)
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {"deeplab": small_deeplab, "lraspp": _lraspp}


class _Named(nn.Module):
    """Gives its features under the name that torchvision's networks look for."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(x)}


def _unit(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output["out"], labels, ignore_index=VOID)


def _stacked(samples: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)
