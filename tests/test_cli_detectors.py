"""Detectors named on the command line: their tensor part is looked into, priced and pruned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("torchvision")
pytest.importorskip("onnxruntime")

import halp_fx
from halp_fx.tools.cli import app
from tests.detectors import assert_same_detections, images, small_rcnn, small_ssd

SSD, RCNN = "tests.detectors:small_ssd", "tests.detectors:small_rcnn"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_groups_of_a_detector_by_its_name() -> None:
    text = call("groups", SSD).stdout
    assert "anchors x classes" in text
    assert "head.classification_head" in text
    text = call("groups", RCNN).stdout
    assert "roi_heads.box_head.fc6" in text


@pytest.mark.parametrize("shape", [[], ["--input", "1x3x64x64"]])
def test_an_ssd_is_pruned_and_put_back(shape: list[str], tmp_path: Path) -> None:
    result = call("prune", SSD, "-b", "0.6", "--latency", "analytic", "-o", tmp_path, *shape)
    assert "restore_core" in result.stderr
    assert (tmp_path / "model.onnx").is_file()
    assert json.loads((tmp_path / "report.json").read_text())["met"]
    torch.manual_seed(0)  # as for a network that is named
    dense = small_ssd().eval()
    given = images((64, 64))
    core = halp_fx.load(tmp_path / "model.safetensors")
    assert_same_detections(dense, halp_fx.restore_core(dense, core, given), given)


def test_a_whole_detector_takes_no_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "samples.npy", np.zeros((2, 3, 64, 64)))
    result = CliRunner().invoke(
        app,
        [
            "prune",
            SSD,
            "-b",
            "0.6",
            "--samples",
            str(tmp_path / "samples.npy"),
            "-o",
            str(tmp_path),
        ],
    )
    assert result.exit_code == 2
    assert "--samples is not for a whole detector" in result.stderr


def test_a_detector_in_parts_has_no_onnx_file(tmp_path: Path) -> None:
    result = call("prune", RCNN, "-b", "0.7", "--latency", "analytic", "-o", tmp_path)
    assert "no ONNX file" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors", "report.json", "report.md",
    ]  # fmt: skip
    torch.manual_seed(0)
    dense = small_rcnn().eval()
    given = images((64, 64))
    core = halp_fx.load(tmp_path / "model.safetensors")
    assert_same_detections(dense, halp_fx.restore_core(dense, core, given), given)


def test_a_sweep_over_a_detector(tmp_path: Path) -> None:
    call("sweep", SSD, "--budgets", "0.8,0.6", "--latency", "analytic", "-o", tmp_path)
    rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert len(rows) == 3
