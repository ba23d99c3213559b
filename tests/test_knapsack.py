"""The knapsack solver against brute force, HiGHS and a real instance."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

import halp_fx.knapsack.relax
from halp_fx.errors import HalpError, InfeasibleError, InputError
from halp_fx.knapsack import Solution, Sum, SumTerm, Term, cost_of, solve, value_of
from halp_fx.knapsack.elimination import Elimination
from halp_fx.knapsack.model import FloatArray, Problem
from halp_fx.knapsack.reading import read

Instance = tuple[list[FloatArray], list[Term]]
DATA = Path(os.environ.get("HALP_FX_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
TITANV = DATA / "knapsack_resnet50_titanv.npz"


def random_table(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Costs in no order, some zero, some forbidden."""
    table: FloatArray = rng.random(shape) * 5
    if rng.random() < 0.5:
        table = np.floor(table * 6 / 5)
    if rng.random() < 0.3:
        table[rng.random(shape) < 0.2] = np.inf
    return table


def random_sum(rng: np.random.Generator, counts: list[int]) -> SumTerm:
    """A cost over one or two sums, which may share variables."""
    axes = []
    for _ in range(rng.integers(1, 3)):
        chosen = rng.choice(len(counts), rng.integers(1, len(counts) + 1), rng.random() < 0.15)
        sizes = [
            rng.integers(0, 5, counts[v])
            if rng.random() < 0.3
            else np.arange(counts[v]) * int(rng.integers(1, 4))
            for v in chosen
        ]
        axes.append(Sum(tuple(int(v) for v in chosen), tuple(sizes), int(rng.integers(0, 4))))
    costs = random_table(rng, (200,))
    if len(axes) == 1:
        return SumTerm(tuple(axes), costs)
    return SumTerm(tuple(axes), lambda s, t: costs[(3 * s + t) % 200])


def random_instance(seed: int, *, sums: bool) -> Instance:
    rng = np.random.default_rng(seed)
    counts = [int(k) for k in rng.integers(1, 5, rng.integers(1, 7))]
    values: list[FloatArray] = [rng.random(k) * 10 for k in counts]
    if rng.random() < 0.5:
        values = [np.sort(np.floor(v - 3)) for v in values]
    if rng.random() < 0.4:
        for v in values:
            v[rng.random(v.size) < 0.15] = -np.inf
    terms: list[Term] = []
    for _ in range(rng.integers(0, 9)):
        if sums and rng.random() < 0.6:
            terms.append(random_sum(rng, counts))
            continue
        size = min(int(rng.integers(1, 4)), len(counts))
        chosen = tuple(int(v) for v in rng.choice(len(counts), size, rng.random() < 0.2))
        terms.append((chosen, random_table(rng, tuple(counts[v] for v in chosen))))
    return values, terms


def every_choice(values: list[FloatArray], terms: list[Term]) -> list[tuple[float, float]]:
    """(value, cost) of every choice that is not forbidden."""
    choices = itertools.product(*(range(v.size) for v in values))
    found = [(value_of(c, values), cost_of(c, terms)) for c in choices]
    return [(v, c) for v, c in found if v > -math.inf and c < math.inf]


def check_against_brute_force(seed: int, *, sums: bool) -> None:
    values, terms = random_instance(seed, sums=sums)
    choices = every_choice(values, terms)
    rng = np.random.default_rng(seed)
    costs = [c for _, c in choices]
    budget = float(rng.uniform(min(costs) - 1, max(costs) + 0.5)) if costs else 1.0
    if costs and rng.random() < 0.2:
        budget = costs[int(rng.integers(len(costs)))]
    gap = float(rng.choice([0.0, 1e-3, 0.05]))
    within = [v for v, c in choices if c <= budget]
    if not within:
        with pytest.raises(InfeasibleError) as caught:
            solve(values, terms, budget, gap=gap)
        assert caught.value.least == pytest.approx(min(costs, default=math.inf))
        return
    solution = solve(values, terms, budget, gap=gap)
    assert solution.cost == min(cost_of(solution.levels, terms), budget)
    assert solution.cost == pytest.approx(cost_of(solution.levels, terms), rel=1e-11)
    assert solution.value == value_of(solution.levels, values)
    assert solution.value <= max(within) + 1e-12 <= solution.bound + 2e-12
    assert 0 <= solution.gap <= gap + 1e-9


@pytest.mark.parametrize("seeds", [range(k, k + 50) for k in range(0, 200, 50)])
def test_pair_costs_against_brute_force(seeds: range) -> None:
    for seed in seeds:
        check_against_brute_force(seed, sums=False)


