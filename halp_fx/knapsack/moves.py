"""Local moves on a solution: one and two variables at a time, judged by the true cost."""

from __future__ import annotations

import numpy as np

from halp_fx.knapsack.model import FloatArray, IntArray, Problem

__all__ = ["Moves"]

TRIED_PAIRS = 512  # most promising pairs of changes whose true cost is computed


class Moves:
    """All changes of one level, and of pairs that share a cost table, listed once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        sizes = np.asarray([v.size for v in problem.values])
        self.count = sizes
        self.variable = np.repeat(np.arange(sizes.size), sizes)  # (levels,) of each flat level
        self.level = np.concatenate([np.arange(n) for n in sizes])
        self.value = np.concatenate(problem.values)
        near: dict[tuple[int, int], FloatArray | None] = {}
        for scope, table in problem.tables:
            plain = [n for n in scope if n < sizes.size]
            for a, b in ((a, b) for a in plain for b in plain if a < b):
                near.setdefault((a, b), None)
                if len(scope) == 2:
                    near[a, b] = table
        # All pairs of levels of near variables, and the tables that join them, one after another.
        first, second, base, width, entries = [], [], [], [], [np.zeros(0)]
        start = 0
        for (a, b), joint in sorted(near.items()):
            i = np.repeat(np.flatnonzero(self.variable == a), sizes[b])
            first.append(i)
            second.append(np.tile(np.flatnonzero(self.variable == b), sizes[a]))
            base.append(np.full(i.size, start))
            width.append(np.full(i.size, sizes[b]))
            entries.append(np.zeros(i.size) if joint is None else joint.reshape(-1))
            start += i.size
        empty = np.zeros(0, dtype=np.int64)
        self.first = np.concatenate([empty, *first])
        self.second = np.concatenate([empty, *second])
        self.base = np.concatenate([empty, *base])
        self.width = np.concatenate([empty, *width])
        self.entries = np.concatenate(entries)

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
        """The pair of changes that gains most, of those within the budget; None if none gains."""
        tolerance = 1e-12 * float(np.abs(self.value[np.isfinite(self.value)]).max(initial=0.0))
        best_gain, best = tolerance, None
        a, b = self.first, self.second
        total = gain[a] + gain[b]
        keep = np.flatnonzero(total > tolerance)
        a, b, total = a[keep], b[keep], total[keep]
        base, width = self.base[keep], self.width[keep]
        i, j = self.level[a], self.level[b]
        here, there = levels[self.variable[a]], levels[self.variable[b]]
        with np.errstate(invalid="ignore"):
            estimate = cost + extra[a] + extra[b]
            estimate += (
                self.entries[base + i * width + j] + self.entries[base + here * width + there]
            )
            estimate -= (
                self.entries[base + i * width + there] + self.entries[base + here * width + j]
            )
        # One change alone may be forbidden where both together are not (a block dropped whole).
        known = np.isfinite(extra[a]) & np.isfinite(extra[b])
        for use in (known & (estimate <= budget), ~known):
            better = self._try(levels, a[use], b[use], total[use], best_gain, budget)
            if better is not None:
                best_gain, best = better
        # Far pairs: their costs add up, unless a sum joins them.
        use = np.flatnonzero(np.isfinite(gain) & np.isfinite(extra) & ((gain != 0) | (extra != 0)))
        both = gain[use][:, None] + gain[use][None]
        fits = (extra[use][:, None] + extra[use][None] <= budget - cost) & (both > best_gain)
        fits &= self.variable[use][:, None] < self.variable[use][None]
        i, j = np.nonzero(fits)
        better = self._try(levels, use[i], use[j], both[i, j], best_gain, budget)
        return best if better is None else better[1]

    def _try(
        self,
        levels: IntArray,
        first: IntArray,
        second: IntArray,
        total: FloatArray,
        least: float,
        budget: float,
    ) -> tuple[float, IntArray] | None:
        """Of the pairs that gain the most, more than `least`, the first truly within the budget."""
        order = np.argsort(-total, kind="stable")[:TRIED_PAIRS]
        order = order[total[order] > least]
        if order.size == 0:
            return None
        moved = self._with(levels, first[order], second[order])
        fits = np.flatnonzero(self.problem.costs(moved) <= budget)
        return None if fits.size == 0 else (float(total[order[fits[0]]]), moved[fits[0]])

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
