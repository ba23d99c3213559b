"""What flows between the stages: one frozen dataclass after each of them.

trace -> Traced -> groups -> ChannelGroups -> saliency -> Saliency
latency -> LatencyModel,  select -> Plan,  rewrite -> torch.fx.GraphModule
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
import torch
from torch import fx

__all__ = [
    "Branch",
    "ChannelGroups",
    "Extent",
    "Group",
    "IntArray",
    "Kernel",
    "LatencyModel",
    "Member",
    "Pin",
    "Plan",
    "Saliency",
    "TensorSpec",
    "Traced",
    "Work",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Traced:
    """A network as a graph, with inputs that it accepts."""

    module: fx.GraphModule  # shares its parameters with the caller's model: read it, never write
    example_inputs: tuple[Any, ...]  # positional arguments of the network
    training: Mapping[str, bool]  # module -> its mode in the caller's model
    root: torch.nn.Module  # the model's modules, also those that the graph never calls; read only
    opaque: Mapping[str, str]  # modules held whole as leaves -> why they could not be traced
    # Graph node -> what it gave for the example: tensors without data (device "meta"), numbers ...
    values: Mapping[str, Any]
    model_name: str  # class of the caller's model, for messages
    # Graph node -> floating point operations for the example, of modules that nobody looks into.
    flops: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """Where the units of a group sit in one dim of one parameter or buffer."""

    name: str  # parameter or buffer, as in `state_dict()`
    dim: int
    index: IntArray  # (units, width): positions along `dim` that each unit owns


@dataclass(frozen=True)
class Group:
    """Channels that are coupled: unit u stands or falls in all members at once."""

    name: str  # the module that produces the channels, for people; unique
    units: int  # how many units can be removed one by one
    width: int  # channels of the producer that one unit stands for
    members: tuple[Member, ...]
    least: int = 1  # units that must stay: 0 where other groups keep every dim alive
    inexact: tuple[str, ...] = ()  # nodes with statistics over these channels (LayerNorm ...)


@dataclass(frozen=True)
class Pin:
    """Channels that must stay, and what demands it."""

    name: str  # parameter or buffer
    dim: int
    index: IntArray  # positions along `dim`
    node: str  # graph node that pins them
    reason: str
    source: str  # "file:line: code" of the model's source, or ""


@dataclass(frozen=True)
class Extent:
    """The size of one dim, as a linear function of the units kept in each group.

    size = fixed + sum of channels * units_kept[group] over parts
    """

    dense: int  # size in the dense network
    fixed: int  # channels that are never removed
    parts: tuple[tuple[int, int], ...] = ()  # (index into ChannelGroups.groups, channels a unit)

    def size(self, kept: Mapping[int, Any] | Any) -> Any:
        """Size for `kept[group]` units; numbers or numpy arrays that broadcast."""
        total: Any = self.fixed
        for group, channels in self.parts:
            total = total + channels * kept[group]
        return total


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a tensor as a function of the units kept, and its dtype."""

    extents: tuple[Extent, ...]
    dtype: torch.dtype

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return tuple(extent.dense for extent in self.extents)

    def shape(self, kept: Mapping[int, Any] | Any) -> tuple[Any, ...]:
        return tuple(extent.size(kept) for extent in self.extents)


@dataclass(frozen=True)
class Work:
    """One operator as it ran inside a graph node: what it computes and what it moves."""

    node: str
    op: str  # ATen name
    # "contraction", "pointwise", "view" (moves nothing), "other", or "whole": a node that nobody
    # looks into
    kind: str
    # Floating point operations: `flops` times the product of the sizes of `factors`.
    flops: float
    factors: tuple[Extent, ...]
    reads: tuple[TensorSpec, ...]  # tensors read, parameters included
    writes: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Branch:
    """A residual branch that may be dropped whole: it then adds a constant."""

    operand: str  # graph node: the operand of the sum that the branch ends in
    nodes: tuple[str, ...]  # graph nodes that serve nothing but the branch, in order
    groups: tuple[int, ...]  # groups that live only in it: all of them go, or none
    tensors: tuple[str, ...]  # parameters and buffers that only the branch reads


