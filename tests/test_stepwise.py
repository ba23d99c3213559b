"""Pruning in steps: scores of what is left, budgets on the way, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import halp_fx
from halp_fx import pipeline
from halp_fx.errors import InfeasibleError, InputError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.saliency import score, score_survivors
from halp_fx.passes.select import select
from halp_fx.passes.trace import trace
from halp_fx.pipeline import prepare
from halp_fx.report import render_markdown
from halp_fx.stepwise import narrowed, target_at
from halp_fx.types import Plan
from tests import oracle
from tests.pruning import plan_by_hand

__all__: list[str] = []


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.inorm = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.outer, self.onorm = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 20, 1)
        self.fc = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.onorm(self.outer(F.relu(self.inorm(self.inner(x))))))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return oracle.randomize(Residual()).double().eval()


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def options(**further: Any) -> dict[str, Any]:
    return {"data": batches(), "loss": F.cross_entropy, "latency": "analytic", **further}


def _plan(model: nn.Module, drop: bool = False) -> Plan:
    """Every third unit is gone, and the residual branch too if `drop`."""
    groups = find_groups(trace(model, image()))
    branch = {g for b in groups.branches for g in b.groups} if drop else set()
    units = [
        [unit for unit in range(0 if i in branch else g.units) if unit % 3]
        for i, g in enumerate(groups.groups)
    ]
    return plan_by_hand(groups, units)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("method", ["fisher", "taylor1.5", "taylor"])
def test_survivors_are_scored_as_in_the_masked_dense_network(
    model: nn.Module, method: str, drop: bool
) -> None:
    plan, data = _plan(model, drop), batches()
    found = score_survivors(rewrite(plan).eval(), plan, data, F.cross_entropy, method)
    assert (found.method, found.data_free) == (method, False)
    masked = oracle.masked_dense(model, plan.kept).eval()
    parameters = dict(masked.named_parameters())
    norms = {"stem": ["norm"] if drop else ["norm", "onorm"]}
    if not drop:
        norms["inner"] = ["inorm"]
    names = [g.name for g in plan.groups.groups]
    for name, own in norms.items():
        tensors = [parameters[f"{n}.{leaf}"] for n in own for leaf in ("weight", "bias")]
        expected = torch.zeros(len(tensors[0]), dtype=torch.float64)
        for inputs, target in data:
            slopes = torch.autograd.grad(F.cross_entropy(masked(inputs), target), tensors)
            change = torch.stack([t * s for t, s in zip(tensors, slopes, strict=True)]).sum(0)
            expected += change.abs() ** {"taylor": 1, "taylor1.5": 1.5, "fisher": 2}[method] / len(
                data
            )
        units = plan.units[names.index(name)]
        scores = found.scores[names.index(name)]
        np.testing.assert_allclose(scores[units], expected.detach()[units], rtol=1e-8)
        assert len(scores) == len(expected) and not np.delete(scores, units).any()
    if drop:
        assert not found.scores[names.index("inner")].any()


def test_steps_take_of_what_is_left_within_budgets_that_fall_exponentially(
    model: nn.Module,
) -> None:
    prepared = prepare(model, image(), steps=4, **options())
    seen: list[tuple[float, float, Plan]] = []

    def choose(scores: Any, budget_ms: float, done: float, among: Any) -> Plan:
        limit = halp_fx.Budget(share=0.4)
        plan = prepared._chooser(limit, done, among)(
            prepared.groups, scores, prepared.costs, budget_ms
        )
        seen.append((done, budget_ms, plan))
        return plan

    dense = prepared.costs.dense_ms
    left, scores = narrowed(
        4, prepared.groups, prepared.scores, prepared.costs, 0.4 * dense, choose,
        batches(), F.cross_entropy, lambda done, total: None,
    )  # fmt: skip
    assert [done for done, *_ in seen] == [0.25, 0.5, 0.75]
    for done, budget_ms, plan in seen:
        assert budget_ms == pytest.approx(dense * 0.4**done)
        assert plan.predicted_ms <= budget_ms
    for (*_, before), (*_, after) in itertools.pairwise(seen):
        assert all(
            np.isin(own, old).all() for own, old in zip(after.units, before.units, strict=True)
        )
    assert all(np.array_equal(a, b) for a, b in zip(left, seen[-1][2].units, strict=True))
    for units, own in zip(left, scores.scores, strict=True):
        assert not np.delete(own, units).any()
    final = halp_fx.plan_of(prepared.prune(halp_fx.Budget(share=0.4)))
    assert all(np.isin(own, old).all() for own, old in zip(final.units, left, strict=True))
    assert final.predicted_ms <= 0.4 * dense


@pytest.mark.parametrize("limits", [{}, {"params": 0.5}, {"macs": 0.4, "memory": 0.9}])
def test_a_network_pruned_in_steps_is_exact_and_within_all_limits(
    model: nn.Module, limits: dict[str, float]
) -> None:
    budget = halp_fx.Budget(share=0.6, **limits)
    with oracle.snapshot(model):
        pruned = halp_fx.compile(model, budget, image(), steps=3, **options())
    oracle.assert_exact(model, pruned, (image(),))
    report = halp_fx.plan_of(pruned).report
    for name, most in limits.items():
        assert report[name]["pruned"] <= most * report[name]["dense"]


def test_a_budget_that_is_met_already_takes_no_steps() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)).double()  # no unit is dead
    stages: list[str] = []
    data = [(x, torch.randn(8, 4, 4, 4, dtype=torch.float64)) for x, _ in batches()]
    halp_fx.compile(
        net, 1.0, image(), data=data, loss=F.mse_loss, latency="analytic", steps=3,
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    assert "steps" not in stages and "select" in stages


@pytest.mark.parametrize("budget", [{"params": 0.4}, {"macs": 0.4}])
def test_steps_are_taken_where_other_limits_bind(
    model: nn.Module, budget: dict[str, float]
) -> None:
    stages: list[str] = []
    halp_fx.compile(
        model, halp_fx.Budget(**budget), image(), steps=3,
        progress=lambda stage, done, total: stages.append(stage), **options(),
    )  # fmt: skip
    assert "steps" in stages


def test_a_shuffled_loader_leaves_the_random_state_alone(model: nn.Module) -> None:
    inputs = torch.cat([x for x, _ in batches()])
    targets = torch.cat([y for _, y in batches()])
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True)
    given, inputs = options(data=loader), image()
    before = torch.get_rng_state()
    plan = halp_fx.plan_of(halp_fx.compile(model, 0.6, inputs, steps=2, **given))
    assert torch.equal(torch.get_rng_state(), before)
    assert plan.report["steps"] == 2
    assert "that the last of 2 steps chose from" in render_markdown(plan)


def test_where_measured_costs_rule_out_what_the_steps_left(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = False

    def refine(groups: Any, source: Any, costs: Any, kept: Any) -> Any:  # noqa: ARG001
        nonlocal measured
        measured = True
        return costs

    def choose(*arguments: Any, among: Any = None, **further: Any) -> Any:
        if measured and among is not None:
            raise InfeasibleError("what is left takes longer than that", 1.0)
        return select(*arguments, among=among, **further)

    monkeypatch.setattr(pipeline, "can_measure", lambda source: True)
    monkeypatch.setattr(pipeline, "refine", refine)
    monkeypatch.setattr(pipeline, "select", choose)
    given = options(verify=False)
    plan = halp_fx.plan_of(halp_fx.compile(model, 0.5, image(), steps=3, **given))
    assert plan.report["steps"] == 1
    assert plan.predicted_ms <= plan.budget_ms
    at_once = halp_fx.plan_of(halp_fx.compile(model, 0.5, image(), **given))
    assert all(map(np.array_equal, plan.units, at_once.units))


def test_nothing_is_left_to_choose_from_after_a_step() -> None:
    """All that can go is one branch, and the first step takes it."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.wide, self.back = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return x + self.back(F.relu(self.wide(x)))

    torch.manual_seed(0)
    net = oracle.randomize(Branch()).double().eval()
    data = [(x, torch.randn(8, 4, 8, 8, dtype=torch.float64)) for x, _ in batches()]
    given = {"data": data, "loss": F.mse_loss, "latency": "analytic", "exclude": "stem"}
    at_once = halp_fx.plan_of(halp_fx.compile(net, 0.1, image(), **given))
    assert all(len(units) == 0 for units in at_once.units)
    plan = halp_fx.plan_of(halp_fx.compile(net, 0.1, image(), steps=4, **given))
    assert plan.predicted_ms <= plan.budget_ms


