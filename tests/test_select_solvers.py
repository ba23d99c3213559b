"""select with every solver and several limits, down to what the rewritten network really holds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

import halp_fx
from halp_fx.budget import Budget
from halp_fx.errors import BudgetError, InfeasibleError, InputError
from halp_fx.latency import Analytic, Source
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.rules.counts import mac_counts, parameter_counts, total
from halp_fx.passes.saliency import score
from halp_fx.passes.select import SOLVERS, check_solver, knapsack_of, select
from halp_fx.passes.trace import trace
from halp_fx.tools import bench_solve
from halp_fx.tools.console import HalpCommands
from halp_fx.types import ChannelGroups, LatencyModel, Plan, Saliency

__all__: list[str] = []

Stages = tuple[ChannelGroups, Saliency, LatencyModel]
SIZE = 16  # pixels of the input


class Block(nn.Module):
    """A residual block that can be dropped whole."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(x + self.bn3(self.conv3(y)))


class Net(nn.Module):
    """Blocks, a depthwise convolution, a concat, a shared layer and a head that never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.left = nn.Conv2d(32, 24, 1)
        self.right = nn.Conv2d(32, 16, 3, padding=1)
        self.mix = nn.Conv2d(40, 40, 1)
        self.again = self.mix
        self.head = nn.Linear(40, 10)
        self.training_only = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.blocks(self.stem(x)))
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.again(torch.relu(self.mix(x)))
        return self.head(x.mean((2, 3)))


def make() -> tuple[nn.Module, Tensor]:
    return Net().eval(), torch.rand(2, 3, SIZE, SIZE)


@pytest.fixture(scope="module")
def stages() -> Stages:
    model, x = make()
    groups = find_groups(trace(model, (x,)))
    return groups, score(groups), price(groups, Source(Analytic(step=8), None))


def real_parameters(plan: Plan) -> int:
    return sum(p.numel() for p in rewrite(plan).parameters())


def real_macs(plan: Plan, batch: int = 2) -> int:
    """Multiply-adds by hooks on the layers of the rewritten network."""
    pruned, macs = rewrite(plan), 0

    def count(layer: Any, inputs: Any, output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * layer.weight[0].numel()

    for module in pruned.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    pruned(torch.rand(batch, 3, SIZE, SIZE))
    return macs


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_every_solver_meets_the_budget(stages: Stages, solver: str, share: float) -> None:
    groups, saliency, latency = stages
    plan = select(groups, saliency, latency, share * latency.dense_ms, solver=solver)
    assert plan.solver == solver
    assert plan.predicted_ms <= plan.budget_ms * (1 + 1e-9)
    assert plan.value <= plan.dense_value
    best = select(groups, saliency, latency, share * latency.dense_ms)
    assert plan.value <= best.value / (1 - best.gap) * (1 + 1e-9)
    # The gap is honest: against a bound that no choice can pass.
    assert 0 <= plan.gap < 1
    assert plan.value / (1 - plan.gap) >= best.value * (1 - 1e-9)
    assert plan.report["params"]["pruned"] == real_parameters(plan)
    assert plan.report["macs"]["pruned"] == real_macs(plan)
    rewrite(plan)(torch.rand(3, 3, SIZE, SIZE))


def test_counts_of_the_dense_network(stages: Stages) -> None:
    groups, _, latency = stages
    model, x = make()
    plan = select(*stages, latency.dense_ms)
    dense = sum(p.numel() for p in model.parameters())
    assert plan.report["params"] == {"dense": dense, "pruned": dense}
    assert plan.report["macs"]["dense"] == plan.report["macs"]["pruned"] == real_macs(plan)
    assert total(parameter_counts(groups), groups.dense_units) == dense
    # The shared layer is one parameter, and runs twice.
    work = [c for c in mac_counts(groups) if c.axes]
    assert len(work) < 14
    assert x.shape[0] == 2


def test_a_dropped_block_takes_its_parameters_with_it(stages: Stages) -> None:
    groups, saliency, latency = stages
    assert len(groups.branches) == 2
    inside = {g for branch in groups.branches for g in branch.groups}
    scores = tuple(s * (1e-6 if g in inside else 1.0) for g, s in enumerate(saliency.scores))
    plan = select(groups, Saliency(scores, "mine", True), latency, 0.3 * latency.dense_ms)
    dropped = [b for b in groups.branches if not any(len(plan.units[g]) for g in b.groups)]
    assert dropped
    for branch in groups.branches:
        empty = [len(plan.units[g]) == 0 for g in branch.groups]
        assert all(empty) or not any(empty)
    assert plan.report["params"]["pruned"] == real_parameters(plan)


@pytest.mark.parametrize(
    "shares", [{"params": 0.5}, {"macs": 0.4}, {"params": 0.3, "macs": 0.5}], ids=str
)
def test_several_limits(stages: Stages, shares: dict[str, float]) -> None:
    groups, saliency, latency = stages
    free = select(groups, saliency, latency, 0.8 * latency.dense_ms)
    limits = {name: share * free.report[name]["dense"] for name, share in shares.items()}
    plan = select(groups, saliency, latency, 0.8 * latency.dense_ms, limits=limits)
    assert plan.report["limits"] == limits
    assert plan.predicted_ms <= plan.budget_ms
    assert real_parameters(plan) <= limits.get("params", np.inf)
    assert real_macs(plan) <= limits.get("macs", np.inf)
    assert plan.value <= free.value / (1 - free.gap)
    assert plan.gap <= 0.03
    # At least one limit is nearly used up, as far as multiples of widths allow.
    used = [plan.report[name]["pruned"] / limit for name, limit in limits.items()]
    assert max([*used, plan.predicted_ms / plan.budget_ms]) > 0.9


def test_limits_that_cannot_be_met(stages: Stages) -> None:
    groups, saliency, latency = stages
    with pytest.raises(InfeasibleError, match=r"the limit of 20 params can't be met: the fewest"):
        select(groups, saliency, latency, latency.dense_ms, limits={"params": 20.0})
    with pytest.raises(InfeasibleError, match=r"the budget of .* ms can't be met"):
        select(groups, saliency, latency, 1e-9, limits={"params": 1e9})
    for solver in SOLVERS:
        with pytest.raises(InfeasibleError, match=r"can't be met: the least latency"):
            select(groups, saliency, latency, 1e-9, solver=solver)


def test_wrong_options(stages: Stages) -> None:
    _, _, latency = stages
    with pytest.raises(
        InputError, match="solver is 'best': pass one of 'joint', 'halp', 'greedy', 'uniform'"
    ):
        select(*stages, latency.dense_ms, solver="best")
    with pytest.raises(InputError, match="limits has 'flops': it takes 'params', 'macs' and"):
        select(*stages, latency.dense_ms, limits={"flops": 1.0})
    with pytest.raises(BudgetError, match="the limit on params is 0: pass a count above 0"):
        select(*stages, latency.dense_ms, limits={"params": 0})
    with pytest.raises(InputError, match="'halp' takes a limit on latency alone: leave params and"):
        check_solver("halp", ("params", "macs"))


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (("analytic", "4ms"), r"also has 'analytic': pass a list of pairs \(latency, budget\)"),
        ([("analytic",)], r"also has \('analytic',\): pass a list of pairs"),
        ("analytic", "also has 'analytic': pass a list of pairs"),
        ([("analytic", Budget(share=0.5, params=0.5))], "in also limits params too: limit those"),
    ],
    ids=str,
)
def test_further_latencies_that_are_none(also: Any, message: str) -> None:
    model, x = make()
    with pytest.raises(InputError, match=message):
        halp_fx.compile(model, 0.5, x, latency="analytic", also=also)


def test_further_latencies_are_for_the_joint_solver(stages: Stages) -> None:
    model, x = make()
    message = "'halp' takes a limit on latency alone, and on one device: leave `also` out"
    with pytest.raises(InputError, match=message):
        halp_fx.compile(model, 0.5, x, solver="halp", also=[("analytic", 0.5)])
    with pytest.raises(InputError, match=message):
        select(*stages, 1.0, solver="halp", also=[(stages[2], 1.0)])


def test_outputs_of_the_kernels(stages: Stages) -> None:
    """The paper's solver moves the axis of what a kernel writes."""
    groups, saliency, latency = stages
    problem = knapsack_of(groups, saliency, latency)
    assert len(problem.outputs) == len(problem.terms)
    variable = [k for k in latency.kernels if k.axes]
    by_name = dict(zip((k.nodes[0] for k in variable), problem.outputs, strict=False))
    axes = {k.nodes[0]: k.axes for k in variable}
    written = axes["right"][by_name["right"]]
    assert written.dense == 16
    assert by_name["head"] == -1  # its output is the network's: nothing moves


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(share=0.5, params=1e6), {"params": 1e6}),
        (Budget(params=0.5), {"params": 500.0}),
        (Budget(params=1.0, macs=2), {"params": 1000.0, "macs": 2.0}),
        (Budget(latency_ms=3.0, macs=1), {"macs": 1.0}),  # an int is a count, whatever its size
        (Budget(share=0.5), {}),
    ],
    ids=str,
)
def test_budgets_as_counts(budget: Budget, expected: dict[str, float]) -> None:
    assert budget.counts(dense_params=1000, dense_macs=5000) == expected
    assert budget.further == tuple(expected)


