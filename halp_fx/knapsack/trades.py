"""Local moves under several budgets: one variable at a time, and one up against one down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halp_fx.knapsack.model import FloatArray, IntArray, Problem

__all__ = ["Trades"]

TRIED_PAIRS = 512  # most promising pairs whose true costs are computed
NEARBY = 0.01  # share of the room by which an estimate may pass it and still be tried


class Trades:
    """Moves on the levels of a problem with several costs.

    Args:
        problems: one a constraint; same variables and levels.
        budgets: (constraints,) highest costs.
    """

    def __init__(self, problems: Sequence[Problem], budgets: FloatArray) -> None:
        self.problems = problems
        self.budgets = budgets
        first = problems[0]
        sizes = np.asarray([v.size for v in first.values])
        self.offsets = first.offsets
        self.variable = np.repeat(np.arange(sizes.size), sizes)
        self.level = np.concatenate([np.arange(n) for n in sizes])
        self.values = np.concatenate(first.values)

    def costs(self, levels: IntArray) -> FloatArray:
        """Costs (batch, constraints) of levels (batch, variables)."""
        return np.stack([p.costs(levels) for p in self.problems], axis=1)

    def value(self, levels: IntArray) -> float:
        """Value of one choice (variables,)."""
        return float(self.problems[0].value(levels[None])[0])

    def improve(self, levels: IntArray, prices: FloatArray) -> IntArray:
        """Levels at least as good and within the budgets, that no such move improves."""
        levels = levels.copy()
        while True:
            gain = self.values - self.values[self.offsets[:-1] + levels][self.variable]
            cost = self.costs(levels[None])[0]
            moved = self._with(levels, np.arange(self.level.size))
            reached = self.costs(moved)
            fits = (reached <= self.budgets).all(axis=1)
            good = fits & (gain > 0)
            if good.any():
                levels = moved[np.where(good, gain, -np.inf).argmax()]
                continue
            with np.errstate(invalid="ignore"):
                extra = (np.where(np.isfinite(reached), reached, np.inf) - cost) @ prices
            free = fits & (gain == 0) & (extra < -1e-12 * abs(float(cost @ prices)))
            if free.any():
                levels = moved[np.where(free, extra, np.inf).argmin()]
                continue
            better = self._trade(levels, gain, cost, reached)
            if better is None:
                return levels
            levels = better

    def _trade(
        self, levels: IntArray, gain: FloatArray, cost: FloatArray, reached: FloatArray
    ) -> IntArray | None:
        """The best of the pairs that gain: one variable up, another one down."""
        finite = np.isfinite(reached).all(axis=1) & np.isfinite(gain)
        up = np.flatnonzero(finite & (gain > 0))
        down = np.flatnonzero(finite & (gain <= 0) & (reached < cost).any(axis=1))
        if up.size == 0 or down.size == 0:
            return None
        tolerance = 1e-12 * float(np.abs(self.values[np.isfinite(self.values)]).max())
        total = gain[up][:, None] + gain[down][None]
        hopeful = (total > tolerance) & (self.variable[up][:, None] != self.variable[down][None])
        miss = np.full(total.shape, -np.inf)
        for k, budget in enumerate(self.budgets):
            # Costs of the two add up, but for what joins them: how far the sum is over.
            over = reached[up, k][:, None] + reached[down, k][None] - cost[k] - budget
            np.maximum(miss, over / max(abs(float(budget)), 1e-300), out=miss)
        for low, high in ((-np.inf, 0.0), (0.0, NEARBY)):
            i, j = np.nonzero(hopeful & (miss > low) & (miss <= high))
            order = np.argsort(-total[i, j], kind="stable")[:TRIED_PAIRS]
            if order.size == 0:
                continue
            moved = self._with(levels, up[i[order]], down[j[order]])
            fits = np.flatnonzero((self.costs(moved) <= self.budgets).all(axis=1))
            if fits.size:
                return moved[fits[0]]
        return None

    def repair(self, levels: IntArray, prices: FloatArray) -> IntArray | None:
        """Levels within the budgets, by the cheapest steps down; None if it gets stuck."""
        levels = levels.copy()
        scale = np.maximum(np.abs(self.budgets), 1e-300)
        weights = np.where(prices > 0, prices, float(prices.max(initial=0.0)) * 1e-3)
        if not weights.any():
            weights = 1 / scale
        first = self.offsets[:-1]
        for _ in range(8 * first.size):
            cost = self.costs(levels[None])[0]
            excess = np.where(np.isfinite(cost), cost - self.budgets, np.inf)
            if (excess <= 0).all():
                return levels
            if not np.isfinite(cost).all():
                return None
            gain = self.values - self.values[first + levels][self.variable]
            moved = self._with(levels, np.arange(self.level.size))
            reached = self.costs(moved)
            over = np.maximum(np.where(np.isfinite(reached), reached, np.inf) - self.budgets, 0.0)
            with np.errstate(invalid="ignore"):
                saved = (np.maximum(excess, 0.0) - over) @ weights
            usable = np.isfinite(saved) & np.isfinite(gain) & (saved > 0)
            if not usable.any():
                return None
            # What is gained in value counts whole, what is lost by what it saves.
            worth = np.full(gain.size, -np.inf)
            worth[usable] = np.where(
                gain[usable] >= 0, gain[usable] * saved[usable], gain[usable] / saved[usable]
            )
            levels = moved[int(worth.argmax())]
        return None

    def _with(self, levels: IntArray, *changes: IntArray) -> IntArray:
        """Copies of `levels`, one a row, each with the flat levels of its changes."""
        rows = np.arange(changes[0].size)
        out = np.repeat(levels[None], rows.size, axis=0)
        for change in changes:
            out[rows, self.variable[change]] = self.level[change]
        return out
