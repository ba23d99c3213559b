"""What goes into a network from a minibatch, and the numbers that come out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["float_tensors", "inputs_of"]


def inputs_of(batch: Any, device: torch.device) -> tuple[Any, ...]:
    """The inputs of a batch `(inputs, target)`, or of one that is a tensor of inputs."""
    given = batch[0] if isinstance(batch, (tuple, list)) else batch
    items = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in items)


def float_tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of real numbers in an output: itself, or what its containers hold, in order."""
    leaves = pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
