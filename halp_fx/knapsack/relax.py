"""The Lagrangian relaxation: upper bounds, and the solutions that come with them.

For a price `lambda >= 0` per unit of cost, every solution within the budget satisfies

    value  <=  max over levels of (value - lambda * cost)  +  lambda * budget.

Where one elimination would need tables too large, the cost tables are split over several
*components*, each of which has its own copy of the variables and a share of their values. The
sum of the optima of the components is still an upper bound, for any shares that add up to the
values (dual decomposition); the shares are tuned by subgradient steps until the copies agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from halp_fx.knapsack.elimination import Elimination, TooWideError, Trace
from halp_fx.knapsack.model import BoolArray, FloatArray, IntArray, Problem

__all__ = ["Evaluation", "Relaxation"]

FACTOR_LIMIT = 2_000_000  # entries of the largest intermediate table
TOTAL_LIMIT = 20_000_000  # entries of all of them
PART = 10  # components, which are evaluated far more often, get this share of the limits
BATCH_ENTRIES = 6_000_000  # entries of all tables of a batch: what memory and caches bear
ROUNDS = 300  # subgradient steps when there are several components
PATIENCE = 15  # of them, without progress, until they are halved
LEAST_REACH = 1 / 64  # of their full length: steps so small get nowhere
MEMORY = 0.7  # of the last step's direction goes into the next: less zigzag
OFFER_EVERY = 15  # of them, between looks at the solutions met
PRICE_PACE = 30.0  # a miss of the budget by the span counts as this many copies that disagree
STEP_WORK = 2_000  # entries that take as long as the fixed part of one step of an elimination


@dataclass(frozen=True)
class Evaluation:
    """What one pass says for each (price, allowed levels) of the batch."""

    upper: FloatArray  # (batch,): optimum of value - price * cost; -inf: nothing is allowed
    cost: FloatArray  # (batch,): cost in the relaxation, the slope of the bound in the price
    levels: tuple[IntArray, ...]  # one array (batch, variables) a component
    marginal: FloatArray | None  # (batch, all levels): the optimum if held there


class Relaxation:
    """Bounds for a problem, by one component if it can be, by several if not."""

    def __init__(self, problem: Problem, limit: int = FACTOR_LIMIT) -> None:
        self.problem = problem
        self.components = _components(problem, limit)
        self.offsets = problem.offsets
        self.entries = sum(c.total_size for c in self.components)
        self.overhead = STEP_WORK * sum(len(c.steps) for c in self.components)
        owners = np.zeros(len(problem.values))
        for c in self.components:
            owners[list(c.own_variables)] += 1
        flat = np.concatenate(problem.values)
        share = flat / np.maximum(np.repeat(owners, np.diff(self.offsets)), 1)
        self.shares = [share.copy() for _ in self.components]
        # Variables of one level are in no component.
        self.fixed_value = float(sum(v[0] for v in problem.values if v.size == 1))

    @property
    def exact(self) -> bool:
        """Whether the relaxed optimum at a price is the true one."""
        return len(self.components) == 1

    @property
    def batch(self) -> int:
        """How many (price, allowed levels) to evaluate at once."""
        return int(np.clip(BATCH_ENTRIES // max(self.entries, 1), 1, 64))

    def least_cost(self) -> tuple[float, IntArray]:
        """A lower bound of the cost, exact with one component, and levels that go with it."""
        zero = np.zeros(self.offsets[-1])
        total, first = -self.problem.constant, None
        for c in self.components:
            trace = c.upward(np.ones(1), self._split(zero[None], c))
            total += float(trace.total[0])
            first = _merge(first, self._levels(c.decode(trace)), c)
        assert first is not None
        return -total, first[0]

    def evaluate(
        self, prices: FloatArray, masks: BoolArray, *, marginals: bool = False
    ) -> Evaluation:
        """Bounds for prices (batch,) and allowed levels (batch or 1, all levels)."""
        step = self.batch
        if prices.size > step:
            rows = [slice(k, k + step) for k in range(0, prices.size, step)]
            parts = [
                self.evaluate(
                    prices[r], masks if masks.shape[0] == 1 else masks[r], marginals=marginals
                )
                for r in rows
            ]
            return Evaluation(
                np.concatenate([p.upper for p in parts]),
                np.concatenate([p.cost for p in parts]),
                tuple(np.concatenate(c) for c in zip(*(p.levels for p in parts), strict=True)),
                np.concatenate([p.marginal for p in parts if p.marginal is not None])
                if marginals
                else None,
            )
        work = self.entries * prices.size + self.overhead
        self.problem.work += 3 * work if marginals else work
        constant = self.problem.constant
        upper = self.fixed_value - prices * constant
        cost = np.full(prices.size, constant)
        levels: list[IntArray] = []
        traces: list[Trace] = []
        for c, share in zip(self.components, self.shares, strict=True):
            trace = c.upward(prices, self._split(np.where(masks, share, -np.inf), c))
            states = c.decode(trace)
            upper = upper + trace.total
            cost = cost + self.problem.table_costs(states, c.tables)
            levels.append(self._levels(states))
            traces.append(trace)
        marginal = None
        if marginals:
            marginal = np.repeat(upper[:, None], self.offsets[-1], axis=1)
            for c, trace in zip(self.components, traces, strict=True):
                others = np.where(np.isneginf(trace.total), 0.0, upper - trace.total)
                for v, m in c.marginals(trace).items():
                    here = slice(self.offsets[v], self.offsets[v + 1])
                    np.minimum(marginal[:, here], m + others[:, None], out=marginal[:, here])
        return Evaluation(upper, cost, tuple(levels), marginal)

    def _levels(self, states: IntArray) -> IntArray:
        return states[: len(self.problem.values)].T

    def _split(self, flat: FloatArray, component: Elimination) -> list[FloatArray]:
        o = self.offsets
        return [flat[:, o[v] : o[v + 1]] for v in range(len(self.problem.values))]

    def proposals(self, found: Evaluation) -> IntArray:
        """Levels (any, variables) worth a look: those of each component, the rest by majority."""
        if self.exact:
            return found.levels[0]
        first: IntArray | None = None
        for c, levels in zip(reversed(self.components), reversed(found.levels), strict=True):
            first = _merge(first, levels, c)
        last: IntArray | None = None
        for c, levels in zip(self.components, found.levels, strict=True):
            last = _merge(last, levels, c)
        assert first is not None and last is not None
        return np.concatenate([first, last])

    def tune(
        self, price: float, budget: float, span: float, offer: Callable[[IntArray, float], float]
    ) -> tuple[float, float]:
        """Improve the shares and the price by Polyak steps; return the least bound, its price.

        The steps are deflected (P. Camerini, L. Fratta, F. Maffioli, "On improving relaxation
        methods by modified gradient techniques", 1975): each keeps some of the last direction.

        `span` is the range of costs, which sets how far the price moves against the shares.

        `offer(levels, bound)` is told now and then what was met, and answers with the best value
        known: the steps aim at it. An answer of +inf ends the tuning.
        """
        mask = np.ones((1, self.offsets[-1]), dtype=np.bool_)
        best, best_price, best_shares = np.inf, price, self.shares
        owned = np.zeros((len(self.components), self.offsets[-1]))
        for k, c in enumerate(self.components):
            for v in c.own_variables:
                owned[k, self.offsets[v] : self.offsets[v + 1]] = 1.0
        owners = np.maximum(owned.sum(axis=0), 1.0)
        met: list[IntArray] = []
        target, reach, stale = -np.inf, 1.0, 0
        last_pull, last_slope = np.zeros_like(owned), 0.0
        for k in range(ROUNDS):
            found = self.evaluate(np.asarray([price]), mask)
            bound = float(found.upper[0]) + price * budget
            stale += 1
            if bound < best:
                stale = 0 if bound < best - 1e-4 * abs(best) else stale
                best, best_price, best_shares = bound, price, self.shares
            met.append(self.proposals(found))
            if k % OFFER_EVERY == OFFER_EVERY - 1 or k == 0:
                target = offer(np.concatenate(met), best)
                met = []
                if target == np.inf:
                    break
            if stale >= PATIENCE:
                reach, stale = reach / 2, 0
            if reach < LEAST_REACH:
                break
            # Each copy is pushed from what it chose towards what the copies chose on average.
            chosen = np.zeros_like(owned)
            for row, levels in zip(chosen, found.levels, strict=True):
                row[self.offsets[:-1] + levels[0]] = 1.0
            chosen *= owned
            pull = chosen - owned * (chosen.sum(axis=0) / owners)
            slope = float(budget - found.cost[0])
            slope *= PRICE_PACE / span
            norm = float((pull**2).sum()) + slope**2
            if norm == 0:
                break
            bent, bent_slope = pull + MEMORY * last_pull, slope + MEMORY * last_slope
            bent_norm = float((bent**2).sum()) + bent_slope**2
            if bent_norm >= norm / 4:  # not where they cancel out: the step would be a leap
                pull, slope, norm = bent, bent_slope, bent_norm
            last_pull, last_slope = pull, slope
            aim = target if np.isfinite(target) else bound - 0.05 * abs(bound)
            step = reach * max(bound - aim, 1e-9 * abs(bound)) / norm
            price = max(price - step * slope * PRICE_PACE / span, 0.0)
            self.shares = [s - step * p for s, p in zip(self.shares, pull, strict=True)]
        self.shares = best_shares
        return best, best_price


def _merge(into: IntArray | None, levels: IntArray, component: Elimination) -> IntArray:
    """Levels of a component's own variables written over what the others say."""
    merged = levels.copy() if into is None else into
    own = list(component.own_variables)
    merged[:, own] = levels[:, own]
    return merged


def _components(problem: Problem, limit: int) -> list[Elimination]:
    """One elimination if affordable, else a greedy split of the tables into a few."""
    everything = range(len(problem.values))
    rest = list(range(len(problem.tables)))

    def attempt(tables: Sequence[int], variables: Iterable[int], share: int) -> Elimination | None:
        size, total = limit // share, TOTAL_LIMIT // share
        if len(tables) <= 1:  # always taken, whatever its size
            size = total = 2**62
        try:
            return Elimination(problem, tables, variables, size, total)
        except TooWideError:
            return None

    whole = attempt(rest, everything, 1)
    if whole is not None:
        return [whole]
    found: list[Elimination] = []
    while rest:
        variables = range(0) if found else everything
        # The longest affordable run of tables: double its length, then bisect.
        low, high, best = 0, len(rest) + 1, None
        while high - low > 1:
            middle = min(max(2 * low, 1), high - 1) if high > len(rest) else (low + high) // 2
            component = attempt(rest[:middle], variables, PART)
            if component is None:
                high = middle
            else:
                low, best = middle, component
        assert best is not None
        found.append(best)
        rest = rest[low:]
    return found
