"""Calibration: the fit, the table it is kept in, and what compile makes of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import halp_fx
from halp_fx.calibrate import calibrate, random_plan
from halp_fx.errors import InputError, LatencyError
from halp_fx.latency import (
    Analytic,
    Calibration,
    LatencyTable,
    Source,
    fit_calibration,
    measure_paired,
)
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import network_key, price, refine
from halp_fx.passes.trace import trace
from tests import oracle

__all__: list[str] = []

X = torch.randn(1, 3, 12, 12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.two, self.three = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.relu(self.two(torch.relu(self.norm(self.one(x))))))


class Whole:
    """A kernel takes its number of parameters; a network twice their sum, and 5000 more."""

    name, measured, fuses, min_sample_ms, samples = "whole", True, True, 1e-6, 1

    def fingerprint(self) -> str:
        return '{"backend": "whole"}'

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        del inputs
        ms = 100.0 + sum(p.numel() for p in module.parameters())
        layers = sum(isinstance(part, nn.Conv2d) for part in module.modules())
        whole = layers == 3

        def run() -> None: ...

        run.ms = 2 * (ms + 200) + 5000 if whole else ms  # type: ignore[attr-defined]
        return run

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        return run.ms * calls  # type: ignore[attr-defined, no-any-return]


def test_a_line_is_found() -> None:
    sums = np.linspace(1, 5, 12)
    found = fit_calibration(sums, 0.3 + 1.1 * sums, held_out=4)
    assert (found.offset_ms, found.scale) == pytest.approx((0.3, 1.1))
    assert (found.networks, found.held_out) == (8, 4)
    assert found.worst_error < 1e-12
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.whole_ms(2.0) == pytest.approx(2.5)


def test_weights_from_memory() -> None:
    random = np.random.default_rng(0)
    sums, weights = random.uniform(1, 5, (2, 16))
    measured = 0.2 + 1.1 * sums + 0.3 * weights
    found = fit_calibration(sums, measured, weights, held_out=4)
    fitted = (found.offset_ms, found.scale, found.weights_ms_per_mb)
    assert fitted == pytest.approx((0.2, 1.1, 0.3))
    assert found.whole_ms(2.0, 4.0) == pytest.approx(0.2 + 2.2 + 1.2)
    few = fit_calibration(sums[:6], measured[:6], weights[:6], held_out=1)
    assert few.weights_ms_per_mb == 0
    cheaper = fit_calibration(sums, 1.1 * sums - 0.1 * weights + 2, weights, held_out=4)
    assert cheaper.weights_ms_per_mb == 0


def test_errors_are_of_the_networks_held_out() -> None:
    sums = [1.0, 2.0, 3.0, 4.0, 1.5, 2.5]
    measured = [1.0, 2.0, 3.0, 4.0, 1.5 / 1.2, 2.5 / 1.1]
    found = fit_calibration(sums, measured, held_out=2)
    assert found.worst_error == pytest.approx(0.2)
    assert found.median_error == pytest.approx(0.15)


def test_where_a_line_makes_no_sense() -> None:
    """Networks of one size, or a scale below 0: a proportion."""
    assert fit_calibration([1, 1.1, 1], [2, 2.2, 2], held_out=1).offset_ms == 0
    falling = fit_calibration([1, 2, 3, 2], [3.0, 2.0, 1.0, 2.0], held_out=1)
    assert (falling.offset_ms, falling.scale) == (0, 1.0)


def test_what_only_noise_can_say() -> None:
    """Times that hardly depend on the kernels: no plan could save anything by such a fit."""
    sums = [1.0, 1.5, 2.0, 2.5, 3.0, 2.0]
    found = fit_calibration(sums, [2.0, 2.3, 1.9, 2.4, 2.1, 2.0], held_out=1)
    assert (found.offset_ms, found.scale) == pytest.approx(
        (0.0, np.median([2, 2.3 / 1.5, 0.95, 0.96, 0.7]))
    )
    assert found.worst_error > 0.01


@pytest.mark.parametrize(
    ("sums", "measured", "held_out", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], 1, "at least two to fit and one to check"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0, "at least two to fit"),
        ([1.0, 2.0, 0.0], [1.0, 2.0, 3.0], 1, "a network takes no time"),
    ],
)
def test_too_little_to_fit(
    sums: list[float], measured: list[float], held_out: int, message: str
) -> None:
    with pytest.raises(LatencyError, match=message):
        fit_calibration(sums, measured, held_out=held_out)


def test_what_is_no_calibration() -> None:
    with pytest.raises(LatencyError, match="can't be used: measure the network again"):
        Calibration(0.0, -1.0, 0.0, 3, 1, 0.0, 0.0, 1.0)


def test_the_table_keeps_it(tmp_path: Path) -> None:
    found = Calibration(0.25, 1.5, 0.5, 8, 4, 0.01, 0.04, 0.99)
    with LatencyTable.open(tmp_path / "t.sqlite") as table:
        assert table.calibration("net", "device") is None
        table.put_calibration("net", "device", found)
        table.put_calibration("net", "other", Calibration(0.0, 1.0, 0.0, 8, 4, 0.0, 0.0, 1.0))
    with LatencyTable.open(tmp_path / "t.sqlite") as table:
        assert table.calibration("net", "device") == found
        assert table.calibration("another", "device") is None


def test_a_table_of_the_version_before_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    LatencyTable.open(path).close()
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE calibrations")
    connection.execute("DROP TABLE reference_times")
    connection.execute("UPDATE meta SET value = '1' WHERE name = 'schema_version'")
    connection.commit()
    connection.close()
    with LatencyTable.open(path) as table:
        assert table.calibration("net", "device") is None
        table.put_calibration("net", "device", Calibration(0.0, 1.0, 0.0, 8, 4, 0.0, 0.0, 1.0))


def test_networks_of_random_widths_are_measured_whole() -> None:
    groups = find_groups(trace(Net().eval(), X))
    source = Source(Whole(), LatencyTable.open(":memory:"))
    bare = price(groups, source)
    seen: list[tuple[int, int]] = []
    found = calibrate(groups, source, networks=6, held_out=3, progress=lambda *a: seen.append(a))
    first, count = seen[0]
    assert 1 < first < count - 9  # some kernels were in the table already
    assert seen == [(k, count) for k in range(first, count + 1)]
    assert found.scale == pytest.approx(2.0, rel=0.05)
    assert found.offset_ms == pytest.approx(5000, rel=0.1)
    assert found.worst_error < 0.02
    assert source.table is not None
    key = network_key(groups, fuses=True)
    assert source.table.calibration(key, source.backend.fingerprint()) == found
    costs = price(groups, source)
    assert costs.calibration == found
    assert costs.dense_ms == pytest.approx(found.whole_ms(bare.dense_ms))
    kept = [n // 2 for n in groups.dense_units]
    assert costs.total_ms(kept) == pytest.approx(found.whole_ms(bare.total_ms(kept)))
    refined = refine(groups, source, costs, kept)
    assert refined.total_ms(groups.dense_units) == pytest.approx(costs.dense_ms)
    assert price(groups, source, calibrated=False).dense_ms == bare.dense_ms


def test_a_calibration_that_was_stopped_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = find_groups(trace(Net().eval(), X))
    measured, most = 0, 100

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal measured
        if measured == most:
            raise KeyboardInterrupt
        measured += 1
        return measure_paired(*args, **options)

    monkeypatch.setattr("halp_fx.calibrate.measure_paired", counted)
    whole = calibrate(
        groups, Source(Whole(), LatencyTable.open(":memory:")), networks=6, held_out=3
    )
    all_of_them, measured, most = measured, 0, 4
    assert all_of_them == 9
    source = Source(Whole(), LatencyTable.open(":memory:"))
    with pytest.raises(KeyboardInterrupt):
        calibrate(groups, source, networks=6, held_out=3)
    assert source.table is not None
    assert source.table.calibration(network_key(groups, True), Whole().fingerprint()) is None
    most = 100
    assert calibrate(groups, source, networks=6, held_out=3) == whole
    assert measured == all_of_them
    assert not [e for e in source.table.entries() if e.key.startswith("whole network")]
    calibrate(groups, source, networks=6, held_out=3)
    assert measured == 2 * all_of_them  # a new one


def test_compile_plans_with_the_calibration() -> None:
    torch.manual_seed(0)
    model = oracle.randomize(Net()).eval()
    source = Source(Whole(), LatencyTable.open(":memory:"))
    groups = find_groups(trace(model, X))
    calibrate(groups, source)
    pruned = halp_fx.compile(model, 0.6, X, latency=source)
    plan = halp_fx.plan_of(pruned)
    assert plan.report["met"]
    assert plan.report["measured_rounds"] == 1
    assert plan.predicted_ms == pytest.approx(plan.report["measured_ms"], rel=0.03)
    oracle.assert_exact(model, pruned, (X,))


@pytest.mark.parametrize("solver", ["joint", "halp"])
def test_compile_plans_with_the_weights_from_memory(solver: str) -> None:
    model = oracle.randomize(Net()).eval()
    source = Source(Whole(), LatencyTable.open(":memory:"))
    groups = find_groups(trace(model, X))
    bare = price(groups, source)
    found = Calibration(50.0, 1.5, 40_000.0, 9, 4, 0.01, 0.02, 1.0)
    assert source.table is not None
    source.table.put_calibration(network_key(groups, True), Whole().fingerprint(), found)
    pruned = halp_fx.compile(model, 0.6, X, latency=source, solver=solver, verify=False)
    plan = halp_fx.plan_of(pruned)
    weights = 4e-6 * sum(p.numel() for p in model.parameters())
    assert plan.dense_ms == pytest.approx(found.whole_ms(bare.dense_ms, weights))
    kept = [len(units) for units in plan.units]
    left = 4e-6 * sum(p.numel() for p in pruned.parameters())
    alone = refine(groups, source, bare, kept).total_ms(kept)
    assert plan.predicted_ms == pytest.approx(found.whole_ms(alone, left))
    assert plan.predicted_ms <= plan.budget_ms


def test_no_networks_to_fit_on_or_to_check() -> None:
    groups = find_groups(trace(Net().eval(), X))
    source = Source(Whole(), LatencyTable.open(":memory:"))
    for networks, held_out in ((0, 4), (4, 0)):
        with pytest.raises(InputError, match="at least one to fit on and one to check"):
            calibrate(groups, source, networks=networks, held_out=held_out)
    assert source.table is not None
    assert not source.table.entries()


def test_random_plans_differ_and_repeat() -> None:
    groups = find_groups(trace(Net().eval(), X))
    costs = price(groups, Source(Analytic(), None))
    plans = [random_plan(groups, costs, np.random.default_rng(s)) for s in (0, 0, 1, 2, 3)]
    counts = [[len(units) for units in plan.units] for plan in plans]
    assert counts[0] == counts[1]
    assert len({tuple(c) for c in counts}) > 2


def test_what_computes_can_not_be_calibrated() -> None:
    groups = find_groups(trace(Net().eval(), X))
    with pytest.raises(LatencyError, match="'analytic' doesn't measure here"):
        calibrate(groups, Source(Analytic(), None))
