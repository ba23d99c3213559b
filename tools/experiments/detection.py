"""An SSD on 31 classes of things that lie on an airfield."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import halp_fx
from halp_fx.tools.detectors import TensorPart, small_ssd
from halp_fx.tools.experiments.data import Minibatches, data_folder, in_order, shuffled
from halp_fx.tools.experiments.detection_data import Target, load_boxed
from halp_fx.tools.experiments.metrics import mean_precision
from halp_fx.tools.experiments.task import Task, Tick

__all__ = ["Detection"]


class Detection(Task):
    """`halp_fx.tools.detectors.small_ssd` on images with boxes.

    Args:
        data: folder of all data; None: the environment variable HALP_FX_DATA.
        size: height and width that images are resized to.
        batch: images a minibatch.
        train_images, test_images: use so many; None: all.

    Raises:
        InputError: the data are missing.
    """

    name = "detection"
    metrics = ("mAP50", "mAP")

    def __init__(
        self,
        data: Path | None = None,
        *,
        size: int = 160,
        batch: int = 16,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        folder = data_folder(data, "detection")
        self._train = load_boxed(folder / "train.npz", size, train_images)
        self._test = load_boxed(folder / "test.npz", size, test_images)
        self._size = size
        self._batch = min(batch, len(self._train))

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return small_ssd(len(self._train.classes) + 1, self._size)

    def example(self) -> list[Tensor]:
        return [self._test.plain(0)[0]]

    def epoch(self, seed: int, number: int) -> Minibatches:
        def augmented(indices: list[int]) -> tuple[list[Tensor], list[Target]]:
            return _pairs(self._train.augmented(i, (seed, number)) for i in indices)

        return Minibatches(shuffled(len(self._train), seed, number), self._batch, augmented)

    def calm(self, seed: int, batches: int) -> list[Any]:
        plain = Minibatches(
            shuffled(len(self._train), seed, 0)[: batches * self._batch],
            self._batch,
            lambda indices: _pairs(self._train.plain(i) for i in indices),
        )
        return list(plain)

    def loss(self, network: nn.Module, batch: Any) -> Tensor:
        losses: dict[str, Tensor] = network(*batch)
        return torch.stack(list(losses.values())).sum()

    def scoring(self) -> dict[str, Any]:
        return {}  # of a detector: the sum of its losses

    def recalibration(self, batches: list[Any]) -> list[Any]:
        return [((images,), targets) for images, targets in batches]

    @torch.no_grad()
    def evaluate(self, network: nn.Module, tick: Tick) -> dict[str, float]:
        network.eval()
        found: list[Any] = []
        wanted: list[Target] = []
        for indices in in_order(len(self._test), self._batch):
            images, targets = _pairs(self._test.plain(i) for i in indices)
            found += network(images)
            wanted += targets
            tick(len(found), len(self._test))
        return mean_precision(found, wanted)

    def core(self, network: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
        image = torch.rand(1, 3, self._size, self._size, generator=torch.Generator().manual_seed(0))
        pruned = "halp_fx" in getattr(network, "meta", {})
        part = halp_fx.core_of(network) if pruned else TensorPart(network)
        return part.eval(), (image,)

    def test_count(self) -> int:
        return len(self._test)

    def facts(self) -> dict[str, Any]:
        return {"size": self._size, "batch": self._batch, "train_images": len(self._train)}


def _pairs(samples: Iterable[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
