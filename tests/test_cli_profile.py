"""`halp-fx profile` and `halp-fx sweep`, on small networks of this file."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import halp_fx
from halp_fx.errors import DependencyError, InputError, LatencyError, RecipeError
from halp_fx.latency import Analytic, Calibration, LatencyTable, Source, Stored, Torch
from halp_fx.passes.latency import network_key
from halp_fx.tools import advice, profiler, sweep
from tests.test_cli import NET, call, ok, refused
from tests.test_verification import Net, Overhead, X

__all__: list[str] = []

SMALL = f"{__name__}:make_small"
WIDE = f"{__name__}:make_wide"  # where nine tenths are within reach however badly one measures


class Small(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.two, self.fc = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.two(torch.relu(self.norm(self.one(x)))))
        y: torch.Tensor = self.fc(x.mean((2, 3)))
        return y


def make_small() -> tuple[nn.Module, torch.Tensor]:
    return Small(), torch.randn(1, 3, 8, 8)


def make_wide() -> tuple[nn.Module, torch.Tensor]:
    return Small(96), torch.randn(1, 3, 16, 16)


def test_a_table_that_prune_reads(tmp_path: Path) -> None:
    table = tmp_path / "net.sqlite"
    options = ("--backend", "torch", "--threads", 1, "--calibrate", 3, "-o", table)
    text = ok("profile", WIDE, *options)
    assert "dense network" in text
    assert "fitted on 3 networks; on 1 others the error is" in text  # two random ones, the dense
    with LatencyTable.open(table) as opened:
        rows = opened.entries()
    ok("profile", WIDE, *options)  # nothing is left to do
    with LatencyTable.open(table) as opened:
        assert opened.entries() == rows
    ok("prune", WIDE, "-b", "0.9", "--latency", table, "-o", tmp_path / "out", "--no-onnx")


def make_foreign(table: Path) -> None:
    """Say that another device has taken the times in a table."""
    with sqlite3.connect(table) as connection:
        (text,) = connection.execute("SELECT text FROM fingerprints").fetchone()
        there = json.dumps({**json.loads(text), "cores": 4096}, sort_keys=True)
        connection.execute("UPDATE fingerprints SET text = ?", (there,))
    connection.close()


def test_a_table_of_another_device(tmp_path: Path) -> None:
    table, folder = tmp_path / "net.sqlite", tmp_path / "out"
    ok("profile", WIDE, "--backend", "torch", "--threads", 1, "--calibrate", 0, "-o", table)
    make_foreign(table)
    prune = ("prune", WIDE, "-b", "0.9", "-o", folder, "--no-onnx", "--latency")
    result = call(*prune, table)
    assert result.exit_code == 2
    text = result.stderr
    assert "made on another device" in text
    assert "cores: 4096, here " in text
    assert "--foreign" in text
    assert not folder.exists()
    with pytest.warns(UserWarning, match="made on another device"):
        ok(*prune, table, "--foreign")
    assert (folder / "model.safetensors").is_file()
    assert "--foreign is for --latency with" in refused(*prune, "torch", "--foreign")
    assert "there is no latency table" in refused(*prune, tmp_path / "no.sqlite", "--foreign")


def test_a_further_table_of_another_device(tmp_path: Path) -> None:
    own, board, folder = tmp_path / "own.sqlite", tmp_path / "board.sqlite", tmp_path / "out"
    ok("profile", WIDE, "--backend", "torch", "--threads", 1, "--calibrate", 0, "-o", own)
    shutil.copy(own, board)
    make_foreign(board)
    prune = ("prune", WIDE, "-b", "0.95", "-o", folder, "--no-onnx", "--latency")
    assert "--foreign" in call(*prune, "analytic", "--also", f"{board}=0.9").stderr
    assert not folder.exists()
    for latency in ("analytic", own):
        with pytest.warns(UserWarning, match="made on another device"):
            text = ok(*prune, latency, "--also", f"{board}=0.9", "--foreign")
        facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))["facts"]
        assert json.loads(facts["also"][0]["device"])["cores"] == 4096
        assert "4096" not in facts["device"]
        assert "by the table" in next(line for line in text.splitlines() if "also torch" in line)
    both = refused(*prune, own, "--also", f"{own}=0.9", "--foreign")
    assert f"--foreign: {own} and {own} are of this device: leave it out" in both
    assert "has no timings of another device" in refused(*prune, own, "--foreign")
    assert "--foreign is for" in refused(*prune, "torch", "--also", "analytic=0.9", "--foreign")


def test_a_batch_size(tmp_path: Path) -> None:
    table = tmp_path / "net.sqlite"
    ok("profile", SMALL, "--backend", "torch", "--threads", 1, "--calibrate", 0, "--batch", 3,
       "-o", table)  # fmt: skip
    with LatencyTable.open(table) as opened:
        assert all("3x" in row.key for row in opened.entries())
        assert not any("inputs ['1x" in row.key for row in opened.entries())


def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    table = tmp_path / "net.sqlite"
    command = [sys.executable, "-m", "halp_fx.tools.cli", "profile", SMALL, "--backend", "torch",
               "--threads", "1", "--calibrate", "0", "-o", str(table)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    measured: set[str] = set()
    while not measured and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        if table.exists():
            with LatencyTable.open(table) as opened:
                measured = {row.key for row in opened.entries()}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert measured
    with LatencyTable.open(table) as opened:
        before = {row.key: row.timing for row in opened.entries()}
    ok("profile", SMALL, "--backend", "torch", "--threads", 1, "--calibrate", 0, "-o", table)
    with LatencyTable.open(table) as opened:
        after = {row.key: row.timing for row in opened.entries()}
    assert before.items() <= after.items()
    assert measured <= set(after)


def test_more_networks_are_measured_where_more_are_asked_for(tmp_path: Path) -> None:
    model, x = make_small()
    groups = profiler.groups_of(model, (x,))
    backend = Torch(threads=1, min_sample_ms=0.02, samples=3)
    with LatencyTable.open(tmp_path / "t.sqlite") as table:
        counts = []
        for asked in (3, 3, 6, 4):
            found = profiler.profile(groups, Source(backend, table), calibrate_on=asked).calibration
            counts.append((found.networks, found.held_out))
    assert counts == [(3, 1), (3, 1), (5, 2), (5, 2)]


def test_analytic_shows_costs() -> None:
    text = ok("profile", NET, "--backend", "analytic")
    assert "dense network" in text
    assert "conv" in text


def test_options_that_have_no_meaning(tmp_path: Path) -> None:
    assert "computes costs" in refused("profile", NET, "--backend", "analytic", "--threads", 1)
    assert "no back-end 'tpu'" in refused("profile", NET, "--backend", "tpu")
    for option in (("--device", "cuda"), ("--dtype", "bfloat16"), ("--channels-last",)):
        text = refused("profile", NET, "--backend", "onnxruntime", *option)
        assert f"{option[0]} is for --backend torch" in text
    assert "--provider is for" in refused(
        "profile", NET, "--backend", "torch", "--provider", "CUDAExecutionProvider"
    )
    assert "no such type" in refused("profile", NET, "--backend", "torch", "--dtype", "float7")
    assert "at least 3 networks" in refused("profile", NET, "--calibrate", 2)
    bundle = ("profile", NET, "--bundle", tmp_path / "bundle")
    text = refused(*bundle, "--threads", 4, "--backend", "torch", "--advise")
    assert "--bundle takes no --backend, --threads, --advise: a bundle is measured by ONNX" in text
    assert "--bundle takes no --calibrate" in refused(*bundle, "--calibrate", 3)
    assert "--advise takes no --calibrate" in refused("profile", NET, "--advise", "--calibrate", 3)
    assert "--import takes no --calibrate, --batch, --input" in refused(
        "profile", NET, "--import", "r.jsonl", "--calibrate", 3, "--batch", 2, "--input", "1x3x8x8"
    )
    assert "--bundle takes no --output" in refused(*bundle, "-o", "t.sqlite")
    assert "--import takes no --threads, --bundle" in refused(
        *bundle, "--import", "results.jsonl", "--threads", 4
    )
    assert not (tmp_path / "bundle").exists()
    assert "cuda_graphs is for" in refused("profile", NET, "--backend", "torch", "--cuda-graphs")


def test_advice(tmp_path: Path) -> None:
    text = ok("profile", SMALL, "--backend", "torch", "--threads", 1, "--advise",
              "-o", tmp_path / "t.sqlite")  # fmt: skip
    assert "Can pruning help?" in text
    for row in ("in kernels whose width can change", "starting kernels", "least latency that"):
        assert row in text


def test_advice_takes_few_measurements() -> None:
    model, x = make_wide()
    groups = profiler.groups_of(model, (x,))
    backend = Torch(threads=1, min_sample_ms=0.02, samples=3)
    counts = []
    for coarse in (True, False):
        with LatencyTable.open(":memory:") as table:
            profiler.profile(groups, Source(backend, table), coarse=coarse)
            counts.append(len(table.entries()))
            if not coarse:  # what is there is used, here and in a table made elsewhere
                profiler.profile(groups, Source(backend, table), coarse=True)
                assert len(table.entries()) == counts[-1]
                stored = Source(Stored(backend.fingerprint(), "{}"), table)
                profiler.profile(groups, stored, coarse=True)
    assert counts[0] < 0.5 * counts[1]


def test_what_advice_says() -> None:
    model, x = make_small()
    groups = profiler.groups_of(model, (x,))
    source = Source(Analytic(), None)
    found = advice.advice_of(groups, profiler.profile(groups, source), source)
    assert found.overhead is None
    assert 0.9 < found.prunable <= 1
    assert 0 < found.least_ms < found.dense_ms
    pruned = halp_fx.compile(model, f"{found.least_ms * 1.001}ms", x, latency="analytic")
    assert halp_fx.plan_of(pruned).predicted_ms == pytest.approx(found.least_ms, rel=1e-2)
    pinned = profiler.groups_of(nn.Conv2d(3, 8, 3), (torch.randn(1, 3, 8, 8),))
    none = advice.advice_of(pinned, profiler.profile(pinned, source), source)
    assert (none.prunable, none.least_ms) == (0, none.dense_ms)
    started = Analytic(overhead_ms=1.0)
    launches = profiler.profile(groups, Source(started, None))
    slow = advice.advice_of(groups, launches, Source(started, None))
    assert slow.least_ms > 0.9 * slow.dense_ms


def test_advice_with_a_calibrated_table() -> None:
    """What a calibration adds is time, and neither a kernel nor started."""
    model, x = make_small()
    groups = profiler.groups_of(model, (x,))
    backend = Torch(threads=1, min_sample_ms=0.02, samples=3)
    with LatencyTable.open(":memory:") as table:
        source = Source(backend, table)
        bare = advice.advice_of(groups, profiler.profile(groups, source), source)
        found = Calibration(0.001, 1.0, 0.5, 9, 4, 0.01, 0.02, 1.0)
        table.put_calibration(network_key(groups, backend.fuses), backend.fingerprint(), found)
        calibrated = advice.advice_of(groups, profiler.profile(groups, source), source)
    assert calibrated.kernels == bare.kernels
    assert calibrated.dense_ms > bare.dense_ms
    assert calibrated.least_ms < calibrated.dense_ms


def test_a_bundle_and_its_results(tmp_path: Path) -> None:
    bundle, table = tmp_path / "bundle", tmp_path / "board.sqlite"
    ok("profile", WIDE, "--bundle", bundle)
    assert (bundle / "manifest.json").is_file()
    files = [path for path in bundle.rglob("*.onnx") if path.name != "gpu_sentinel.onnx"]
    size = sum(path.stat().st_size for path in files)
    assert size < 200_000  # weights are not in the files
    subprocess.run(
        [sys.executable, str(bundle / "run.py"), "--samples", "1", "--min-sample-ms", "0.01"],
        check=True,
        capture_output=True,
    )
    ok("profile", WIDE, "--import", bundle / "results.jsonl", "-o", table)
    with LatencyTable.open(table) as opened:
        assert opened.entries()
    ok("prune", WIDE, "-b", "0.9", "--latency", table, "-o", tmp_path / "out", "--no-onnx")
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert "takes -o FILE" in refused("profile", WIDE, "--import", bundle / "results.jsonl")
    text = refused("profile", WIDE, "--import", tmp_path / "other.jsonl", "-o", table)
    assert "other.jsonl" in text


def test_sweep(tmp_path: Path) -> None:
    text = ok("sweep", SMALL, "--budgets", "0.9,0.5,0.0001", "--latency", "analytic", "--save",
              "-o", tmp_path / "out")  # fmt: skip
    assert "latency against saliency kept" in text
    with (tmp_path / "out" / "sweep.csv").open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["budget"] for row in rows] == ["0.9", "0.5", "0.0001"]
    assert float(rows[0]["predicted_ms"]) > float(rows[1]["predicted_ms"])
    assert float(rows[0]["value_kept"]) > float(rows[1]["value_kept"])
    assert "can't be met" in rows[2]["remark"]
    markdown = (tmp_path / "out" / "sweep.md").read_text(encoding="utf-8")
    assert "- 0.0001: the budget of" in markdown
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "sweep.svg").read_text(encoding="utf-8")
    small = halp_fx.load(tmp_path / "out" / "0.5.safetensors")
    assert small(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def swept(folder: Path, *options: object) -> dict[str, dict[str, str]]:
    """Budget -> its row, of SMALL by computed costs."""
    ok("sweep", SMALL, "--latency", "analytic", "-o", folder, *options)
    with (folder / "sweep.csv").open(newline="", encoding="utf-8") as opened:
        return {row["budget"]: row for row in csv.DictReader(opened)}


def test_limits_hold_at_each_budget_of_a_sweep(tmp_path: Path) -> None:
    budgets = ("--budgets", "0.9,0.5")
    free = swept(tmp_path, *budgets)
    dense = sum(p.numel() for p in Small().parameters())
    assert int(free["0.9"]["params"]) > 0.6 * dense
    limited = swept(tmp_path, *budgets, "--params", 0.6)
    assert all(int(row["params"]) <= 0.6 * dense for row in limited.values())
    assert limited["0.9"]["budget_ms"] == free["0.9"]["budget_ms"]
    most = int(free["0.9"]["macs"]) - 1
    assert int(swept(tmp_path, *budgets, "--macs", most)["0.9"]["macs"]) <= most
    within = swept(tmp_path, *budgets, "--memory", 0.6, "--also", "analytic=0.6")["0.9"]
    assert float(within["predicted_ms"]) <= 0.6 * float(within["dense_ms"])
    assert within["met"] == "True"
    assert within["remark"] == ""
    tight = swept(tmp_path, *budgets, "--memory", 1e-3)
    assert all("can't be met" in row["remark"] for row in tight.values())
    refusing = ("sweep", SMALL, "--latency", "analytic", "-o", tmp_path / "none")
    assert "macs of the budget is -1.0" in refused(*refusing, "--macs=-1")
    assert "'halp' takes a limit on latency alone" in refused(
        *refusing, "--params", 0.5, "--solver", "halp"
    )


class Refusing(Overhead):
    """Runs no whole network that has less than 0.7 of the dense one's parameters."""

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        whole = len(list(module.parameters())) == len(list(Net().parameters()))
        least = 0.7 * sum(p.numel() for p in Net().parameters())
        if whole and sum(p.numel() for p in module.parameters()) < least:
            raise LatencyError("the device went away\n  while it measured")
        return super().prepare(module, inputs)