@pytest.mark.parametrize("seeds", [range(k, k + 50) for k in range(0, 200, 50)])
def test_sum_costs_against_brute_force(seeds: range) -> None:
    for seed in seeds:
        check_against_brute_force(seed, sums=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(10_000, 10**9), st.booleans())
def test_any_seed_against_brute_force(seed: int, sums: bool) -> None:
    check_against_brute_force(seed, sums=sums)


@pytest.mark.parametrize("limit", [60, 200])
def test_split_relaxation_against_brute_force(limit: int, monkeypatch: Any) -> None:
    """Tables too large for one elimination: several components, still a valid bound."""
    monkeypatch.setattr(halp_fx.knapsack.relax.Relaxation.__init__, "__defaults__", (limit,))
    for seed in range(60):
        values, terms = random_instance(seed, sums=True)
        choices = every_choice(values, terms)
        if not choices:
            continue
        budget = float(np.median([c for _, c in choices]))
        solution = solve(values, terms, budget)
        best = max(v for v, c in choices if c <= budget)
        assert best <= solution.bound + 1e-12
        assert solution.value >= best * (1 - 1e-3) - 1e-12 or solution.gap <= 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_max_marginals_against_brute_force(seed: int) -> None:
    values, terms = random_instance(seed, sums=True)
    try:
        raw, allowed = read(values, terms)
    except InfeasibleError:
        return
    problem = Problem(raw.restrict([np.flatnonzero(a) for a in allowed]))
    elimination = Elimination(problem, range(len(problem.tables)), (), 10**6, 10**7)
    price = np.asarray([0.0, 0.7])
    trace = elimination.upward(price, [v[None] for v in problem.values])
    sizes = [v.size if k in elimination.own_variables else 1 for k, v in enumerate(problem.values)]
    levels = np.asarray(list(itertools.product(*(range(n) for n in sizes))))
    costs = problem.costs(levels) - problem.constant
    own = list(elimination.own_variables)
    worth = np.asarray([sum(problem.values[v][k[v]] for v in own) for k in levels])
    for row, p in enumerate(price):
        objective = np.where(np.isinf(costs), -np.inf, worth - p * np.where(costs < 9e99, costs, 0))
        assert trace.total[row] == pytest.approx(objective.max())
        for v, marginal in elimination.marginals(trace).items():
            for k in range(sizes[v]):
                expected = objective[levels[:, v] == k].max()
                assert marginal[row, k] == pytest.approx(expected)


def highs(values: list[FloatArray], terms: list[Term], budget: float) -> float:
    """Optimum by HiGHS: one binary a level, one a combination of each pair cost."""
    offsets = np.concatenate([[0], np.cumsum([v.size for v in values])])
    gain = [-np.concatenate(values)]
    cost = [np.zeros(offsets[-1])]
    rows: list[tuple[list[int], list[float], float]] = [
        (list(range(offsets[v], offsets[v + 1])), [1.0] * values[v].size, 1.0)
        for v in range(len(values))
    ]
    count = int(offsets[-1])
    for term in terms:
        assert not isinstance(term, SumTerm)
        (a, b), table = term
        table = np.asarray(table)
        gain.append(np.zeros(table.size))
        cost.append(table.reshape(-1))
        index = count + np.arange(table.size).reshape(table.shape)
        for i in range(table.shape[0]):
            rows.append(([*index[i], offsets[a] + i], [1.0] * table.shape[1] + [-1.0], 0.0))
        for j in range(table.shape[1]):
            rows.append(([*index[:, j], offsets[b] + j], [1.0] * table.shape[0] + [-1.0], 0.0))
        count += table.size
    matrix = scipy.sparse.lil_matrix((len(rows) + 1, count))
    for r, (columns, entries, _) in enumerate(rows):
        matrix[r, columns] = entries
    matrix[len(rows)] = np.concatenate(cost)
    right = np.asarray([r[2] for r in rows])
    found = scipy.optimize.milp(
        np.concatenate(gain),
        constraints=scipy.optimize.LinearConstraint(
            matrix.tocsr(), np.append(right, -np.inf), np.append(right, budget)
        ),
        integrality=np.ones(count),
        bounds=(0, 1),
        options={"mip_rel_gap": 1e-9},
    )
    assert found.success
    return float(-found.fun)