def test_budgets_without_latency_keep_the_dense_one() -> None:
    assert Budget(params=0.5).in_ms(dense_ms=8.0) == 8.0
    with pytest.raises(BudgetError, match="Budget sets no limit"):
        Budget()
    with pytest.raises(BudgetError, match="params of the budget is -1, it must be above 0"):
        Budget(params=-1)
    with pytest.raises(BudgetError, match=r"macs of the budget is '1', not a number: pass a count"):
        Budget(macs="1")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="exactly one of latency_ms and share"):
        Budget(latency_ms=1.0, share=0.5, params=0.5)


def test_compile_with_several_limits() -> None:
    model, x = make()
    dense = sum(p.numel() for p in model.parameters())
    budget = Budget(share=0.7, params=0.4, macs=1e9)
    pruned = halp_fx.compile(model, budget, x, latency="analytic")
    plan = halp_fx.plan_of(pruned)
    assert sum(p.numel() for p in pruned.parameters()) <= 0.4 * dense
    assert plan.predicted_ms <= 0.7 * plan.dense_ms
    assert plan.report["limits"] == {"params": 0.4 * dense, "macs": 1e9}
    assert plan.report["model"] == "Net"
    assert pruned(torch.rand(3, 3, SIZE, SIZE)).shape == (3, 10)


