"""The layers that can be fitted, what each is to give, and the rows it is fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from halp_fx.reconstruction.dropout import Dropout, dropout_before
from halp_fx.reconstruction.maps import LinearMap, map_at
from halp_fx.reconstruction.norms import Norm, Tensors
from halp_fx.reconstruction.sums import Sum, sum_after

__all__ = ["Layer", "Rows", "layers_of", "rows_of"]

_MOST_INPUTS = 4608  # that an output is computed from; moments grow with the square

Index = torch.Tensor | None  # channels that survive; None: all


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of the pruned network, and its twin in the dense one."""

    name: str
    map: LinearMap
    node: fx.Node
    twin: fx.Node
    kept: Index  # of the output channels
    norm: Norm | None = None  # that reads nothing but the output of this layer
    sum: Sum | None = None  # that the layer ends in, maybe through the norm
    dropout: Dropout | None = None  # whose outputs it reads

    @property
    def channel_dim(self) -> int:
        """Of its output."""
        return 1 if self.map.kernel else -1


def layers_of(
    network: fx.GraphModule, dense: fx.GraphModule, kept: Mapping[str, tuple[Index, ...]]
) -> list[Layer]:
    """The layers that can be fitted, in the order in which they run.

    Left out are those that run more than once or share their tensors, those whose weights are
    computed, transposed convolutions, modules with hooks or a forward that is opaque, and those
    with more inputs an output than moments should be kept of.
    """
    tensors = Tensors(network)
    twins = {node.name: node for node in dense.graph.nodes}
    found: list[Layer] = []
    for node in network.graph.nodes:
        twin = twins.get(node.name)
        if twin is None or (twin.op, twin.target) != (node.op, node.target):
            continue
        own = map_at(node, tensors)
        if own is None or own.inputs > _MOST_INPUTS or own.name not in kept:
            continue
        norm, end = sum_after(node, tensors, twins)
        name = own.name.removesuffix(".weight")
        dropout = dropout_before(node, network)
        found.append(Layer(name, own, node, twin, kept[own.name][0], norm, end, dropout))
    return found


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
    own = layer.map
    dims = 2 + len(own.kernel)
    tensors = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    if not tensors or x.ndim != y.ndim or x.ndim < dims:
        return None
    if not own.kernel:
        if x.shape[:-1] != y.shape[:-1]:
            return None
        index = _drawn(x[..., 0].numel(), count, generator, x.device)
        read, given = x.flatten(0, -2)[index], y.flatten(0, -2)[index]
        samples = index // max(x[0, ..., 0].numel(), 1)
        return Rows(_precise(read)[:, None], _precise(given)[:, None], samples)
    if x.ndim != dims:
        return None
    patches = _patches(own, x)
    places = patches.shape[2:dims]
    if y.shape[0] != x.shape[0] or y.shape[2:] != places:
        return None
    sizes = (x.shape[0], *places)
    index = _drawn(torch.Size(sizes).numel(), count, generator, x.device)
    samples, *where = torch.unravel_index(index, sizes)
    at: Any = (samples, slice(None), *where)
    rows = (len(index), own.groups, -1)
    read, given = _precise(patches[at]), _precise(y[at])
    return Rows(read.reshape(rows), given.reshape(rows), samples)


def _patches(own: LinearMap, x: torch.Tensor) -> torch.Tensor:
    """(N, C, places ..., kernel ...), a view of the padded input."""
    if any(own.padding):
        x = F.pad(x, own.padding, mode=own.mode)
    for i, (kernel, stride, dilation) in enumerate(
        zip(own.kernel, own.stride, own.dilation, strict=True)
    ):
        x = x.unfold(2 + i, (kernel - 1) * dilation + 1, stride)
    within: Any = (..., *(slice(None, None, dilation) for dilation in own.dilation))
    return x[within]


def _drawn(
    count: int, wanted: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    return torch.randperm(count, generator=generator)[:wanted].to(device)


def _precise(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
