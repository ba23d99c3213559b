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

Several budgets at once, with one price each:

    dual         bounds from the prices, and the search for the best ones
    master       the small linear program of that search
    trades       local moves that respect every budget
    several      `solve_several`

To compare with, without a certificate:

    settle       the dense choice, and lower ones that are allowed
    halp         `solve_halp`, the paper's own
    baselines    `solve_greedy`, `solve_uniform`
"""

from __future__ import annotations

from halp_fx.knapsack.baselines import solve_greedy, solve_uniform
from halp_fx.knapsack.halp import solve_halp
from halp_fx.knapsack.model import Sum, SumTerm, Term, cost_of, value_of
from halp_fx.knapsack.several import SeveralSolution, solve_several
from halp_fx.knapsack.solver import Solution, solve

__all__ = [
    "SeveralSolution",
    "Solution",
    "Sum",
    "SumTerm",
    "Term",
    "cost_of",
    "solve",
    "solve_greedy",
    "solve_halp",
    "solve_several",
    "solve_uniform",
    "value_of",
]
