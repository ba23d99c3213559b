"""Fine-tuning, the same for all methods."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn

from halp_fx.tools.experiments.accuracy_data import Batches, correct
from halp_fx.tools.experiments.accuracy_task import Task
from halp_fx.training import Distillation, fine_tune

__all__ = ["tune", "tuned"]

Network = TypeVar("Network", bound=nn.Module)


def tuned(
    task: Task, network: Network, seed: int, *, used: int = 0, recovery: str | None = None
) -> tuple[Network, float]:
    """The network fine-tuned at the rate of the settings that suits it best, and that rate.

    Of several rates, that which gives the highest accuracy on images kept for choosing.

    Args:
        network: it is left as it is.
        task, seed, used, recovery: as for `tune`.
    """
    settings = task.settings
    images = task.choose.sample(settings.choose_images, 0)
    best: tuple[float, Network, float] | None = None
    for rate in settings.rates:
        trial = deepcopy(network)
        tune(task, trial, seed, rate=rate, used=used, recovery=recovery)
        right = float(correct(trial, images).mean()) if len(settings.rates) > 1 else 0.0
        if best is None or right > best[0]:
            best = right, trial, rate
    assert best is not None
    return best[1:]


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

    SGD with momentum 0.9, the learning rate in one cycle, gradients clipped, images shifted and
    mirrored.

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
    loss: Any = task.loss
    if (recovery or settings.recovery) == "distilled":
        teacher = task.once("teacher", lambda: deepcopy(task.dense).to(task.device))
        loss = Distillation(teacher, alpha=settings.alpha)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    rise = 0.2 if len(data) > 4 else 0.3  # OneCycleLR divides by rise * total_steps - 1
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=len(data) + 1, pct_start=rise, cycle_momentum=False
    )
    fine_tune(
        network, data, loss, optimizer=optimizer, scheduler=scheduler, clip_norm=settings.clip_norm
    )
    task.recalibrate(network, seed)
