"""Convolutions and linear layers of a graph, whether modules or functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from halp_fx.reconstruction.norms import Tensors

__all__ = ["LinearMap", "map_at", "map_of"]

_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_FUNCTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, F.linear: 0}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class LinearMap:
    """`y = W x + b` of patches of an image, or of the last dim where there are no `kernel` dims."""

    name: str  # of the weight
    weight: torch.Tensor  # (outputs, inputs of a group, kernel ...)
    bias: torch.Tensor | None
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # as `F.pad` takes it
    mode: str = "constant"  # of the padding
    groups: int = 1

    @property
    def inputs(self) -> int:
        """Numbers that an output is computed from."""
        return self.weight[0].numel()


def map_at(node: fx.Node, tensors: Tensors) -> LinearMap | None:
    """What a node computes, unless others share its weights or it does something besides."""
    found: LinearMap | None = None
    bias: Any = None
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        module: Any = tensors.network.get_submodule(str(node.target))
        found = map_of(module, f"{node.target}.weight")
        bias = f"{node.target}.bias" if found is not None and found.bias is not None else None
    elif node.op == "call_function" and node.target in _FUNCTIONS:
        given = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        weight, bias = given.get("weight"), given.get("bias")
        if not _is_constant(weight) or not (bias is None or _is_constant(bias)):
            return None
        bias = None if bias is None else str(bias.target)
        found = _of_function(_FUNCTIONS[node.target], given, tensors, bias)
    if found is None or not tensors.alone(found.name):
        return None
    return found if bias is None or tensors.alone(bias) else None


def map_of(module: Any, name: str = "weight") -> LinearMap | None:
    """What a module computes; None where it has hooks, computed weights or its own forward."""
    kind: Any = next((k for k in _MODULES if isinstance(module, k)), None)
    if kind is None or type(module).forward is not kind.forward:
        return None
    weight = module._parameters.get("weight")
    if weight is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    if kind is nn.Linear:
        return LinearMap(name, weight, module.bias)
    return LinearMap(
        name, weight, module.bias, module.kernel_size, module.stride, module.dilation,
        tuple(module._reversed_padding_repeated_twice),
        "constant" if module.padding_mode == "zeros" else module.padding_mode, module.groups,
    )  # fmt: skip


def _of_function(
    dims: int, given: dict[str, Any], tensors: Tensors, bias: str | None
) -> LinearMap | None:
    name = str(given["weight"].target)
    weight = tensors.known[name]
    own = None if bias is None else tensors.known[bias]
    if not dims:
        return LinearMap(name, weight, own)
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_numbers(given.get(k, 1), dims) for k in ("stride", "dilation"))
    groups, padding = given.get("groups", 1), given.get("padding", 0)
    if stride is None or dilation is None or not isinstance(groups, int) or len(kernel) != dims:
        return None
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sizes = _numbers(0 if padding == "valid" else padding, dims)
        if sizes is None:
            return None
        sides = [(size, size) for size in sizes]
    pads = tuple(size for pair in reversed(sides) for size in pair)
    return LinearMap(name, weight, own, kernel, stride, dilation, pads, groups=groups)


def _is_constant(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _numbers(value: Any, dims: int) -> tuple[int, ...] | None:
    """One number a dim; None where they are computed by the graph."""
    found = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    found = found * dims if len(found) == 1 else found
    return found if len(found) == dims and all(isinstance(v, int) for v in found) else None