def test_compile_with_another_solver(tmp_path: Path) -> None:
    model, x = make()
    pruned = halp_fx.compile(model, 0.5, x, latency="analytic", solver="halp")
    plan = halp_fx.plan_of(pruned)
    assert plan.solver == "halp"
    halp_fx.save(pruned, tmp_path / "net.safetensors")
    again = halp_fx.plan_of(halp_fx.load(tmp_path / "net.safetensors"))
    assert (again.solver, again.report["params"]) == ("halp", plan.report["params"])
    with pytest.raises(InputError, match="solver is 'milp'"):
        halp_fx.compile(nn.Identity(), 0.5, x, latency="analytic", solver="milp")
    with pytest.raises(InputError, match="takes a limit on latency alone"):
        halp_fx.compile(model, Budget(params=0.5), x, latency="analytic", solver="greedy")


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer(cls=HalpCommands)
    app.callback()(lambda: None)
    bench_solve.add_command(app)
    return app


def test_bench_solve_on_a_network(command: typer.Typer, tmp_path: Path) -> None:
    target = tmp_path / "out" / "solve.csv"
    arguments = ["solve", "--models", f"{__name__}:make", "--budgets", "0.5,0.3", "--compare"]
    result = CliRunner().invoke(command, [*arguments, "-o", str(target)])
    assert result.exit_code == 0, result.output
    assert "value kept" in result.output
    with target.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["solver"] for r in rows] == ["joint", "halp", "halp, 1 step", "greedy", "uniform"] * 2
    for row in rows:
        assert float(row["cost"]) <= float(row["budget"]) * (1 + 1e-9)
        assert 0 <= float(row["gap"]) < 1


