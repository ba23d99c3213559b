"""The joint knapsack, solved with a certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InfeasibleError, InputError
from halp_fx.knapsack.branch import Box, Clock, Incumbent, Search, threshold
from halp_fx.knapsack.model import IntArray, Problem, Term, cost_of, value_of
from halp_fx.knapsack.reading import read
from halp_fx.knapsack.relax import Relaxation

__all__ = ["Solution", "solve"]

WORK = 2e9  # table entries computed before the search gives up on the gap
EASY_WORK = 1e8  # of it, spent on a tenth of the gap asked for
ROUNDING = 1e-12  # relative: sums of the same costs in another order may differ by this
SECANTS = 60  # prices tried for the whole problem; a handful is enough in practice


@dataclass(frozen=True)
class Solution:
    """Chosen levels, and how good they are."""

    levels: tuple[int, ...]  # chosen level of each variable
    value: float  # sum of their values
    cost: float  # sum of their costs, at most the budget
    bound: float  # proven: no choice within the budget is worth more

    @property
    def gap(self) -> float:
        """How far from the best possible at most, relative: (bound - value) / |bound|."""
        return max(self.bound - self.value, 0.0) / max(abs(self.bound), 1e-300)


def solve(
    values: Sequence[npt.ArrayLike],
    terms: Sequence[Term],
    budget: float,
    *,
    gap: float = 1e-3,
    time_limit_s: float | None = None,
) -> Solution:
    """Choose a level for each variable: the most value whose cost is within the budget.

    Args:
        values: for each variable a 1-D array, the value of each level; -inf: forbidden.
        terms: pairs (variables, table): variable indices and the cost array with one axis for
            each; inf: forbidden. Or `SumTerm`, for a cost that depends on sums of widths.
        budget: highest sum of costs, in the unit of the tables.
        gap: stop once `(bound - value) / |bound|` is proven to be at most this.
        time_limit_s: stop after about this long with what there is. None: a limit on the work
            done instead, so that the same input has the same answer.

    Raises:
        InputError: NaN, wrong shapes or indices, a variable without levels.
        InfeasibleError: the budget is below the least cost, or everything is forbidden.

    Example:
        >>> solution = solve([[0, 3, 5], [0, 4]], [((0, 1), [[0, 1], [1, 3], [2, 9]])], 3.0)
        >>> solution.levels, solution.value
        ((1, 1), 7.0)
    """
    start = time.monotonic()
    if isinstance(budget, bool) or math.isnan(budget):
        raise InputError(f"budget is {budget!r}: pass a number in the unit of the costs")
    if not 0 <= gap < 1:
        raise InputError(f"gap is {gap!r}: pass a share from 0 up to, but not, 1")
    raw, allowed = read(values, terms)
    if not raw.values:
        return _nothing(terms, budget)
    keep = [np.flatnonzero(a) for a in allowed]
    problem = Problem(raw.restrict(keep))
    clock = Clock(problem, WORK, None if time_limit_s is None else start + time_limit_s)
    # More than the most that can be spent changes nothing, but an infinite budget times a
    # price of 0 would be NaN.
    slack = min(budget + ROUNDING * abs(budget), problem.most) if budget > -math.inf else budget
    levels, bound = _solve(problem, slack, gap, clock)
    chosen = tuple(int(keep[v][k]) for v, k in enumerate(levels))
    value = value_of(chosen, values)
    # The bound was summed in another order than the value.
    rounding = ROUNDING * sum(
        float(np.abs(v[a]).max()) for v, a in zip(raw.values, allowed, strict=True)
    )
    bound = value if bound <= value + rounding else bound + rounding
    return Solution(chosen, value, min(cost_of(chosen, terms), budget), bound)


def _nothing(terms: Sequence[Term], budget: float) -> Solution:
    cost = cost_of((), terms)
    if cost > budget:
        raise InfeasibleError(_too_dear(budget, cost), least=cost)
    return Solution((), 0.0, cost, 0.0)


def _too_dear(budget: float, least: float) -> str:
    return f"the budget is {budget:.6g}, but the least cost of any choice is {least:.6g}: raise it"


def _solve(problem: Problem, budget: float, gap: float, clock: Clock) -> tuple[IntArray, float]:
    """Levels of the best solution found, and the bound."""
    relaxation = Relaxation(problem)
    incumbent = Incumbent(problem, budget)
    least, cheapest = relaxation.least_cost()
    _check_feasible(relaxation, incumbent, least, cheapest)
    root = _root(relaxation, incumbent, cheapest, gap, clock)
    # A better answer than asked for is often nearly free.
    search = Search(
        relaxation, incumbent, gap / 10, Clock(problem, problem.work + EASY_WORK, clock.until)
    )
    search.push(root)
    search.run()
    search.gap, search.clock = gap, clock
    search.run()
    if incumbent.levels is None:
        raise InfeasibleError(
            f"no choice within the budget of {budget:.6g} was found, though none was proven not to "
            f"exist: any choice costs at least {least:.6g}. Raise the budget",
            least=least,
        )
    return incumbent.levels, search.bound


def _check_feasible(
    relaxation: Relaxation, incumbent: Incumbent, least: float, cheapest: IntArray
) -> None:
    budget = incumbent.budget
    if math.isinf(least):
        raise InfeasibleError(
            "every combination of levels is forbidden by costs of inf: allow at least one",
            least=math.inf,
        )
    if least > budget:
        if relaxation.exact:
            raise InfeasibleError(_too_dear(budget, least), least=least)
        raise InfeasibleError(
            f"the budget is {budget:.6g}, but any choice costs at least {least:.6g} (a lower "
            "bound; the least cost itself is not known): raise it",
            least=least,
        )
    incumbent.offer(cheapest[None], repair=not relaxation.exact)


def _root(
    relaxation: Relaxation, incumbent: Incumbent, cheapest: IntArray, gap: float, clock: Clock
) -> Box:
    """The box of the whole problem, bounded at its best price."""
    problem, budget = relaxation.problem, incumbent.budget
    everything = np.ones((1, problem.offsets[-1]), dtype=np.bool_)
    free = relaxation.evaluate(np.zeros(1), everything)
    incumbent.offer(relaxation.proposals(free), repair=not relaxation.exact)
    high = (float(free.upper[0]), float(free.cost[0]))
    box = Box(high[0], 0.0, everything[0])
    if high[1] <= budget and relaxation.exact:
        return box
    low = (float(problem.value(cheapest[None])[0]), float(problem.costs(cheapest[None])[0]))
    price = max(high[0] - low[0], 0.0) / (high[1] - low[1]) if high[1] > low[1] else 0.0
    if not relaxation.exact:

        def offer(levels: IntArray, bound: float) -> float:
            incumbent.offer(levels, polish=2, repair=True)
            done = bound <= threshold(incumbent.value, gap) or clock.over
            return math.inf if done else incumbent.value

        span = high[1] - low[1] if high[1] > low[1] else max(abs(budget), abs(high[1]), 1e-300)
        box.bound, box.price = relaxation.tune(price, budget, span, offer)
        return box
    box.below, box.line_below, box.above, box.line_above = cheapest, low, free.levels[0][0], high
    box.price = best = price
    met = []
    for _ in range(SECANTS):
        found = relaxation.evaluate(np.asarray([box.price]), everything)
        bound = float(found.upper[0]) + box.price * budget
        met.append(relaxation.proposals(found))
        if bound < box.bound:
            box.bound, best = bound, box.price
        before = box.price
        box.update(float(found.upper[0]), float(found.cost[0]), found.levels[0][0], budget)
        if abs(box.price - before) <= 1e-12 * abs(before):
            break
    incumbent.offer(np.concatenate(met), polish=3)
    box.price = best
    return box
