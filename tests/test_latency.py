"""The latency pass: what each kernel costs at each width, by formula and by measuring."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import halp_fx
from halp_fx.errors import LatencyError
from halp_fx.latency import Analytic, LatencyTable, Source, Torch
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price
from halp_fx.passes.trace import trace
from halp_fx.types import ChannelGroups, Kernel, LatencyModel
from halp_fx.verification import TOLERANCE
from tests import oracle
from tests.patterns import PATTERNS

__all__: list[str] = []

# One operation, or one byte, a millisecond; the other is free.
FLOPS = Analytic(peak_gflops=1e-6, bandwidth_gbs=1e30)
BYTES = Analytic(peak_gflops=1e30, bandwidth_gbs=1e-6)


class Net(nn.Module):
    """p channels after the stem, q beside them."""

    def __init__(self, p: int = 16, q: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, p, 3, padding=1), nn.BatchNorm2d(p)
        self.body = nn.Conv2d(p, p, 1, bias=False)
        self.side = nn.Conv2d(p, q, 1, bias=False)
        self.fc = nn.Linear(p + q, 10)

    def forward(self, x: Tensor) -> Any:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)  # (N, p, 4, 4)
        y = self.body(x) + x
        y = torch.cat([y, self.side(y)], 1)
        return self.fc(y.mean((2, 3)))


def groups_of(model: nn.Module, *inputs: Tensor) -> ChannelGroups:
    return find_groups(trace(model.eval(), inputs or (torch.randn(1, 3, 8, 8),)))


def by_name(model: LatencyModel) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in model.kernels}


def costs(model: LatencyModel, kept: dict[int, Any]) -> dict[str, float]:
    return {k.name: float(k.cost(*(a.size(kept) for a in k.axes))) for k in model.kernels}


def _flops(p: int, q: int) -> dict[str, float]:
    """A multiply-add is two operations, batch norm two an element, a window its size."""
    return {
        "relu": 2 * (3 * 9) * p * 64 + 2 * p * 64 + p * 64,
        "max_pool2d": 4 * p * 16,
        "add": 2 * p * p * 16 + p * 16,
        "side": 2 * p * q * 16,
        "cat": 0,
        "mean": (p + q) * 16,
        "fc": 2 * (p + q) * 10,
    }


def _bytes(p: int, q: int) -> dict[str, float]:
    """Float32; what is fused is neither written nor read, batch norm is folded."""
    return {
        "relu": 4 * (3 * 64 + p * 27 + p + p * 64),
        "max_pool2d": 4 * (p * 64 + p * 16),
        "add": 4 * (p * 16 + p * p + p * 16 + p * 16),
        "side": 4 * (p * 16 + p * q + q * 16),
        "cat": 4 * 2 * (p + q) * 16,
        "mean": 4 * ((p + q) * 16 + (p + q)),
        "fc": 4 * ((p + q) + (p + q) * 10 + 10 + 10),
    }


@pytest.mark.parametrize(("p", "q"), [(16, 8), (16, 3), (5, 8), (1, 1), (9, 2)])
@pytest.mark.parametrize(("backend", "expected"), [(FLOPS, _flops), (BYTES, _bytes)], ids=str)
def test_costs_by_hand(
    backend: Analytic, expected: Callable[[int, int], dict[str, float]], p: int, q: int
) -> None:
    groups = groups_of(Net())
    model = price(groups, Source(backend, None))
    order = {g.name: i for i, g in enumerate(groups.groups)}
    got = costs(model, {order["stem"]: p, order["side"]: q})
    assert got == pytest.approx(expected(p, q), rel=1e-9, abs=1e-12)


def test_formulas_agree_with_a_network_of_that_width() -> None:
    """The costs of a shrunk dense network are those of a network built narrow."""
    wide = price(groups := groups_of(Net(16, 8)), Source(Analytic(), None))
    order = {g.name: i for i, g in enumerate(groups.groups)}
    narrow = price(groups_of(Net(7, 3)), Source(Analytic(), None))
    total = wide.total_ms({order["stem"]: 7, order["side"]: 3})
    assert total == pytest.approx(narrow.dense_ms)


# Widths that leave out batches and dtypes: (pattern, extra checks).
@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_every_operator_is_in_one_kernel(name: str) -> None:
    model, inputs = PATTERNS[name]()
    groups = groups_of(model, *inputs)
    found = price(groups, Source(Analytic(), None))
    nodes = [set(kernel.nodes) for kernel in found.kernels]
    working = {w.node for w in groups.work}
    assert set().union(*nodes) == working
    fused = [n for n in working if sum(n in some for some in nodes) > 1]
    assert all(sum(1 for w in groups.work if w.node == n) > 1 for n in fused), fused
    dense = groups.dense_units
    assert found.total_ms(dense) == pytest.approx(found.dense_ms)
    assert found.dense_ms > 0
    least = [max(g.least, 1) for g in groups.groups]
    assert 0 < found.total_ms(least) <= found.dense_ms * (1 + 1e-12)


def test_costs_take_arrays() -> None:
    groups = groups_of(Net())
    model = price(groups, Source(Analytic(), None))
    for kernel in model.kernels:
        if len(kernel.axes) == 2:
            one, two = np.arange(1, 5)[:, None], np.arange(2, 8)[None]
            grid = kernel.cost(one, two)
            assert grid.shape == (4, 6)
            assert grid[2, 3] == pytest.approx(kernel.cost(3, 5))


def test_overhead_counts_kernels() -> None:
    groups = groups_of(Net())
    plain = price(groups, Source(Analytic(), None))
    slow = price(groups, Source(Analytic(overhead_ms=0.5), None))
    assert len(plain.kernels) == len(slow.kernels) == 7
    assert slow.dense_ms == pytest.approx(plain.dense_ms + 0.5 * 7)


def test_steps() -> None:
    groups = groups_of(Net(32, 16))
    model = price(groups, Source(Analytic(step=16), None))
    order = {g.name: i for i, g in enumerate(groups.groups)}
    totals = [model.total_ms({order["stem"]: p, order["side"]: 16}) for p in range(1, 33)]
    # The concat and what follows see p + 16, whose steps are the same.
    assert len({round(t, 12) for t in totals}) == 2
    assert totals[15] < totals[16]


def test_what_a_model_says_about_itself() -> None:
    backend = Analytic(peak_gflops=50.0)
    model = price(groups_of(Net()), Source(backend, None))
    assert (model.backend, model.device) == ("analytic", backend.fingerprint())
    kernel = by_name(model)["relu"]
    assert kernel.nodes == ("stem", "norm", "relu")
    assert kernel.op == "convolution + native_batch_norm + relu"


def test_a_network_that_does_nothing() -> None:
    groups = groups_of(nn.Flatten())
    with pytest.raises(LatencyError, match="Flatten has no operator that costs time"):
        price(groups, Source(Analytic(), None))


def test_the_batch_size_is_priced() -> None:
    one = price(groups_of(Net(), torch.randn(1, 3, 8, 8)), Source(FLOPS, None))
    four = price(groups_of(Net(), torch.randn(4, 3, 8, 8)), Source(FLOPS, None))
    assert four.dense_ms == pytest.approx(4 * one.dense_ms)


def test_half_precision_moves_half_the_bytes() -> None:
    single = price(groups_of(Net()), Source(BYTES, None))
    model = Net().to(torch.bfloat16)
    half = price(groups_of(model, torch.randn(1, 3, 8, 8).bfloat16()), Source(BYTES, None))
    assert half.dense_ms == pytest.approx(single.dense_ms / 2)


# Measured ---------------------------------------------------------------------------------------


class _Run:
    """A kernel that ran once, and what it takes."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], operations: bool) -> None:
        with torch.no_grad(), FlopCounterMode(display=False) if operations else nullcontext() as c:
            module(*inputs)
        state = sum(tensor.numel() for tensor in oracle.named_tensors(module).values())
        moved = state + sum(x.numel() for x in inputs if isinstance(x, Tensor))
        self.ms = 1e-6 * ((c.get_total_flops() if c else 0) + 100 * moved) + 1e-3

    def __call__(self) -> None: ...


