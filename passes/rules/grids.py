"""At which widths a kernel is measured, and its cost between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halp_fx.latency import Analytic, GridCost, Step, SteppedCost, find_step, probe_sizes
from halp_fx.passes.rules.kernels import Part, reduced, roofline
from halp_fx.types import ChannelGroups, Extent, IntArray, Kernel

__all__ = ["Grid", "Kept", "Probe", "probes", "steps_of"]

Kept = dict[int, int]  # group -> units kept

_POINTS = {1: 6, 2: 4}  # measured sizes an axis, by the number of axes
_COARSE_POINTS = {1: 3, 2: 2}  # the same, where a measurement is dear
_ANCHORS = (1.0, 0.5, 0.25)  # shares at which a kernel with more axes is measured
_REFERENCE = Analytic()  # shape of the costs of kernels with too many axes to measure
_WORTH_PROBING = 0.02  # share of the network's cost that a kind of kernel has at least


class Grid:
    """Where one kernel is measured: a coarse grid on full blocks of channels."""

    def __init__(self, groups: ChannelGroups, part: Part, *, coarse: bool = False) -> None:
        self.groups, self.part = groups, part
        points = _COARSE_POINTS if coarse else _POINTS
        self.axes, self.formula = roofline(part, _REFERENCE.cost_ms, lambda n: n)
        involved = [g for axis in self.axes for g, _ in axis.parts]
        independent = len(involved) == len(set(involved))
        self.gridded = len(self.axes) <= max(_POINTS) and independent
        self.choices: list[dict[int, Kept]] = []  # for each axis: size -> units kept
        if self.gridded:
            for axis in self.axes:
                along = _along(groups, axis, points[len(self.axes)])
                self.choices.append({int(axis.size(kept)): kept for kept in along})

    @property
    def sizes(self) -> list[IntArray]:
        """For each axis, the sizes measured, ascending."""
        return [np.array(sorted(choice), dtype=np.int64) for choice in self.choices]

    def points(self) -> list[Kept]:
        """Units kept in each group, one dict a measurement."""
        dense = dict(enumerate(self.groups.dense_units))
        if not self.gridded:
            return [{**dense, **anchor} for anchor in self._anchors()]
        ordered = [[choice[s] for s in sorted(choice)] for choice in self.choices]
        return [
            {**dense, **{g: n for choice in combination for g, n in choice.items()}}
            for combination in itertools.product(*ordered)
        ]

    def _anchors(self) -> list[Kept]:
        involved = {g: c for axis in self.axes for g, c in axis.parts}
        groups = self.groups.groups
        return [
            {g: _aligned(groups[g].units, groups[g].least, c, share) for g, c in involved.items()}
            for share in _ANCHORS
        ]

    def kernel(
        self, look_up: Callable[[tuple[str, ...], Kept], float], steps: Sequence[int | Step]
    ) -> Kernel:
        """The kernel with its measured cost.

        Args:
            look_up: milliseconds of some nodes when so many units are kept.
            steps: one an axis; 0 where none was looked for.
        """
        part = self.part
        points = self.points()
        times = [look_up(part.nodes, kept) for kept in points]
        found = [s if isinstance(s, Step) else Step() for s in steps]
        known = tuple(s.size if isinstance(s, Step) else 0 for s in steps)
        slower = tuple(max(step.penalties, default=1.0) for step in found)
        cost: Callable[..., Any]
        if self.gridded:
            sizes = self.sizes
            grid = GridCost(tuple(sizes), np.array(times).reshape([len(s) for s in sizes]))
            least, dense = [int(s[0]) for s in sizes], [int(s[-1]) for s in sizes]
            narrow = {
                at: ms
                for at, ms in zip(itertools.product(*sizes), times, strict=True)
                if any(
                    n % step.size and n < high
                    for n, step, high in zip(at, found, dense, strict=True)
                )
            }
            cost = SteppedCost(grid, found, least, dense, narrow)
        else:
            anchors = [tuple(int(axis.size(kept)) for axis in self.axes) for kept in points]
            cost = ScaledCost(self.formula, dict(zip(anchors, times, strict=True)))
        return Kernel(part.nodes[-1], part.nodes, self.axes, cost, part.op, known, slower)


class ScaledCost:
    """A formula, scaled to measurements: between them by the nearer ones."""

    def __init__(self, formula: Callable[..., Any], times_ms: Mapping[tuple[int, ...], float]):
        self.formula, self.times_ms = formula, dict(times_ms)

    def __call__(self, *sizes: Any) -> Any:
        """Milliseconds at one size (number or array, which broadcast) an axis."""
        logs = [np.log(np.maximum(np.asarray(s, dtype=np.float64), 1.0)) for s in sizes]
        total: Any = 0.0
        weights: Any = 0.0
        for anchor, ms in self.times_ms.items():
            ratio = ms / max(float(self.formula(*anchor)), 1e-12)
            squares = ((x - math.log(max(n, 1))) ** 2 for x, n in zip(logs, anchor, strict=True))
            weight = 1.0 / (sum(squares) + 1e-9)  # exact at an anchor, to a part in a million
            total, weights = total + weight * ratio, weights + weight
        return self.formula(*sizes) * total / weights

    def with_point(self, sizes: Sequence[int], ms: float) -> ScaledCost:
        """The same cost with one more measurement."""
        return ScaledCost(self.formula, {**self.times_ms, tuple(sizes): ms})


def _along(groups: ChannelGroups, axis: Extent, points: int) -> list[Kept]:
    """Units to keep along one axis: from few to all, evenly."""
    return [
        {
            g: _aligned(groups.groups[g].units, groups.groups[g].least, channels, share)
            for g, channels in axis.parts
        }
        for share in np.linspace(0.0, 1.0, points)
    ]


def _aligned(units: int, least: int, channels: int, share: float) -> int:
    """About `share` of the units between few and all, such that full blocks are computed."""
    if share >= 1:
        return units
    size = units * channels
    block = next((b for b, from_ in ((32, 320), (16, 64), (8, 32), (4, 16)) if size >= from_), 1)
    unit = block // math.gcd(block, channels)
    first = max(unit // 2 if block >= 16 else unit, least, 1)
    wanted = first + share * (units - first)
    count = first if share <= 0 else unit * round(wanted / unit)
    return min(max(count, first), units)


@dataclass(frozen=True)
class Probe:
    """Measurements that show the step of one kind of kernel along one axis."""

    kind: tuple[Any, ...]
    axis: int
    nodes: tuple[str, ...]
    points: tuple[tuple[int, Kept], ...]  # size, and the units kept in every group


def probes(groups: ChannelGroups, grids: Sequence[Grid]) -> list[Probe]:
    """What to measure to find the steps: of each kind of kernel the costliest one."""
    dense = groups.dense_units
    costs = [float(g.formula(*(a.size(dense) for a in g.axes))) for g in grids]
    total = max(math.fsum(costs), 1e-300)
    share: dict[Any, float] = {}
    for grid, cost in zip(grids, costs, strict=True):
        share[_kind(grid)] = share.get(_kind(grid), 0.0) + cost / total
    found: dict[tuple[Any, int], Probe] = {}
    for _, grid in sorted(zip(costs, grids, strict=True), key=lambda pair: -pair[0]):
        kind = _kind(grid)
        if kind is None or share[kind] < _WORTH_PROBING:
            continue
        for position, axis in enumerate(grid.axes):
            points = _probe_points(dense, axis)
            if points and (kind, position) not in found:
                found[kind, position] = Probe(kind, position, grid.part.nodes, points)
    return list(found.values())


def _probe_points(dense: Sequence[int], axis: Extent) -> tuple[tuple[int, Kept], ...]:
    if axis.fixed or len(axis.parts) != 1:
        return ()
    ((group, channels),) = axis.parts
    return tuple(
        (size, {**dict(enumerate(dense)), group: size // channels})
        for size in probe_sizes(dense[group] * channels)
        if size % channels == 0
    )


def steps_of(
    grid: Grid, found: Sequence[Probe], look_up: Callable[[tuple[str, ...], Kept], float | None]
) -> list[Step | int]:
    """The steps of a kernel, one an axis; 0 where its kind was not probed."""
    kind = _kind(grid)
    steps: list[Step | int] = [0] * len(grid.axes)
    for probe in found:
        if probe.kind == kind and kind is not None:
            times = {size: look_up(probe.nodes, kept) for size, kept in probe.points}
            steps[probe.axis] = find_step({n: ms for n, ms in times.items() if ms is not None})
    return steps


def _kind(grid: Grid) -> tuple[Any, ...] | None:
    """What kernels with the same steps have in common; None where steps are not looked for."""
    main = next((w for w in grid.part.work if w.kind == "contraction"), None)
    if main is None or not grid.gridded:
        return None
    keys = [axis.parts for axis in grid.axes]

    def place(extent: Extent) -> int | None:
        key = reduced(extent)[0] if extent.parts else ()
        return keys.index(key) if key in keys else None

    pattern = tuple(tuple(place(e) for e in spec.extents) for spec in main.reads)
    window: tuple[int, ...] = ()
    alone = False
    if main.op == "convolution":
        weight = main.reads[1].extents
        window = tuple(e.dense for e in weight[2:])
        alone = not weight[1].parts and weight[1].dense == 1  # depthwise
    return (main.op, pattern, window, alone)
