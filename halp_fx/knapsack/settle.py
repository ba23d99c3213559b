"""What solvers without a certificate start from and fall back to.

They walk down from the dense network, one level array at a time. A walk may run into a forbidden
combination (conv1 of a block without channels, conv2 with some): `Ground.settle` then lowers the
rest of the block too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InfeasibleError, InputError
from halp_fx.knapsack.model import (
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    Term,
    cost_of,
    value_of,
)
from halp_fx.knapsack.reading import read

__all__ = ["Ground"]


class Ground:
    """A checked problem, its true costs, and the dense choice."""

    def __init__(
        self, values: Sequence[npt.ArrayLike], terms: Sequence[Term], budget: float
    ) -> None:
        if isinstance(budget, bool) or math.isnan(budget):
            raise InputError(f"budget is {budget!r}: pass a number in the unit of the costs")
        self.given_values, self.given_terms = values, terms
        self.raw, self.allowed = read(values, terms)
        self.problem = Problem(self.raw)
        self.values = self.raw.values
        self.budget = budget
        self.forbidding = [
            (scope, np.isfinite(table))
            for scope, table in self.raw.tables.items()
            if not np.isfinite(table).all()
        ]
        top = np.array([int(np.flatnonzero(a)[-1]) for a in self.allowed], dtype=np.int64)
        dense = self.settle(top)
        if dense is None:
            raise InputError(
                "the highest level of every variable together is a forbidden combination: this "
                'solver starts there, use solver="joint"'
            )
        self.dense: IntArray = dense

    def cost(self, levels: IntArray) -> float:
        """True cost of one choice, correctly rounded; inf if forbidden."""
        return cost_of([int(k) for k in levels], self.given_terms)

    def value(self, levels: IntArray) -> float:
        """Value of one choice."""
        return value_of([int(k) for k in levels], self.given_values)

    @property
    def most(self) -> float:
        """What no choice is worth more than: each variable at its best."""
        return math.fsum(float(v[a].max()) for v, a in zip(self.values, self.allowed, strict=True))

    def settle(self, levels: IntArray) -> IntArray | None:
        """The choice itself if it is allowed, else lower levels that are; None if there are none.

        A table that forbids a combination moves its variables to the allowed combination of
        most value that is nowhere higher; a level that is forbidden goes down to the next one.
        """
        levels = levels.copy()
        for v, allowed in enumerate(self.allowed):
            below = np.flatnonzero(allowed[: levels[v] + 1])
            if below.size == 0:
                return None
            levels[v] = below[-1]
        changed = True
        while changed:
            changed = False
            for scope, finite in self.forbidding:
                if finite[tuple(levels[v] for v in scope)]:
                    continue
                lower = self._best_below(scope, finite, levels)
                if lower is None:
                    return None
                levels[list(scope)] = lower
                changed = True
        return levels

    def _best_below(
        self, scope: tuple[int, ...], finite: BoolArray, levels: IntArray
    ) -> IntArray | None:
        inside = np.ix_(*(np.flatnonzero(self.allowed[v][: levels[v] + 1]) for v in scope))
        choices = finite[inside]
        worth: FloatArray = np.zeros(choices.shape)
        for axis, v in enumerate(scope):
            shape = [1] * len(scope)
            shape[axis] = -1
            worth = worth + self.values[v][inside[axis].reshape(-1)].reshape(shape)
        if not choices.any():
            return None
        worth = np.where(choices, worth, -np.inf)
        # Of equals the lowest, so that nothing is kept that is worth nothing.
        best = np.unravel_index(int(worth.argmax()), worth.shape)
        return np.array(
            [inside[axis].reshape(-1)[k] for axis, k in enumerate(best)], dtype=np.int64
        )

    def lowest(self) -> IntArray | None:
        """The lowest level of every variable, if that combination is allowed."""
        low = np.array([int(np.flatnonzero(a)[0]) for a in self.allowed], dtype=np.int64)
        return low if math.isfinite(self.cost(low)) else None

    def too_dear(self, solver: str, least: float) -> InfeasibleError:
        """The error of a solver that ended above the budget, at cost `least`."""
        return InfeasibleError(
            f"the {solver} solver found nothing within the budget of {self.budget:.6g}; the least "
            f'cost it reached is {least:.6g}: raise the budget, or use solver="joint"',
            least=least,
        )