def test_the_trunk_is_scored_by_what_is_left_of_it() -> None:
    """Its only batch norm goes with a branch: filters count then."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 1)
            self.inner, self.norm = nn.Conv2d(16, 24, 1), nn.BatchNorm2d(16)
            self.outer, self.fc = nn.Conv2d(24, 16, 1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            x = x + self.norm(self.outer(F.relu(self.inner(x))))
            return self.fc(F.relu(x).mean((2, 3)))

    torch.manual_seed(0)
    net = oracle.randomize(Bare()).double().eval()
    plan = _plan(net, drop=True)
    found = score_survivors(rewrite(plan).eval(), plan, batches(), F.cross_entropy)
    names = [g.name for g in plan.groups.groups]
    trunk = next(i for i, name in enumerate(names) if name == "stem")
    assert (found.scores[trunk][plan.units[trunk]] > 0).all()


def test_a_tensor_of_two_names_is_scored() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.two.weight = self.one.weight
            self.stem, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(F.relu(self.two(F.relu(self.one(self.stem(x))))).mean((2, 3)))

    torch.manual_seed(0)
    net = oracle.randomize(Tied()).double().eval()
    groups = find_groups(trace(net, image()))
    scores = score(groups, batches(), F.cross_entropy).scores
    assert scores and all((own > 0).any() for own in scores)


def test_targets() -> None:
    assert target_at(8.0, 2.0, 0.5) == pytest.approx(4.0)
    assert target_at(8.0, 2.0, 1.0) == pytest.approx(2.0)
    assert target_at(8.0, 9.0, 0.5) == 9.0  # nothing to do on the way there


def _stream() -> Iterator[Any]:
    yield from batches()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps is 0: pass a whole number of at least 1"),
        ({"steps": True}, "steps is True"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"steps": 2, "data": None, "loss": None}, "pass data and leave saliency out"),
        ({"steps": 2, "saliency": "magnitude"}, "leave saliency out"),
        ({"steps": 2, "saliency": lambda groups: []}, "leave saliency out"),
        ({"steps": 2, "data": _stream()}, "an iterator that is used up after one look"),
    ],
    ids=str,
)
def test_what_is_refused(model: nn.Module, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        halp_fx.compile(model, 0.5, image(), **options(**given))