def test_bench_solve_on_a_recorded_instance(command: typer.Typer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["stem", "('net.layer1.0.conv3', 'net.layer1.0.downsample')"]
    names += ["net.layer1.0.conv1", "net.layer1.0.conv2"]
    arrays: dict[str, Any] = {"names": np.array(names)}
    for k, levels in enumerate((3, 5, 5, 5)):
        arrays[f"value_{k}"] = np.concatenate([[0.0], np.cumsum(rng.random(levels - 1))])
    for j, (out, into) in enumerate([(0, -1), (2, 0), (3, 2), (1, 3)]):
        shape = [arrays[f"value_{v}"].size for v in (out, into) if v >= 0]
        grown = (
            np.multiply.outer(*map(np.arange, shape)) if len(shape) == 2 else np.arange(shape[0])
        )
        arrays[f"term_{j}"], arrays[f"term_{j}_groups"] = grown * 1.0, np.array([out, into])
    path, target = tmp_path / "instance.npz", tmp_path / "solve.md"
    np.savez(path, **arrays)
    arguments = ["solve", "--instance", str(path), "--budgets", "0.6", "--compare"]
    result = CliRunner().invoke(command, [*arguments, "-o", str(target)])
    assert result.exit_code == 0, result.output
    lines = target.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| instance | groups | budget | solver |")
    assert len(lines) == 2 + 5
    instance = bench_solve.read_instance(path)
    assert instance.values[0][:-1].max() == -np.inf  # the stem stays whole
    assert instance.values[1][0] == -np.inf  # coupled layers keep something
    assert np.isinf(np.asarray(instance.terms[-1][1])).sum() == 8  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "half"], "is no list of shares"),
        (["--budgets", "1.5"], "must name shares above 0 and at most 1"),
        (["--instance", "nowhere.npz"], "can't be read as a knapsack instance"),
    ],
)
def test_bench_solve_errors(command: typer.Typer, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(command, ["solve", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_two_devices_at_once() -> None:
    """A second latency, on a device that is bound by memory, is a limit of its own."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 8, 1),
    )
    x = torch.randn(1, 3, 32, 32)
    memory = halp_fx.latency.Analytic(peak_gflops=1e6, bandwidth_gbs=1.0)
    alone = halp_fx.plan_of(halp_fx.compile(net, 0.5, x, latency="analytic"))
    both = halp_fx.plan_of(halp_fx.compile(net, 0.5, x, latency="analytic", also=[(memory, 0.6)]))
    (second,) = both.report["also"]
    assert both.predicted_ms <= both.budget_ms
    assert second["predicted_ms"] <= second["budget_ms"]
    assert second["budget_ms"] == pytest.approx(0.6 * second["dense_ms"])
    assert both.value <= alone.value
    assert both.gap < 0.05
    with pytest.raises(halp_fx.errors.InfeasibleError, match="ms of analytic can't be met"):
        halp_fx.compile(net, 0.5, x, latency="analytic", also=[(memory, 0.01)])
    with pytest.raises(halp_fx.errors.InputError, match="solver"):
        halp_fx.compile(net, 0.5, x, latency="analytic", also=[(memory, 0.6)], solver="greedy")