@pytest.mark.parametrize("seed", range(4))
def test_middle_sizes_against_highs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [np.cumsum(rng.gamma(0.7, size=5)) for _ in range(14)]
    pairs = [(k, k + 1) for k in range(13)] + [(0, 5), (3, 11), (2, 13)]
    terms: list[Term] = [
        (p, np.outer(np.arange(1, 6), np.arange(1, 6)) * rng.gamma(1.0) + rng.random((5, 5)))
        for p in pairs
    ]
    budget = 0.4 * cost_of([4] * 14, terms)
    solution = solve(values, terms, budget, gap=0.0)
    best = highs(values, terms, budget)
    assert solution.value == pytest.approx(best, rel=1e-6)
    assert solution.bound == pytest.approx(best, rel=1e-6)


def titanv() -> tuple[list[FloatArray], list[Term], float, float]:
    """The ResNet-50 of the TITAN V with its restrictions; dense cost and value."""
    with np.load(TITANV) as data:
        names = [str(n) for n in data["names"]]
        values = [data[f"value_{k}"].copy() for k in range(len(names))]
        terms: list[Term] = []
        for k in itertools.takewhile(lambda k: f"term_{k}" in data, itertools.count()):
            out, into = (int(g) for g in data[f"term_{k}_groups"])
            terms.append(((out,) if into < 0 else (out, into), data[f"term_{k}"].copy()))
    dense = [v.size - 1 for v in values]
    cost, value = cost_of(dense, terms), value_of(dense, values)
    values[0][:-1] = -np.inf  # the stem stays whole
    index = {}
    for k, name in enumerate(names):
        layers = name.replace("'", "").strip("(),").split(", ")
        if len(layers) > 1:
            values[k][0] = -np.inf
        index[layers[0]] = k
    for layer, first in index.items():
        second = index.get(layer.replace("conv1", "conv2"))
        if ".layer" not in layer or second is None or second == first:
            continue
        forbidden = np.zeros((values[first].size, values[second].size))
        forbidden[0, 1:] = forbidden[1:, 0] = np.inf
        terms.append(((first, second), forbidden))
    return values, terms, cost, value


@pytest.mark.skipif(not TITANV.exists(), reason=f"{TITANV} is not there")
@pytest.mark.parametrize(
    ("share", "least"), [(0.80, 0.943), (0.55, 0.834), (0.45, 0.782), (0.30, 0.683), (0.15, 0.534)]
)
def test_real_instance(share: float, least: float) -> None:
    values, terms, cost, value = titanv()
    assert cost == 259_228
    blocks = [t for t in terms if not isinstance(t, SumTerm) and np.isinf(t[1]).any()]
    assert len(blocks) == 16
    solution = solve(values, terms, share * cost)
    assert round(solution.value / value, 3) >= least
    assert solution.gap <= 1e-3
    assert solution.cost == cost_of(solution.levels, terms) <= share * cost


def test_same_input_same_answer() -> None:
    for seed in range(20):
        values, terms = random_instance(seed, sums=True)
        outcomes: list[Solution | str] = []
        for _ in range(2):
            try:
                outcomes.append(solve(values, terms, 6.0))
            except HalpError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


def test_input_is_not_changed() -> None:
    values = [np.array([0.0, 1.0, -np.inf]), np.array([0.0, 2.0])]
    table = np.array([[0.0, 1.0], [np.inf, 2.0], [0.0, 0.0]])
    before = [v.copy() for v in values], table.copy()
    solve(values, [((0, 1), table)], 2.0)
    assert all(np.array_equal(a, b) for a, b in zip(values, before[0], strict=True))
    assert np.array_equal(table, before[1])


def test_everything_fits() -> None:
    solution = solve([[0, 3, 5], [0, 4]], [((0, 1), [[0, 1], [1, 3], [2, 9]])], math.inf)
    assert solution == Solution((2, 1), 9.0, 9.0, 9.0)
    assert solution.gap == 0
    # A budget that is the same sum of costs in another order, so a little less.
    costs = [0.1, 0.2, 0.3]
    terms: list[Term] = [((k,), [0.0, c]) for k, c in enumerate(costs)]
    exact = math.fsum(costs)
    solution = solve([[0, 1]] * 3, terms, np.nextafter(exact, 0))
    assert solution.levels == (1, 1, 1)
    assert solution.cost <= np.nextafter(exact, 0)


def test_variable_twice_is_the_diagonal() -> None:
    table = [[0.0, 9.0], [9.0, 1.0]]
    assert solve([[0, 1]], [((0, 0), table)], 1.0).levels == (1,)


def test_no_variables_and_constants() -> None:
    assert solve([], [], 1.0) == Solution((), 0.0, 0.0, 0.0)
    assert solve([[2.0]], [((0,), [3.0]), ((), 1.0)], 4.0) == Solution((0,), 2.0, 4.0, 2.0)


