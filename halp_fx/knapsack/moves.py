"""Local moves on a solution: one and two variables at a time, judged by the true cost."""

from __future__ import annotations

import numpy as np

from halp_fx.knapsack.model import FloatArray, IntArray, Problem

__all__ = ["Moves"]

TRIED_PAIRS = 512  # most promising pairs of changes whose true cost is computed
TRIED_FIRST = 32  # of them, before the others: mostly one of these will do


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
        # The changes that reach each sum node and each table: the others need no look there.
        reach = [frozenset([v]) for v in range(sizes.size)]
        for node in problem.sums:
            reach.append(reach[node.left] | reach[node.right])
        scopes = [frozenset().union(*(reach[n] for n in scope)) for scope, _ in problem.tables]
        self.sum_rows = [self._changes_of(r) for r in reach[sizes.size :]]
        self.table_rows = [self._changes_of(s) for s in scopes]
        self.touched = 4 * sum(r.size for r in (*self.sum_rows, *self.table_rows))
        self.touched += 1000 * len(problem.tables)

    def _changes_of(self, variables: frozenset[int]) -> IntArray:
        return np.flatnonzero(np.isin(self.variable, sorted(variables)))

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
        cost = float(self.problem.costs(levels[None])[0])
        while True:
            current = self.value[self.problem.offsets[:-1] + levels]
            gain = self.value - current[self.variable]
            extra = self._extra(levels)
            good = np.flatnonzero((gain > 0) & (extra + cost <= budget))
            good = good[np.argsort(-gain[good], kind="stable")]
            better = self._several(levels, good[:, None], extra[good], budget - cost, budget)
            if better is None:
                free = np.flatnonzero((gain == 0) & (extra < 0))
                free = free[np.argsort(extra[free], kind="stable")]
                better = self._several(levels, free[:, None], extra[free], 0.0, budget)
                # `extra` is rounded: what doesn't truly save would be undone and done for ever.
                if better is not None and better[1] >= cost:
                    better = None
            if better is None:
                better = self._improve_pair(levels, gain, extra, cost, budget)
            if better is None:
                return levels
            levels, cost = better

    def _extra(self, levels: IntArray) -> FloatArray:
        """What each change of one level adds to the cost (all levels,), but for rounding."""
        problem = self.problem
        base = problem.states(levels[None])[:, 0]
        states = np.repeat(base[:, None], self.level.size, axis=1)
        states[self.variable, np.arange(self.level.size)] = self.level
        for k, (node, rows) in enumerate(zip(problem.sums, self.sum_rows, strict=True)):
            states[self.count.size + k, rows] = node.index[
                states[node.left, rows], states[node.right, rows]
            ]
        extra = np.zeros(self.level.size)
        for (scope, table), rows in zip(problem.tables, self.table_rows, strict=True):
            here = table[tuple(base[n] for n in scope)]
            extra[rows] += table[tuple(states[n, rows] for n in scope)] - here
        problem.work += self.touched
        return extra

    def _several(
        self, levels: IntArray, moves: IntArray, added: FloatArray, room: float, budget: float
    ) -> tuple[IntArray, float] | None:
        """As many moves (any, changes) as seem to fit together, the first ones first.

        `added` is what each adds to the cost, `room` what all may add; if the true cost is then
        over the budget, half as many, and so on. The levels and their cost; None if none fits.
        """
        chosen: list[IntArray] = []
        taken: set[int] = set()
        for move, cost in zip(moves, added, strict=True):
            variables = {int(v) for v in self.variable[move]}
            if cost <= room and not variables & taken:
                chosen.append(move)
                taken |= variables
                room -= float(cost)
        counts = [len(chosen) >> k for k in range(len(chosen).bit_length())]
        if not counts:
            return None
        moved = np.repeat(levels[None], len(counts), axis=0)
        for row, count in zip(moved, counts, strict=True):
            changes = np.concatenate(chosen[:count])
            row[self.variable[changes]] = self.level[changes]
        costs = self.problem.costs(moved)
        fits = np.flatnonzero(costs <= budget)
        return None if fits.size == 0 else (moved[fits[0]], float(costs[fits[0]]))

    def _improve_pair(
        self, levels: IntArray, gain: FloatArray, extra: FloatArray, cost: float, budget: float
    ) -> tuple[IntArray, float] | None:
        """Pairs of changes that gain and are within the budget together; None if none does.

        No change alone gains within the budget: of a far pair one goes up, the other down.
        """
        least = 1e-12 * float(np.abs(self.value[np.isfinite(self.value)]).max(initial=0.0))
        room = budget - cost
        up = np.flatnonzero((gain > least) & np.isfinite(extra))
        down = np.flatnonzero(np.isfinite(gain) & (gain <= 0) & (extra < 0))
        far = self._far_pairs(up, down, gain, extra, room)
        far = far[gain[far].sum(axis=1) > least]
        if far.size:
            far = far[np.argsort(-gain[far].sum(axis=1), kind="stable")[:TRIED_PAIRS]]
            better = self._several(levels, far, extra[far].sum(axis=1), room, budget)
            if better is not None:
                return better
        near = self._near_pair(levels, gain, extra, cost, budget, least)
        if near is not None or far.size == 0:
            return near
        # Costs of far pairs add up, unless a sum joins them: then look at all that seem to fit.
        both = gain[up][:, None] + gain[down][None]
        fits = (extra[up][:, None] + extra[down][None] <= room) & (both > least)
        fits &= self.variable[up][:, None] != self.variable[down][None]
        i, j = np.nonzero(fits)
        self.problem.work += both.size
        found = self._try(levels, up[i], down[j], both[i, j], least, budget)
        return None if found is None else found[1:]

    def _far_pairs(
        self, up: IntArray, down: IntArray, gain: FloatArray, extra: FloatArray, room: float
    ) -> IntArray:
        """For each change up, the change down that loses least of those that save enough."""
        if not up.size or not down.size:
            return np.zeros((0, 2), dtype=np.int64)
        down = down[np.argsort(extra[down], kind="stable")]
        last = np.searchsorted(extra[down], room - extra[up], side="right") - 1
        loss, variable = gain[down], self.variable[down]
        # Where the best of each run from the start is.
        new = loss > np.concatenate([[-np.inf], np.maximum.accumulate(loss)[:-1]])
        best = np.maximum.accumulate(np.where(new, np.arange(down.size), 0))[last]
        for k in np.flatnonzero((variable[best] == self.variable[up]) & (last >= 0)):
            run = slice(last[k] + 1)
            others = np.where(variable[run] == self.variable[up[k]], -np.inf, loss[run])
            best[k] = others.argmax()
            if others[best[k]] == -np.inf:
                last[k] = -1
        pairs = np.stack([up, down[best]], axis=1)
        return pairs[last >= 0]

    def _near_pair(
        self,
        levels: IntArray,
        gain: FloatArray,
        extra: FloatArray,
        cost: float,
        budget: float,
        least: float,
    ) -> tuple[IntArray, float] | None:
        """The pair of changes of near variables that gains most, of those within the budget."""
        best_gain, best = least, None
        a, b = self.first, self.second
        total = gain[a] + gain[b]
        keep = np.flatnonzero(total > least)
        self.problem.work += total.size + 4 * keep.size
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
                best_gain, best = better[0], better[1:]
        return best

    def _try(
        self,
        levels: IntArray,
        first: IntArray,
        second: IntArray,
        total: FloatArray,
        least: float,
        budget: float,
    ) -> tuple[float, IntArray, float] | None:
        """Of the pairs that gain the most, more than `least`, the first truly within the budget.

        What it gains, the levels and their cost.
        """
        order = np.argsort(-total, kind="stable")[:TRIED_PAIRS]
        order = order[total[order] > least]
        for part in (order[:TRIED_FIRST], order[TRIED_FIRST:]):
            if part.size == 0:
                return None
            moved = self._with(levels, first[part], second[part])
            costs = self.problem.costs(moved)
            fits = np.flatnonzero(costs <= budget)
            if fits.size:
                k = fits[0]
                return float(total[part[k]]), moved[k], float(costs[k])
        return None

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
