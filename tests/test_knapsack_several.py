"""Several budgets at once: against brute force, linear programming and a real instance."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize

import halp_fx.knapsack.relax
import halp_fx.knapsack.several
from halp_fx.errors import InfeasibleError, InputError
from halp_fx.knapsack import Term, cost_of, solve, value_of
from halp_fx.knapsack.master import Master
from halp_fx.knapsack.model import FloatArray
from halp_fx.knapsack.several import Constraint, solve_several
from tests.test_knapsack import TITANV, random_instance, random_sum, random_table, titanv
from tests.test_knapsack_sums import densenet

__all__: list[str] = []


def more_terms(rng: np.random.Generator, values: list[FloatArray]) -> list[Term]:
    """Another random cost of the same variables."""
    counts = [v.size for v in values]
    terms: list[Term] = []
    for _ in range(rng.integers(1, 6)):
        if rng.random() < 0.4:
            terms.append(random_sum(rng, counts))
            continue
        size = min(int(rng.integers(1, 4)), len(counts))
        chosen = tuple(int(v) for v in rng.choice(len(counts), size, rng.random() < 0.2))
        terms.append((chosen, random_table(rng, tuple(counts[v] for v in chosen))))
    return terms


def check_against_brute_force(seed: int, count: int, *, near: bool = True) -> bool:
    """Whether an instance of `count` budgets had a solution, and the solver found one."""
    rng = np.random.default_rng(seed + 1_000_000)
    values, first = random_instance(seed, sums=True)
    costs = [first, *(more_terms(rng, values) for _ in range(count - 1))]
    choices = []
    for levels in itertools.product(*(range(v.size) for v in values)):
        worth = value_of(levels, values)
        cost = [cost_of(levels, terms) for terms in costs]
        if worth > -math.inf and math.inf not in cost:
            choices.append((worth, cost))
    if not choices:
        return False
    budgets = [float(np.quantile([c[k] for _, c in choices], rng.random())) for k in range(count)]
    constraints = list(zip(costs, budgets, strict=True))
    within = [w for w, c in choices if all(x <= b for x, b in zip(c, budgets, strict=True))]
    if not within:
        with pytest.raises(InfeasibleError):
            solve_several(values, constraints)
        return False
    try:
        solution = solve_several(values, constraints)
    except InfeasibleError as error:
        assert "though none was proven not to exist" in str(error)
        return False
    assert solution.value == value_of(solution.levels, values)
    assert solution.value <= max(within) + 1e-9 <= solution.bound + 2e-9
    for cost, terms, budget in zip(solution.costs, costs, budgets, strict=True):
        assert cost <= budget
        assert cost == pytest.approx(cost_of(solution.levels, terms), rel=1e-11)
    if near:
        assert solution.value >= max(within) - 0.15 * abs(max(within)) - 1e-9
    return True


def test_a_level_that_another_constraint_forbids_is_not_taken_from_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(halp_fx.knapsack.several._Pool, "closed", lambda *args: False)
    time: list[Term] = [((v,), np.array([0.0, 1.0, 2.0])) for v in range(3)]
    for forbidden in (1, 2):  # the level above it has another place, or none
        size = [((v,), np.array([0.0, 1.0, 1.0])) for v in range(3)]
        size[0][1][forbidden] = math.inf
        values = [np.array([0.0, 3.0, 4.0 + v]) for v in range(3)]
        solution = solve_several(values, [(time, 3.0), (size, 9.0)])
        assert solution.levels[0] != forbidden
        assert solution.value == value_of(solution.levels, values)
        assert cost_of(solution.levels, time) <= 3.0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_against_brute_force(count: int) -> None:
    solved = sum(check_against_brute_force(seed, count) for seed in range(50))
    assert solved >= 25


@pytest.mark.parametrize("limit", [60, 200])
def test_split_relaxation_against_brute_force(limit: int, monkeypatch: Any) -> None:
    """Tables too large for one elimination: several components, still a valid bound."""
    monkeypatch.setattr(halp_fx.knapsack.relax.Relaxation.__init__, "__defaults__", (limit,))
    assert sum(check_against_brute_force(seed, 2, near=False) for seed in range(25)) >= 12


def test_one_constraint_is_the_plain_problem() -> None:
    values, terms = random_instance(4, sums=True)
    alone = solve(values, terms, 8.0)
    several = solve_several(values, [(terms, 8.0)])
    assert (several.levels, several.value, several.bound) == (
        alone.levels,
        alone.value,
        alone.bound,
    )
    assert several.costs == (alone.cost,)


def test_a_budget_that_does_not_bind_changes_nothing() -> None:
    net = densenet((4, 4), seed=1)
    budget = 0.5 * cost_of(net.dense, net.terms)
    loose: list[Term] = [((v,), np.arange(x.size) * 1.0) for v, x in enumerate(net.values)]
    alone = solve(net.values, net.terms, budget)
    several = solve_several(net.values, [(net.terms, budget), (loose, 1e9)])
    assert several.gap <= 1e-3
    assert several.value >= alone.bound * (1 - 2e-3)


def test_concats_under_two_budgets() -> None:
    net = densenet((6, 6), seed=2)
    channels: list[Term] = [((v,), x * 1.0) for v, x in enumerate(net.sizes)]
    time, size = cost_of(net.dense, net.terms), cost_of(net.dense, channels)
    constraints: list[Constraint] = [(net.terms, 0.6 * time), (channels, 0.5 * size)]
    solution = solve_several(net.values, constraints)
    assert solution.gap <= 5e-3
    assert solution.costs[0] <= 0.6 * time
    assert solution.costs[1] <= 0.5 * size
    assert solution == solve_several(net.values, constraints)  # the same answer each time


@pytest.mark.skipif(not TITANV.exists(), reason=f"{TITANV} is not there")
@pytest.mark.parametrize(("time", "size"), [(0.5, 0.5), (0.3, 0.5), (0.9, 0.4)])
def test_real_instance_with_its_weights_limited(time: float, size: float) -> None:
    values, terms, cost, _ = titanv()
    weights: list[Term] = []
    for term in terms:
        scope, table = term  # type: ignore[misc]
        shape = np.asarray(table).shape
        if np.isfinite(table).all():
            product = np.ones(shape)
            for axis in np.indices(shape):
                product = product * axis
            weights.append((scope, product))
    dense = cost_of([v.size - 1 for v in values], weights)
    solution = solve_several(values, [(terms, time * cost), (weights, size * dense)])
    assert solution.gap <= 3e-3
    assert solution.costs[0] <= time * cost
    assert solution.costs[1] <= size * dense


def test_infeasible_budgets() -> None:
    values = [[0.0, 1.0]]
    up: list[Term] = [((0,), [1.0, 2.0])]
    down: list[Term] = [((0,), [2.0, 1.0])]
    with pytest.raises(
        InfeasibleError, match=r"budget 1 is 0\.5, but the least cost 1 .* is 1"
    ) as e:
        solve_several(values, [(up, 5.0), (down, 0.5)])
    assert e.value.least == 1.0
    with pytest.raises(InfeasibleError, match="not all of them together"):
        solve_several(values, [(up, 1.4), (down, 1.4)])
    assert solve_several(values, [(up, 2.0), (down, 1.0)]).levels == (1,)
    never: list[Term] = [((0,), [math.inf, math.inf])]
    with pytest.raises(InfeasibleError, match="every level of variable 0 is forbidden"):
        solve_several(values, [(up, 5.0), (never, 5.0)])


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="there is no constraint"):
        solve_several([[0.0, 1.0]], [])
    with pytest.raises(InputError, match="budget is nan"):
        solve_several([[0.0, 1.0]], [([], 1.0), ([], math.nan)])
    with pytest.raises(InputError, match="gap is 1"):
        solve_several([[0.0, 1.0]], [([], 1.0)], gap=1)


def test_no_variables_and_constants() -> None:
    empty: list[Term] = [((), 1.0)]
    assert solve_several([], [(empty, 1.0), (empty, 2.0)]).costs == (1.0, 1.0)
    with pytest.raises(InfeasibleError, match=r"budget 1 is 0\.5"):
        solve_several([], [(empty, 1.0), (empty, 0.5)])
    one = solve_several([[2.0]], [(empty, 1.0), ([((0,), [3.0])], 3.0)])
    assert (one.levels, one.value, one.costs) == ((0,), 2.0, (1.0, 3.0))


@pytest.mark.parametrize("seed", range(20))
def test_master_against_linear_programming(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(1, 5)), int(rng.integers(1, 40))
    worth, costs = rng.random(columns) * 10, rng.random((rows, columns))
    room = rng.random(rows) * 0.6
    master = Master(room, 1e4)
    for k in range(columns):
        master.add(float(worth[k]), costs[:, k])
        if k % 7 == 0:
            master.solve()
    reached, prices, allowed = master.solve()
    found = scipy.optimize.linprog(
        -worth, costs, room, np.ones((1, columns)), [1.0], bounds=(0, None)
    )
    assert allowed == found.success
    if found.success:
        assert reached == pytest.approx(-found.fun)
        assert (prices >= 0).all()
        # Strong duality: the prices prove the optimum.
        assert float(room @ prices + (worth - prices @ costs).max()) == pytest.approx(reached)
