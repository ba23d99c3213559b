"""What goes into a network from a minibatch, where to, and the numbers that come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from halp_fx.errors import InputError

__all__ = ["device_of", "each_of", "float_tensors", "inputs_of", "moved", "target_of"]


def device_of(module: nn.Module) -> torch.device:
    """Where the parameters are; the CPU where there are none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def each_of(data: Any) -> Iterator[Any]:
    """The minibatches of a list or a loader, one after the other.

    Raises:
        InputError: it is one tensor, or can't hold any.
    """
    if not isinstance(data, torch.Tensor):
        try:
            return iter(data)
        except TypeError:
            pass
    raise InputError(f"data is a {type(data).__name__}: pass a list of minibatches, or a loader")


def moved(value: Any, device: torch.device) -> Any:
    """The same value with all tensors in its containers on the device."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, value)


def inputs_of(batch: Any, device: torch.device) -> tuple[Any, ...]:
    """The inputs of a batch `(inputs, target)`, or of one that is a tensor of inputs."""
    given = batch[0] if isinstance(batch, (tuple, list)) else batch
    items = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    return tuple(moved(x, device) for x in items)


def target_of(batch: Any, device: torch.device) -> Any:
    """The target of a batch `(inputs, target)`; None of one that has inputs alone."""
    target = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return moved(target, device)


def float_tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of real numbers in an output: itself, or what its containers hold, in order."""
    return [x for x in _tensors(output) if x.is_floating_point()]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from _tensors(getattr(leaf, field.name))
