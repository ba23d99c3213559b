"""What an experiment is about: a network, its data, its loss and how good it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halp_fx.tools.experiments.training import Epochs

__all__ = ["Task", "Tick"]

Tick = Callable[[int, int], None]  # (done, total)


class Task(ABC):
    """A network that is trained, pruned and compared; each experiment derives from it."""

    name: str
    metrics: tuple[str, ...]  # what `evaluate` tells; charts show the first

    @abstractmethod
    def network(self) -> nn.Module:
        """The untrained network, the same one each time."""

    @abstractmethod
    def example(self) -> Any:
        """Example inputs as `halp_fx.compile` takes them: one image."""

    @abstractmethod
    def epoch(self, seed: int, number: int) -> Epochs:
        """Minibatches of an epoch of training, augmented."""

    @abstractmethod
    def calm(self, seed: int, batches: int) -> list[Any]:
        """Minibatches of training images as they are, to score channels and recalibrate by."""

    @abstractmethod
    def loss(self, network: nn.Module, batch: Any) -> torch.Tensor:
        """The loss of a network in training mode."""

    @abstractmethod
    def scoring(self) -> dict[str, Any]:
        """Arguments of `halp_fx.compile` that say the loss by which channels are scored."""

    @abstractmethod
    def recalibration(self, batches: list[Any]) -> list[Any]:
        """`calm` minibatches as `halp_fx.recalibrate` takes them."""

    @abstractmethod
    def evaluate(self, network: nn.Module, tick: Tick) -> dict[str, float]:
        """Each of `metrics` of a network, on the test images."""

    @abstractmethod
    def core(self, network: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """What the latency is of, dense or pruned, and its inputs."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the trained weights depend on, for the checkpoint: JSON values."""

    @abstractmethod
    def test_count(self) -> int:
        """How many test images `evaluate` takes."""