@dataclass(frozen=True)
class ChannelGroups:
    """Which channels stand or fall together, which must stay, and why."""

    traced: Traced
    groups: tuple[Group, ...]
    pins: tuple[Pin, ...]
    # Nodes are (parameter, dim); an edge says who couples: `node` (of the graph), `op`, `source`.
    graph: nx.MultiGraph[Any]
    # Graph node name -> its output: TensorSpec, number, None, or tuple/list/dict of those.
    outputs: Mapping[str, Any]
    # Parameter or buffer name -> its shape as a function of the units kept.
    parameters: Mapping[str, TensorSpec]
    work: tuple[Work, ...]  # every operator, in the order in which they run
    branches: tuple[Branch, ...]  # what may be dropped whole
    # For the rewrite: the labels of the dense run, and the component of each unit of each group.
    labelled: Any = field(repr=False, compare=False)
    unit_components: tuple[IntArray, ...] = field(repr=False, compare=False)

    def without_network(self) -> ChannelGroups:
        """The groups alone: the dense network and its labels are let go."""
        traced = replace(
            self.traced,
            module=fx.GraphModule(torch.nn.Module(), fx.Graph()),
            root=torch.nn.Module(),
            example_inputs=(),
            values={},
        )
        return replace(self, traced=traced, work=(), outputs={}, labelled=None)

    @property
    def dense_units(self) -> tuple[int, ...]:
        """Units of each group in the dense network."""
        return tuple(group.units for group in self.groups)


@dataclass(frozen=True)
class Saliency:
    """What each unit is worth, comparable across groups."""

    scores: tuple[FloatArray, ...]  # one array (units,) a group, at least 0, same order as groups
    method: str  # see `halp_fx.passes.saliency.score`, or the name of the user's callable
    data_free: bool  # True: no data was used, which is the weaker score
    # What other methods say of the same minibatches: method -> scores.
    others: Mapping[str, tuple[FloatArray, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Kernel:
    """What a back-end runs as one, and its cost at every width.

    `axes` are the dims that can change. `cost(*sizes)` takes one size (number or numpy array
    that broadcasts with the others) an axis and returns milliseconds.
    """

    name: str  # node of the graph that it ends in
    nodes: tuple[str, ...]  # graph nodes that run in it
    axes: tuple[Extent, ...]
    cost: Callable[..., Any] = field(compare=False)
    op: str = ""  # for people: "conv2d 3x3 + batch_norm + relu"
    # One an axis, or none: sizes that are no multiple of it are no faster than the next multiple.
    # 1: every size counts; 0: not looked for.
    steps: tuple[int, ...] = ()
    # One an axis, or none: how many times slower than the next multiple sizes off it are, at worst
    # (the median over odd sizes, over those that 2 divides and 4 does not, and so on).
    penalties: tuple[float, ...] = ()


@dataclass(frozen=True)
class LatencyModel:
    """What each width costs on a device, in milliseconds."""

    kernels: tuple[Kernel, ...]
    backend: str  # "analytic", "torch" ...
    device: str  # fingerprint of the device, for people and for the table
    dense_ms: float  # cost of the dense network
    # How the whole network relates to its kernels, as measured (halp_fx.latency.Calibration): the
    # costs of the kernels are scaled by it already. None: sums are taken as they are.
    calibration: Any = field(default=None, compare=False)

    def total_ms(self, kept: Mapping[int, int] | Any) -> float:
        """Cost in milliseconds when `kept[g]` units of group g survive."""
        return float(
            sum(float(k.cost(*(axis.size(kept) for axis in k.axes))) for k in self.kernels)
        )


@dataclass(frozen=True)
class Plan:
    """Which channels survive."""

    # Parameter or buffer of the original model -> for each dim, sorted int64 indices that
    # survive, or None where the dim is whole. Empty: the whole thing is gone.
    kept: Mapping[str, tuple[torch.Tensor | None, ...]]
    units: tuple[IntArray, ...]  # kept units of each group, sorted
    dense_ms: float  # latency of the dense network by the table
    predicted_ms: float  # latency of the pruned network by the table
    budget_ms: float
    gap: float  # certified: (bound - value) / bound, at most this far from the best possible
    value: float  # saliency kept
    # Saliency of what was chosen from: the dense network, or what earlier steps left of it.
    dense_value: float
    solver: str
    groups: ChannelGroups = field(repr=False, compare=False)
    report: Mapping[str, Any] = field(default_factory=dict, compare=False)  # facts for people

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """A plan is never changed, so copies of a network share it."""
        return self
