"""The joint knapsack under several budgets at once, solved with a certificate.

    maximise   sum over variables v of  values[v][level of v]
    subject to cost_i(levels)  <=  budget_i    for each constraint i

For prices lambda_i >= 0, one a constraint, every choice within all budgets satisfies

    value  <=  L(lambda) = max over levels of (value - sum_i lambda_i cost_i)
                           + sum_i lambda_i budget_i,

and variable elimination finds that maximum. `dual` looks for the prices with the least L; choices
met near them, brought within the budgets and improved by local moves (`trades`), give the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InfeasibleError, InputError
from halp_fx.knapsack.dual import POLISHED, Dual
from halp_fx.knapsack.model import (
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    RawProblem,
    Term,
    cost_of,
    value_of,
)
from halp_fx.knapsack.reading import read
from halp_fx.knapsack.solver import ROUNDING, Solution, solve
from halp_fx.knapsack.trades import Trades

__all__ = ["Constraint", "SeveralSolution", "solve_several"]

Constraint = tuple[Sequence[Term], float]  # terms of a cost, and its budget

NUDGES = (0.995, 1.005, 0.98, 1.02, 0.95, 1.05)  # factors on the best prices, for more choices


@dataclass(frozen=True)
class SeveralSolution:
    """Chosen levels under several budgets, and how good they are."""

    levels: tuple[int, ...]  # chosen level of each variable
    value: float  # sum of their values
    costs: tuple[float, ...]  # of each constraint, at most its budget
    bound: float  # proven: no choice within the budgets is worth more

    @property
    def gap(self) -> float:
        """How far from the best possible at most, relative: (bound - value) / |bound|."""
        return max(self.bound - self.value, 0.0) / max(abs(self.bound), 1e-300)


def solve_several(
    values: Sequence[npt.ArrayLike],
    constraints: Sequence[Constraint],
    *,
    gap: float = 1e-3,
) -> SeveralSolution:
    """Choose a level for each variable: the most value within every budget.

    Args:
        values: as for `solve`.
        constraints: pairs (terms, budget), each as for `solve`; at least one.
        gap: stop once `(bound - value) / |bound|` is proven to be at most this.

    Raises:
        InputError: as `solve`, or there is no constraint.
        InfeasibleError: some budget, or all together, can't be met; or no choice was found.

    Example:
        >>> time = [((0,), [0, 1, 3]), ((1,), [0, 2])]
        >>> size = [((0,), [0, 4, 5]), ((1,), [0, 4])]
        >>> solve_several([[0, 3, 5], [0, 4]], [(time, 3.0), (size, 6.0)]).levels
        (2, 0)
    """
    if not constraints:
        raise InputError("there is no constraint: pass at least one pair (terms, budget)")
    if not 0 <= gap < 1:
        raise InputError(f"gap is {gap!r}: pass a share from 0 up to, but not, 1")
    for terms, budget in constraints:
        if isinstance(budget, bool) or math.isnan(budget):
            raise InputError(f"budget is {budget!r}: pass a number in the unit of the costs")
        del terms
    if len(constraints) == 1:
        ((terms, budget),) = constraints
        return _finish(solve(values, terms, budget, gap=gap), values, constraints)
    raw, keep = _read(values, constraints)
    if not values:
        return _constant(constraints)
    problems = [Problem(r.restrict(keep)) for r in raw]
    budgets = np.array(
        [
            min(b + ROUNDING * abs(b), p.most) if b > -math.inf else b
            for p, (_, b) in zip(problems, constraints, strict=True)
        ]
    )
    pool = _Pool(problems, budgets)
    dual = Dual(problems, budgets)
    dual.check_each()
    dual.improve(pool.offer, gap)
    bound = dual.bound
    if not pool.closed(bound, gap):
        nudged = [
            dual.proposals(dual.evaluate(dual.prices * factors))
            for factors in np.vstack([np.eye(budgets.size) * (f - 1) + 1 for f in NUDGES])
        ]
        pool.offer(np.unique(np.concatenate(nudged), axis=0), dual.prices)
    if dual.binding is not None and not pool.closed(bound, gap):
        # One budget decides: branch and bound may close what its price leaves open.
        alone = solve(values, *constraints[dual.binding], gap=gap)
        bound = min(bound, alone.bound)
        if all(level in k for level, k in zip(alone.levels, keep, strict=True)):
            pool.offer(_positions(alone.levels, keep)[None], np.eye(budgets.size)[dual.binding])
    found = pool.levels
    if found is None:
        raise InfeasibleError(
            "no choice within all budgets was found, though none was proven not to exist: raise "
            "a budget",
            least=float(dual.least[0]),
        )
    levels = tuple(int(k[i]) for k, i in zip(keep, found, strict=True))
    return _finish(Solution(levels, value_of(levels, values), 0.0, bound), values, constraints)


def _finish(
    solution: Solution, values: Sequence[npt.ArrayLike], constraints: Sequence[Constraint]
) -> SeveralSolution:
    rounding = ROUNDING * math.fsum(
        float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
        for a in (np.asarray(v, dtype=np.float64) for v in values)
    )
    value, bound = solution.value, solution.bound
    return SeveralSolution(
        solution.levels,
        value,
        tuple(min(cost_of(solution.levels, terms), b) for terms, b in constraints),
        value if bound <= value + rounding else bound + rounding,
    )


def _constant(constraints: Sequence[Constraint]) -> SeveralSolution:
    costs = [cost_of((), terms) for terms, _ in constraints]
    for k, (cost, (_, budget)) in enumerate(zip(costs, constraints, strict=True)):
        if cost > budget:
            raise InfeasibleError(_too_dear(k, budget, cost), least=cost)
    return SeveralSolution((), 0.0, tuple(costs), 0.0)


def _too_dear(k: int, budget: float, least: float) -> str:
    return (
        f"budget {k} is {budget:.6g}, but the least cost {k} of any choice is {least:.6g}: raise it"
    )


def _read(
    values: Sequence[npt.ArrayLike], constraints: Sequence[Constraint]
) -> tuple[list[RawProblem], list[IntArray]]:
    """One problem a constraint, all with the same nodes and tables, and the levels to keep."""
    every = [term for terms, _ in constraints for term in terms]
    _, allowed = read(values, every)
    raw = [read(values, terms)[0] for terms, _ in constraints]
    tables = {scope: table for r in raw for scope, table in r.tables.items()}
    aligned = []
    for k, own in enumerate(raw):
        sums: list[tuple[Any, Callable[..., Any], str]] = []
        for j, other in enumerate(raw):
            for axes, table, name in other.sums:
                named = f"constraints[{j}]: {name}"
                sums.append((axes, table if j == k else _nothing, named))
        aligned.append(
            RawProblem(
                own.values,
                {s: own.tables.get(s, np.zeros(t.shape)) for s, t in tables.items()},
                tuple(sums),
            )
        )
    return aligned, [np.flatnonzero(a) for a in allowed]


def _nothing(*sums: IntArray) -> FloatArray:
    return np.zeros(np.broadcast_shapes(*(s.shape for s in sums)))


def _positions(levels: Sequence[int], keep: Sequence[IntArray]) -> IntArray:
    return np.array(
        [int(np.searchsorted(k, level)) for k, level in zip(keep, levels, strict=True)],
        dtype=np.int64,
    )


class _Pool:
    """The best choice within the budgets so far."""

    def __init__(self, problems: Sequence[Problem], budgets: FloatArray) -> None:
        self.trades = Trades(problems, budgets)
        self.problems, self.budgets = problems, budgets
        self.levels: IntArray | None = None
        self.value = -math.inf
        self.seen: set[bytes] = set()

    def closed(self, bound: float, gap: float) -> bool:
        """Whether the gap is proven to be at most this."""
        return self.levels is not None and bound - self.value <= gap * abs(bound)

    def offer(self, levels: IntArray, prices: FloatArray, polish: int = POLISHED) -> float:
        """Bring choices (any, variables) within the budgets, improve them; the best value."""
        costs = self.trades.costs(levels)
        worth = self.problems[0].value(levels)
        within: BoolArray = np.asarray((costs <= self.budgets).all(axis=1))
        room = np.maximum(np.abs(self.budgets), 1e-300)
        miss = np.maximum((costs - self.budgets) / room, 0.0).sum(axis=1)
        # Of those within the budgets the most worth, of the others the nearest.
        inside = sorted(np.flatnonzero(within), key=lambda k: -float(worth[k]))
        near = sorted(np.flatnonzero(~within & np.isfinite(miss)), key=lambda k: float(miss[k]))
        for k in [*inside[:polish], *near[:polish]]:
            start: IntArray | None = levels[k]
            if not within[k]:
                start = self.trades.repair(levels[k], prices)
            if start is None or start.tobytes() in self.seen:
                continue
            self.seen.add(start.tobytes())
            better = self.trades.improve(start, prices)
            value = self.trades.value(better)
            if value > self.value:
                self.levels, self.value = better, value
        return self.value
