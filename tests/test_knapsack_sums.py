"""Costs over sums of widths: networks that concat."""

from __future__ import annotations

import numpy as np
import pytest

from halp_fx.knapsack import Sum, SumTerm, Term, cost_of, solve, value_of
from halp_fx.knapsack.model import FloatArray, IntArray, Problem
from halp_fx.knapsack.reading import read
from halp_fx.knapsack.relax import Relaxation


def staircase(into: IntArray, out: IntArray) -> FloatArray:
    """Cost of a convolution in steps of 16, dearer off the steps: not monotone."""
    work = (np.ceil(into / 16) * 16) * (np.ceil(out / 8) * 8) * 1e-5 + (into + out) * 1e-4 + 0.01
    cost = work * np.where(into % 16 == 0, 1.0, 1.1)
    return np.asarray(np.where((into == 0) | (out == 0), 0.0, cost))


class Network:
    """Variables and kernels of a synthetic network."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.values: list[FloatArray] = []
        self.sizes: list[IntArray] = []
        self.terms: list[Term] = []

    def group(self, channels: int, step: int, *, least: int = 0) -> int:
        sizes = np.arange(least, channels + 1, step)
        scores = np.sort(self.rng.gamma(0.7, size=channels) * self.rng.gamma(2.0))[::-1]
        self.values.append(np.concatenate([[0], np.cumsum(scores)])[sizes])
        self.sizes.append(sizes)
        return len(self.sizes) - 1

    def concat(self, groups: list[int]) -> Sum:
        return Sum(tuple(groups), tuple(self.sizes[g] for g in groups))

    def kernel(self, into: list[int], out: list[int]) -> None:
        self.terms.append(SumTerm((self.concat(into), self.concat(out)), staircase))

    @property
    def dense(self) -> list[int]:
        return [v.size - 1 for v in self.values]


def densenet(blocks: tuple[int, ...], seed: int = 0) -> Network:
    """Every layer reads the concat of all before it in its block."""
    net = Network(seed)
    features = [net.group(64, 8, least=8)]
    for layers in blocks:
        for _ in range(layers):
            bottleneck, new = net.group(128, 32), net.group(32, 8)
            net.kernel(features, [bottleneck])
            net.kernel([bottleneck], [new])
            together = np.zeros((5, 5))
            together[0, 1:] = together[1:, 0] = np.inf
            net.terms.append(((bottleneck, new), together))
            features = [*features, new]
        transition = net.group(128, 16, least=16)
        net.kernel(features, [transition])
        features = [transition]
    return net


def test_densenet_201_is_exact_and_closed() -> None:
    net = densenet((6, 12, 48, 32))
    raw, _ = read(net.values, net.terms)
    problem = Problem(raw)
    assert len(problem.sums) == 98  # the chain is shared by all concats of a block
    assert Relaxation(problem).exact
    budget = 0.5 * cost_of(net.dense, net.terms)
    solution = solve(net.values, net.terms, budget)
    assert solution.gap <= 1e-3
    assert solution.cost == cost_of(solution.levels, net.terms) <= budget
    assert solution.value == value_of(solution.levels, net.values)


def test_inception_like() -> None:
    net = Network(1)
    features = [net.group(64, 16, least=16)]
    for _ in range(6):
        reduced = [net.group(48, 16, least=16) for _ in range(2)]
        branches = [net.group(c, 16, least=16) for c in (64, 96, 32, 32)]
        for r in reduced:
            net.kernel(features, [r])
        for r, b in zip(reduced, branches[1:3], strict=True):
            net.kernel([r], [b])
        net.kernel(features, [branches[0]])
        net.kernel(features, [branches[3]])
        features = branches
    solution = solve(net.values, net.terms, 0.4 * cost_of(net.dense, net.terms))
    assert solution.gap <= 1e-3


def test_concats_that_do_not_nest() -> None:
    """HarDNet-like: too wide for one elimination, so the relaxation is split."""
    net = Network(2)
    layers = [net.group(64, 16, least=16)]
    for k in range(1, 25):
        links = [layers[k - (1 << i)] for i in range(5) if k % (1 << i) == 0 and k >= 1 << i]
        layers.append(net.group(16 * (k & -k), 4 * (k & -k), least=4 * (k & -k)))
        net.kernel(links, [layers[-1]])
    net.kernel(layers[1::2], [net.group(128, 32, least=32)])
    raw, _ = read(net.values, net.terms)
    assert not Relaxation(Problem(raw), limit=20_000).exact
    budget = 0.5 * cost_of(net.dense, net.terms)
    solution = solve(net.values, net.terms, budget)
    assert solution.cost <= budget
    assert solution.gap <= 1e-2


def test_many_random_sums_keep_a_valid_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The split relaxation against the exact one, on the same instance."""
    net = densenet((5, 4), seed=3)
    budget = 0.5 * cost_of(net.dense, net.terms)
    exact = solve(net.values, net.terms, budget, gap=0.0)
    monkeypatch.setattr(Relaxation.__init__, "__defaults__", (500,))
    split = solve(net.values, net.terms, budget)
    assert exact.value <= split.bound * (1 + 1e-12)
    assert split.value <= exact.bound * (1 + 1e-12)
    assert split.gap <= 1e-2


def test_axes_of_one_variable_become_a_plain_table() -> None:
    sizes = np.array([0, 8, 24])
    term = SumTerm((Sum((0,), (sizes,), 8), Sum((1,), (sizes,))), lambda s, t: s * 1.0 + 100 * t)
    raw, _ = read([[0, 1, 2], [0, 1, 2]], [term])
    problem = Problem(raw)
    assert problem.sums == []
    ((scope, table),) = problem.tables
    assert scope == (0, 1)
    assert np.array_equal(table, (sizes + 8)[:, None] + 100.0 * sizes[None])


def test_same_sum_on_both_axes_is_the_diagonal() -> None:
    """A depthwise convolution behind a concat: channels in and out are one sum."""
    both = Sum((0, 1), (np.array([0, 1]), np.array([0, 2])))
    raw, _ = read([[0, 1], [0, 1]], [SumTerm((both, both), lambda s, t: s * 10.0 + t)])
    ((scope, table),) = Problem(raw).tables
    assert scope == (2,)
    assert np.array_equal(table, [0, 11, 22, 33])


def test_concat_of_a_tensor_with_itself_counts_twice() -> None:
    sizes = np.array([0, 4])
    term = SumTerm((Sum((0, 0), (sizes, sizes)),), lambda s: s * 1.0)
    assert solve([[0, 1]], [term], 8.0).levels == (1,)
    assert solve([[0, 1]], [term], 7.0).levels == (0,)
