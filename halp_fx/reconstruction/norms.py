"""Batch norms of a graph, whether modules or functions, and the names that tensors have there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from halp_fx.passes.rules.structure import named_tensors

__all__ = ["Norm", "Spread", "Tensors", "main_input", "spread_of"]

_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum")


@dataclass(frozen=True)
class Norm:
    """A batch norm with running statistics."""

    name: str  # of the running mean
    mean: torch.Tensor  # running, (channels,)
    var: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


class Tensors:
    """The tensors of a network by name, and which of them one node alone reads."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.known = dict(named_tensors(network))
        self._owners = Counter(id(tensor) for tensor in self.known.values())
        self._reads = Counter(name for node in network.graph.nodes for name in self._read_by(node))

    def alone(self, name: str) -> bool:
        """Whether a tensor has one name only, and one node reads it."""
        tensor = self.known.get(name)
        return tensor is not None and self._owners[id(tensor)] == 1 == self._reads[name]

    def norm_at(self, node: fx.Node) -> Norm | None:
        """The batch norm that a node is, unless others share its tensors."""
        if node.op == "call_module":
            module: Any = self.network.get_submodule(str(node.target))
            if not isinstance(module, _MODULES) or module.running_mean is None:
                return None
            path, eps = str(node.target), module.eps
            parts = ("running_mean", "running_var", "weight", "bias")
            names = [f"{path}.{p}" if getattr(module, p) is not None else None for p in parts]
        elif node.op == "call_function" and node.target is F.batch_norm:
            given: Any = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
            names = [_name(given.get(part)) for part in _ARGUMENTS[1:5]]
            eps = given.get("eps", node.args[7] if len(node.args) > 7 else 1e-5)
        else:
            return None
        if None in names[:2] or not all(name is None or self.alone(name) for name in names):
            return None
        mean, var, weight, bias = (None if n is None else self.known[n] for n in names)
        assert mean is not None
        assert var is not None
        return Norm(str(names[0]), mean, var, weight, bias, float(eps))

    def _read_by(self, node: fx.Node) -> Iterator[str]:
        if node.op == "get_attr":
            yield str(node.target)
        elif node.op == "call_module":
            module = self.network.get_submodule(str(node.target))
            for name, _ in named_tensors(module):
                yield f"{node.target}.{name}"


def main_input(node: fx.Node) -> Any:
    """What a layer or a norm is called on; None where it is called on nothing."""
    return node.args[0] if node.args else node.kwargs.get("input")


def _name(value: Any) -> str | None:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


@dataclass(frozen=True)
class Spread:
    """Mean and variance (channels,) of what a batch norm reads, float64."""

    mean: torch.Tensor
    var: torch.Tensor

    def finite(self) -> bool:
        """Whether there is no NaN and no infinity."""
        return bool(self.mean.isfinite().all() and self.var.isfinite().all())


def spread_of(values: Sequence[torch.Tensor]) -> Spread:
    """Over all but the channels, dim 1."""
    count = 0
    about: torch.Tensor | None = None
    total = square = torch.zeros(())
    for value in values:
        flat = value.detach().transpose(0, 1).flatten(1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        if about is None:
            about = flat.mean(1, keepdim=True)
            total = square = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
        near = flat - about
        total = total + near.sum(1).double()
        square = square + near.square().sum(1).double()
        count += flat.shape[1]
    assert about is not None
    mean = total / count
    return Spread(about[:, 0].double() + mean, (square / count - mean.square()).clamp_min(0))
