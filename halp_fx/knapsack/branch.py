"""Branch and bound on top of the relaxation: closes what the price alone leaves open.

A box (levels still allowed, one mask) is bounded at a few prices. Max-marginals then drop levels
that no better solution can use (reduced-cost fixing), and the box is cut in two at a variable in
which its best solutions within and over the budget differ. Boxes are taken best bound first and
evaluated a batch at a time.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field

import numpy as np

from halp_fx.knapsack.model import BoolArray, IntArray, Problem
from halp_fx.knapsack.moves import Moves
from halp_fx.knapsack.relax import Evaluation, Relaxation

__all__ = ["Box", "Clock", "Incumbent", "Search", "threshold"]

PRICE_ROUNDS = 4  # prices tried for each box
LISTED = 512  # combinations of a box that are looked at one by one


def threshold(value: float, gap: float) -> float:
    """The highest bound with (bound - value) <= gap * |bound|."""
    return value / (1 - gap) if value > 0 else value / (1 + gap)


@dataclass
class Clock:
    """Stops the search: by work done, the same on every machine, and by time if asked."""

    problem: Problem
    work: float  # where the count of the problem stops it
    until: float | None = None  # time.monotonic()

    @property
    def over(self) -> bool:
        return self.problem.work >= self.work or (
            self.until is not None and time.monotonic() >= self.until
        )


@dataclass
class Incumbent:
    """The best solution within the budget so far."""

    problem: Problem
    budget: float
    moves: Moves = field(init=False)
    levels: IntArray | None = None
    value: float = -np.inf
    seen: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.moves = Moves(self.problem)

    def offer(self, levels: IntArray, *, polish: int = 1, repair: bool = False) -> None:
        """Look at levels (any, variables): keep the best, and improve the `polish` best ones."""
        levels = np.unique(levels, axis=0)
        costs, values = self.problem.costs(levels), self.problem.value(levels)
        order = np.argsort(-values, kind="stable")
        fits = [k for k in order if costs[k] <= self.budget and np.isfinite(values[k])]
        starts = [levels[k] for k in fits[:polish]]
        if repair:
            over = sorted(
                (k for k in order if costs[k] > self.budget and np.isfinite(values[k])),
                key=lambda k: float(costs[k]),
            )
            for k in over[:polish]:
                mended = self.moves.repair(levels[k], self.budget)
                if mended is not None:
                    starts.append(mended)
        for start in starts:
            if start.tobytes() in self.seen:
                continue
            self.seen.add(start.tobytes())
            self._keep(self.moves.improve(start, self.budget))

    def _keep(self, levels: IntArray) -> None:
        value = float(self.problem.value(levels[None])[0])
        if value > self.value:
            self.levels, self.value = levels, value


@dataclass
class Box:
    """Levels still allowed, and what is known of the best solution among them."""

    bound: float
    price: float
    mask: BoolArray  # (all levels,)
    below: IntArray | None = None  # relaxed optimum within the budget
    above: IntArray | None = None  # relaxed optimum over the budget
    line_below: tuple[float, float] | None = None  # its value and cost in the relaxation
    line_above: tuple[float, float] | None = None
    step: float = 0.02

    def update(self, upper: float, cost: float, levels: IntArray, budget: float) -> None:
        """Take in an evaluation at the current price, and choose the next price."""
        if not np.isfinite(upper):
            return
        line = (upper + self.price * cost, cost)
        if cost <= budget:
            self.below, self.line_below = levels, line
        else:
            self.above, self.line_above = levels, line
        if self.line_below is not None and self.line_above is not None:
            rise = self.line_above[0] - self.line_below[0]
            self.price = max(rise / (self.line_above[1] - self.line_below[1]), 0.0)
        elif cost > budget:
            self.price *= 1 + self.step
            self.step *= 4
        else:
            self.price /= 1 + self.step
            self.step *= 4


class Search:
    """The boxes that are open, best bound first."""

    def __init__(
        self, relaxation: Relaxation, incumbent: Incumbent, gap: float, clock: Clock
    ) -> None:
        self.relaxation = relaxation
        self.incumbent = incumbent
        self.budget = incumbent.budget
        self.gap = gap
        self.clock = clock
        problem = relaxation.problem
        self.offsets = problem.offsets
        self.settled = -np.inf  # highest bound of what was put aside
        self.open: list[tuple[float, int, Box]] = []
        self._number = 0

    @property
    def bound(self) -> float:
        """Upper bound of the value of every solution."""
        open_bound = -self.open[0][0] if self.open else -np.inf
        return max(self.settled, open_bound, self.incumbent.value)

    def run(self) -> None:
        """Search until the gap is closed or the clock is over."""
        while self.open and not self.clock.over:
            limit = threshold(self.incumbent.value, self.gap)
            if -self.open[0][0] <= limit:
                return
            boxes: list[Box] = []
            while self.open and len(boxes) < max(self.relaxation.batch // 2, 1):
                _, _, box = heapq.heappop(self.open)
                if box.bound <= limit:
                    self.settled = max(self.settled, box.bound)
                else:
                    boxes.append(box)
            children = [child for box in boxes for child in self._cut(box)]
            self.bound_boxes(children)
            for child in children:
                self.push(child)

    def push(self, box: Box) -> None:
        """Open a box, or put it aside if it can't close the gap any further."""
        if box.bound <= threshold(self.incumbent.value, self.gap):
            self.settled = max(self.settled, box.bound)
            return
        self._number += 1
        heapq.heappush(self.open, (-box.bound, self._number, box))

    def bound_boxes(self, boxes: list[Box]) -> None:
        """Lower the bounds of boxes, drop levels from them, offer the solutions met."""
        active = boxes
        best = {id(box): box.price for box in boxes}
        for _ in range(PRICE_ROUNDS):
            limit = threshold(self.incumbent.value, self.gap)
            active = [b for b in active if b.bound > limit]
            if not active:
                return
            found = self._evaluate(active, marginals=False)
            for k, box in enumerate(active):
                price = box.price
                bound = float(found.upper[k]) + price * self.budget
                if bound < box.bound:
                    box.bound, best[id(box)] = bound, price
                box.update(
                    float(found.upper[k]), float(found.cost[k]), found.levels[0][k], self.budget
                )
            self.incumbent.offer(self.relaxation.proposals(found))
        limit = threshold(self.incumbent.value, self.gap)
        active = [b for b in active if b.bound > limit]
        if not active:
            return
        for box in active:
            box.price = best[id(box)]
        found = self._evaluate(active, marginals=True)
        assert found.marginal is not None
        for k, box in enumerate(active):
            reach = found.marginal[k] + box.price * self.budget
            dropped = box.mask & (reach <= limit)
            if dropped.any():
                self.settled = max(self.settled, float(reach[dropped].max()))
                box.mask = box.mask & ~dropped
                if not np.logical_or.reduceat(box.mask, self.offsets[:-1]).all():
                    box.bound = -np.inf

    def _evaluate(self, boxes: list[Box], *, marginals: bool) -> Evaluation:
        return self.relaxation.evaluate(
            np.asarray([b.price for b in boxes]),
            np.stack([b.mask for b in boxes]),
            marginals=marginals,
        )

    def _cut(self, box: Box) -> list[Box]:
        """Two boxes that share the levels of one; none if it is small enough to list."""
        counts = np.add.reduceat(box.mask.astype(np.int64), self.offsets[:-1])
        if np.log(counts).sum() <= np.log(LISTED):
            self._list(box, counts)
            return []
        value = np.concatenate(self.relaxation.problem.values)
        v, last = -1, 0
        if box.below is not None and box.above is not None:
            low, high = box.below, box.above
            differ = np.where(
                (low != high) & (counts > 1),
                np.abs(value[self.offsets[:-1] + low] - value[self.offsets[:-1] + high]),
                -1.0,
            )
            v = int(differ.argmax())
            last = int(low[v] + high[v]) // 2
            if differ[v] < 0:
                v = -1
        if v < 0:
            v, last = int(counts.argmax()), -1
        here = np.arange(self.offsets[v], self.offsets[v + 1])
        allowed = np.flatnonzero(box.mask[here])
        if not allowed[0] <= last < allowed[-1]:
            last = int(allowed[(allowed.size - 1) // 2])
        children = []
        for side in (here[: last + 1], here[last + 1 :]):
            mask = box.mask.copy()
            mask[here] = False
            mask[side] = box.mask[side]
            children.append(Box(box.bound, box.price, mask))
        return children

    def _list(self, box: Box, counts: IntArray) -> None:
        """Settle a box by looking at every combination in it."""
        levels = np.zeros((int(counts.prod()), counts.size), dtype=np.int64)
        rest = np.arange(levels.shape[0])
        for v, count in enumerate(counts):
            allowed = np.flatnonzero(box.mask[self.offsets[v] : self.offsets[v + 1]])
            rest, place = np.divmod(rest, count)
            levels[:, v] = allowed[place]
        self.incumbent.offer(levels)
