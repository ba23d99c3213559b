"""The layers that can be fitted, what each is to give, and the rows it is fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from halp_fx.reconstruction.norms import Norm, Tensors
from halp_fx.reconstruction.sums import Sum, sum_after

__all__ = ["Layer", "Rows", "layers_of", "rows_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_INPUTS = 4608  # that an output is computed from; moments grow with the square

Index = torch.Tensor | None  # channels that survive; None: all


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of the pruned network, and its twin in the dense one."""

    name: str
    module: Any  # nn.Conv1d, nn.Conv2d, nn.Conv3d or nn.Linear
    node: fx.Node
    twin: fx.Node
    kept: Index  # of the output channels
    norm: Norm | None = None  # that reads nothing but the output of this layer
    sum: Sum | None = None  # that the layer ends in, maybe through the norm

    @property
    def channel_dim(self) -> int:
        """Of its output."""
        return -1 if isinstance(self.module, nn.Linear) else 1

    @property
    def groups(self) -> int:
        """In how many parts its channels are computed apart."""
        return getattr(self.module, "groups", 1)


def layers_of(
    network: fx.GraphModule, dense: fx.GraphModule, kept: Mapping[str, tuple[Index, ...]]
) -> list[Layer]:
    """The layers that can be fitted, in the order in which they run.

    Left out are those that run more than once or share their tensors, those whose weights are
    computed or called as functions, transposed convolutions, those with hooks or a forward of
    their own, and those with more inputs an output than moments should be kept of.
    """
    tensors = Tensors(network)
    twins = {node.name: node for node in dense.graph.nodes}
    found: list[Layer] = []
    for node in network.graph.nodes:
        twin = twins.get(node.name)
        if node.op != "call_module" or twin is None or twin.target != node.target:
            continue
        module = network.get_submodule(str(node.target))
        if not _plain(module) or len(node.args) != 1 or node.kwargs:
            continue
        own = [name for name in ("weight", "bias") if getattr(module, name) is not None]
        if not all(tensors.alone(f"{node.target}.{name}") for name in own):
            continue
        norm, end = sum_after(node, tensors, twins)
        index = kept[f"{node.target}.weight"][0]
        found.append(Layer(str(node.target), module, node, twin, index, norm, end))
    return found


def _plain(module: Any) -> bool:
    """Whether it computes what its class says, from weights that are not too many."""
    kind = next((k for k in (*_CONVOLUTIONS, nn.Linear) if isinstance(module, k)), None)
    if kind is None or type(module).forward is not kind.forward:
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    weight = module._parameters.get("weight")
    return not hooked and weight is not None and weight[0].numel() <= _MOST_INPUTS


@dataclass(frozen=True)
class Rows:
    """At some positions, what a layer reads (rows, groups, d) and is to give (rows, groups, o)."""

    read: torch.Tensor  # at least float32
    given: torch.Tensor
    samples: torch.Tensor  # (rows,): which sample of the minibatch each is of

    def where(self, chosen: torch.Tensor) -> Rows:
        """Some of the rows."""
        return Rows(self.read[chosen], self.given[chosen], self.samples[chosen])


def rows_of(layer: Layer, x: Any, y: Any, count: int, generator: torch.Generator) -> Rows | None:
    """Up to `count` random positions.

    Args:
        x: input of the layer.
        y: of the shape of its output.

    Returns:
        None where shapes do not fit.
    """
    module = layer.module
    dims = 2 if isinstance(module, nn.Linear) else 2 + len(module.kernel_size)
    tensors = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    if not tensors or x.ndim != y.ndim or x.ndim < dims:
        return None
    if isinstance(module, nn.Linear):
        if x.shape[:-1] != y.shape[:-1]:
            return None
        index = _drawn(x[..., 0].numel(), count, generator, x.device)
        read, given = x.flatten(0, -2)[index], y.flatten(0, -2)[index]
        samples = index // max(x[0, ..., 0].numel(), 1)
        return Rows(_precise(read)[:, None], _precise(given)[:, None], samples)
    if x.ndim != dims:
        return None
    patches = _patches(module, x)
    places = patches.shape[2:dims]
    if y.shape[0] != x.shape[0] or y.shape[2:] != places:
        return None
    sizes = (x.shape[0], *places)
    index = _drawn(torch.Size(sizes).numel(), count, generator, x.device)
    samples, *where = torch.unravel_index(index, sizes)
    at: Any = (samples, slice(None), *where)
    rows = (len(index), module.groups, -1)
    read, given = _precise(patches[at]), _precise(y[at])
    return Rows(read.reshape(rows), given.reshape(rows), samples)


def _patches(module: Any, x: torch.Tensor) -> torch.Tensor:
    """(N, C, places ..., kernel ...), a view of the padded input."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for i, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + i, (kernel - 1) * dilation + 1, stride)
    within: Any = (..., *(slice(None, None, dilation) for dilation in module.dilation))
    return x[within]


def _drawn(
    count: int, wanted: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    return torch.randperm(count, generator=generator)[:wanted].to(device)


def _precise(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
