"""The paper's solver and the baselines: what they choose, and that they tell the truth."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from halp_fx.errors import InfeasibleError, InputError
from halp_fx.knapsack import Sum, SumTerm, Term, cost_of, solve, value_of
from halp_fx.knapsack.baselines import solve_greedy, solve_uniform
from halp_fx.knapsack.halp import RESOLUTION, augmented_knapsack, solve_halp
from halp_fx.knapsack.model import FloatArray
from halp_fx.knapsack.settle import Ground
from tests.test_knapsack import TITANV, titanv

__all__: list[str] = []

SOLVERS: list[Any] = [solve_halp, solve_greedy, solve_uniform]


def chain(seed: int, layers: int = 5, levels: int = 5) -> tuple[list[FloatArray], list[Term]]:
    """Layers in a row: cost in proportion to channels in times channels out, and an overhead."""
    rng = np.random.default_rng(seed)
    values = [
        np.concatenate([[0.0], np.cumsum(np.sort(rng.gamma(1.0, size=levels - 1))[::-1])])
        for _ in range(layers)
    ]
    terms: list[Term] = [((0,), np.arange(levels) * 1.0 + 0.1)]
    for k in range(1, layers):
        work = np.outer(np.arange(levels), np.arange(levels)) * float(rng.uniform(0.2, 1.0))
        terms.append(((k, k - 1), work + 0.1))
    return values, terms


def dense(values: list[FloatArray]) -> list[int]:
    return [v.size - 1 for v in values]


@pytest.mark.parametrize("seed", range(30))
def test_augmented_knapsack_against_every_choice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, 5)
    gains = [np.cumsum(rng.random(n)) for n in counts]
    costs: list[FloatArray] = [rng.integers(0, 9, n).astype(float) for n in counts]
    for cost in costs:
        cost -= cost.min()  # not monotone: a longer prefix may cost less
    if rng.random() < 0.3 and counts[0] > 1:
        gains[0][0], costs[0][1] = -np.inf, 0.0
        costs[0][0] = np.inf
    room = float(rng.choice([1, 2, 4, 5, 10, 20]))
    assert RESOLUTION % room == 0  # whole costs are not rounded
    chosen = augmented_knapsack(gains, costs, room)
    worth = [
        sum(float(g[k]) for g, k in zip(gains, levels, strict=True))
        for levels in itertools.product(*(range(n) for n in counts))
        if sum(float(c[k]) for c, k in zip(costs, levels, strict=True)) <= room
    ]
    assert sum(float(c[k]) for c, k in zip(costs, chosen, strict=True)) <= room
    assert sum(float(g[k]) for g, k in zip(gains, chosen, strict=True)) == pytest.approx(max(worth))


def test_one_step_charges_each_layer_for_its_own_width() -> None:
    """Worked by hand: inputs are frozen at their dense width, so both cuts look too cheap."""
    values = [np.array([0.0, 3.0, 5.0]), np.array([0.0, 4.0, 6.0])]
    table = np.array([[0.0, 0, 0], [0, 1, 2], [0, 2, 4]])  # (out, in): their product
    terms: list[Term] = [((0,), [0.0, 1, 2]), ((1, 0), table)]
    # Dense: 6. Variable 0 saves 1 a level, variable 1 saves 2 a level (in = 2). Target 4.
    one_step = solve_halp(values, terms, 4.0, steps=1)
    assert one_step.levels == (2, 1)
    assert one_step.cost == 4.0
    assert one_step.value == 9.0
    # Target 3: (1, 1) by 1 + 2 in the linearisation. In truth that costs 2, and (2, 0) 2 as well.
    one_step = solve_halp(values, terms, 3.0, steps=1)
    assert one_step.levels == (1, 1)
    assert one_step.cost == 2.0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_within_the_budget_and_honest(solver: Any, share: float) -> None:
    for seed in range(10):
        values, terms = chain(seed)
        budget = share * cost_of(dense(values), terms)
        solution = solver(values, terms, budget)
        best = solve(values, terms, budget, gap=0.0)
        assert solution.value == value_of(solution.levels, values)
        assert solution.cost == cost_of(solution.levels, terms) <= budget
        assert solution.value <= best.value * (1 + 1e-12)
        assert best.bound <= solution.bound * (1 + 1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_fits_is_left_alone(solver: Any) -> None:
    values, terms = chain(0)
    assert list(solver(values, terms, 1e9).levels) == dense(values)
    assert list(solver(values, terms, cost_of(dense(values), terms)).levels) == dense(values)


@pytest.mark.parametrize("solver", SOLVERS)
def test_input_is_not_changed(solver: Any) -> None:
    values, terms = chain(1)
    before = [v.copy() for v in values]
    tables = [np.array(t[1]) for t in terms if not isinstance(t, SumTerm)]
    solver(values, terms, 5.0)
    assert all(np.array_equal(a, b) for a, b in zip(values, before, strict=True))
    after = [np.array(t[1]) for t in terms if not isinstance(t, SumTerm)]
    assert all(np.array_equal(a, b) for a, b in zip(tables, after, strict=True))


def test_more_steps_see_the_narrowed_inputs() -> None:
    """With one step the true cost falls far below the budget; thirty spend nearly all of it."""
    kept = {}
    for steps in (1, 30):
        found = []
        for seed in range(10):
            values, terms = chain(seed, layers=8, levels=17)
            budget = 0.5 * cost_of(dense(values), terms)
            solution = solve_halp(values, terms, budget, steps=steps)
            found.append((solution.cost / budget, solution.value / value_of(dense(values), values)))
        kept[steps] = np.mean(found, axis=0)
    assert kept[1][0] < 0.85
    assert kept[30][0] > 0.9
    assert kept[30][1] > kept[1][1]


def test_outputs_name_the_axis_that_moves() -> None:
    """The same chain with the axes of its tables turned round."""
    values, terms = chain(2)
    turned: list[Term] = [terms[0]]
    for term in terms[1:]:
        assert not isinstance(term, SumTerm)
        (out, into), table = term
        turned.append(((into, out), np.asarray(table).T))
    budget = 0.4 * cost_of(dense(values), terms)
    expected = solve_halp(values, terms, budget)
    assert solve_halp(values, turned, budget, outputs=[0, 1, 1, 1, 1]).levels == expected.levels


def test_sums_are_linearised_like_tables() -> None:
    values, terms = chain(3)
    sizes = np.arange(5)
    sums: list[Term] = []
    for term in terms:
        assert not isinstance(term, SumTerm)
        scope, table = term
        axes = tuple(Sum((v,), (sizes,)) for v in scope)
        sums.append(SumTerm(axes, np.asarray(table)))
    budget = 0.4 * cost_of(dense(values), terms)
    expected = solve_halp(values, terms, budget)
    assert solve_halp(values, sums, budget).levels == expected.levels
    assert solve_greedy(values, sums, budget).levels == solve_greedy(values, terms, budget).levels


def test_a_concat_as_input_is_frozen_as_a_whole() -> None:
    values = [np.array([0.0, 2.0, 3.0])] * 3
    sizes = np.array([0, 8, 16])
    concat = Sum((0, 1), (sizes, sizes))
    terms: list[Term] = [
        SumTerm((Sum((2,), (sizes,)), concat), lambda out, into: out * into / 64.0),
        ((0,), [0.0, 1.0, 2.0]),
        ((1,), [0.0, 1.0, 2.0]),
    ]
    solution = solve_halp(values, terms, 6.0)
    assert solution.cost <= 6.0
    assert solution.cost == cost_of(solution.levels, terms)


def test_a_block_goes_as_a_whole() -> None:
    """conv1 without channels and conv2 with some is forbidden: what is left of it goes too."""
    together = np.zeros((3, 3))
    together[0, 1:] = together[1:, 0] = np.inf
    values = [np.array([0.0, 1.0, 1.1]), np.array([0.0, 0.1, 0.2])]
    terms: list[Term] = [((0,), [0.0, 1.0, 2.0]), ((1,), [0.0, 4.0, 8.0]), ((0, 1), together)]
    ground = Ground(values, terms, 1.0)
    assert ground.settle(np.array([2, 0])).tolist() == [0, 0]  # type: ignore[union-attr]
    assert ground.settle(np.array([2, 1])).tolist() == [2, 1]  # type: ignore[union-attr]
    for solver in SOLVERS:
        solution = solver(values, terms, 1.0)
        assert solution.levels == (0, 0)
        assert solution.cost == 0.0


def test_levels_that_save_nothing_hold_nothing_up() -> None:
    """Costs that don't fall with every level: 2 costs more than 3, as on real devices."""
    values = [np.array([0.0, 1.0, 2.0, 3.0])]
    terms: list[Term] = [((0,), [0.0, 1.0, 4.0, 3.0])]
    for solver in SOLVERS:
        assert solver(values, terms, 2.0).levels == (1,)


