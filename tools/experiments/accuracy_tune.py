"""Fine-tuning, the same for all methods."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from halp_fx.errors import DivergedError
from halp_fx.tools.experiments.accuracy_data import Batches, correct
from halp_fx.tools.experiments.accuracy_task import Task
from halp_fx.training import Distillation, fine_tune

__all__ = ["Remembering", "best_tuned", "random_devices", "training_loss", "tune"]


class Remembering(nn.Module):
    """A network that runs once on each minibatch: all methods and rates train on the same ones.

    Minibatches are told apart by what is in them. For a network in eval mode, without gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._known: dict[bytes, torch.Tensor] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        key = hashlib.sha256(images.contiguous().cpu().numpy().data).digest()
        if key not in self._known:
            self._known[key] = self.network(images).cpu()
        return self._known[key].to(images.device)


def best_tuned(
    task: Task, network: nn.Module, seed: int, *, used: int = 0, recovery: str | None = None
) -> tuple[nn.Module, float | None]:
    """The network fine-tuned at the rate of the settings that suits it best, and that rate.

    Of several rates, that which gives the highest accuracy on images kept for choosing, and the
    first of those that do.

    Args:
        network: it is left as it is.
        task, seed, used, recovery: as for `tune`.

    Returns:
        Rate None where no training is due.

    Raises:
        DivergedError: no rate leads to a finite loss.
    """
    settings = task.settings
    if settings.tune_images - used < 1:
        return deepcopy(network), None
    images = task.choosing()
    best: tuple[float, nn.Module, float] | None = None
    diverged: DivergedError | None = None
    for rate in settings.rates:
        trial = deepcopy(network)
        # Each sees the same dropout as it would alone.
        with torch.random.fork_rng(devices=random_devices(task.device)):
            torch.manual_seed(seed)
            try:
                tune(task, trial, seed, rate=rate, used=used, recovery=recovery)
            except DivergedError as error:
                diverged = error
                continue
        right = float(correct(trial, images).mean()) if len(settings.rates) > 1 else 0.0
        if best is None or right > best[0]:
            best = right, trial, rate
    if best is None:
        assert diverged is not None
        raise diverged
    return best[1:]


def training_loss(task: Task, recovery: str | None = None) -> Any:
    """What networks are trained by: the task's loss, or the dense network.

    Args:
        recovery: "plain" or "distilled"; None: as the settings say.
    """
    if (recovery or task.settings.recovery) == "plain":
        return task.loss
    teacher = task.once("teacher", lambda: Remembering(deepcopy(task.dense).to(task.device)))
    return Distillation(teacher, alpha=task.settings.alpha)


def random_devices(device: str) -> Sequence[int]:
    """The CUDA devices whose random state counts when training on this one."""
    return range(torch.cuda.device_count()) if device.startswith("cuda") else []


def tune(
    task: Task,
    network: nn.Module,
    seed: int,
    *,
    images: int | None = None,
    used: int = 0,
    recovery: str | None = None,
    rate: float | None = None,
) -> None:
    """Fine-tune a network in place, and recalibrate it: the same for all methods.

    SGD with momentum 0.9, the learning rate in one cycle, images shifted and mirrored.

    Args:
        task: whose training images and settings count.
        network: on the task's device.
        seed: of order and augmentation.
        images: that are due; None: as the settings say.
        used: images that were trained on already, of those that are due; the next ones follow.
        recovery: "plain" or "distilled"; None: as the settings say.
        rate: the highest learning rate; None: the first of the settings.
    """
    settings = task.settings
    rate = settings.rates[0] if rate is None else rate
    left = (settings.tune_images if images is None else images) - used
    if left < 1:
        return
    data = Batches(task.train, settings.batch, seed, left, settings.shift, skip=used)
    loss = training_loss(task, recovery)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    rise = 0.2 if len(data) > 4 else 0.3  # OneCycleLR divides by rise * total_steps - 1
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=len(data) + 1, pct_start=rise, cycle_momentum=False
    )
    fine_tune(network, data, loss, optimizer=optimizer, scheduler=scheduler)
    task.recalibrate(network, seed)
