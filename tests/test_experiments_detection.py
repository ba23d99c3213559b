"""The experiments on detection and segmentation as commands, on small data made here."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from torch import nn
from typer.testing import CliRunner, Result

pytest.importorskip("torchvision")
pytest.importorskip("PIL")

import halp_fx
from halp_fx.errors import InfeasibleError, InputError
from halp_fx.latency import OnnxRuntime, Source, Timing
from halp_fx.tools.console import HalpCommands
from halp_fx.tools.experiments import comparison
from halp_fx.tools.experiments.cli import add_commands
from halp_fx.tools.experiments.comparison import Settings, read_records
from halp_fx.tools.experiments.segmentation import Segmentation
from halp_fx.tools.experiments.training import Recipe, read_weights
from tests.experiment_data import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("HALP_FX_DATA", raising=False)


def call(*arguments: object) -> Result:
    app = typer.Typer(cls=HalpCommands)
    app.callback()(lambda: None)
    add_commands(app)
    return CliRunner().invoke(app, ["experiment", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: "), result.stderr
    return result.stderr


def trial(name: str, data: Path, folder: Path, *further: object) -> Result:
    return call(
        name, "--data", data, "-o", folder, "--epochs", 1, "--tune-epochs", 1, "--batch", 4,
        "--backend", "analytic", *further,
    )  # fmt: skip


def test_detection_compares_and_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pycocotools")
    pytest.importorskip("matplotlib")
    arguments = ("detection", data, tmp_path, "--size", 64, "--speedups", 1.5)
    result = trial(*arguments)
    assert result.exit_code == 0, result.output
    assert "mAP50 tuned" in result.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"dense.safetensors", "records.jsonl", "results.csv", "results.png"}
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["dense", "joint", "uniform"]
    dense, joint, uniform = rows
    assert float(dense["speedup"]) == 1
    for row in (joint, uniform):
        assert float(row["speedup"]) >= 1.5 * (1 - 1e-9)
        assert int(row["params"]) < int(dense["params"])
    assert float(joint["value_kept"]) > float(uniform["value_kept"])
    (saved,) = (tmp_path / "networks").glob("joint_1.5_0_*.safetensors")
    core = halp_fx.load(saved)
    assert sum(p.numel() for p in core.parameters()) == int(joint["params"])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| joint | 1.5x |" in text

    # The last result is cut off, as by a kill: only that one is made again.
    path = tmp_path / "records.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:40], encoding="utf-8")
    solvers: list[str] = []
    original = halp_fx.compile

    def counted(*args: Any, **options: Any) -> Any:
        solvers.append(options["solver"])
        return original(*args, **options)

    monkeypatch.setattr(halp_fx, "compile", counted)
    assert trial(*arguments).exit_code == 0
    assert set(solvers) == {"uniform"}
    again = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert again[:2] == lines[:2]
    assert len(again) == 3
    assert json.loads(again[2])["tuned"] == json.loads(lines[2])["tuned"]

    message = refused(
        "detection", "--data", data, "-o", tmp_path, "--epochs", 2, "--size", 64,
        "--batch", 4, "--backend", "analytic",
    )  # fmt: skip
    assert "was trained with epochs 1, now 2" in message
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"records\.jsonl, line 1 is damaged"):
        read_records(tmp_path)


@pytest.mark.parametrize("network", ["deeplab", pytest.param("lraspp", marks=pytest.mark.slow)])
def test_segmentation_compares(network: str, data: Path, tmp_path: Path) -> None:
    result = trial(
        "segmentation", data, tmp_path, "--network", network, "--speedups", 2,
        "--methods", "joint,joint-reconstructed",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    dense, joint, fitted = read_records(tmp_path)
    assert (fitted.ms, fitted.params) == (joint.ms, joint.params)
    assert fitted.pruned != joint.pruned
    assert joint.dense_ms / joint.ms >= 2 * (1 - 1e-9)
    assert joint.params < dense.params
    assert set(joint.tuned) == {"mIoU", "pixels"}
    assert 0 <= joint.tuned["mIoU"] <= 1


def test_training_alone_leaves_weights(data: Path, tmp_path: Path) -> None:
    result = trial("segmentation", data, tmp_path, "--train-only")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["dense.safetensors"]
    task = Segmentation(data, batch=4)
    assert read_weights(tmp_path / "dense.safetensors", task.network()) == 1


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--methods", "joint,best"], "no method 'best': choose from joint, joint-reconstructed"),
        (["--speedups", "0.5"], "a speed-up of 0.5 is none: pass numbers above 1"),
        (["--speedups", "fast"], "must be numbers, as 1.5,1.94 and 0,1"),
        (["--seeds", ""], "nothing to compare"),
        (["--backend", "abacus"], "no back-end 'abacus'"),
        (["--network", "unet"], "no network 'unet'"),
        (["--rate", "0"], "the learning rate is 0.0"),
    ],
)
def test_mistakes_are_told_before_training(
    further: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    assert message in refused("segmentation", "--data", data, "-o", folder, *further)
    assert not (folder / "dense.safetensors").exists()


def test_output_must_be_a_folder(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("segmentation", "--data", data, "-o", tmp_path / "file")
    assert "is a file; name a folder" in message


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_help_has_examples(name: str) -> None:
    result = call(name, "--help")
    assert "Examples:" in result.stdout
    assert f"halp-fx experiment {name} --data" in result.stdout


def test_missing_package_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    assert "run pip install pycocotools" in refused("detection", "-o", "never")


def test_the_steadiest_of_several_measurements_counts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([(8.0, 4.0), (6.0, 1.0), (7.0, 2.0), (5.0, 3.0), (9.0, 9.0)])

    def paired(*_: Any, **__: Any) -> tuple[Timing, Timing]:
        median, spread = next(measured)
        return Timing(median, 0.1, 9), Timing(median / 2, spread / 2, 9)

    monkeypatch.setattr(comparison, "measure_paired", paired)
    task = Segmentation(data, batch=4)
    run = comparison._Run(
        task, task.network(), tmp_path, "joint", 2.0, 0, Settings(Recipe(0, 1e-3)),
        {}, Source(OnnxRuntime(), None), lambda *_: None,
    )  # fmt: skip
    assert run._measured(task.network()) == (6.0, 3.0, 0.5)
    assert next(measured, None) is None


def test_networks_are_measured_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, dense = Segmentation(data, batch=4), Segmentation(data, batch=4).network()
    ms = iter([(8.0, 8.0), (8.0, 4.0), (6.0, 6.0), (6.0, 2.0)])

    def paired(*_: Any, **__: Any) -> tuple[Timing, Timing]:
        return tuple(Timing(each, 0.0, 9) for each in next(ms))  # type: ignore[return-value]

    monkeypatch.setattr(comparison, "measure_paired", paired)
    monkeypatch.setattr(
        comparison._Run, "_pruned",
        lambda run: halp_fx.compile(dense.eval(), 0.7, task.example(), latency="analytic"),
    )  # fmt: skip

    def compare(**options: Any) -> list[tuple[str, float]]:
        records = comparison.compare(
            task, dense, tmp_path, methods=["joint"], speedups=[2.0], seeds=[0],
            settings=Settings(Recipe(0, 1e-3)), source=Source(OnnxRuntime(), None),
            progress=lambda *_: None, **options,
        )  # fmt: skip
        return [(record.method, record.dense_ms / record.ms) for record in records]

    assert compare() == [("dense", 1.0), ("joint", 2.0)]
    assert compare() == [("dense", 1.0), ("joint", 2.0)]
    assert compare(measure_again=True) == [("dense", 1.0), ("joint", 3.0)]
    assert [round(r.dense_ms / r.ms, 3) for r in read_records(tmp_path)] == [1.0, 2.0, 1.0, 3.0]
    assert compare() == [("dense", 1.0), ("joint", 3.0)]
    (network,) = (tmp_path / "networks").iterdir()
    network.unlink()
    ms = iter([(6.0, 6.0)])
    with pytest.raises(InputError, match="is gone: make the record again"):
        compare(measure_again=True)


def _network(value: float, share: float) -> nn.Module:
    network = nn.Identity()
    plan = SimpleNamespace(value=value, predicted_ms=share, dense_ms=1.0, report={})
    network.meta = {"halp_fx": plan}  # type: ignore[assignment]
    return network


def test_each_rounding_is_brought_to_the_latency(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Segmentation(data, batch=4)
    run = comparison._Run(
        task, task.network(), tmp_path, "uniform", 2.0, 0, Settings(Recipe(0, 1e-3)),
        {}, Source(OnnxRuntime(), None), lambda *_: None,
    )  # fmt: skip

    def compiled(_: Any, options: Any, share: float) -> nn.Module:
        # The first has wide steps; the second gets to a half when it is asked for 0.6.
        if options["round_to"] is None:
            return _network(5.0 * share, 0.4 if share < 0.55 else 0.8)
        return _network(9.0 * share, share - 0.1)

    monkeypatch.setattr(comparison._Run, "_compiled", compiled)
    best = run._best([{"round_to": None}, {"round_to": 1}])
    assert halp_fx.plan_of(best).predicted_ms == pytest.approx(0.5, rel=0.02)
    with pytest.raises(InfeasibleError, match="can't make the network 2 times as fast: too wide"):

        def never(*_: Any) -> nn.Module:
            raise InfeasibleError("too wide", 0.7)

        monkeypatch.setattr(comparison._Run, "_compiled", never)
        run._best([{"round_to": 1}])
