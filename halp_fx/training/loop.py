"""A small training loop, for recovery after pruning and for pruning while training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from halp_fx.errors import DivergedError, InputError
from halp_fx.minibatches import device_of, moved
from halp_fx.training.arguments import check_model
from halp_fx.training.distillation import Distillation
from halp_fx.training.pruner import GradualPruner

__all__ = ["fine_tune"]


def fine_tune(
    model: nn.Module | GradualPruner,
    data: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor] | Distillation,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    epochs: int = 1,
    clip_norm: float | None = None,
    ema: Any = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train a network, in place and in train mode; its modes are given back at the end.

    Args:
        model: a network, or a `GradualPruner`, which then scores and shrinks its network.
        data: minibatches `(inputs, target)`, gone through anew each epoch.
        loss: `loss(output, target)`, as `nn.CrossEntropyLoss(label_smoothing=0.1)`; or a
            `Distillation`.
        optimizer: of the network's parameters. None: SGD, learning rate 0.01, momentum 0.9,
            Nesterov, weight decay 1e-4.
        scheduler: a learning rate schedule of that optimiser, stepped once a minibatch.
        epochs: how often to go through the data.
        clip_norm: the largest norm of all gradients together.
        ema: a `torch.optim.swa_utils.AveragedModel` of the network (`pruner.network`), updated
            after each minibatch.
        progress: called as `progress(epoch, minibatch, loss)`, both counted from 1.

    Returns:
        The mean loss of each epoch.

    Raises:
        InputError: no data, or an optimiser of another network.
        DivergedError: a loss that is not finite.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> data = [(torch.rand(8, 3), torch.zeros(8, dtype=torch.int64))]
        >>> first, last = fine_tune(net, data, nn.CrossEntropyLoss(), epochs=2)
        >>> last < first
        True
    """
    pruner = model if isinstance(model, GradualPruner) else None
    network = pruner.network if pruner is not None else model
    check_model(network)
    assert isinstance(network, nn.Module)
    if optimizer is None and scheduler is not None:
        raise InputError("scheduler was given without optimizer: pass the one that it changes")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise InputError(f"epochs is {epochs!r}: pass a whole number")
    if clip_norm is not None and not clip_norm > 0:
        raise InputError(f"clip_norm is {clip_norm!r}: pass a number above 0, or None")
    if optimizer is None:
        optimizer = torch.optim.SGD(
            network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
    _check_trains(optimizer, network)
    modes = {path: module.training for path, module in network.named_modules()}
    means: list[float] = []
    try:
        network.train()
        optimizer.zero_grad()  # of what was done before
        for epoch in range(1, epochs + 1):
            losses: list[float] = []
            for inputs, target in data:
                current = pruner.model if pruner is not None else network
                value = _value_of(current, inputs, target, loss)
                losses.append(float(value.detach()))
                if not math.isfinite(losses[-1]):
                    raise DivergedError(
                        f"the loss is {losses[-1]} in minibatch {len(losses)} of epoch {epoch}: "
                        "check the data, or lower the learning rate"
                    )
                value.backward()
                if pruner is not None:
                    pruner.after_backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
                if ema is not None:
                    ema.update_parameters(network)
                if pruner is not None:
                    pruner.step(optimizer, ema=ema)
                if progress is not None:
                    progress(epoch, len(losses), losses[-1])
            if not losses:
                raise InputError(
                    f"data has no minibatches in epoch {epoch}: pass a list or a loader, which "
                    "can be gone through more than once"
                )
            means.append(sum(losses) / len(losses))
    finally:
        for path, module in network.named_modules():
            module.training = modes.get(path, network.training)
    return means


def _check_trains(optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    own = {id(p) for p in network.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise InputError(
            f"{type(optimizer).__name__} has no parameter of the network that is trained, maybe "
            "those of the dense one: build it from the parameters of what is passed here "
            "(pruned.parameters(), or pruner.model.parameters())"
        )


def _value_of(
    network: nn.Module,
    inputs: Any,
    target: Any,
    loss: Callable[[Any, Any], torch.Tensor] | Distillation,
) -> torch.Tensor:
    device = device_of(network)
    given = moved(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), device)
    aim = moved(target, device)
    if isinstance(loss, Distillation):
        return loss(network, given, aim)[1]
    return loss(network(*given), aim)
