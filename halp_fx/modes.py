"""Train and eval modes of a network's modules, left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["in_eval"]


@contextmanager
def in_eval(network: nn.Module) -> Iterator[None]:
    """Eval mode; each module has its own mode back afterwards, also after an error."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
