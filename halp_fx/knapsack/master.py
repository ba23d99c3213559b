"""The master of Dantzig-Wolfe column generation: a linear program of very few rows.

    maximise   sum over j of  share_j * value_j
    subject to sum over j of  share_j * cost_j  <=  room   (one row a constraint)
               sum over j of  share_j = 1,  share_j >= 0

Its columns are choices met so far, its dual prices the next multipliers to try. With a handful of
rows a dense revised simplex is a few lines, and spares the solver a dependency on scipy.

Source: G. B. Dantzig, P. Wolfe, "Decomposition principle for linear programs", Operations
Research 8(1), 1960.
"""

from __future__ import annotations

import numpy as np

from halp_fx.knapsack.model import FloatArray

__all__ = ["Master"]

PIVOTS = 500  # of one solution; a few dozen is usual
TINY = 1e-11


class Master:
    """Columns so far, and the basis of the last optimum.

    Args:
        room: (constraints,) budgets, at least 0.
        penalty: value lost by the artificial column, more than any choice is worth.
    """

    def __init__(self, room: FloatArray, penalty: float) -> None:
        rows = room.size
        self.right = np.append(room, 1.0)
        # The slacks, then the artificial column (allowed, worth nothing), then the choices.
        self.columns = np.hstack([np.eye(rows + 1, rows), np.eye(rows + 1)[:, rows:]])
        self.worth = np.append(np.zeros(rows), -penalty)
        self.basis = list(range(rows + 1))

    def add(self, value: float, cost: FloatArray) -> None:
        """Take in a choice: its value and its costs (constraints,)."""
        self.columns = np.hstack([self.columns, np.append(cost, 1.0)[:, None]])
        self.worth = np.append(self.worth, value)

    def solve(self) -> tuple[float, FloatArray, bool]:
        """Optimum, price of each constraint, and whether no artificial column is needed."""
        rows = self.right.size - 1
        scale = 1.0 + float(np.abs(self.worth[rows + 1 :]).max(initial=0.0))
        for pivot in range(PIVOTS):
            inverse = np.linalg.inv(self.columns[:, self.basis])
            level = inverse @ self.right
            dual = self.worth[self.basis] @ inverse
            reduced = self.worth - dual @ self.columns
            reduced[self.basis] = 0.0
            gaining = np.flatnonzero(reduced > TINY * scale)
            if gaining.size == 0:
                break
            # The steepest column; after many pivots the first one, which can't cycle (Bland).
            enter = int(gaining[0] if pivot > PIVOTS // 2 else gaining[reduced[gaining].argmax()])
            rate = inverse @ self.columns[:, enter]
            falling = np.flatnonzero(rate > TINY)
            if falling.size == 0:
                break
            ratio = np.maximum(level[falling], 0.0) / rate[falling]
            ties = falling[ratio <= ratio.min() + TINY]
            leave = int(min(ties, key=lambda r: self.basis[r]))
            self.basis[leave] = enter
        inverse = np.linalg.inv(self.columns[:, self.basis])
        level = inverse @ self.right
        dual = self.worth[self.basis] @ inverse
        artificial = self.basis.index(rows) if rows in self.basis else -1
        allowed = artificial < 0 or float(level[artificial]) <= 1e-9
        return float(dual @ self.right), np.maximum(dual[:rows], 0.0), allowed
