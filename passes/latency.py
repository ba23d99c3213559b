"""latency: what each width of each kernel costs on a device.

Requires: `ChannelGroups` and a source of costs (a back-end, with a table if it measures).
Ensures: every operator of the network is in one kernel; every kernel has a cost at every width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from halp_fx.errors import InputError, LatencyError, warn_caller
from halp_fx.latency import Analytic, Calibration, Job, Source, Stored, measure_jobs
from halp_fx.passes.rules.counts import parameter_counts
from halp_fx.passes.rules.cut import cut, signature
from halp_fx.passes.rules.grids import Grid, Kept, Probe, probes, steps_of
from halp_fx.passes.rules.kernels import Part, axes_of, kernel_parts, remainder, roofline
from halp_fx.types import ChannelGroups, Extent, Kernel, LatencyModel

__all__ = [
    "copies_views",
    "measure_widths",
    "measurements",
    "network_key",
    "price",
    "refine",
    "weight_costs",
]

Progress = Callable[[int, int], None]


def price(
    groups: ChannelGroups,
    source: Source,
    *,
    calibrated: bool = True,
    coarse: bool | None = None,
    progress: Progress | None = None,
) -> LatencyModel:
    """Price every kernel of the network at every width.

    A back-end that computes costs is asked for each kernel as a formula. One that measures is
    given each kernel, cut out of the graph and narrowed, at a coarse grid of widths; between
    those the cost is interpolated. Kernels with more than two independent widths are measured at
    a few and scaled by the roofline. The costliest kernel of each kind is measured at narrow
    distances besides, which shows the steps that its width should keep to (`Kernel.steps`).

    Args:
        calibrated: where the table has a calibration of this network, scale the kernels by it.
        coarse: measure at few widths and look for no steps; None: as the back-end has it.
        progress: called with how many measurements are done and how many there are.

    Raises:
        InputError: the back-end measures, and the source has no table.
        LatencyError: a kernel can't be measured, or nothing costs time.
    """
    backend = source.backend
    if isinstance(backend, Analytic):
        parts = kernel_parts(groups, True, split=True)
        priced = [_analytic(part, backend) for part in parts]
        rests = {k: _analytic(rest, backend) for k, rest in _remainders(groups, parts).items()}
    else:
        priced, rests = _measured(groups, source, coarse, progress)
    kernels = [_droppable(kernel, groups, rests.get(k)) for k, kernel in enumerate(priced)]
    found = None
    if calibrated and source.table is not None and not isinstance(backend, Analytic):
        key = network_key(groups, backend.fuses, copies=copies_views(backend))
        found = source.table.calibration(key, backend.fingerprint())
    if found is not None:
        kernels = _calibrated(kernels, found, groups)
    dense = groups.dense_units
    total = float(sum(float(k.cost(*(a.size(dense) for a in k.axes))) for k in kernels))
    if not kernels or total <= 0:
        raise LatencyError(f"{groups.traced.model_name} has no operator that costs time")
    return LatencyModel(tuple(kernels), backend.name, backend.fingerprint(), total, found)


def copies_views(backend: Any) -> bool:
    """Whether a back-end copies where PyTorch looks at a tensor in another way."""
    return bool(getattr(backend, "copies", False))


def network_key(
    groups: ChannelGroups,
    fuses: bool,
    kept: Sequence[int] | None = None,
    *,
    copies: bool = False,
) -> str:
    """What identifies a network in a table: a digest of its kernels.

    Args:
        fuses, copies: as the back-end has them.
        kept: units kept in each group; None: all.
    """
    units = dict(enumerate(groups.dense_units if kept is None else kept))
    parts = kernel_parts(groups, fuses, split=False, copies=copies)
    texts = [signature(groups, part.nodes, units) for part in parts]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def measurements(groups: ChannelGroups, fuses: bool, copies: bool = False) -> list[Job]:
    """All that `price` measures for a back-end: jobs for a device that is elsewhere.

    Args:
        fuses: whether that back-end runs a convolution and what follows it as one kernel.
        copies: whether it copies where PyTorch looks at a tensor in another way.
    """
    parts = kernel_parts(groups, fuses, split=False, copies=copies)
    grids = [Grid(groups, part) for part in parts]
    rests = [Grid(groups, rest) for rest in _remainders(groups, parts).values()]
    return _jobs(groups, [*grids, *rests], probes(groups, grids))


def refine(
    groups: ChannelGroups,
    source: Source,
    model: LatencyModel,
    kept: Sequence[int],
    *,
    progress: Progress | None = None,
) -> LatencyModel:
    """The same model, made exact at one choice of widths by measuring each kernel there.

    Args:
        model: what `price` or `refine` gave for these groups and this source.
        kept: units kept in each group.

    Returns:
        `model` itself where nothing can be measured.
    """
    backend, table = source.backend, source.table
    if isinstance(backend, Analytic | Stored) or table is None:
        return model
    measure_widths(groups, source, model, [kept], progress=progress)
    units = dict(enumerate(kept))
    keys = _keys(groups, model, units)
    fingerprint = backend.fingerprint()
    kernels = list(model.kernels)
    for k, key in keys.items():
        timing = table.get(key, fingerprint)
        if timing is not None:
            cost: Any = kernels[k].cost
            sizes = [int(axis.size(units)) for axis in kernels[k].axes]
            kernels[k] = replace(kernels[k], cost=cost.with_point(sizes, timing.median_ms))
    return replace(model, kernels=tuple(kernels))


def measure_widths(
    groups: ChannelGroups,
    source: Source,
    model: LatencyModel,
    choices: Sequence[Sequence[int]],
    *,
    progress: Progress | None = None,
) -> None:
    """Measure the kernels at several choices of widths, in one go.

    In random order over all of them, so that a slow hour of the machine is no matter of one choice.
    Without a table, or a back-end that measures, there is nothing to do.

    Args:
        source: the back-end and its table.
        model: what `price` or `refine` gave for these groups and this source.
        choices: units kept in each group, for each choice.
    """
    if isinstance(source.backend, Analytic | Stored) or source.table is None:
        return
    jobs = []
    whole = {item.node for item in groups.work if item.kind == "whole"}
    for kept in choices:
        units = dict(enumerate(kept))
        for k, key in _keys(groups, model, units).items():
            nodes = model.kernels[k].nodes
            optional = not whole.isdisjoint(nodes)
            jobs.append(Job(key, _builder(groups, nodes, units), optional))
    measure_jobs(jobs, source.backend, source.table, progress=_counting(progress))


def _keys(groups: ChannelGroups, model: LatencyModel, units: Mapping[int, int]) -> dict[int, str]:
    """Number of a kernel -> its key in a table, of those that can be measured at these widths."""
    kept = list(units.values())
    return {
        k: signature(groups, kernel.nodes, units)
        for k, kernel in enumerate(model.kernels)
        if _can_refine(kernel, kept)
    }


def _can_refine(kernel: Kernel, kept: Sequence[int]) -> bool:
    involved = {g for axis in kernel.axes for g, _ in axis.parts}
    return bool(involved and kernel.nodes) and all(kept[g] for g in involved)


def _counting(progress: Progress | None) -> Callable[[int, int, str], None] | None:
    return None if progress is None else (lambda done, total, key: progress(done, total))


def _analytic(part: Part, backend: Analytic) -> Kernel:
    axes, cost = roofline(part, backend.cost_ms, backend.round_channels)
    return Kernel(part.nodes[-1], part.nodes, axes, cost, part.op)


def _owners(groups: ChannelGroups, axes: Sequence[Extent]) -> list[set[int]]:
    """For each axis, the branches that can be dropped which all of its width lies in."""
    inside = {g: i for i, branch in enumerate(groups.branches) for g in branch.groups}
    return [
        {inside[g] for g, _ in axis.parts}
        if axis.fixed == 0 and all(g in inside for g, _ in axis.parts)
        else set()
        for axis in axes
    ]


def _remainders(groups: ChannelGroups, parts: Sequence[Part]) -> dict[int, Part]:
    """Kernels that reach out of a branch -> what is left of them when it is dropped.

    Of a convolution with the sum and the activation that follow: the sum, of the trunk and a
    constant, and the activation.
    """
    found: dict[int, Part] = {}
    for k, part in enumerate(parts):
        touched = set().union(*_owners(groups, axes_of(part)[0]))
        if len(touched) == 1:
            rest = remainder(part, groups.branches[touched.pop()].nodes)
            if rest is not None:
                found[k] = rest
    return found


def _droppable(kernel: Kernel, groups: ChannelGroups, rest: Kernel | None) -> Kernel:
    """A kernel within branches that can be dropped costs nothing when they are.

    One whose widths are all of the trunk (the norm that a branch ends in) depends on a width of
    the branch besides. One that only touches such a branch (the sum that follows is fused into
    it) costs then what `rest` does; where that is not known, what it does at the least width.
    """
    owners = _owners(groups, kernel.axes)
    if not any(owners):
        return _droppable_by(kernel, groups)
    nodes = [set(groups.branches[i].nodes) for i in set().union(*owners)]
    whole = any(set(kernel.nodes) <= n for n in nodes)
    least = [int(axis.size([g.least for g in groups.groups])) for axis in kernel.axes]
    left: Callable[..., Any] | None = (lambda *sizes: 0.0) if whole else None
    if not whole and rest is not None and set(rest.axes) <= set(kernel.axes):
        left = _Along(rest.cost, [kernel.axes.index(axis) for axis in rest.axes])
    return replace(kernel, cost=_Droppable(kernel.cost, [bool(o) for o in owners], least, left))


def _droppable_by(kernel: Kernel, groups: ChannelGroups) -> Kernel:
    """The same kernel, free when the smallest branch that it lies in is dropped."""
    around = [b for b in groups.branches if b.groups and set(kernel.nodes) <= set(b.nodes)]
    if not around:
        return kernel
    group = min(around, key=lambda b: len(b.nodes)).groups[0]
    unit = Extent(groups.groups[group].units, 0, ((group, 1),))
    own = len(kernel.axes)
    cost = _Droppable(kernel.cost, [False] * own + [True], [0] * own, lambda *sizes: 0.0)
    return replace(kernel, axes=(*kernel.axes, unit), cost=cost)


class _Droppable:
    """A cost that goes on to width 0 along some axes.

    `least` has the axes that the cost itself takes; one more may follow, of the branch. `left` is
    what it costs at width 0, of all sizes; None: what it does at the least width.
    """

    def __init__(
        self,
        cost: Callable[..., Any],
        can_vanish: list[bool],
        least: list[int],
        left: Callable[..., Any] | None,
    ) -> None:
        self.cost, self.can_vanish, self.least, self.left = cost, can_vanish, least, left

    def __call__(self, *sizes: Any) -> Any:
        cost = self.cost(*(np.maximum(s, low) for s, low in zip(sizes, self.least, strict=False)))
        if self.left is None:
            return cost
        gone: Any = False
        for size, can in zip(sizes, self.can_vanish, strict=True):
            if can:
                gone = gone | (np.asarray(size) == 0)
        return np.where(gone, self.left(*sizes), cost)

    def with_point(self, sizes: Sequence[int], ms: float) -> _Droppable:
        """The same cost with one more measurement."""
        cost: Any = self.cost
        refined = cost.with_point(sizes[: len(self.least)], ms)
        return _Droppable(refined, self.can_vanish, self.least, self.left)


class _Along:
    """A cost of some of the sizes."""

    def __init__(self, cost: Callable[..., Any], axes: list[int]) -> None:
        self.cost, self.axes = cost, axes

    def __call__(self, *sizes: Any) -> Any:
        return self.cost(*(sizes[axis] for axis in self.axes))


def weight_costs(groups: ChannelGroups, ms_per_mb: float) -> list[Kernel]:
    """What it takes to fetch the weights, as functions of the widths."""
    return [
        Kernel("", (), count.axes, _Scaled(count.cost, 4e-6 * ms_per_mb), "weights from memory")
        for count in parameter_counts(groups)
    ]


def _calibrated(
    kernels: Sequence[Kernel], found: Calibration, groups: ChannelGroups
) -> list[Kernel]:
    """Kernels whose sum is what the whole network takes."""
    scaled = [replace(k, cost=_Scaled(k.cost, found.scale)) for k in kernels]
    rest = Kernel("", (), (), lambda: found.offset_ms, "the rest of the network")
    if not found.weights_ms_per_mb:
        return [*scaled, rest]
    return [*scaled, *weight_costs(groups, found.weights_ms_per_mb), rest]


class _Scaled:
    """A cost, scaled."""

    def __init__(self, cost: Callable[..., Any], scale: float) -> None:
        self.cost, self.scale = cost, scale

    def __call__(self, *sizes: Any) -> Any:
        return self.scale * self.cost(*sizes)

    def with_point(self, sizes: Sequence[int], ms: float) -> _Scaled:
        """The same cost with one more measurement, as the kernel alone takes."""
        cost: Any = self.cost
        return _Scaled(cost.with_point(sizes, ms), self.scale)


def _measured(
    groups: ChannelGroups, source: Source, coarse: bool | None, progress: Progress | None
) -> tuple[list[Kernel], dict[int, Kernel]]:
    """The kernels, and what is left of some of them when a branch is dropped."""
    table, backend = source.table, source.backend
    if table is None:
        raise InputError(
            f"the back-end {backend.name!r} measures, and there is no table to keep that in: pass "
            "Source(backend, halp_fx.LatencyTable.open(path))"
        )
    parts = kernel_parts(groups, backend.fuses, split=False, copies=copies_views(backend))
    fingerprint = backend.fingerprint()
    stored = isinstance(backend, Stored)
    keys: dict[Any, str] = {}

    def time_of(nodes: tuple[str, ...], kept: Mapping[int, int]) -> float | None:
        at = (nodes, tuple(kept.items()))
        if at not in keys:
            keys[at] = signature(groups, nodes, kept)
        timing = table.get(keys[at], fingerprint)
        return None if timing is None else timing.median_ms

    def look_up(nodes: tuple[str, ...], kept: Mapping[int, int]) -> float:
        ms = time_of(nodes, kept)
        if ms is None:
            raise LatencyError(f"the table has no time for {signature(groups, nodes, kept)}")
        return ms

    if coarse is None:
        coarse = bool(getattr(backend, "coarse", False))
        if stored and not coarse:  # measured where that is dear, or for advice
            fine, few = ([Grid(groups, part, coarse=c) for part in parts] for c in (False, True))
            coarse = not _are_known(fine, time_of) and _are_known(few, time_of)
    grids = [Grid(groups, part, coarse=coarse) for part in parts]
    rests = {k: Grid(groups, rest, coarse=coarse) for k, rest in _remainders(groups, parts).items()}
    probed = [] if coarse else probes(groups, grids)
    jobs = _jobs(groups, grids if stored else [*grids, *rests.values()], [] if stored else probed)
    measure_jobs(jobs, backend, table, progress=_counting(progress))
    unknown = [g for g in grids if g.part.is_whole and not _is_known(g, time_of)]
    _tell_unknown(groups, unknown)
    left: dict[int, Kernel] = {}
    for k, grid in rests.items():
        # A table that was made elsewhere may not have them.
        if _is_known(grid, time_of):
            left[k] = grid.kernel(look_up, [0] * len(grid.axes))
    kernels = [
        grid.kernel(_no_time if grid in unknown else look_up, steps_of(grid, probed, time_of))
        for grid in grids
    ]
    return kernels, left


def _no_time(nodes: tuple[str, ...], kept: Kept) -> float:
    return 0.0


def _are_known(
    grids: Sequence[Grid], time_of: Callable[[tuple[str, ...], Kept], float | None]
) -> bool:
    """Whether the table has all of them; those held whole may be left out of it."""
    return all(grid.part.is_whole or _is_known(grid, time_of) for grid in grids)


def _is_known(grid: Grid, time_of: Callable[[tuple[str, ...], Kept], float | None]) -> bool:
    return all(time_of(grid.part.nodes, kept) is not None for kept in grid.points())


def _tell_unknown(groups: ChannelGroups, unknown: Sequence[Grid]) -> None:
    """Warn of nodes that nobody looks into and that could not be measured alone."""
    if unknown:
        names = ", ".join(grid.part.nodes[0] for grid in unknown)
        warn_caller(
            f"halp_fx: {names} of {groups.traced.model_name} can't be measured alone, on random "
            "inputs of the shapes that it takes; the predicted latencies are without it. What is "
            "measured of the whole network has it"
        )


def _jobs(groups: ChannelGroups, grids: Iterable[Grid], probed: Iterable[Probe]) -> list[Job]:
    wanted = [(g.part.nodes, kept, g.part.is_whole) for g in grids for kept in g.points()]
    wanted += [(probe.nodes, kept, False) for probe in probed for _, kept in probe.points]
    jobs: dict[str, Job] = {}
    for nodes, kept, optional in wanted:
        key = signature(groups, nodes, kept)
        if key not in jobs:
            jobs[key] = Job(key, _builder(groups, nodes, kept), optional)
    return list(jobs.values())


def _builder(groups: ChannelGroups, nodes: tuple[str, ...], kept: Kept) -> Any:
    return lambda: cut(groups, nodes, kept)
