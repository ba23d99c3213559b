"""The benchmarks of latency, on a small network and few samples."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halp_fx
from halp_fx.latency import LatencyTable, Torch
from halp_fx.pipeline import Prepared
from halp_fx.tools import bench_latency
from halp_fx.tools.bench_speedup import speedups
from tests.test_cli import NET, ok, refused

__all__: list[str] = []

SMALL = "tests.test_cli_profile:make_small"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def quick(*_: Any, **options: Any) -> Torch:
    del options
    return Torch(threads=1, min_sample_ms=0.02, samples=3)


class _Sized:
    """What takes as long as it has weights, on a clock that only counts."""

    def __init__(self, module: nn.Module) -> None:
        self.ms = 0.01 + 1e-3 * sum(p.numel() for p in module.parameters())

    def __call__(self) -> None: ...


class Steady(Torch):
    def prepare(self, module: nn.Module, inputs: Any) -> Any:
        super().prepare(module, inputs)()  # it must run all the same
        return _Sized(module)

    def block_ms(self, run: Any, calls: int) -> float:
        return float(run.ms * calls)


def steady(*_: Any, **options: Any) -> Torch:
    del options
    return Steady(threads=1, samples=3)


def test_predictions_are_checked(tmp_path: Path) -> None:
    seen: list[str] = []
    row = bench_latency.calibrated(
        SMALL, quick(), None, tmp_path, networks=4, progress=lambda stage, *_: seen.append(stage)
    )
    assert (row.networks, row.held_out) == (4, 1)  # three random ones and the dense
    assert row.dense_ms > 0
    assert row.worst_error >= row.median_error >= 0
    assert {"latency", "calibrate"} <= set(seen)
    again = bench_latency.calibrated(
        SMALL, quick(), None, tmp_path, networks=4, progress=lambda *_: None
    )
    assert again.offset_ms == row.offset_ms


def test_next_to_torch_pruning(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    with LatencyTable.open(tmp_path / "t.sqlite") as table:
        rows = bench_latency.compared(NET, 0.9, quick(), torch.randn(1, 3, 16, 16), table)
    assert [row.what.split(",")[0] for row in rows] == ["halp_fx", *["Torch-Pruning"] * 2]
    for row in rows:
        assert 0 < row.params_share <= 1
        assert row.share == pytest.approx(row.pruned_ms / row.dense_ms)


def test_speedups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halp_fx.tools.profiler.Torch", steady)
    text = ok("bench", "speedup", "--models", SMALL, "--backend", "torch", "--batches", "1,2",
              "--budgets", "0.9,0.0001", "-o", tmp_path)  # fmt: skip
    assert "measured with torch" in text
    rows = rows_of(tmp_path / "speedup.csv")
    assert [(row["batch"], row["budget"]) for row in rows] == [
        ("1", "0.9"), ("1", "0.0001"), ("2", "0.9"), ("2", "0.0001"),
    ]  # fmt: skip
    assert 0 < float(rows[0]["measured"]) <= 0.9
    assert float(rows[0]["speedup"]) == pytest.approx(1 / float(rows[0]["measured"]), rel=1e-3)
    assert rows[1]["measured"] == ""
    assert "can't be met" in rows[1]["remark"]


def test_a_network_that_the_device_can_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(model: str, budgets: Any, image: Any, batch: int, *rest: Any) -> Any:
        if batch == 2:
            raise torch.OutOfMemoryError("out of memory\nTried to allocate")
        return speedups(model, budgets, image, batch, *rest)

    monkeypatch.setattr("halp_fx.tools.profiler.Torch", steady)
    monkeypatch.setattr("halp_fx.tools.bench_speedup.speedups", failing)
    ok("bench", "speedup", "--models", SMALL, "--backend", "torch", "--batches", "2,1",
       "--budgets", "0.9", "-o", tmp_path)  # fmt: skip
    rows = rows_of(tmp_path / "speedup.csv")
    assert [(row["batch"], row["remark"]) for row in rows] == [("2", "out of memory"), ("1", "")]
    assert rows[0]["measured"] == "" and float(rows[1]["measured"]) > 0


def test_a_budget_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = Prepared.prune

    def failing(self: Prepared, budget: halp_fx.Budget) -> Any:
        if budget.share == 0.8:
            raise RuntimeError("no engine was found")
        return prune(self, budget)

    monkeypatch.setattr("halp_fx.tools.profiler.Torch", steady)
    monkeypatch.setattr(Prepared, "prune", failing)
    ok("bench", "speedup", "--models", SMALL, "--backend", "torch", "--budgets", "0.9,0.8,0.7",
       "-o", tmp_path)  # fmt: skip
    rows = rows_of(tmp_path / "speedup.csv")
    assert [row["remark"] for row in rows] == ["", "no engine was found", ""]
    assert [bool(row["measured"]) for row in rows] == [True, False, True]


def test_mistakes(tmp_path: Path) -> None:
    assert "no back-end 'tpu'" in refused(
        "bench", "latency", "--backends", "tpu", "-o", tmp_path / "l"
    )
    assert "above 1" in refused("bench", "speedup", "--budgets", "2", "-o", tmp_path / "s")
    speedup = ("bench", "speedup", "--models", SMALL, "--backend", "torch", "-o", tmp_path / "s")
    assert "--dtype float7: there is no such type" in refused(*speedup, "--dtypes", "float7")
    assert "--dtype int8: there is no such type" in refused(*speedup, "--dtypes", "int8")
    assert "--batches two: pass whole numbers" in refused(*speedup, "--batches", "1,two")
    assert "--budgets 4ms: pass shares" in refused(*speedup, "--budgets", "0.5,4ms")
    assert "'half' can't be parsed" in refused(*speedup, "--budgets", "half")
    assert "--models is empty" in refused("bench", "speedup", "--models", ",", "-o", tmp_path)
