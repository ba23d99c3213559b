"""The joint knapsack: levels of many variables, costs that depend on two or more of them.

    maximise   sum over variables v of  values[v][level of v]
    subject to sum over terms t of      cost_t(levels of its variables)  <=  budget

The answer carries a certificate: `Solution.bound` is proven. Only numpy is needed.

    model        what the solver is given, and its normal form
    reading      the input, checked
    elimination  exact optimum for a price, by variable elimination
    relax        upper bounds from prices
    moves        local moves on a solution
    branch       branch and bound that closes the gap
    solver       `solve`, all of these in order
"""

from __future__ import annotations

from halp_fx.knapsack.model import Sum, SumTerm, Term, cost_of, value_of
from halp_fx.knapsack.solver import Solution, solve

__all__ = ["Solution", "Sum", "SumTerm", "Term", "cost_of", "solve", "value_of"]
