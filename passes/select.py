"""select: which channels survive, by the joint knapsack over widths.

Requires: groups, their saliency and a latency model of the same network; a budget in milliseconds.
Ensures: the predicted latency is within the budget; `Plan.gap` is proven.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halp_fx.errors import BudgetError, InfeasibleError
from halp_fx.knapsack import Sum, SumTerm, solve
from halp_fx.passes.rules.plan import kept_indices
from halp_fx.types import (
    ChannelGroups,
    Group,
    IntArray,
    LatencyModel,
    Plan,
    Saliency,
)

__all__ = ["select", "widths"]

_MAX_LEVELS = 32


def widths(group: Group) -> IntArray:
    """The numbers of units that a group may keep, ascending.

    Multiples of a power of two that grows with the group (8 from 64 units on), so that back-ends
    which compute channels in blocks find full ones; the least and the dense width always count.
    """
    step = 1
    while group.units // step > _MAX_LEVELS or (step < 8 and group.units >= 8 * step):
        step *= 2
    choices = {*range(step, group.units, step), group.units, max(group.least, 1), group.least}
    return np.array(sorted(c for c in choices if c >= group.least), dtype=np.int64)


def select(
    groups: ChannelGroups, saliency: Saliency, latency: LatencyModel, budget_ms: float
) -> Plan:
    """Choose the units that keep the most saliency within `budget_ms` milliseconds.

    Raises:
        InfeasibleError: the least latency that can be reached is above the budget.
    """
    if not budget_ms > 0:
        raise BudgetError(f"budget_ms is {budget_ms!r}: pass a latency above 0 milliseconds")
    choices = [widths(g) for g in groups.groups]
    orders = [np.argsort(-s, kind="stable") for s in saliency.scores]
    values = [
        np.concatenate([[0.0], np.cumsum(s[order])])[n]
        for s, order, n in zip(saliency.scores, orders, choices, strict=True)
    ]
    fixed = sum(float(k.cost()) for k in latency.kernels if not k.axes)
    terms = [
        SumTerm(
            tuple(
                Sum(
                    tuple(g for g, _ in axis.parts),
                    tuple(c * choices[g] for g, c in axis.parts),
                    axis.fixed,
                )
                for axis in kernel.axes
            ),
            kernel.cost,
        )
        for kernel in latency.kernels
        if kernel.axes
    ]
    try:
        solution = solve(values, terms, budget_ms - fixed)
    except InfeasibleError as error:
        least = error.least + fixed
        raise InfeasibleError(
            f"the budget of {budget_ms:.4g} ms can't be met: the least latency that "
            f"{groups.traced.model_name} can be pruned to is {least:.4g} ms "
            f"({least / latency.dense_ms:.1%} of the dense {latency.dense_ms:.4g} ms)",
            least,
        ) from error
    units = tuple(
        np.sort(order[: choices[g][level]])
        for g, (order, level) in enumerate(zip(orders, solution.levels, strict=True))
    )
    return Plan(
        kept=kept_indices(groups, units),
        units=units,
        dense_ms=latency.dense_ms,
        predicted_ms=latency.total_ms(_counts(units)),
        budget_ms=budget_ms,
        gap=max(0.0, (solution.bound - solution.value) / max(abs(solution.bound), 1e-300)),
        value=solution.value,
        dense_value=float(sum(s.sum() for s in saliency.scores)),
        solver="joint",
        groups=groups,
    )


def _counts(units: Sequence[IntArray]) -> list[int]:
    return [len(u) for u in units]