def test_uniform_takes_the_largest_share_that_fits() -> None:
    values = [np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0])]
    terms: list[Term] = [((0,), [0.0, 2.0, 4.0]), ((1,), [1.0, 2.0])]
    sizes = [[8, 16, 32], [4, 8]]
    assert solve_uniform(values, terms, 6.0, sizes=sizes).levels == (2, 1)
    assert solve_uniform(values, terms, 5.9, sizes=sizes).levels == (1, 0)  # a share of a half
    assert solve_uniform(values, terms, 1.0, sizes=sizes).levels == (0, 0)
    with pytest.raises(InputError, match=r"sizes has 1 arrays for 2 variables"):
        solve_uniform(values, terms, 1.0, sizes=[[1, 2, 3]])
    with pytest.raises(InputError, match=r"sizes\[0\] must hold 3 widths in ascending order"):
        solve_uniform(values, terms, 1.0, sizes=[[3, 2, 1], [1, 2]])


def test_greedy_takes_the_cheapest_step_first() -> None:
    values = [np.array([0.0, 5.0]), np.array([0.0, 4.0]), np.array([0.0, 9.0])]
    terms: list[Term] = [((0,), [0.0, 5.0]), ((1,), [0.0, 2.0]), ((2,), [0.0, 3.0])]
    assert solve_greedy(values, terms, 9.0).levels == (0, 1, 1)  # 1 a unit, against 2 and 3
    assert solve_greedy(values, terms, 4.0).levels == (0, 0, 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_infeasible_budgets_are_told(solver: Any) -> None:
    values, terms = chain(0)
    least = cost_of([0] * 5, terms)
    with pytest.raises(InfeasibleError, match=r"nothing within the budget of 0\.1") as caught:
        solver(values, terms, 0.1)
    assert caught.value.least == pytest.approx(least)
    assert solver(values, terms, least + 1e-9).cost == pytest.approx(least)


@pytest.mark.parametrize("solver", SOLVERS)
def test_wrong_input(solver: Any) -> None:
    with pytest.raises(InputError, match="budget is nan"):
        solver([[0, 1]], [], math.nan)
    with pytest.raises(InputError, match=r"values\[0\] contains NaN"):
        solver([[0, math.nan]], [], 1.0)


def test_wrong_options_of_the_papers_solver() -> None:
    with pytest.raises(InputError, match="steps is 0: pass a whole number of at least 1"):
        solve_halp([[0, 1]], [], 1.0, steps=0)
    with pytest.raises(InputError, match="outputs has 1 entries for 0 terms"):
        solve_halp([[0, 1]], [], 1.0, outputs=[0])
    with pytest.raises(InputError, match=r"outputs\[0\] is 1, but terms\[0\] has 1 axes"):
        solve_halp([[0, 1]], [((0,), [0.0, 1.0])], 1.0, outputs=[1])


def test_dense_must_be_allowed() -> None:
    forbidden = np.array([[0.0, 0.0], [0.0, np.inf]])
    solution = solve_halp([[0, 1], [0, 1]], [((0, 1), forbidden)], 1.0)
    assert solution.value == 1.0  # settled below the forbidden corner
    apart = np.array([[np.inf, 0.0], [0.0, np.inf]])
    odd: list[Term] = [(p, apart) for p in ((0, 1), (1, 2), (0, 2))]
    with pytest.raises(InputError, match=r'use solver="joint"'):
        solve_greedy([[0, 1]] * 3, odd, 1.0)


@pytest.mark.skipif(not TITANV.exists(), reason=f"{TITANV} is not there")
@pytest.mark.parametrize("share", [0.8, 0.55, 0.3])
def test_real_instance_is_best_solved_jointly(share: float) -> None:
    values, terms, cost, _ = titanv()
    best = solve(values, terms, share * cost)
    several = solve_halp(values, terms, share * cost)
    once = solve_halp(values, terms, share * cost, steps=1)
    assert once.value < several.value < best.value
    assert once.cost < 0.95 * share * cost
    assert several.cost <= share * cost
    for solver in (solve_greedy, solve_uniform):
        other = solver(values, terms, share * cost)
        assert other.value <= best.bound
        assert other.cost <= share * cost