class Counting:
    """A back-end whose clock is a count: measured times are the same each time."""

    name, measured, min_sample_ms, samples = "counting", True, 1e-6, 1

    def __init__(self, fuses: bool = False, operations: bool = True) -> None:
        self.fuses = fuses
        self.operations = operations  # counting them is slow

    def fingerprint(self) -> str:
        return json.dumps({"backend": self.name, "fuses": self.fuses})

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        return _Run(module, inputs, self.operations)

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        assert isinstance(run, _Run)
        return run.ms * calls


@pytest.fixture
def counted(tmp_path: Path) -> Source:
    return Source(Counting(), LatencyTable.open(tmp_path / "counted.sqlite"))


@pytest.fixture
def measured(tmp_path: Path) -> Source:
    backend = Torch(threads=1, min_sample_ms=0.02, samples=3)
    return Source(backend, LatencyTable.open(tmp_path / "table.sqlite"))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.two(F.relu(self.norm(self.one(x))))


def test_measuring_resumes(measured: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny().eval()
    with oracle.snapshot(model):
        groups = groups_of(model)
        seen: list[tuple[int, int]] = []
        first = price(groups, measured, progress=lambda *counts: seen.append(counts))
    assert measured.table is not None
    assert seen[-1][0] == seen[-1][1] > 4
    assert len(list(measured.table.entries())) == seen[-1][1]

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("halp_fx.passes.latency.cut", never)
    monkeypatch.setattr(Torch, "prepare", never)
    second = price(groups_of(Tiny()), measured)
    assert second.dense_ms == first.dense_ms
    for kernel, twin in zip(first.kernels, second.kernels, strict=True):
        assert kernel.name == twin.name
        assert [a.dense for a in kernel.axes] == [a.dense for a in twin.axes]


def test_kernels_of_eager_pytorch(measured: Source) -> None:
    """Nothing is fused, and every size lies on the grid's range."""
    groups = groups_of(Tiny())
    model = price(groups, measured)
    assert [k.nodes for k in model.kernels] == [("one",), ("norm",), ("relu",), ("two",)]
    assert model.backend == "torch"
    assert model.total_ms(groups.dense_units) == pytest.approx(model.dense_ms)
    for kernel in model.kernels:
        (axis,) = kernel.axes
        grid = kernel.cost(np.arange(1, axis.dense + 1))
        assert np.isfinite(grid).all()
        assert (grid > 0).all()


@pytest.mark.parametrize("fuses", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_kernels_that_are_cut_out_run(name: str, fuses: bool) -> None:
    """Concats, attention, shuffles: every kernel runs alone, at every width asked for."""
    model, inputs = PATTERNS[name]()
    groups = groups_of(model, *inputs)
    with LatencyTable.open(":memory:") as table:
        found = price(groups, Source(Counting(fuses, operations=False), table))
    working = {w.node for w in groups.work}
    assert working <= set().union(*(k.nodes for k in found.kernels))
    assert math.isfinite(found.dense_ms)
    least = [max(g.least, 1) for g in groups.groups]
    assert 0 < found.total_ms(least) <= found.dense_ms * (1 + 1e-9)


def test_between_the_measured_widths_costs_are_interpolated(counted: Source) -> None:
    groups = groups_of(Net(48, 16))
    model = price(groups, counted)
    order = {g.name: i for i, g in enumerate(groups.groups)}
    narrow = price(groups_of(Net(21, 5)), counted)
    assert model.total_ms({order["stem"]: 21, order["side"]: 5}) == pytest.approx(
        narrow.dense_ms, rel=0.02
    )


def test_alike_kernels_are_measured_once(counted: Source) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
            self.out = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.out(x)

    price(groups_of(Twice()), counted)
    assert counted.table is not None
    rows = len(counted.table.entries())
    price(groups_of(Twice()), counted)
    assert len(counted.table.entries()) == rows <= 4 * 7


@pytest.mark.parametrize("fuses", [False, True])
def test_compile_with_measured_costs(fuses: bool) -> None:
    torch.manual_seed(0)
    model = oracle.randomize(Net(32, 16)).eval()
    x = torch.randn(2, 3, 8, 8)
    source = Source(Counting(fuses), LatencyTable.open(":memory:"))
    random_state = torch.get_rng_state()
    with oracle.snapshot(model):
        pruned = halp_fx.compile(model, 0.6, x, latency=source)
    assert torch.equal(torch.get_rng_state(), random_state)
    plan = halp_fx.plan_of(pruned)
    assert plan.predicted_ms <= plan.budget_ms
    report = plan.report
    assert report["backend"] == "counting"
    assert report["met"] is True
    assert report["measured_ms"] <= (1 + TOLERANCE) * report["measured_budget_ms"]
    assert report["measured_budget_ms"] == pytest.approx(0.6 * report["measured_dense_ms"])
    assert 1 <= report["measured_rounds"] <= 4
    oracle.assert_exact(model, pruned, (x,), strict=True)


def test_without_verification_only_kernels_are_measured() -> None:
    model = oracle.randomize(Net(32, 16)).eval()
    x = torch.randn(2, 3, 8, 8)
    source = Source(Counting(), LatencyTable.open(":memory:"))
    pruned = halp_fx.compile(model, 0.6, x, latency=source, verify=False)
    assert "measured_ms" not in halp_fx.plan_of(pruned).report


class Started(Counting):
    """A whole network takes some milliseconds that no kernel tells of."""

    def __init__(self, more_ms: float) -> None:
        super().__init__()
        self.more_ms = more_ms

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        run = _Run(module, inputs, True)
        layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in module.modules())
        run.ms += self.more_ms if layers > 1 else 0.0
        return run


def test_a_result_that_misses_its_budget_is_chosen_again() -> None:
    """The whole network takes longer than its kernels tell: less is asked for, and measured."""
    model = oracle.randomize(Net(64, 32)).eval()
    x = torch.randn(2, 3, 16, 16)
    source = Source(Started(3.0), LatencyTable.open(":memory:"))
    pruned = halp_fx.compile(model, 0.7, x, latency=source)
    plan = halp_fx.plan_of(pruned)
    assert plan.report["measured_rounds"] > 1
    assert plan.report["met"] is True
    assert plan.report["measured_ms"] <= (1 + TOLERANCE) * 0.7 * plan.report["measured_dense_ms"]
    assert plan.predicted_ms < 0.9 * plan.budget_ms  # less than the budget was asked for
    assert plan.budget_ms == pytest.approx(0.7 * plan.dense_ms)
    oracle.assert_exact(model, pruned, (x,), strict=True)


def test_a_budget_that_is_missed_whatever_is_chosen_is_told() -> None:
    model = oracle.randomize(Net(64, 32)).eval()
    x = torch.randn(2, 3, 16, 16)
    source = Source(Started(1000.0), LatencyTable.open(":memory:"))
    report = halp_fx.plan_of(halp_fx.compile(model, 0.7, x, latency=source)).report
    assert report["met"] is False
    assert report["measured_ms"] > report["measured_budget_ms"]


def test_compile_measures_this_machine(measured: Source) -> None:
    torch.manual_seed(0)
    model = oracle.randomize(Net(48, 32)).eval()
    x = torch.randn(2, 3, 24, 24)
    with oracle.snapshot(model):
        pruned = halp_fx.compile(model, 0.9, x, latency=measured)
    report = halp_fx.plan_of(pruned).report
    assert (report["backend"], report["data_free"]) == ("torch", True)
    assert report["measured_dense_ms"] > 0
    assert report["met"] is (
        report["measured_ms"] <= report["measured_budget_ms"] * (1 + TOLERANCE)
    )
    oracle.assert_exact(model, pruned, (x,), strict=True)


class Block(nn.Module):
    """A residual block of 16 channels, 12 within, after a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.wide, self.back = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)
        self.fc = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.fc(F.relu(x + self.back(F.relu(self.wide(x)))))


class PerWeight:
    """A kernel takes 100 ms, a millisecond for each of its weights, and one for each channel."""

    name, measured, fuses, min_sample_ms, samples = "per weight", True, True, 1e-6, 1

    def fingerprint(self) -> str:
        return '{"backend": "per weight"}'

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        def run() -> None: ...

        weights = sum(p.numel() for p in module.parameters())
        run.ms = 100.0 + weights + inputs[0].shape[1]  # type: ignore[attr-defined]
        return run

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        return run.ms * calls  # type: ignore[attr-defined, no-any-return]


def test_what_is_left_of_a_kernel_when_its_branch_is_dropped_is_measured() -> None:
    """Of the convolution with the sum and the activation fused: those two, 16 channels wide."""
    groups = groups_of(Block())
    source = Source(PerWeight(), LatencyTable.open(":memory:"))
    kernels = price(groups, source).kernels
    (kernel,) = [k for k in kernels if "add" in k.op]
    inner = next(i for i, axis in enumerate(kernel.axes) if axis.dense == 12)
    for trunk in (16, 8, 5):
        at = [0 if i == inner else trunk for i in range(len(kernel.axes))]
        assert kernel.cost(*at) == pytest.approx(100 + trunk, rel=0.02)
        at[inner] = 1
        assert kernel.cost(*at) > 100 + 9 * trunk
    (gone,) = [k for k in kernels if k.nodes[0] == "wide"]
    at = [0 if axis.dense == 12 else 16 for axis in gone.axes]
    assert gone.cost(*at) == 0


def test_what_is_left_of_a_kernel_when_its_branch_is_dropped_by_formula() -> None:
    (kernel,) = [k for k in priced(Block(), BYTES) if "add" in k.op]
    sizes = [0 if axis.dense == 12 else 16 for axis in kernel.axes]
    # The trunk is read and a sum is written: 16 channels of 8x8 numbers of 4 bytes.
    assert kernel.cost(*sizes) == pytest.approx(2 * 16 * 64 * 4)
    least = [1 if axis.dense == 12 else 16 for axis in kernel.axes]
    assert kernel.cost(*sizes) < kernel.cost(*least)


def priced(model: nn.Module, backend: Analytic) -> tuple[Kernel, ...]:
    return price(groups_of(model), Source(backend, None)).kernels
