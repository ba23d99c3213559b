"""Measured costs where widths are between steps, branches are dropped, or a table is foreign."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rich import console
from torch import Tensor, nn

import halp_fx
from halp_fx.calibrate import random_plan
from halp_fx.errors import DeviceMismatchError, InputError
from halp_fx.latency import LatencyTable, Source, Stored, Torch, resolve_backend
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price, refine
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.trace import trace
from halp_fx.tools.profiler import kernel_table
from halp_fx.types import ChannelGroups
from tests.test_latency import Counting

__all__: list[str] = []

X = torch.randn(1, 3, 12, 12)


def groups_of(model: nn.Module) -> ChannelGroups:
    return find_groups(trace(model.eval(), (X,)))


def source_of(backend: Any) -> Source:
    return Source(backend, LatencyTable.open(":memory:"))


class Stairs(Counting):
    """Output channels in blocks of 16, input channels in blocks of 4; slower between them."""

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        run: Any = super().prepare(module, inputs)
        run.ms *= 0.05
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                out = -(-conv.out_channels // 16) * (1.37 if conv.out_channels % 4 else 1)
                into = -(-conv.in_channels // 4) * (1.15 if conv.in_channels % 4 else 1)
                run.ms += 0.01 * out * (into if conv.groups == 1 else 1)
        return run  # type: ignore[no-any-return]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.depth = nn.Conv2d(3, 96, 3), nn.Conv2d(96, 96, 3, groups=96)
        self.two, self.three = nn.Conv2d(96, 80, 1), nn.Conv2d(80, 40, 3)
        self.fc = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depth(torch.relu(self.one(x))))
        y: Tensor = self.fc(torch.relu(self.three(torch.relu(self.two(x)))).mean((2, 3)))
        return y


def test_refined_costs_are_exact_between_steps_too() -> None:
    groups = groups_of(Plain())
    source = source_of(Stairs(fuses=True))
    costs = price(groups, source)
    assert {step for kernel in costs.kernels for step in kernel.steps} > {4, 16}
    worst = max(penalty for kernel in costs.kernels for penalty in kernel.penalties)
    assert 1.2 < worst < 1.6
    shown = console.Console(width=200, file=io.StringIO())
    shown.print(kernel_table(costs))
    assert f"(off it {worst:.1f}x)" in shown.file.getvalue()
    random = np.random.default_rng(0)
    coarse = []
    for _ in range(3):
        plan = random_plan(groups, costs, random)
        kept = [len(units) for units in plan.units]
        truth = price(groups_of(rewrite(plan)), source_of(Stairs(fuses=True))).dense_ms
        coarse.append(abs(costs.total_ms(kept) / truth - 1))
        refined = refine(groups, source, costs, kept)
        assert refined.total_ms(kept) == pytest.approx(truth, rel=1e-9)
        assert refined.total_ms(groups.dense_units) == pytest.approx(costs.dense_ms)
    assert max(coarse) > 1e-3  # so there was something to refine


class Eights(Counting):
    """Channels in blocks of 8."""

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        run: Any = super().prepare(module, inputs)
        run.ms = 0.01 + sum(
            -(-conv.out_channels // 8) * -(-conv.in_channels // 8)
            for conv in module.modules()
            if isinstance(conv, nn.Conv2d)
        )
        return run  # type: ignore[no-any-return]


class Narrow(nn.Module):
    """So few channels that any multiple of 4 may be kept where nothing was measured."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 28, 3), nn.Conv2d(28, 28, 3)
        self.three, self.four = nn.Conv2d(28, 28, 3), nn.Conv2d(28, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        y: Tensor = self.four(torch.relu(self.three(x)))
        return y


def test_widths_keep_to_the_steps_that_were_measured() -> None:
    measured, analytic = set(), set()
    for budget in (0.8, 0.7, 0.6, 0.5):
        for latency, widths in ((source_of(Eights(fuses=True)), measured), ("analytic", analytic)):
            pruned = halp_fx.compile(Narrow().eval(), budget, X, latency=latency)
            layers = [pruned.get_submodule(name) for name in ("one", "two", "three")]
            widths |= {layer.out_channels for layer in layers}
    assert all(width % 8 == 0 or width == 28 for width in measured), measured
    assert min(measured) < 28
    assert {12, 20} & analytic, analytic  # so there were others to choose


class Branched(nn.Module):
    """A residual branch that starts (`before`) or ends with a norm of the trunk's width."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.one, self.two = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.out = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if self.before:
            y = self.two(torch.relu(self.one(torch.relu(self.norm(x)))))
        else:
            y = self.norm(self.two(torch.relu(self.one(x))))
        z: Tensor = self.out(torch.relu(x + y))
        return z


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_what_lies_in_a_dropped_branch_costs_nothing(before: bool, fuses: bool) -> None:
    groups = groups_of(Branched(before))
    source = source_of(Counting(fuses))
    costs = price(groups, source)
    (branch,) = groups.branches
    kept = [0 if g in branch.groups else n for g, n in enumerate(groups.dense_units)]
    inside = [k for k in costs.kernels if set(k.nodes) <= set(branch.nodes)]
    assert "norm" in {node for k in inside for node in k.nodes} or fuses
    for model in (costs, refine(groups, source, costs, groups.dense_units)):
        for kernel in model.kernels:
            ms = float(kernel.cost(*(axis.size(kept) for axis in kernel.axes)))
            assert (ms == 0) == (set(kernel.nodes) <= set(branch.nodes)), kernel.name
        assert model.total_ms(groups.dense_units) == pytest.approx(costs.dense_ms)


class Dear(Counting):
    """`torch.compile` on a board: few widths are measured."""

    name, coarse = "torch.compile", True

    def fingerprint(self) -> str:
        return json.dumps({"backend": self.name, "device": "board"})


def test_a_foreign_table_of_a_back_end_that_measures_few_widths() -> None:
    model = Plain().eval()
    source = source_of(Dear(fuses=True))
    own = price(groups_of(model), source)
    with pytest.raises(DeviceMismatchError, match=r"made on another device.*device is 'board'"):
        halp_fx.compile(model, 0.6, X, latency=source.table)
    foreign = resolve_backend(source.table, allow_foreign=True)
    with pytest.warns(UserWarning, match=r"made on another device.*device is 'board'"):
        pruned = halp_fx.compile(model, 0.6, X, latency=foreign)
    assert halp_fx.plan_of(pruned).dense_ms == pytest.approx(own.dense_ms)


def test_the_warning_about_a_foreign_table_says_what_differs() -> None:
    here = json.loads(Torch(threads=1).fingerprint())
    there = json.dumps({**here, "cores": 4096}, sort_keys=True)

    class Elsewhere(Counting):
        def fingerprint(self) -> str:
            return there

    source = source_of(Elsewhere())
    price(groups_of(Plain()), source)
    stored = Source(Stored(there, Torch(threads=1).fingerprint()), source.table)
    with pytest.warns(UserWarning, match=r"other settings.*\(cores: 4096, here "):
        halp_fx.compile(Plain(), 0.6, X, latency=stored)


def test_measurements_need_a_table() -> None:
    with pytest.raises(InputError, match=r"'counting' measures, and there is no table"):
        halp_fx.compile(Plain(), 0.5, X, latency=Source(Counting(), None))
