"""Local moves on a solution: one and two variables at a time, judged by the true cost."""

from __future__ import annotations

import numpy as np

from halp_fx.knapsack.model import FloatArray, IntArray, Problem

__all__ = ["Moves"]

TRIED_PAIRS = 512  # most promising pairs of far variables whose true cost is computed


class Moves:
    """All changes of one level, and of pairs that share a cost table, listed once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        sizes = np.asarray([v.size for v in problem.values])
        self.count = sizes
        self.variable = np.repeat(np.arange(sizes.size), sizes)  # (levels,) of each flat level
        self.level = np.concatenate([np.arange(n) for n in sizes])
        self.value = np.concatenate(problem.values)
        near: set[tuple[int, int]] = set()
        for scope, _ in problem.tables:
            plain = [n for n in scope if n < sizes.size]
            near.update((a, b) for a in plain for b in plain if a < b)
        first, second = [], []
        for a, b in sorted(near):
            i = np.flatnonzero(self.variable == a)
            j = np.flatnonzero(self.variable == b)
            first.append(np.repeat(i, j.size))
            second.append(np.tile(j, i.size))
        empty = np.zeros(0, dtype=np.int64)
        self.near = (
            np.concatenate(first) if first else empty,
            np.concatenate(second) if second else empty,
        )

    def _with(self, levels: IntArray, *changes: IntArray) -> IntArray:
        """Copies of `levels`, one a row, each with the flat levels of its changes."""
        rows = np.arange(changes[0].size)
        out = np.repeat(levels[None], rows.size, axis=0)
        for change in changes:
            out[rows, self.variable[change]] = self.level[change]
        return out

    def improve(self, levels: IntArray, budget: float) -> IntArray:
        """Levels at least as good and within the budget, that no such move improves."""
        levels = levels.copy()
        flat = np.arange(self.level.size)
        while True:
            current = self.value[self.problem.offsets[:-1] + levels]
            cost = float(self.problem.costs(levels[None])[0])
            gain = self.value - current[self.variable]
            moved = self._with(levels, flat)
            extra = self.problem.costs(moved) - cost
            good = (gain > 0) & (extra + cost <= budget)
            free = (gain == 0) & (extra < 0)
            if good.any():
                levels = moved[np.where(good, gain, -np.inf).argmax()]
                continue
            if free.any():
                levels = moved[np.where(free, extra, np.inf).argmin()]
                continue
            better = self._improve_pair(levels, gain, extra, cost, budget)
            if better is None:
                return levels
            levels = better

    def _improve_pair(
        self, levels: IntArray, gain: FloatArray, extra: FloatArray, cost: float, budget: float
    ) -> IntArray | None:
        tolerance = 1e-12 * float(np.abs(self.value[np.isfinite(self.value)]).max(initial=0.0))
        best_gain, best = tolerance, None
        a, b = self.near
        total = gain[a] + gain[b]
        keep = np.flatnonzero(total > tolerance)
        if keep.size:
            a, b, total = a[keep], b[keep], total[keep]
            moved = self._with(levels, a, b)
            fits = self.problem.costs(moved) <= budget
            if fits.any():
                pick = int(np.where(fits, total, -np.inf).argmax())
                best_gain, best = float(total[pick]), moved[pick]
        # Far pairs: their costs add up, unless a sum node joins them, so check the best ones.
        use = np.flatnonzero(np.isfinite(gain) & np.isfinite(extra) & ((gain != 0) | (extra != 0)))
        both = gain[use][:, None] + gain[use][None]
        fits = (extra[use][:, None] + extra[use][None] <= budget - cost) & (both > best_gain)
        fits &= self.variable[use][:, None] < self.variable[use][None]
        i, j = np.nonzero(fits)
        if i.size == 0:
            return best
        order = np.argsort(-both[i, j], kind="stable")[:TRIED_PAIRS]
        i, j = i[order], j[order]
        moved = self._with(levels, use[i], use[j])
        real = np.flatnonzero(self.problem.costs(moved) <= budget)
        return best if real.size == 0 else moved[real[0]]

    def repair(self, levels: IntArray, budget: float) -> IntArray | None:
        """Levels within the budget, by the cheapest steps down; None if it gets stuck."""
        levels = levels.copy()
        flat = np.arange(self.level.size)
        first = self.problem.offsets[:-1]
        for _ in range(4 * first.size):
            cost = float(self.problem.costs(levels[None])[0])
            if cost <= budget:
                return levels
            gain = self.value - self.value[first + levels][self.variable]
            costs = self.problem.costs(self._with(levels, flat))
            # What goes below the budget is worth nothing.
            excess = cost - budget
            saved = np.minimum(cost - costs, excess) if np.isfinite(cost) else np.isfinite(costs)
            worth = np.full(flat.size, -np.inf)
            np.divide(gain, saved, out=worth, where=(saved > 0) & np.isfinite(gain))
            best = np.maximum.reduceat(worth, first)
            order = [v for v in np.argsort(-best, kind="stable") if best[v] > -np.inf]
            if not order:
                return None
            moves = [first[v] + int(worth[first[v] :][: self.count[v]].argmax()) for v in order]
            # Several at once while far from the budget, if they get along.
            enough = int(np.searchsorted(np.cumsum(saved[moves]), excess / 2)) + 1
            bundle = levels.copy()
            for m in moves[:enough]:
                bundle[self.variable[m]] = self.level[m]
            if not float(self.problem.costs(bundle[None])[0]) < cost:
                bundle = levels.copy()
                bundle[self.variable[moves[0]]] = self.level[moves[0]]
            levels = bundle
        return None
