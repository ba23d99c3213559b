"""Modules that do nothing in eval mode, as dropout and stochastic depth."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from halp_fx.random_state import same_random_state

__all__ = ["acts_in_training_only", "is_idle"]

_RANKS = (4, 3, 2, 5)  # of the tensors that a module is tried on


def is_idle(module: nn.Module) -> bool:
    """Whether a module without tensors and hooks gives back its input in eval mode.

    Seen by running a copy on tensors without data, of all ranks that it takes.
    """
    parts = list(module.modules())
    if any(part._parameters or part._buffers for part in parts):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return False
    if any(isinstance(value, fx.Proxy) for part in parts for value in vars(part).values()):
        return False  # it holds what is being traced
    with _unseen():
        found = [_gives_back(module, rank, training=False) for rank in _RANKS]
    return True in found and False not in found


def acts_in_training_only(module: nn.Module) -> bool:
    """Whether an idle module does something in train mode, or asks for the mode."""
    if not is_idle(module):
        return False
    if any("training" in _names(part) for part in module.modules()):
        return True  # what it does may be left to chance
    with _unseen():
        return not all(_gives_back(module, rank, training=True) is not False for rank in _RANKS)


def _names(module: nn.Module) -> tuple[str, ...]:
    code = getattr(type(module).forward, "__code__", None)
    plain = type(module).__module__.startswith("torch.nn.")
    return () if code is None or plain else tuple(code.co_names)


def _gives_back(module: nn.Module, rank: int, *, training: bool) -> bool | None:
    """None where it takes no tensor of this rank."""
    x = torch.empty((2,) * rank, device="meta")
    try:
        found: Any = _in_mode(module, training)(x)
    except Exception:  # noqa: BLE001  whatever its operators raise
        return None
    return found is x and not x._version


def _in_mode(module: nn.Module, training: bool) -> nn.Module:
    """A copy of the modules alone: what else they hold may be large."""
    twin = copy.copy(module)
    twin._modules = {
        name: None if part is None else _in_mode(part, training)
        for name, part in module._modules.items()
    }
    twin.training = training
    return twin


@contextmanager
def _unseen() -> Iterator[None]:
    """No gradients and no warnings meanwhile, and random numbers as before afterwards."""
    with torch.no_grad(), same_random_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
