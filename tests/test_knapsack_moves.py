"""Local moves on a solution of the knapsack: their costs, and what they leave nothing of."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from halp_fx.knapsack import Sum, SumTerm, Term
from halp_fx.knapsack.model import FloatArray, Problem
from halp_fx.knapsack.moves import Moves
from halp_fx.knapsack.reading import read


def random_problem(seed: int, *, sums: bool) -> Problem:
    """Whole costs, so that sums in any order are the same; some pairs forbidden."""
    rng = np.random.default_rng(seed)
    counts = [int(n) for n in rng.integers(2, 5, 6)]
    values = [rng.integers(0, 30, n).astype(np.float64) for n in counts]
    terms: list[Term] = [((v,), rng.integers(0, 9, n)) for v, n in enumerate(counts)]
    for a, b in itertools.pairwise(range(6)):
        table: FloatArray = rng.integers(0, 9, (counts[a], counts[b])).astype(np.float64)
        table[-1, 0] = np.inf
        terms.append(((a, b), table))
    if sums:
        into = Sum((0, 2, 5), tuple(np.arange(counts[v]) * 2 for v in (0, 2, 5)))
        out = Sum((3,), (np.arange(counts[3]),))
        terms.append(SumTerm((into, out), rng.integers(0, 9, (40, 5))))
    raw, _ = read(values, terms)
    return Problem(raw)


def random_start(problem: Problem, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Levels that are not forbidden."""
    rng = np.random.default_rng(seed)
    sizes = [v.size for v in problem.values]
    while True:
        levels = np.array([rng.integers(n) for n in sizes], dtype=np.int64)
        if np.isfinite(problem.costs(levels[None])[0]):
            return levels


@pytest.mark.parametrize("sums", [False, True])
def test_extra_is_the_difference_of_costs(sums: bool) -> None:
    for seed in range(30):
        problem = random_problem(seed, sums=sums)
        moves, levels = Moves(problem), random_start(problem, seed)
        rows = moves._with(levels, np.arange(moves.level.size))
        expected = problem.costs(rows) - problem.costs(levels[None])
        np.testing.assert_allclose(moves._extra(levels), expected, atol=1e-9)


@pytest.mark.parametrize("sums", [False, True])
def test_improve_stays_within_the_budget_and_loses_nothing(sums: bool) -> None:
    for seed in range(60):
        problem = random_problem(seed, sums=sums)
        start = random_start(problem, seed)
        budget = float(problem.costs(start[None])[0]) + seed % 4
        found = Moves(problem).improve(start, budget)
        assert problem.costs(found[None])[0] <= budget
        assert problem.value(found[None])[0] >= problem.value(start[None])[0]


def test_improve_leaves_no_pair_of_changes_that_gains() -> None:
    for seed in range(60):
        problem = random_problem(seed, sums=False)
        start = random_start(problem, seed)
        budget = float(problem.costs(start[None])[0]) + 2
        found = Moves(problem).improve(start, budget)
        choices = np.array(list(itertools.product(*(range(v.size) for v in problem.values))))
        near = choices[(choices != found).sum(axis=1) <= 2]
        within = near[problem.costs(near) <= budget]
        assert problem.value(within).max() == problem.value(found[None])[0]


def test_far_pairs_skip_the_variable_that_goes_up() -> None:
    """The cheapest change down is of the variable that goes up: the next one has to do."""
    values = [[4.0, 5.0, 9.0], [2.0, 5.0]]
    raw, _ = read(values, [((0,), [0.0, 5.0, 9.0]), ((1,), [1.0, 5.0])])
    problem = Problem(raw)
    found = Moves(problem).improve(np.array([1, 1]), 10.0)
    assert found.tolist() == [2, 0]
