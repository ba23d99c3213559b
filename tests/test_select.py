"""select: the joint knapsack over widths, against every choice there is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halp_fx.errors import BudgetError, InfeasibleError
from halp_fx.latency import Analytic, Source
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price
from halp_fx.passes.saliency import score
from halp_fx.passes.select import select, widths
from halp_fx.passes.trace import trace
from halp_fx.types import ChannelGroups, Group, LatencyModel, Member, Saliency
from tests import oracle

__all__: list[str] = []

Problem = tuple[ChannelGroups, Saliency, LatencyModel]


class Chain(nn.Module):
    """Three groups in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3), nn.Conv2d(6, 4, 1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


class Joined(nn.Module):
    """A concat and a sum: kernels that depend on several groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.c, self.d = nn.Conv2d(9, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.c(torch.cat([F.relu(self.a(x)), self.b(x)], 1))
        return self.out(y + F.relu(self.d(y)))


def problem(model: nn.Module, backend: Analytic | None = None) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        oracle.randomize(model).eval()
    groups = find_groups(trace(model, torch.randn(1, 3, 8, 8)))
    return groups, score(groups), price(groups, Source(backend or Analytic(), None))


def best(case: Problem, budget_ms: float) -> float:
    """The most saliency of any choice of widths within the budget."""
    groups, saliency, latency = case
    most = -np.inf
    for counts in itertools.product(*(widths(g).tolist() for g in groups.groups)):
        if latency.total_ms(counts) <= budget_ms * (1 + 1e-12):
            kept = [
                np.sort(s)[::-1][:n].sum() for s, n in zip(saliency.scores, counts, strict=True)
            ]
            most = max(most, float(sum(kept)))
    return most


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.35])
@pytest.mark.parametrize("kind", [Chain, Joined])
@pytest.mark.parametrize("step", [1, 4])
def test_against_every_choice(kind: type[nn.Module], share: float, step: int) -> None:
    case = problem(kind(), Analytic(step=step, overhead_ms=1e-5))
    budget_ms = share * case[2].dense_ms
    try:
        plan = select(*case, budget_ms)
    except InfeasibleError as error:
        assert best(case, budget_ms) == -np.inf
        assert error.least > budget_ms
        return
    optimum = best(case, budget_ms)
    assert plan.predicted_ms <= budget_ms * (1 + 1e-12)
    assert plan.value <= optimum + 1e-9
    assert plan.value >= 0.99 * optimum
    bound = plan.value / (1 - plan.gap)
    assert bound >= optimum - 1e-9, "the certificate is wrong"


def test_the_best_units_of_each_group_stay() -> None:
    case = problem(Chain())
    groups, saliency, latency = case
    plan = select(*case, 0.5 * latency.dense_ms)
    for units, scores in zip(plan.units, saliency.scores, strict=True):
        order = np.argsort(-scores, kind="stable")
        assert units.tolist() == sorted(order[: len(units)].tolist())
    assert plan.value == pytest.approx(
        sum(s[u].sum() for s, u in zip(saliency.scores, plan.units, strict=True))
    )
    assert plan.dense_value == pytest.approx(sum(s.sum() for s in saliency.scores))
    counts = [len(u) for u in plan.units]
    assert plan.predicted_ms == pytest.approx(latency.total_ms(counts))
    assert (plan.dense_ms, plan.budget_ms) == (latency.dense_ms, 0.5 * latency.dense_ms)
    assert plan.groups is groups


def test_kept_names_every_tensor() -> None:
    model = Chain()
    case = problem(model)
    plan = select(*case, 0.4 * case[2].dense_ms)
    assert list(plan.kept) == list(oracle.named_tensors(model))
    by_name = {g.name: u for g, u in zip(case[0].groups, plan.units, strict=True)}
    rows, columns, *_ = plan.kept["b.weight"]
    for index, name, units in ((rows, "b", 6), (columns, "a", 5)):
        assert (list(range(units)) if index is None else index.tolist()) == by_name[name].tolist()
    assert rows is not None or columns is not None
    assert plan.kept["out.bias"] == (None,)
    assert plan.kept["a.weight"][1:] == (None, None, None)


def test_more_budget_never_keeps_less() -> None:
    case = problem(Joined())
    values = [select(*case, s * case[2].dense_ms).value for s in (0.4, 0.5, 0.6, 0.8, 1.0)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(select(*case, 10 * case[2].dense_ms).dense_value)


def test_the_least_latency() -> None:
    case = problem(Chain())
    groups, _, latency = case
    with pytest.raises(
        InfeasibleError, match="the least latency that Chain can be pruned"
    ) as caught:
        select(*case, 1e-9)
    least = latency.total_ms([g.least for g in groups.groups])
    assert caught.value.least == pytest.approx(least)
    assert f"{least / latency.dense_ms:.1%} of the dense" in str(caught.value)
    assert select(*case, caught.value.least * 1.0001).predicted_ms == pytest.approx(least)


@pytest.mark.parametrize("budget_ms", [0.0, -1.0, float("nan")])
def test_budgets_out_of_range(budget_ms: float) -> None:
    with pytest.raises(BudgetError, match="pass a latency above 0 milliseconds"):
        select(*problem(Chain()), budget_ms)


def test_choosing_twice_gives_the_same() -> None:
    case = problem(Joined())
    one, two = (select(*case, 0.5 * case[2].dense_ms) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.units, two.units, strict=True))


def _group(units: int, least: int = 1) -> Group:
    member = Member("w", 0, np.arange(units, dtype=np.int64)[:, None])
    return Group("g", units, 1, (member,), least)


@pytest.mark.parametrize(
    ("units", "least", "expected"),
    [
        (1, 0, [0, 1]),
        (2, 1, [1, 2]),
        (5, 1, [1, 2, 3, 4, 5]),
        (6, 0, [0, 1, 2, 3, 4, 5, 6]),
        (64, 1, [1, *range(8, 65, 8)]),
        (65, 1, [1, *range(8, 65, 8), 65]),
    ],
)
def test_widths(units: int, least: int, expected: list[int]) -> None:
    assert widths(_group(units, least)).tolist() == expected


@pytest.mark.parametrize("units", [7, 16, 33, 96, 256, 512, 1280, 4096])
def test_widths_are_few_and_full(units: int) -> None:
    found = widths(_group(units, 1))
    assert found[0] == 1
    assert found[-1] == units
    assert np.all(np.diff(found) > 0)
    assert len(found) <= 35
    if units >= 64:
        assert all(n % 8 == 0 for n in found[1:-1])
