"""Coverage sweeps: the judgement of exactness, one process a model, going on after a stop."""

from __future__ import annotations

import copy
import csv
import importlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import halp_fx
from halp_fx.errors import DependencyError, InputError
from halp_fx.tools import coverage, coverage_report
from halp_fx.tools.cli import app
from halp_fx.tools.coverage_models import Family, count_parameters, example_for, model_names
from halp_fx.tools.coverage_worker import Cause, Record, examine
from halp_fx.tools.exactness import compare, masked_dense, randomize

HERE = __name__


class Net(nn.Module):
    """A convolution, a layer norm over its channels, a group norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.bn = nn.BatchNorm2d(32)
        self.body = nn.Conv2d(32, 48, 3, padding=1)
        self.groups = nn.GroupNorm(1, 48)
        self.norm = nn.LayerNorm(48)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.gelu(self.groups(self.body(x))).mean((2, 3))
        y: torch.Tensor = self.fc(self.norm(x))
        return y


def make_net() -> tuple[nn.Module, torch.Tensor]:
    return Net(), torch.randn(2, 3, 8, 8)


def make_sleepy() -> nn.Module:
    time.sleep(60)
    return Net()


def make_crash() -> nn.Module:
    os.abort()


def make_hungry() -> nn.Module:
    hoard = []
    for _ in range(200):
        hoard.append(torch.ones(1 << 25))
        time.sleep(0.02)
    return Net()


def make_pinned() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Conv2d(3, 8, 1)), torch.randn(1, 3, 4, 4)


def pruned_net() -> tuple[nn.Module, Any, torch.Tensor]:
    torch.manual_seed(0)
    model, inputs = make_net()
    randomize(model.eval())
    return model, halp_fx.compile(model, 0.5, inputs, latency="analytic"), inputs


def test_a_pruned_network_is_exact() -> None:
    model, pruned, inputs = pruned_net()
    found = compare(model, pruned, halp_fx.plan_of(pruned).kept, (inputs,))
    assert found.exact
    assert found.error < 1e-12
    assert found.batches == (2, 3)
    assert found.signal > 1e-3
    assert found.dtype == torch.float64


def test_a_changed_weight_is_not_exact() -> None:
    model, pruned, inputs = pruned_net()
    wrong = copy.deepcopy(pruned)
    with torch.no_grad():
        wrong.get_parameter("body.weight").mul_(1.01)
    found = compare(model, wrong, halp_fx.plan_of(pruned).kept, (inputs,))
    assert not found.exact
    assert found.note == "state: body.weight is not the dense tensor cut by the plan"


def test_a_changed_computation_is_not_exact() -> None:
    model, pruned, inputs = pruned_net()
    pruned.get_submodule("norm").eps = 0.5
    found = compare(model, pruned, halp_fx.plan_of(pruned).kept, (inputs,))
    assert not found.exact
    assert found.error > 1e-3
    assert found.note == ""


def test_statistics_are_those_of_the_survivors() -> None:
    model, pruned, inputs = pruned_net()
    kept = halp_fx.plan_of(pruned).kept
    assert kept["norm.weight"][0] is not None
    with torch.no_grad():
        plain = masked_dense(model, kept).double()(inputs.double())
        small = copy.deepcopy(pruned).double()(inputs.double())
    assert float((plain - small).abs().max()) > 1e-3  # over all channels they differ


def test_a_dropped_branch_still_adds_its_constant() -> None:
    dense = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    nothing = torch.empty(0, dtype=torch.int64)
    kept = {
        "0.weight": (nothing, None, None, None),
        "0.bias": (nothing,),
        "1.weight": (nothing,),
        "2.weight": (nothing, nothing, None, None),
        "2.bias": (nothing,),
    }
    masked = masked_dense(dense.eval(), kept)
    with torch.no_grad():
        outputs = masked(torch.randn(1, 3, 2, 2))
    wanted = dense.get_parameter("2.bias").detach().reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert torch.equal(outputs, wanted)


def test_the_dense_network_stays_as_it_is() -> None:
    model, pruned, inputs = pruned_net()
    before = copy.deepcopy(model.state_dict())
    compare(model, pruned, halp_fx.plan_of(pruned).kept, (inputs,))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_examine_tells_what_there_is_to_tell() -> None:
    record = examine(f"{HERE}:make_net")
    assert record.status == "exact", record.message
    assert record.groups == 2
    assert record.prunable == pytest.approx(80 / 90)
    assert record.pinned[0].reason == "output of the network"
    assert record.pinned[0].channels == 10
    assert record.inexact_groups == 1
    assert record.inputs == "2x3x8x8"
    assert record.latency_kept is not None
    assert record.latency_kept <= 0.5 + 1e-9
    assert record.passes_s is not None
    assert Record.from_json(record.to_json()) == record


def test_examine_reports_errors() -> None:
    record = examine(f"{HERE}:make_pinned")
    assert record.status == "error"
    assert record.message.startswith("NothingToPruneError")
    assert record.prunable == 0.0
    assert examine("nonsense:x").message.startswith("InputError")


@pytest.mark.parametrize(
    ("factory", "limits", "status", "message"),
    [
        ("make_sleepy", coverage.Limits(timeout_s=2), "timeout", "more than 2 s"),
        ("make_hungry", coverage.Limits(memory_gb=1.5), "memory", "more than 1.5 GB"),
        ("make_crash", coverage.Limits(), "error", "the process ended with -6"),
    ],
)
def test_a_bad_model_ends_only_itself(
    factory: str, limits: coverage.Limits, status: str, message: str
) -> None:
    record = coverage.run_one(f"{HERE}:{factory}", budget=0.5, seed=0, limits=limits)
    assert record.status == status
    assert record.message.startswith(message)
    assert record.stage == "load"
    assert record.total_s is not None


def test_a_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    ran: list[str] = []

    def fake(model: str, **options: Any) -> Record:
        ran.append(model)
        return Record(model, status="exact" if model != "b" else "error", message="no")

    monkeypatch.setattr(coverage, "run_one", fake)
    coverage.sweep(["a", "b"], log)
    with log.open("a") as file:
        file.write('{"model": "c", "sta')  # cut off
    seen: list[tuple[str, int, int]] = []
    records = coverage.sweep(["a", "b", "c"], log, progress=lambda *event: seen.append(event))
    assert ran == ["a", "b", "c"]
    assert [r.status for r in records] == ["exact", "error", "exact"]
    assert seen[-1] == ("models", 3, 3)
    coverage.sweep(["a", "b", "c"], log, again=True)
    assert ran == ["a", "b", "c", "b"]


def test_what_is_written(tmp_path: Path) -> None:
    causes = (
        Cause("output of the network", "output", "", 10),
        Cause("reads | all", "softmax", "/x/site-packages/timm/a.py:3: y", 7),
    )
    record = Record("timm:net", "exact", error=1e-15, groups=3, prunable=0.5, pinned=causes)
    coverage_report.write_csv(
        [record, Record("timm:bad", message="no")], tmp_path / "out" / "a.csv"
    )
    with (tmp_path / "out" / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["prunable"] == "0.5"
    assert "7 x reads | all [softmax timm/a.py:3: y]" in rows[0]["pinned"]
    assert rows[1]["status"] == "error"
    page = coverage_report.to_markdown([record], Family.timm)
    assert "| 1 | 7 | reads \\| all | `timm/a.py:3: y` | net |" in page
    assert "/x/site-packages" not in page
    assert coverage_report.summary([record]) == "1 models: 1 exact"


def test_torchvision_names_and_inputs() -> None:
    pytest.importorskip("torchvision")
    names = model_names(Family.torchvision)
    assert "torchvision:resnet18" in names
    assert "torchvision:raft_small" in names
    assert not any("rcnn" in name or "quantized" in name for name in names)
    assert model_names(Family.classification, limit=2) == names[:2]
    assert model_names(Family.torchvision, names=["alexnet"]) == ["torchvision:alexnet"]
    with pytest.raises(InputError, match="did you mean resnet18"):
        model_names(Family.torchvision, names=["resnet19"])
    inputs = example_for("torchvision:fake", nn.Sequential(nn.Conv2d(3, 2, 96), nn.Flatten()))
    assert inputs[0].shape == (1, 3, 96, 96)
    with pytest.raises(InputError, match="accepts none of the inputs"):
        example_for("torchvision:fake", nn.Linear(3, 3))


def test_timm_sample_has_each_file_once() -> None:
    timm = pytest.importorskip("timm")
    names = model_names(Family.timm, limit=4, seed=1)
    assert names == model_names(Family.timm, limit=4, seed=1)
    files = {timm.models.model_entrypoint(n.partition(":")[2]).__module__ for n in names}
    assert len(files) == 4


def test_parameters_are_counted_without_memory() -> None:
    model = Net()
    assert count_parameters(Net) == sum(p.numel() for p in model.parameters())
    assert count_parameters(lambda: nn.Linear(1 << 20, 1 << 20)) == (1 << 40) + (1 << 20)
    assert count_parameters(make_nothing) is None


def make_nothing() -> nn.Module:
    raise RuntimeError("no such luck")


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def fake(name: str, package: str | None = None) -> Any:
        if name in ("timm", "torchvision.models"):
            raise ModuleNotFoundError(name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", fake)
    with pytest.raises(DependencyError, match=r"pip install .*halp-fx\[timm\]"):
        model_names(Family.timm)
    with pytest.raises(DependencyError, match=r"pip install .*halp-fx\[vision\]"):
        model_names(Family.torchvision)


def test_the_command_writes_its_files(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    command = ["bench", "coverage", "--models", "squeezenet1_1", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "1 models: 1 exact" in result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "torchvision.csv",
        "torchvision.jsonl",
        "torchvision.md",
    }
