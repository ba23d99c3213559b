"""select: which channels survive, by the joint knapsack over widths.

Requires: groups, their saliency and a latency model of the same network; a budget in milliseconds.
Ensures: the predicted latency is within the budget, and so are parameters and multiply-adds where
they are limited; `Plan.gap` is proven, whichever solver made the choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from halp_fx.errors import BudgetError, InputError
from halp_fx.knapsack import Term
from halp_fx.passes.rules.counts import mac_counts, parameter_counts, total
from halp_fx.passes.rules.kernels import reduced
from halp_fx.passes.rules.memory import memory_moments, peak
from halp_fx.passes.rules.plan import kept_indices
from halp_fx.passes.rules.solving import Knapsack, Limit, solve_within, terms_of
from halp_fx.passes.rules.widths import Widths
from halp_fx.types import (
    Branch,
    ChannelGroups,
    Group,
    IntArray,
    Kernel,
    LatencyModel,
    Plan,
    Saliency,
    TensorSpec,
)

__all__ = [
    "SOLVERS",
    "Knapsack",
    "check_solver",
    "knapsack_of",
    "select",
    "unit_steps",
    "widths",
]

SOLVERS = ("joint", "halp", "greedy", "uniform")
_MAX_LEVELS = 32


def widths(
    group: Group,
    *,
    droppable: bool = False,
    min_share: float = 0.0,
    min_width: int = 0,
    round_to: int | None = None,
    step: int = 1,
) -> IntArray:
    """The numbers of units that a group may keep, ascending; the dense number is always one.

    At least `min_share` of them, and as many as `min_width` channels take; a group of a branch
    that is `droppable` whole may also keep none.

    Multiples of a power of two that grows with the group (8 from 32 units on), so that back-ends
    which compute channels in blocks find full ones, and the least width; with a `step` of units
    above 1, found by measuring, multiples of that; with `round_to` instead only such that the
    channels are a multiple of it.
    """
    asked = max(math.ceil(min_share * group.units - 1e-9), -(-min_width // group.width))
    least = min(max(group.least, asked), group.units)
    if round_to is None and 1 < step < group.units:
        unit = step
        while group.units // step > _MAX_LEVELS:
            step *= 2
        ends = {min(-(-n // unit) * unit, group.units) for n in (max(least, 1), least)}
    elif round_to is None:
        step = 1
        while group.units // step > _MAX_LEVELS or (step < 8 and group.units >= 8 * step):
            step *= 2
        ends = {max(least, 1), least}
    else:
        unit = step = round_to // math.gcd(round_to, group.width)
        while group.units // step > _MAX_LEVELS:
            step *= 2
        ends = {-(-n // unit) * unit for n in (max(least, 1), least)}
    choices = {*range(step, group.units, step), *ends, group.units}
    found = {c for c in choices if least <= c <= group.units} | ({0} if droppable else set())
    return np.array(sorted(found), dtype=np.int64)


def unit_steps(groups: ChannelGroups, latency: LatencyModel) -> list[int]:
    """For each group, of how many units its width should be a multiple; 1: nothing is known.

    The smallest step among the kernels that have the width: the costs tell what a width between
    the larger steps of others takes.
    """
    found: list[list[int]] = [[] for _ in groups.groups]
    for kernel in latency.kernels:
        for axis, step in zip(kernel.axes, kernel.steps, strict=False):
            for group, channels in axis.parts if step else ():
                found[group].append(step // math.gcd(step, channels))
    return [min(steps, default=1) for steps in found]


def knapsack_of(
    groups: ChannelGroups,
    saliency: Saliency,
    latency: LatencyModel,
    *,
    drop_blocks: bool = True,
    allowed: Widths | None = None,
    among: Sequence[IntArray] | None = None,
) -> Knapsack:
    """Values and costs of all levels of all groups; see `select` for the options.

    Raises:
        InputError: the widths that are allowed contradict each other or the groups.
    """
    within = {g for branch in groups.branches for g in branch.groups if drop_blocks}
    left = among if among is not None else [np.arange(n) for n in groups.dense_units]
    sizes = tuple(
        _at_most(
            len(own_units),
            widths(
                group,
                droppable=g in within,
                min_share=own.min_share,
                min_width=own.min_width,
                round_to=own.round_to,
                step=step,
            ),
        )
        for g, (group, own, step, own_units) in enumerate(
            zip(
                groups.groups,
                (allowed or Widths()).resolve(groups),
                unit_steps(groups, latency),
                left,
                strict=True,
            )
        )
    )
    orders = tuple(
        own[np.argsort(-s[own], kind="stable")]
        for s, own in zip(saliency.scores, left, strict=True)
    )
    values = tuple(
        np.concatenate([[0.0], np.cumsum(s[order])])[n]
        for s, order, n in zip(saliency.scores, orders, sizes, strict=True)
    )
    outputs = [_output_axis(groups, k) for k in latency.kernels if k.axes]
    together = _all_or_none(groups.branches, sizes)
    return Knapsack(
        values=values,
        terms=(*terms_of(latency.kernels, sizes), *together),
        sizes=sizes,
        orders=orders,
        outputs=(*outputs, *[-1] * (1 + len(together))),
    )


def select(
    groups: ChannelGroups,
    saliency: Saliency,
    latency: LatencyModel,
    budget_ms: float,
    *,
    solver: str = "joint",
    limits: Mapping[str, float] | None = None,
    also: Sequence[tuple[LatencyModel, float]] = (),
    drop_blocks: bool = True,
    allowed: Widths | None = None,
    among: Sequence[IntArray] | None = None,
) -> Plan:
    """Choose the units that keep the most saliency within `budget_ms` milliseconds.

    Args:
        solver: "joint", which is proven to be near the best; or to compare with, "halp" (the
            paper's own, in 30 steps), "greedy" (the least saliency for each millisecond saved)
            or "uniform" (the same share of every group).
        limits: further limits, for the joint solver: "params" and "macs" as counts, "memory" as
            bytes of activations at a time.
        also: further latency models and the milliseconds that each may take, likewise.
        drop_blocks: whether residual branches may go whole.
        allowed: the widths that each group may have; None: any.
        among: the units of each group to choose from; the others are gone. None: all.

    Raises:
        InputError: an unknown solver or limit, limits with a solver that takes none, or widths
            that can't be.
        BudgetError: a budget that is not above 0.
        InfeasibleError: the least latency that can be reached is above the budget, or the limits
            can't be met.
    """
    limits = dict(limits or {})
    if not budget_ms > 0:
        raise BudgetError(f"budget_ms is {budget_ms!r}: pass a latency above 0 milliseconds")
    check_solver(solver, limits, also)
    for name, limit in limits.items():
        if not limit > 0:
            raise BudgetError(f"the limit on {name} is {limit!r}: pass a count above 0")
    problem = knapsack_of(
        groups, saliency, latency, drop_blocks=drop_blocks, allowed=allowed, among=among
    )
    params, macs = parameter_counts(groups), mac_counts(groups)
    counts = {"params": params, "macs": macs}
    further = [
        *(Limit(name, counts[name], limit, total(counts[name], groups.dense_units))
          for name, limit in limits.items() if name in counts),
        *(Limit(f"ms of {other.backend}", other.kernels, limit, other.dense_ms)
          for other, limit in also),
    ]  # fmt: skip
    moments = memory_moments(groups)
    levels, value, bound = solve_within(
        groups, latency, problem, budget_ms, solver, further, moments, limits.get("memory")
    )
    units = tuple(
        np.sort(order[: size[level]])
        for order, size, level in zip(problem.orders, problem.sizes, levels, strict=True)
    )
    kept, dense = [len(u) for u in units], groups.dense_units
    report = {
        "limits": limits,
        "params": {"dense": total(params, dense), "pruned": total(params, kept)},
        "macs": {"dense": total(macs, dense), "pruned": total(macs, kept)},
        "memory": {"dense": peak(moments, dense)[0], "pruned": peak(moments, kept)[0]},
        "also": [
            {
                "backend": other.backend,
                "device": other.device,
                "dense_ms": other.dense_ms,
                "predicted_ms": other.total_ms(kept),
                "budget_ms": limit,
            }
            for other, limit in also
        ],
    }
    return Plan(
        kept=kept_indices(groups, units),
        units=units,
        dense_ms=latency.dense_ms,
        predicted_ms=latency.total_ms(kept),
        budget_ms=budget_ms,
        gap=max(0.0, (bound - value) / max(abs(bound), 1e-300)),
        value=value,
        dense_value=float(sum(s.sum() for s in saliency.scores)),
        solver=solver,
        groups=groups,
        report=report,
    )


def _at_most(units: int, sizes: IntArray) -> IntArray:
    """The sizes that so many units are enough for, and to keep all of them."""
    return np.union1d(sizes[sizes <= units], np.array([units], dtype=np.int64))


def check_solver(solver: str, further: Collection[str] = (), also: Collection[object] = ()) -> None:
    """Whether there is such a solver, and it takes these limits besides the latency.

    Args:
        further: of "params", "macs" and "memory".
        also: limits on further latencies.

    Raises:
        InputError: it is unknown, or takes no further limits; the message says what to pass.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver is {solver!r}: pass one of {', '.join(map(repr, SOLVERS))}")
    for name in further:
        if name not in ("params", "macs", "memory"):
            raise InputError(f"limits has {name!r}: it takes 'params', 'macs' and 'memory'")
    if further and solver != "joint":
        raise InputError(
            f"the solver {solver!r} takes a limit on latency alone: leave {' and '.join(further)} "
            "out of the budget, or use solver='joint'"
        )
    if also and solver != "joint":
        raise InputError(
            f"the solver {solver!r} takes a limit on latency alone, and on one device: leave "
            "`also` out, or use solver='joint'"
        )


def _all_or_none(branches: Iterable[Branch], sizes: Sequence[IntArray]) -> list[Term]:
    """Forbids that some groups of a branch are empty and others are not."""
    terms: list[Term] = []
    for branch in branches:
        for one, other in itertools.pairwise(branch.groups):
            empty = np.equal.outer(sizes[one] == 0, sizes[other] == 0)
            terms.append(((one, other), np.where(empty, 0.0, np.inf)))
    return terms


def _output_axis(groups: ChannelGroups, kernel: Kernel) -> int:
    """The axis that the kernel's result has, channels first; -1 if none can change."""
    # What a calibration adds for the weights is no node's.
    spec = groups.outputs.get(kernel.nodes[-1]) if kernel.nodes else None
    if not isinstance(spec, TensorSpec):
        return -1
    keys = [reduced(axis)[0] for axis in kernel.axes]
    own = [reduced(extent)[0] for extent in spec.extents if extent.parts]
    return next((keys.index(key) for key in own if key in keys), -1)
