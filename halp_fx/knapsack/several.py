"""The joint knapsack under several budgets at once, solved with a certificate.

    maximise   sum over variables v of  values[v][level of v]
    subject to cost_i(levels)  <=  budget_i    for each constraint i

For prices lambda_i >= 0, one a constraint, every choice within all budgets satisfies

    value  <=  L(lambda) = max over levels of (value - sum_i lambda_i cost_i)
                           + sum_i lambda_i budget_i,

and variable elimination finds that maximum exactly. The prices with the least L are found by
cutting planes, here in their dual form: a linear program over the choices met (`master`). Choices
near the best prices, brought within the budgets and improved by local moves, give the answer.
Where one elimination is not affordable, weighted sums of the constraints are solved instead: what
no choice within the sum of the budgets can reach, none within each of them can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InfeasibleError, InputError
from halp_fx.knapsack.elimination import Elimination
from halp_fx.knapsack.master import Master
from halp_fx.knapsack.model import (
    FloatArray,
    IntArray,
    Problem,
    RawProblem,
    SumTerm,
    Term,
    cost_of,
    value_of,
)
from halp_fx.knapsack.reading import read
from halp_fx.knapsack.relax import Relaxation
from halp_fx.knapsack.solver import ROUNDING, Solution, solve
from halp_fx.knapsack.trades import Trades

__all__ = ["Constraint", "SeveralSolution", "solve_several"]

Constraint = tuple[Sequence[Term], float]  # terms of a cost, and its budget

CUTS = 100  # prices tried; some twenty are usual
NUDGES = (0.995, 1.005, 0.98, 1.02, 0.95, 1.05)  # factors on the best prices, for more choices
POLISHED = 6  # choices brought within the budgets and improved
ROUNDS = 6  # weighted sums solved where one elimination is not affordable
SUM_GAP = 5e-3  # at which each of them stops


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
    search = _Search(problems, budgets)
    search.check_each()
    if search.exact:
        search.cut()
        single = search.binding
        found, bound = search.levels, search.bound
    else:
        single, found, bound = None, None, math.inf
        found, bound = _by_weighted_sums(values, constraints, keep, search, gap)
    if single is not None and not _closed(search, found, bound, gap):
        # One budget decides: branch and bound may close what its price leaves open.
        alone = solve(values, *constraints[single], gap=gap)
        bound = min(bound, alone.bound)
        search.offer(_positions(alone.levels, keep)[None], np.eye(len(problems))[single])
        found = search.levels
    if found is None:
        raise InfeasibleError(
            "no choice within all budgets was found, though none was proven not to exist: raise "
            "a budget",
            least=math.nan,
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


def _closed(search: _Search, found: IntArray | None, bound: float, gap: float) -> bool:
    return found is not None and bound - search.value <= gap * abs(bound)


@dataclass
class _Search:
    """Prices, the bound that they prove, and the best choice within the budgets so far."""

    problems: list[Problem]
    budgets: FloatArray  # (constraints,)
    levels: IntArray | None = field(init=False, default=None)
    value: float = field(init=False, default=-math.inf)
    bound: float = field(init=False, default=math.inf)
    binding: int | None = field(init=False, default=None)  # the only constraint with a price

    def __post_init__(self) -> None:
        self.relaxations = [Relaxation(p) for p in self.problems]
        self.exact = all(r.exact for r in self.relaxations)
        self.trades = Trades(self.problems, self.budgets)
        self.seen: set[bytes] = set()
        first = self.problems[0]
        flat = np.concatenate(first.values)
        self.values = [
            flat[None, a:b] for a, b in zip(first.offsets, first.offsets[1:], strict=False)
        ]
        self.constants = np.array([p.constant for p in self.problems])
        self.fixed_value = math.fsum(float(v[0]) for v in first.values if v.size == 1)
        self.span = 1.0 + math.fsum(float(v.max() - v.min()) for v in first.values)
        if self.exact:
            self._engines = [r.components[0] for r in self.relaxations]

    def check_each(self) -> None:
        """Every budget alone can be met."""
        self.cheapest = []
        self.least = np.zeros(len(self.problems))
        for k, relaxation in enumerate(self.relaxations):
            least, levels = relaxation.least_cost()
            if math.isinf(least):
                raise InfeasibleError(
                    "every combination of levels is forbidden by costs of inf: allow at least one",
                    least=math.inf,
                )
            if least > self.budgets[k]:
                raise InfeasibleError(_too_dear(k, float(self.budgets[k]), least), least=least)
            self.cheapest.append(levels)
            self.least[k] = least

    def evaluate(self, prices: FloatArray, *, worth: bool = True) -> tuple[float, IntArray]:
        """Most value less priced cost, and the choice that has it; without `worth`, least cost."""
        engine: Elimination = self._engines[0]
        kept = [(step.cost, step.forbid) for step in engine.steps]
        try:
            for k, step in enumerate(engine.steps):
                parts = [e.steps[k] for e in self._engines]
                own = [kept[k], *((p.cost, p.forbid) for p in parts[1:])]
                costs = [
                    c * float(p) for (c, _), p in zip(own, prices, strict=True) if c is not None
                ]
                bans = [b for _, b in own if b is not None]
                step.cost = sum(costs[1:], costs[0]) if costs else None
                step.forbid = sum(bans[1:], bans[0]) if bans else None
            values = self.values if worth else [np.zeros_like(v) for v in self.values]
            trace = engine.upward(np.ones(1), values)
            levels = engine.decode(trace)[: len(values), 0]
        finally:
            for step, (cost, forbid) in zip(engine.steps, kept, strict=True):
                step.cost, step.forbid = cost, forbid
        total = float(trace.total[0]) - float(prices @ self.constants)
        return total + (self.fixed_value if worth else 0.0), levels

    def cut(self) -> None:
        """Find the best prices, and offer the choices met on the way."""
        free, top = self.evaluate(np.zeros(len(self.problems)))
        if free == -math.inf:
            raise InfeasibleError(
                "every combination of levels is forbidden by costs of inf: allow at least one",
                least=math.inf,
            )
        self.bound = free
        if (self._costs(top) <= self.budgets).all():
            self.levels, self.value = top, free
            return
        scale = np.maximum(self._costs(top) - self.least, 1e-9 * np.abs(self.least) + 1e-300)
        room = (self.budgets - self.least) / scale
        master = Master(np.minimum(room, 1e6), 1e4 * self.span)
        met: list[IntArray] = []

        def take(levels: IntArray) -> None:
            cost = self._costs(levels)
            if np.isfinite(cost).all():
                met.append(levels)
                master.add(self.trades.value(levels), (cost - self.least) / scale)

        take(top)
        for levels in self.cheapest:
            take(levels)
        take(self.evaluate(1 / scale, worth=False)[1])
        best = np.zeros(len(self.problems))
        allowed = True
        for _ in range(CUTS):
            reached, scaled, allowed = master.solve()
            prices = scaled / scale
            upper, levels = self.evaluate(prices)
            upper += float(prices @ self.budgets)
            if upper < self.bound:
                self.bound, best = upper, prices
            before = len(met)
            take(levels)
            known = len(met) > before and any(np.array_equal(levels, m) for m in met[:before])
            if known or upper - reached <= 1e-5 * abs(upper):
                break
        if not allowed and self.bound < math.fsum(float(v.min()) for v in self.problems[0].values):
            raise InfeasibleError(
                "each budget can be met, but not all of them together: raise one",
                least=float(self.least[0]),
            )
        for factors in np.vstack([np.eye(best.size) * (f - 1) + 1 for f in NUDGES]):
            met.append(self.evaluate(best * factors)[1])
        priced = np.flatnonzero(best * scale > 1e-9 * self.span)
        self.binding = int(priced[0]) if priced.size == 1 else None
        self.offer(np.unique(np.stack(met), axis=0), best)

    def _costs(self, levels: IntArray) -> FloatArray:
        return self.trades.costs(levels[None])[0]

    def offer(self, levels: IntArray, prices: FloatArray) -> None:
        """Bring choices (any, variables) within the budgets, improve them, keep the best."""
        costs = self.trades.costs(levels)
        worth = self.problems[0].value(levels)
        within = (costs <= self.budgets).all(axis=1)
        room = np.maximum(np.abs(self.budgets), 1e-300)
        miss = np.maximum((costs - self.budgets) / room, 0.0).sum(axis=1)
        # Of those within the budgets the most worth, of the others the nearest.
        inside = sorted(np.flatnonzero(within), key=lambda k: -worth[k])[:POLISHED]
        near = sorted(np.flatnonzero(~within & np.isfinite(miss)), key=lambda k: float(miss[k]))
        for k in [*inside, *near[:POLISHED]]:
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


def _by_weighted_sums(
    values: Sequence[npt.ArrayLike],
    constraints: Sequence[Constraint],
    keep: Sequence[IntArray],
    search: _Search,
    gap: float,
) -> tuple[IntArray | None, float]:
    """Solve weighted sums of the constraints; weights grow where a budget is passed."""
    budgets = np.array([b for _, b in constraints])
    scale = np.maximum(np.abs(search.budgets - search.least), 1e-9 * np.abs(search.budgets))
    weights = 1 / np.maximum(scale, 1e-300)
    bound = math.inf
    for _ in range(ROUNDS):
        terms = [
            _scaled(term, float(w))
            for (own, _), w in zip(constraints, weights, strict=True)
            for term in own
        ]
        together = solve(
            values, terms, float(weights @ np.minimum(budgets, search.budgets)), gap=gap
        )
        bound = min(bound, together.bound)
        levels = _positions(together.levels, keep)
        search.offer(levels[None], weights)
        if search.levels is not None and bound - search.value <= gap * abs(bound):
            break
        over = (search.trades.costs(levels[None])[0] - search.budgets) / scale
        weights = weights * np.exp(np.clip(4 * (over - over.max() / 2), -1.0, 1.0))
    return search.levels, bound


def _scaled(term: Term, weight: float) -> Term:
    if not isinstance(term, SumTerm):
        variables, table = term
        return variables, np.asarray(table, dtype=np.float64) * weight
    table = term.table
    if not callable(table):
        return SumTerm(term.axes, np.asarray(table, dtype=np.float64) * weight)
    return SumTerm(term.axes, lambda *sums: np.asarray(table(*sums), dtype=np.float64) * weight)
