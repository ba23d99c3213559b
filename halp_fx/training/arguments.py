"""What the caller passes, checked: each error names the argument and what to pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from halp_fx.errors import InputError
from halp_fx.passes.saliency import BY_LOSS

__all__ = [
    "Optimizers",
    "check_count",
    "check_forward",
    "check_model",
    "check_saliency",
    "check_scale",
    "check_smoothing",
    "listed",
    "optimizers_in",
]

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def check_model(model: Any) -> None:
    """Whether it is a network."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: pass a torch.nn.Module")


def check_count(name: str, count: Any) -> None:
    """Whether it is a whole number of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"{name} is {count!r}: pass a whole number of at least 1")


def check_smoothing(smoothing: Any) -> None:
    """Whether it is the weight of the past, or None."""
    if smoothing is not None and not (_is_number(smoothing) and 0 <= smoothing < 1):
        raise InputError(f"smoothing is {smoothing!r}: pass None or a number from 0 to below 1")


def check_saliency(saliency: Any) -> None:
    """Whether it is a score that gradients give."""
    if saliency not in tuple(BY_LOSS):  # what can't be hashed is no method either
        raise InputError(
            f"saliency is {saliency!r}: pass 'fisher', 'taylor1.5' or 'taylor', which are taken "
            "from the gradients of the training loop"
        )


def check_scale(scale: Any) -> float:
    """What the loss was multiplied by, as a number."""
    number = scale.item() if isinstance(scale, torch.Tensor) and scale.numel() == 1 else scale
    if not (_is_number(number) and number > 0 and math.isfinite(number)):
        raise InputError(f"scale is {scale!r}: pass what the loss was multiplied by")
    return float(number)


def check_forward(network: nn.Module) -> None:
    """Whether the network runs its own code, which changes with each cut.

    Raises:
        InputError: `network.forward` was replaced by something bound to the code before a cut.
    """
    if "forward" in vars(network):
        raise InputError(
            "the forward of pruner.network was replaced, and would go on running the network as "
            "it was before a cut (accelerator.prepare does this for mixed precision): run "
            "pruner.model in accelerator.autocast() instead, or wrap a module around the network"
        )


def optimizers_in(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimisers that were passed, one or several; an empty list where there is none."""
    found: list[Any] = [None] if optimizer is None else listed(optimizer)
    for each in found:
        if not isinstance(each, torch.optim.Optimizer):
            raise InputError(
                f"optimizer is a {type(each).__name__}: pass the torch.optim.Optimizer that trains "
                "pruner.model, or all of them in a list"
            )
    return found


def listed(value: Any) -> list[Any]:
    """Nothing, one or several as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