def test_an_error_at_one_budget_is_a_remark(tmp_path: Path) -> None:
    with LatencyTable.open(":memory:") as table:
        points = sweep.sweep(
            Net(), ["0.9", "0.5", "0.8"], (X,), tmp_path,
            options={"latency": "analytic", "also": [(Source(Refusing("own", 0.0), table), "60s")]},
        )  # fmt: skip
    assert [point.met for point in points] == [True, False, True]
    assert [point.remark for point in points] == [
        "",
        "the device went away while it measured",
        "",
    ]
    assert points[1].predicted_ms is None
    with pytest.raises(InputError, match="no back-end and no existing file"):
        sweep.sweep(Net(), ["0.9"], (X,), tmp_path, options={"latency": "tpu"})


def test_a_network_that_can_not_be_saved_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RecipeError("the disk is full")

    monkeypatch.setattr(halp_fx, "save", full)
    (row,) = swept(tmp_path, "--budgets", "0.5", "--save").values()
    assert row["remark"] == "the disk is full"
    assert row["met"] == "True"


def test_a_further_latency_that_is_missed_is_a_remark(tmp_path: Path) -> None:
    with LatencyTable.open(":memory:") as table:
        slow = Source(Overhead("slow", 1e6), table)  # no width makes it much faster
        (point,) = sweep.sweep(
            Net(), ["0.9"], (X,), tmp_path, options={"latency": "analytic", "also": [(slow, 0.7)]}
        )
    assert not point.met
    assert point.remark.startswith("slow takes ")
    assert point.remark.endswith(" ms measured")


