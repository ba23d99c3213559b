"""Modules that do nothing in eval mode, as dropout and stochastic depth."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

__all__ = ["acts_in_training_only", "is_idle"]

_RANKS = (4, 3, 2, 5)  # of the tensors that a module is tried on


def is_idle(module: nn.Module) -> bool:
    """Whether a module without tensors and hooks gives back its input in eval mode.

    Seen by running a copy on tensors without data.
    """
    if type(module) is nn.Identity:
        return True
    if any(part._parameters or part._buffers for part in module.modules()):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return False
    return any(_gives_back(module, rank, training=False) for rank in _RANKS)


def acts_in_training_only(module: nn.Module) -> bool:
    """Whether an idle module does something in train mode."""
    return is_idle(module) and not any(_gives_back(module, rank, training=True) for rank in _RANKS)


def _gives_back(module: nn.Module, rank: int, *, training: bool) -> bool:
    x = torch.empty((2,) * rank, device="meta")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found: Any = copy.deepcopy(module).train(training)(x)
    except Exception:  # noqa: BLE001  it takes other inputs, or draws what needs data
        return False
    return found is x and not x._version
