"""What the core of a model reads while the whole model runs on data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from halp_fx.cores.calls import capture
from halp_fx.minibatches import device_of, inputs_of

__all__ = ["PartInputs"]


class PartInputs:
    """Minibatches of a core, without targets: what the dense model calls its parts with.

    Args:
        model: the dense model; left as it is.
        names: the parts whose tensors the core takes, in its order.
        data: minibatches of the whole model.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], data: Iterable[Any]) -> None:
        self.model, self.names, self.data = model, list(names), data

    def __iter__(self) -> Iterator[tuple[tuple[torch.Tensor, ...], None]]:
        device = device_of(self.model)
        for batch in self.data:
            _, tensors = capture(self.model, self.names, inputs_of(batch, device), "data")
            yield tuple(t for name in self.names for t in tensors[name]), None
