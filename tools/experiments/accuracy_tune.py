"""Fine-tuning, the same for all methods."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from halp_fx.tools.experiments.accuracy_data import Batches
from halp_fx.tools.experiments.accuracy_task import Task
from halp_fx.training import Distillation, fine_tune

__all__ = ["tune"]


def tune(
    task: Task,
    network: nn.Module,
    seed: int,
    *,
    images: int | None = None,
    used: int = 0,
    recovery: str | None = None,
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
    """
    settings = task.settings
    left = (settings.tune_images if images is None else images) - used
    if left < 1:
        return
    data = Batches(task.train, settings.batch, seed, left, settings.shift, skip=used)
    loss: Any = task.loss
    if (recovery or settings.recovery) == "distilled":
        teacher = task.once("teacher", lambda: deepcopy(task.dense).to(task.device))
        loss = Distillation(teacher, alpha=settings.alpha)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=settings.rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    rise = 0.2 if len(data) > 4 else 0.3  # OneCycleLR divides by rise * total_steps - 1
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=len(data) + 1, pct_start=rise, cycle_momentum=False
    )
    fine_tune(
        network, data, loss, optimizer=optimizer, scheduler=scheduler, clip_norm=settings.clip_norm
    )
    task.recalibrate(network, seed)
