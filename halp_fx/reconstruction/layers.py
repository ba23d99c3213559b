"""The layers that can be fitted, what each is to give, and the rows it is fitted on."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from halp_fx.passes.rules.structure import named_tensors

__all__ = ["BATCH_NORMS", "Layer", "layers_of", "rows_of"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# What does nothing in eval mode.
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_IDLE_CALLS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}

_MOST_INPUTS = 8192  # that an output is computed from; moments grow with the square

Index = torch.Tensor | None  # channels that survive; None: all


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of the pruned network, and the dense node it is to match."""

    name: str
    module: Any  # nn.Conv1d, nn.Conv2d, nn.Conv3d or nn.Linear
    node: fx.Node
    aim: fx.Node  # of the dense graph: the same layer, or the sum that it ends in
    kept: Index  # of the aim's channels
    # Where the layer ends in a sum: what is added to it, which is known before, and the batch norm
    # on the way.
    addend: fx.Node | None = None
    norm: Any = None
    # A batch norm follows, on the way to a sum or not: it takes up any bias.
    shifted: bool = False

    @property
    def channel_dim(self) -> int:
        """Of its output."""
        return -1 if isinstance(self.module, nn.Linear) else 1


def layers_of(
    network: fx.GraphModule,
    dense: fx.GraphModule,
    kept: Mapping[str, tuple[Index, ...]],
) -> list[Layer]:
    """The layers that can be fitted, in the order in which they run.

    Left out are those that run more than once or share their weights, those whose weights are
    computed, those with a forward of their own, and those with thousands of inputs an output.
    """
    calls = Counter(n.target for n in network.graph.nodes if n.op in ("call_module", "get_attr"))
    owners = Counter(id(tensor) for _, tensor in named_tensors(network))
    twins = {node.name: node for node in dense.graph.nodes}
    once = {target for target, count in calls.items() if count == 1}
    found: list[Layer] = []
    for node in network.graph.nodes:
        twin = twins.get(node.name)
        if node.op != "call_module" or twin is None or twin.target != node.target:
            continue
        module = network.get_submodule(node.target)
        weight = module._parameters.get("weight")
        if (
            weight is None
            or not _plain(module)
            or weight[0].numel() > _MOST_INPUTS
            or node.target not in once
            or owners[id(weight)] > 1
            or calls[f"{node.target}.weight"]
            or len(node.args) != 1
            or node.kwargs
        ):
            continue
        index = kept[f"{node.target}.weight"][0]
        layer = Layer(node.target, module, node, twin, index)
        found.append(_to_sum(layer, network, twins, once))
    return found


def _plain(module: nn.Module) -> bool:
    """Whether it computes what its class says."""
    kind = next((k for k in (*_CONVOLUTIONS, nn.Linear) if isinstance(module, k)), None)
    hooked = module._forward_hooks or module._forward_pre_hooks
    return kind is not None and type(module).forward is kind.forward and not hooked


def _to_sum(
    layer: Layer, network: fx.GraphModule, twins: Mapping[str, fx.Node], once: Set[str]
) -> Layer:
    """With the sum that the layer ends in as its aim, where there is one.

    A residual branch is then fitted to what the dense stream is, less what the pruned one is
    before: it makes up for what was lost on the way.
    """
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    node, norm, shifted = layer.node, None, False
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "call_module":
            module = network.get_submodule(str(user.target))
            if isinstance(module, BATCH_NORMS) and norm is None and node is layer.node:
                shifted = module.running_mean is not None and user.target in once
                if not shifted or module.weight is None:
                    break
                norm = module
            elif not isinstance(module, _IDLE):
                break
        elif _is_sum(user):
            addend: Any = user.args[1] if user.args[0] is node else user.args[0]
            twin = twins.get(user.name)
            if twin is not None and _is_sum(twin) and order[addend] < order[layer.node]:
                return replace(layer, aim=twin, addend=addend, norm=norm, shifted=shifted)
            break
        elif user.op != "call_function" or user.target not in _IDLE_CALLS:
            break
        node = user
    return replace(layer, shifted=shifted)


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _SUMS
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(arg, fx.Node) for arg in node.args)
        and node.args[0] is not node.args[1]
    )


def rows_of(
    layer: Layer, x: torch.Tensor, y: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """At `count` random positions, what the layer reads and what it is to give.

    Args:
        x: input of the layer.
        y: of the shape of its output.

    Returns:
        (rows, groups, d) and (rows, groups, o), at least float32; None where shapes do not fit.
    """
    module = layer.module
    if isinstance(module, nn.Linear):
        if x.shape[:-1] != y.shape[:-1]:
            return None
        flat, aim = x.flatten(0, -2), y.flatten(0, -2)
        index = _drawn(len(flat), count, generator, x.device)
        return _precise(flat[index])[:, None], _precise(aim[index])[:, None]
    patches = _patches(module, x)
    places = patches.shape[2 : 2 + len(module.kernel_size)]
    if y.ndim != x.ndim or y.shape[0] != x.shape[0] or y.shape[2:] != places:
        return None
    sizes = (x.shape[0], *places)
    index = _drawn(torch.Size(sizes).numel(), count, generator, x.device)
    sample, *where = torch.unravel_index(index, sizes)
    at: Any = (sample, slice(None), *where)
    read, given = _precise(patches[at]), _precise(y[at])
    groups = module.groups
    return read.reshape(len(index), groups, -1), given.reshape(len(index), groups, -1)


def _patches(module: Any, x: torch.Tensor) -> torch.Tensor:
    """(N, C, places ..., kernel ...), a view of the padded input."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for i, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + i, (kernel - 1) * dilation + 1, stride)
    strides = [slice(None, None, dilation) for dilation in module.dilation]
    within: Any = (..., *strides)
    return x[within]


def _drawn(
    count: int, wanted: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    return torch.randperm(count, generator=generator)[:wanted].to(device)


def _precise(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