def test_forbidden_at_price_zero() -> None:
    """inf forbids even where the price is 0, and never makes NaN."""
    solution = solve([[0, 5], [0, 5]], [((0, 1), np.array([[0, 0], [0, np.inf]]))], 100.0)
    assert solution.value == 5
    assert solution.bound == 5


def test_more_variables_than_array_dims() -> None:
    """Boxes that are small enough to list may still have many variables."""
    rng = np.random.default_rng(0)
    values = [np.array([0.0, v]) for v in rng.random(150)]
    terms: list[Term] = [((k,), [0.0, c]) for k, c in enumerate(rng.random(150))]
    solution = solve(values, terms, 20.0, gap=0.0)
    assert solution.gap <= 1e-9


def test_time_limit_still_answers() -> None:
    values, terms = random_instance(3, sums=False)
    solution = solve(values, terms, 1e9, time_limit_s=0.0)
    assert solution.bound >= solution.value


@pytest.mark.parametrize(
    ("values", "terms", "message"),
    [
        ([[0, math.nan]], [], r"values\[0\] contains NaN"),
        ([[0, math.inf]], [], r"values\[0\] contains NaN or \+inf"),
        ([[]], [], r"values\[0\] has shape \(0,\).*at least one level"),
        ([[[1.0]]], [], r"values\[0\] has shape \(1, 1\)"),
        ([["a"]], [], r"values\[0\] is not an array of numbers"),
        ([[0, 1]], [((0,), [0, math.nan])], r"terms\[0\] has a cost of NaN"),
        ([[0, 1]], [((0,), [0, -math.inf])], r"terms\[0\] has a cost of NaN or -inf"),
        ([[0, 1]], [((0,), [0, 1, 2])], r"terms\[0\] has a table of shape \(3,\).*\(2,\) levels"),
        ([[0, 1]], [((1,), [0, 1])], r"terms\[0\] names variable 1, but there are 1"),
        ([[0, 1]], [((-1,), [0, 1])], r"terms\[0\] names variable -1"),
        ([[0, 1]], [((0.5,), [0, 1])], r"terms\[0\] names variable 0.5: pass an integer"),
        ([[0, 1]], [3], r"terms\[0\] is not a pair"),
        (
            [[0, 1]],
            [SumTerm((Sum((0,), (np.array([0.0, 1.0]),)),), np.zeros(2))],
            r"terms\[0\].axes\[0\] has sizes of shape \(2,\) and dtype float64",
        ),
        (
            [[0, 1]],
            [SumTerm((Sum((0,), ()),), np.zeros(2))],
            r"terms\[0\].axes\[0\] has 1 variables and 0 size arrays",
        ),
        (
            [[0, 1]],
            [SumTerm((Sum((0,), (np.array([0, 9]),)),), np.zeros(9))],
            r"reaches sums from 0 to 9, but the table has 9",
        ),
        (
            [[0, 1]],
            [SumTerm((Sum((0,), (np.array([0, 1]),)),), lambda s: s * math.nan)],
            r"terms\[0\] has a cost of NaN",
        ),
        (
            [[0, 1]],
            [SumTerm((Sum((0,), (np.array([0, 1]),)),), lambda s: np.zeros(7))],
            r"terms\[0\]: table\(\.\.\.\) returned shape \(7,\), expected \(2,\)",
        ),
    ],
)
def test_wrong_input_is_refused(values: Any, terms: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        solve(values, terms, 1.0)


def test_wrong_budget_and_gap() -> None:
    with pytest.raises(InputError, match="budget is nan"):
        solve([[0, 1]], [], math.nan)
    with pytest.raises(InputError, match="gap is 1"):
        solve([[0, 1]], [], 1.0, gap=1)


def test_infeasible_messages() -> None:
    with pytest.raises(InfeasibleError, match=r"the budget is 1, but the least cost .* is 2") as e:
        solve([[0, 1], [0, 1]], [((0, 1), np.array([[2, 3], [4, 5]]))], 1.0)
    assert e.value.least == 2
    with pytest.raises(InfeasibleError, match="every level of variable 1 is forbidden") as e:
        solve([[0, 1], [-math.inf, -math.inf]], [], 1.0)
    assert e.value.least == math.inf
    # No level alone is impossible, but no combination is left.
    apart = np.array([[math.inf, 0.0], [0.0, math.inf]])
    terms: list[Term] = [(p, apart) for p in ((0, 1), (1, 2), (0, 2))]
    with pytest.raises(InfeasibleError, match="every combination of levels is forbidden"):
        solve([[0, 1]] * 3, terms, 1.0)
