"""latency: what each width of each kernel costs on a device.

Requires: `ChannelGroups` and a source of costs (a back-end, with a table if it measures).
Ensures: every operator of the network is in one kernel; every kernel has a cost at every width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from halp_fx.errors import LatencyError
from halp_fx.latency import Analytic, GridCost, Job, Source, measure_jobs
from halp_fx.passes.rules.cut import cut, signature
from halp_fx.passes.rules.kernels import Part, kernel_parts, roofline
from halp_fx.types import ChannelGroups, Extent, IntArray, Kernel, LatencyModel

__all__ = ["price"]

Progress = Callable[[int, int], None]
_POINTS = {1: 7, 2: 5}  # measured sizes an axis, by the number of axes
_REFERENCE = Analytic()  # shape of the costs of kernels with too many axes to measure


def price(
    groups: ChannelGroups, source: Source, *, progress: Progress | None = None
) -> LatencyModel:
    """Price every kernel of the network at every width.

    A back-end that computes costs is asked for each kernel as a formula. One that measures is
    given each kernel, cut out of the graph and narrowed, at a grid of widths; between those the
    cost is interpolated. Kernels with more than two independent widths are measured once and
    scaled by the roofline.

    Args:
        progress: called with how many measurements are done and how many there are.
    """
    backend = source.backend
    if isinstance(backend, Analytic):
        kernels = [_analytic(part, backend) for part in kernel_parts(groups, True, split=True)]
    else:
        kernels = _measured(groups, source, progress)
    kernels = [_droppable(kernel, groups) for kernel in kernels]
    dense = groups.dense_units
    total = float(sum(float(k.cost(*(a.size(dense) for a in k.axes))) for k in kernels))
    if not kernels or total <= 0:
        raise LatencyError(f"{groups.traced.model_name} has no operator that costs time")
    return LatencyModel(tuple(kernels), backend.name, backend.fingerprint(), total)


def _analytic(part: Part, backend: Analytic) -> Kernel:
    axes, cost = roofline(part, backend.cost_ms, backend.round_channels)
    return Kernel(part.nodes[-1], part.nodes, axes, cost, part.op)


def _droppable(kernel: Kernel, groups: ChannelGroups) -> Kernel:
    """A kernel within branches that can be dropped costs nothing when they are.

    Where it only touches such a branch (the sum that follows is fused into it), the cost at the
    least width stands for what remains.
    """
    inside = {g: i for i, branch in enumerate(groups.branches) for g in branch.groups}
    owners = [
        {inside[g] for g, _ in axis.parts}
        if axis.fixed == 0 and all(g in inside for g, _ in axis.parts)
        else set()
        for axis in kernel.axes
    ]
    if not any(owners):
        return kernel
    nodes = [set(groups.branches[i].nodes) for i in set().union(*owners)]
    whole = any(set(kernel.nodes) <= n for n in nodes)
    least = [int(axis.size([g.least for g in groups.groups])) for axis in kernel.axes]
    return replace(kernel, cost=_Droppable(kernel.cost, [bool(o) for o in owners], least, whole))


class _Droppable:
    """A cost that goes on to width 0 along some axes."""

    def __init__(
        self, cost: Callable[..., Any], can_vanish: list[bool], least: list[int], whole: bool
    ) -> None:
        self.cost, self.can_vanish, self.least, self.whole = cost, can_vanish, least, whole

    def __call__(self, *sizes: Any) -> Any:
        cost = self.cost(*(np.maximum(s, low) for s, low in zip(sizes, self.least, strict=True)))
        if not self.whole:
            return cost
        gone: Any = False
        for size, can in zip(sizes, self.can_vanish, strict=True):
            if can:
                gone = gone | (np.asarray(size) == 0)
        return np.where(gone, 0.0, cost)


def _measured(groups: ChannelGroups, source: Source, progress: Progress | None) -> list[Kernel]:
    parts = kernel_parts(groups, source.backend.fuses, split=False)
    plans = [_Grid(groups, part) for part in parts]
    jobs: dict[str, Job] = {}
    for plan in plans:
        for kept in plan.points():
            key = signature(groups, plan.part.nodes, kept)
            if key not in jobs:
                jobs[key] = Job(key, _builder(groups, plan.part.nodes, kept))
    table = source.table
    assert table is not None
    measure_jobs(
        list(jobs.values()),
        source.backend,
        table,
        progress=None if progress is None else (lambda done, total, key: progress(done, total)),
    )
    fingerprint = source.backend.fingerprint()

    def look_up(nodes: tuple[str, ...], kept: Mapping[int, int]) -> float:
        timing = table.get(signature(groups, nodes, kept), fingerprint)
        if timing is None:
            raise LatencyError(f"the table has no time for {signature(groups, nodes, kept)}")
        return timing.median_ms

    return [plan.kernel(look_up) for plan in plans]


def _builder(groups: ChannelGroups, nodes: tuple[str, ...], kept: dict[int, int]) -> Any:
    return lambda: cut(groups, nodes, kept)


class _Grid:
    """Where a kernel is measured."""

    def __init__(self, groups: ChannelGroups, part: Part) -> None:
        self.groups, self.part = groups, part
        self.axes, self.formula = roofline(part, _REFERENCE.cost_ms, lambda n: n)
        involved = [g for axis in self.axes for g, _ in axis.parts]
        independent = len(involved) == len(set(involved))
        self.gridded = len(self.axes) <= max(_POINTS) and independent
        self.sizes: list[IntArray] = []
        self.choices: list[list[dict[int, int]]] = []
        if self.gridded:
            for axis in self.axes:
                chosen = {
                    int(axis.size(kept)): kept
                    for kept in _along(groups, axis, _POINTS[len(self.axes)])
                }
                self.sizes.append(np.array(sorted(chosen), dtype=np.int64))
                self.choices.append([chosen[s] for s in sorted(chosen)])

    def points(self) -> list[dict[int, int]]:
        """Units kept in each group, one dict a measurement."""
        dense = dict(enumerate(self.groups.dense_units))
        return [
            {**dense, **{g: n for choice in combination for g, n in choice.items()}}
            for combination in itertools.product(*self.choices)
        ]

    def kernel(self, look_up: Callable[[tuple[str, ...], Mapping[int, int]], float]) -> Kernel:
        part = self.part
        times = [look_up(part.nodes, kept) for kept in self.points()]
        cost: Callable[..., Any]
        if self.gridded:
            shape = tuple(len(s) for s in self.sizes)
            cost = GridCost(tuple(self.sizes), np.array(times).reshape(shape))
        else:
            dense = [axis.size(self.groups.dense_units) for axis in self.axes]
            scale = times[0] / max(float(self.formula(*dense)), 1e-12)
            cost = _Scaled(scale, self.formula)
        return Kernel(part.nodes[-1], part.nodes, self.axes, cost, part.op)


class _Scaled:
    """A formula, scaled to one measurement."""

    def __init__(self, scale: float, formula: Callable[..., Any]) -> None:
        self.scale, self.formula = scale, formula

    def __call__(self, *sizes: Any) -> Any:
        return self.scale * self.formula(*sizes)


def _along(groups: ChannelGroups, axis: Extent, points: int) -> list[dict[int, int]]:
    """Units to keep along one axis: from the least to all, evenly, on multiples of 8."""
    choices: list[dict[int, int]] = []
    for share in np.linspace(0.0, 1.0, points):
        kept: dict[int, int] = {}
        for group, _ in axis.parts:
            units, least = groups.groups[group].units, groups.groups[group].least
            count = round(least + share * (units - least))
            if units >= 64 and least < count < units:
                count = max(8 * round(count / 8), 8)
            kept[group] = min(max(count, least), units)
        choices.append(kept)
    return choices
