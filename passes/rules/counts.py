"""Parameters and multiply-adds of a network as functions of the widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from halp_fx.passes.rules.kernels import Part, axes_of, roofline
from halp_fx.types import ChannelGroups, Extent, TensorSpec, Work

__all__ = ["Count", "mac_counts", "parameter_counts", "total"]


@dataclass(frozen=True)
class Count:
    """A number that depends on some sizes: the sum over what has the same dims that can change."""

    axes: tuple[Extent, ...]
    cost: Callable[..., Any] = field(compare=False)  # one size (number or array) an axis


def parameter_counts(groups: ChannelGroups) -> list[Count]:
    """Numbers in the parameters, each tensor counted once under however many names.

    Buffers, such as running statistics, are not parameters.
    """
    specs = [
        groups.parameters[name]
        for name, _ in groups.traced.module.named_parameters()
        if name in groups.parameters
    ]
    alike: dict[Any, list[TensorSpec]] = {}
    for spec in specs:
        part = _reading([spec])
        alike.setdefault((frozenset(a.parts for a in axes_of(part)[0]), spec.dtype), []).append(
            spec
        )
    return [_count(_reading(same), _Numbers(dtype.itemsize)) for (_, dtype), same in alike.items()]


def mac_counts(groups: ChannelGroups) -> list[Count]:
    """Multiply-adds of all convolutions and matrix products, for the example's batch size."""
    alike: dict[Any, list[Work]] = {}
    for item in groups.work:
        if item.kind == "contraction":
            part = Part((item.node,), (item,), (), ())
            alike.setdefault(frozenset(a.parts for a in axes_of(part)[0]), []).append(item)
    return [
        _count(Part((), tuple(same), (), ()), lambda flops, _: flops / 2) for same in alike.values()
    ]


def total(counts: Iterable[Count], kept: Mapping[int, int] | Any) -> int:
    """The whole count when `kept[g]` units of group g survive."""
    return round(math.fsum(float(c.cost(*(axis.size(kept) for axis in c.axes))) for c in counts))


@dataclass(frozen=True)
class _Numbers:
    """How many numbers so many bytes are."""

    itemsize: int

    def __call__(self, flops: Any, moved: Any) -> Any:
        return moved / self.itemsize


def _reading(specs: list[TensorSpec]) -> Part:
    return Part((), (), tuple(specs), ())


def _count(part: Part, measure: Callable[[Any, Any], Any]) -> Count:
    axes, cost = roofline(part, measure, lambda n: n)
    return Count(axes, cost)
