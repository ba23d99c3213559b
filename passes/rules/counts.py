"""Parameters and multiply-adds of a network as functions of the widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halp_fx.passes.rules.kernels import Part, axes_of, roofline
from halp_fx.types import ChannelGroups, Extent, TensorSpec, Work

__all__ = ["Count", "count_of", "mac_counts", "parameter_counts", "reading", "total"]


@dataclass(frozen=True)
class Count:
    """A number that depends on some sizes: the sum over what has the same dims that can change."""

    axes: tuple[Extent, ...]
    cost: Callable[..., Any] = field(compare=False)  # one size (number or array) an axis


def parameter_counts(groups: ChannelGroups) -> list[Count]:
    """Numbers in the parameters, each tensor counted once under however many names.

    Buffers, such as running statistics, are not parameters. What the graph never reads (a head
    that is used only in training) counts as it is, and what belongs to a branch that is dropped
    whole counts nothing.
    """
    branch_of = {name: b for b, branch in enumerate(groups.branches) for name in branch.tensors}
    alike: dict[Any, list[TensorSpec]] = {}
    unread = 0  # state that the graph never reads is carried over as it is
    for name, tensor in groups.traced.root.named_parameters():
        spec = groups.parameters.get(name)
        if spec is None:
            unread += tensor.numel()
            continue
        parts = frozenset(a.parts for a in axes_of(reading([spec]))[0])
        alike.setdefault((parts, spec.dtype, branch_of.get(name)), []).append(spec)
    found = [Count((), _Constant(unread))] if unread else []
    for (_, dtype, branch), specs in alike.items():
        count = count_of(reading(specs), _Numbers(dtype.itemsize))
        found.append(count if branch is None else _dropped(count, groups, branch))
    return found


def _dropped(count: Count, groups: ChannelGroups, branch: int) -> Count:
    """The same count, but 0 when the branch is dropped whole, its last norm included."""
    own = groups.branches[branch].groups
    for k, axis in enumerate(count.axes):
        if axis.fixed == 0 and axis.parts and all(g in own for g, _ in axis.parts):
            return Count(count.axes, _Droppable(count.cost, k, passed=True))
    group = own[0]
    unit = Extent(groups.groups[group].units, 0, ((group, 1),))
    return Count((*count.axes, unit), _Droppable(count.cost, len(count.axes), passed=False))


def mac_counts(groups: ChannelGroups) -> list[Count]:
    """Multiply-adds of all convolutions and matrix products, for the example's batch size.

    Those in modules that nobody looks into are among them, as counted when the example ran.
    """
    alike: dict[Any, list[Work]] = {}
    for item in groups.work:
        if item.kind in ("contraction", "whole") and item.flops:
            part = Part((item.node,), (item,), (), ())
            alike.setdefault(frozenset(a.parts for a in axes_of(part)[0]), []).append(item)
    return [
        count_of(Part((), tuple(same), (), ()), lambda flops, _: flops / 2)
        for same in alike.values()
    ]


def total(counts: Iterable[Count], kept: Mapping[int, int] | Any) -> int:
    """The whole count when `kept[g]` units of group g survive."""
    return round(math.fsum(float(c.cost(*(axis.size(kept) for axis in c.axes))) for c in counts))


@dataclass(frozen=True)
class _Constant:
    """A cost that nothing changes."""

    number: int

    def __call__(self) -> float:
        return float(self.number)


@dataclass(frozen=True)
class _Droppable:
    """A cost that is 0 where one of the sizes is."""

    cost: Callable[..., Any]
    axis: int  # of that size
    passed: bool  # whether the cost takes that size too

    def __call__(self, *sizes: Any) -> Any:
        cost = self.cost(*sizes) if self.passed else self.cost(*sizes[: self.axis])
        return np.where(np.asarray(sizes[self.axis]) == 0, 0.0, cost)


@dataclass(frozen=True)
class _Numbers:
    """How many numbers so many bytes are."""

    itemsize: int

    def __call__(self, flops: Any, moved: Any) -> Any:
        return moved / self.itemsize


def reading(specs: Iterable[TensorSpec]) -> Part:
    """A kernel that does nothing but read these tensors."""
    return Part((), (), tuple(specs), ())


def count_of(part: Part, measure: Callable[[Any, Any], Any]) -> Count:
    """What `measure` makes of a kernel's operations and bytes, at every width."""
    axes, cost = roofline(part, measure, lambda n: n)
    return Count(axes, cost)
