"""Baselines to hold the joint solver against: a uniform share, and greedy removal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InputError
from halp_fx.knapsack.model import IntArray, Term
from halp_fx.knapsack.settle import Ground
from halp_fx.knapsack.solver import Solution

__all__ = ["solve_greedy", "solve_uniform"]


def solve_uniform(
    values: Sequence[npt.ArrayLike],
    terms: Sequence[Term],
    budget: float,
    *,
    sizes: Sequence[npt.ArrayLike] | None = None,
) -> Solution:
    """The same share of its width for every variable: the largest share within the budget.

    Args:
        values, terms, budget: as for `solve`; levels ascend in width, the last is the dense one.
        sizes: for each variable the width of each level. None: the levels are evenly spaced.

    Returns:
        Levels, value and true cost; `bound` is no more than the value of everything.

    Raises:
        InputError: as `solve`, or `sizes` doesn't fit `values`.
        InfeasibleError: the least share is over the budget.
    """
    ground = Ground(values, terms, budget)
    widths = _shares(ground, sizes)
    # Costs need not grow with the share, so every share that changes a level is looked at.
    shares = np.unique(np.concatenate([np.zeros(1), *widths]))
    least = math.inf
    for share in shares[::-1]:
        wanted = np.array(
            [max(int((w <= share * (1 + 1e-9)).sum()) - 1, 0) for w in widths], dtype=np.int64
        )
        lowest = np.array([int(np.flatnonzero(a)[0]) for a in ground.allowed], dtype=np.int64)
        levels = ground.settle(np.maximum(wanted, lowest))
        if levels is None:
            continue
        cost = ground.cost(levels)
        least = min(least, cost)
        if cost <= budget:
            return Solution(tuple(map(int, levels)), ground.value(levels), cost, ground.most)
    raise ground.too_dear("uniform", least)


def _shares(ground: Ground, sizes: Sequence[npt.ArrayLike] | None) -> list[npt.NDArray[np.float64]]:
    counts = [v.size for v in ground.values]
    if sizes is None:
        return [np.arange(1, n + 1) / n for n in counts]
    if len(sizes) != len(counts):
        raise InputError(
            f"sizes has {len(sizes)} arrays for {len(counts)} variables: pass one each"
        )
    found = []
    for v, (given, count) in enumerate(zip(sizes, counts, strict=True)):
        size = np.asarray(given, dtype=np.float64)
        if size.shape != (count,) or (np.diff(size) < 0).any():
            raise InputError(f"sizes[{v}] must hold {count} widths in ascending order")
        found.append(size / max(float(size[-1]), 1e-300))
    return found


def solve_greedy(values: Sequence[npt.ArrayLike], terms: Sequence[Term], budget: float) -> Solution:
    """Lower one variable at a time, where the least value is lost for the cost saved.

    Each step goes down to the next level that saves cost at all, so that a level which costs as
    much as the one above it, or more, holds nothing up. Costs are the true ones throughout.

    Returns:
        Levels, value and true cost; `bound` is no more than the value of everything.

    Raises:
        InputError: as `solve`.
        InfeasibleError: no step saves anything and the budget is not met.
    """
    ground = Ground(values, terms, budget)
    levels, cost = ground.dense, ground.cost(ground.dense)
    while cost > budget:
        lower = _cheapest_step(ground, levels, cost)
        if lower is None:
            raise ground.too_dear("greedy", cost)
        levels, cost = lower, ground.cost(lower)
    return Solution(tuple(map(int, levels)), ground.value(levels), cost, ground.most)


def _cheapest_step(ground: Ground, levels: IntArray, cost: float) -> IntArray | None:
    """The step down with the least value lost for each unit of cost saved."""
    value = float(ground.problem.value(levels[None])[0])
    waiting = [(int(v), int(levels[v]) - 1) for v in np.flatnonzero(levels > 0)]
    best: IntArray | None = None
    best_ratio = math.inf
    while waiting:
        steps = [_lowered(ground, levels, v, k) for v, k in waiting]
        known = [k for k, step in enumerate(steps) if step is not None]
        rows = [step for step in steps if step is not None]
        costs = ground.problem.costs(np.stack(rows)) if rows else np.zeros(0)
        lost = value - ground.problem.value(np.stack(rows)) if rows else np.zeros(0)
        saves = costs < cost
        for row, loss, reached in zip(
            np.flatnonzero(saves), lost[saves], costs[saves], strict=True
        ):
            ratio = float(loss) / (cost - float(reached))
            if ratio < best_ratio:
                best, best_ratio = rows[row], ratio
        again = {k for k, good in zip(known, saves, strict=True) if not good}
        waiting = [(v, k - 1) for i, (v, k) in enumerate(waiting) if i in again and k > 0]
    return best


def _lowered(ground: Ground, levels: IntArray, variable: int, level: int) -> IntArray | None:
    lower = levels.copy()
    lower[variable] = level
    return ground.settle(lower)