def test_a_sweep_by_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "samples.npy", np.random.default_rng(0).random((8, 3, 8, 8)))
    ok("sweep", SMALL, "--budgets", "0.5", "--latency", "analytic", "--save",
       "--samples", tmp_path / "samples.npy", "--reconstruct", "-o", tmp_path / "out")  # fmt: skip
    small = halp_fx.load(tmp_path / "out" / "0.5.safetensors")
    assert halp_fx.plan_of(small).report["saliency"] == "output"
    assert "reconstructed_layers" in halp_fx.plan_of(small).report


def test_a_sweep_traces_and_scores_once(tmp_path: Path) -> None:
    stages: list[str] = []

    def tell(stage: str, done: int, total: int) -> None:
        del total
        if done == 0:
            stages.append(stage)

    model, x = make_small()
    points = sweep.sweep(
        model, ["0.8", "0.6"], (x,), tmp_path, progress=tell, options={"latency": "analytic"}
    )
    assert [p.met for p in points] == [True, True]
    assert [stages.count(s) for s in ("trace", "groups", "select", "rewrite")] == [1, 1, 2, 2]


def test_budgets_that_are_none(tmp_path: Path) -> None:
    assert "--budgets is empty" in refused("sweep", SMALL, "--budgets", " ,", "-o", tmp_path)
    assert "can't be parsed" in refused("sweep", SMALL, "--budgets", "0.5,soon", "-o", tmp_path)
    assert not (tmp_path / "sweep.csv").exists()


def test_charts_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r"pip install \"halp_fx\[plot\]\""):
        sweep.write_points([sweep.Point("0.5")], tmp_path, "net")
    assert (tmp_path / "sweep.csv").is_file()
