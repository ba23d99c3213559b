"""Dropout in front of a layer, under which its weights must serve in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from halp_fx.reconstruction.norms import main_input

__all__ = ["Dropout", "dropout_before"]

_CHANNEL_MODULES = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_CHANNEL_FUNCTIONS = (F.dropout1d, F.dropout2d, F.dropout3d)
# What only moves values, or picks among them.
_KEEPING_MODULES = (nn.Identity, nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_FLAT = (torch.flatten, torch.reshape, "flatten", "reshape", "view")
_KEEPING = (
    F.relu, torch.relu, F.max_pool1d, F.max_pool2d, F.max_pool3d, "relu", "contiguous",
)  # fmt: skip
_MOST = 1e6  # variance of the factor, where all is dropped


@dataclass(frozen=True)
class Dropout:
    """Multiplicative noise on what a layer reads: `x * mask / (1 - p)`."""

    variance: float  # of the factor, p / (1 - p)
    channels: bool  # whole channels are dropped


def dropout_before(node: fx.Node, network: fx.GraphModule) -> Dropout | None:
    """The dropout whose outputs a layer reads, as they are or pooled by their maximum."""
    current, flat = main_input(node), False
    while isinstance(current, fx.Node):
        target: Any = current.target
        if current.op == "call_module":
            target = network.get_submodule(str(current.target))
        p = _probability(current, target)
        if p is not None:
            whole = isinstance(target, _CHANNEL_MODULES) or target in _CHANNEL_FUNCTIONS
            variance = p / max(1 - p, 1 / _MOST)
            return Dropout(variance, whole and not flat) if variance > 0 else None
        if isinstance(target, nn.Flatten) or target in _FLAT:
            flat = True
        elif not (isinstance(target, _KEEPING_MODULES) or target in _KEEPING):
            return None
        current = main_input(current)
    return None


def _probability(node: fx.Node, target: Any) -> float | None:
    if isinstance(target, (nn.Dropout, *_CHANNEL_MODULES)):
        return float(target.p)
    if node.op != "call_function" or target not in (F.dropout, *_CHANNEL_FUNCTIONS):
        return None
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    return float(given) if isinstance(given, (int, float)) else None
