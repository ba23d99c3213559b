"""The Lagrangian dual under several budgets: prices, the bound they prove, choices met on the way.

One price a constraint. Where one elimination is affordable, the maximum at given prices is exact,
and the best prices are found by cutting planes in their dual form (`master`). Else the problem is
split over components with shares of the values, as in `relax`, and prices and shares move together
by Polyak's subgradient steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from halp_fx.errors import InfeasibleError
from halp_fx.knapsack.elimination import Elimination
from halp_fx.knapsack.master import Master
from halp_fx.knapsack.model import FloatArray, IntArray, Problem
from halp_fx.knapsack.relax import Relaxation

__all__ = ["POLISHED", "Dual", "Priced"]

POLISHED = 6  # choices improved, of those met at once
CUTS = 100  # prices tried by cutting planes; some twenty are usual
STEPS = 300  # prices tried by subgradients
OFFER_EVERY = 20  # of them, between looks at the choices met
STALE = 10  # steps without a better bound, after which they are halved
PACE = 10.0  # a miss of a budget by its span counts as this many copies that disagree

# (choices, prices, how many of them to improve) -> best value known
Offer = Callable[[IntArray, FloatArray, int], float]


@dataclass(frozen=True)
class Priced:
    """What the relaxation says at some prices."""

    upper: float  # most value less priced cost, an upper bound
    costs: FloatArray  # (constraints,) costs in the relaxation, the slope of the bound
    levels: tuple[IntArray, ...]  # (variables,) of each component


class Dual:
    """Bounds for problems that differ in their costs alone.

    Args:
        problems: one a constraint: same variables, nodes and scopes of tables.
        budgets: (constraints,) highest costs.
    """

    def __init__(self, problems: Sequence[Problem], budgets: FloatArray) -> None:
        self.problems, self.budgets = problems, budgets
        self.relaxations = [Relaxation(p) for p in problems]
        first = self.relaxations[0]
        self.exact = first.exact
        self.offsets = first.offsets
        self.shares: list[FloatArray] = first.shares
        self.fixed_value = first.fixed_value
        self.constants = np.array([p.constant for p in problems])
        self.span = 1.0 + math.fsum(float(v.max() - v.min()) for v in problems[0].values)
        self.bound = math.inf
        self.prices = np.zeros(len(problems))  # that gave the bound
        self.binding: int | None = None  # the only constraint with a price, if there's one
        self.least = np.zeros(len(problems))  # lower bounds of the costs
        self.cheapest: list[IntArray] = []

    def check_each(self) -> None:
        """Every budget alone can be met, as far as is known.

        Raises:
            InfeasibleError: one can't.
        """
        for k, relaxation in enumerate(self.relaxations):
            least, levels = relaxation.least_cost()
            if math.isinf(least):
                raise forbidden()
            if least > self.budgets[k]:
                raise InfeasibleError(
                    f"budget {k} is {self.budgets[k]:.6g}, but the least cost {k} of any choice "
                    f"is {least:.6g}: raise it",
                    least=least,
                )
            self.least[k] = least
            self.cheapest.append(levels)

    def evaluate(self, prices: FloatArray, *, worth: bool = True) -> Priced:
        """Most value less priced cost; without `worth`, the least priced cost."""
        upper = (self.fixed_value if worth else 0.0) - float(prices @ self.constants)
        costs = self.constants.copy()
        levels = []
        for c, share in enumerate(self.shares):
            engine = self._priced(c, prices)
            flat = share[None] if worth else np.zeros_like(share)[None]
            at = self.offsets
            values = [flat[:, at[v] : at[v + 1]] for v in range(at.size - 1)]
            trace = engine.upward(np.ones(1), values)
            states = engine.decode(trace)
            upper += float(trace.total[0])
            for k, (problem, relaxation) in enumerate(
                zip(self.problems, self.relaxations, strict=True)
            ):
                tables = relaxation.components[c].tables
                costs[k] += float(problem.table_costs(states, tables)[0])
            levels.append(states[: at.size - 1, 0])
        return Priced(upper, costs, tuple(levels))

    def _priced(self, component: int, prices: FloatArray) -> Elimination:
        """An elimination whose cost is the priced sum of all costs."""
        engines = [r.components[component] for r in self.relaxations]
        steps = []
        for step, *others in zip(*(e.steps for e in engines), strict=True):
            same = [step, *others]
            costs = [
                s.cost * float(p) for s, p in zip(same, prices, strict=True) if s.cost is not None
            ]
            bans = [s.forbid for s in same if s.forbid is not None]
            steps.append(
                replace(
                    step,
                    cost=sum(costs[1:], costs[0]) if costs else None,
                    forbid=sum(bans[1:], bans[0]) if bans else None,
                )
            )
        engine = copy.copy(engines[0])
        engine.steps = steps
        return engine

    def proposals(self, found: Priced) -> IntArray:
        """Choices (any, variables): those of the components laid over each other, both ways."""
        components = self.relaxations[0].components
        rows = []
        for order in (range(len(components)), reversed(range(len(components)))):
            merged: IntArray | None = None
            for c in order:
                levels = found.levels[c]
                merged = levels.copy() if merged is None else merged
                own = list(components[c].own_variables)
                merged[own] = levels[own]
            assert merged is not None
            rows.append(merged)
        return np.stack(rows[:1] if self.exact else rows)

    def costs(self, levels: IntArray) -> FloatArray:
        """True costs (batch, constraints) of choices (batch, variables)."""
        return np.stack([p.costs(levels) for p in self.problems], axis=1)

    def improve(self, offer: Offer, gap: float) -> None:
        """Find good prices; the bound is then the least that was met.

        Raises:
            InfeasibleError: the budgets can't be met together.
        """
        free = self.evaluate(np.zeros(len(self.problems)))
        if free.upper == -math.inf:
            raise forbidden()
        self.bound = free.upper
        tops = self.proposals(free)
        if offer(tops, self.prices, 1) >= free.upper:
            return
        top = tops[0]
        highest = np.where(np.isfinite(self.costs(top[None])[0]), self.costs(top[None])[0], 0.0)
        scale = np.maximum(highest - self.least, 1e-9 * np.abs(self.least) + 1e-300)
        if self.exact:
            self._cut(offer, scale, top)
        else:
            self._tune(offer, scale, gap)
        priced = np.flatnonzero(self.prices * scale > 1e-9 * self.span)
        self.binding = int(priced[0]) if priced.size == 1 else None

    def _note(self, found: Priced, prices: FloatArray) -> float:
        bound = found.upper + float(prices @ self.budgets)
        if bound < self.bound:
            self.bound, self.prices = bound, prices
        return bound

    def _cut(self, offer: Offer, scale: FloatArray, top: IntArray) -> None:
        room = np.minimum((self.budgets - self.least) / scale, 1e6)
        master = Master(room, 1e4 * self.span)
        met: list[IntArray] = []

        def take(levels: IntArray) -> None:
            cost = self.costs(levels[None])[0]
            if np.isfinite(cost).all():
                met.append(levels)
                value = float(self.problems[0].value(levels[None])[0])
                master.add(value, (cost - self.least) / scale)

        for levels in (top, *self.cheapest, self.evaluate(1 / scale, worth=False).levels[0]):
            take(levels)
        allowed = True
        for _ in range(CUTS):
            reached, scaled, allowed = master.solve()
            prices = scaled / scale
            found = self.evaluate(prices)
            bound = self._note(found, prices)
            levels = found.levels[0]
            known = any(np.array_equal(levels, m) for m in met)
            take(levels)
            if known or bound - reached <= 1e-5 * abs(bound):
                break
        worst = math.fsum(float(v.min()) for v in self.problems[0].values)
        if not allowed and self.bound < worst:
            raise InfeasibleError(
                "each budget can be met, but not all of them together: raise one",
                least=float(self.least[0]),
            )
        offer(np.unique(np.stack(met), axis=0), self.prices, POLISHED)

    def _tune(self, offer: Offer, scale: FloatArray, gap: float) -> None:
        owned = np.zeros((len(self.shares), int(self.offsets[-1])))
        for row, component in zip(owned, self.relaxations[0].components, strict=True):
            for v in component.own_variables:
                row[self.offsets[v] : self.offsets[v + 1]] = 1.0
        owners = np.maximum(owned.sum(axis=0), 1.0)
        prices = self.span / scale / len(scale)
        best_shares, met = self.shares, []
        target, reach, stale = -math.inf, 1.0, 0
        for k in range(STEPS):
            found = self.evaluate(prices)
            before = self.bound
            bound = self._note(found, prices)
            stale += 1
            if self.bound < before:
                best_shares = self.shares
                stale = 0 if self.bound < before - 1e-4 * abs(before) else stale
            met.append(self.proposals(found))
            if k % OFFER_EVERY == OFFER_EVERY - 1 or k in (0, STEPS - 1):
                target = offer(np.unique(np.concatenate(met), axis=0), prices, 1)
                met = []
                if self.bound - target <= gap * abs(self.bound):
                    break
            if stale >= STALE:
                reach, stale = reach / 2, 0
            # Each copy is pushed from what it chose towards what the copies chose on average.
            chosen = np.zeros_like(owned)
            for row, levels in zip(chosen, found.levels, strict=True):
                row[self.offsets[:-1] + levels] = 1.0
            chosen *= owned
            pull = chosen - owned * (chosen.sum(axis=0) / owners)
            slope = (self.budgets - found.costs) / scale * PACE
            norm = float((pull**2).sum()) + float((slope**2).sum())
            if norm == 0:
                break
            aim = target if math.isfinite(target) else bound - 0.05 * abs(bound)
            step = reach * max(bound - aim, 1e-9 * abs(bound)) / norm
            prices = np.maximum(prices - step * slope * PACE / scale, 0.0)
            self.shares = [s - step * p for s, p in zip(self.shares, pull, strict=True)]
        self.shares = best_shares


def forbidden() -> InfeasibleError:
    """The error where no combination of levels is left at all."""
    return InfeasibleError(
        "every combination of levels is forbidden by costs of inf: allow at least one",
        least=math.inf,
    )
