"""The command line, on small networks of this file."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations
from typer.testing import CliRunner, Result

import halp_fx
from halp_fx.errors import DependencyError, HalpError, InputError
from halp_fx.tools import demo, models
from halp_fx.tools.cli import app, main
from halp_fx.tools.prune import further_latencies, summary_table

NET = f"{__name__}:make_net"
COMMANDS: tuple[list[str], ...] = (
    [],
    ["groups"],
    ["profile"],
    ["prune"],
    ["sweep"],
    ["bench"],
    ["bench", "discover"],
)


class Net(nn.Module):
    """Two convolutions, joined by an addition, and a classifier."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.body = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.body(x) + x)
        y: torch.Tensor = self.fc(x.mean((2, 3)))
        return y


def make_net() -> tuple[nn.Module, torch.Tensor]:
    return Net(), torch.randn(2, 3, 16, 16)


def make_nothing() -> int:
    return 3


def make_broken() -> nn.Module:
    raise RuntimeError("no such luck")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HALP_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_examples(command: list[str]) -> None:
    text = ok(*command, "--help")
    assert "Examples:" in text
    assert " ".join(["halp-fx", *command]) in text


def test_help_and_version() -> None:
    assert "package.module:factory" in ok("--help")
    assert ok("--version") == f"halp-fx {halp_fx.__version__}\n"


def test_main_runs_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["halp-fx", "--version"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert halp_fx.__version__ in capsys.readouterr().out


def test_groups_shows_groups_and_pins() -> None:
    text = ok("groups", NET)
    assert "stem.weight[0]" in text
    assert "add" in text
    assert "1 group, 32 channels that may go" in text
    assert "fc.weight[0] (10)" in text
    assert text == ok("groups", NET)


def test_why_names_the_coupled_layers_and_the_source() -> None:
    text = ok("groups", NET, "--why", "body")
    assert "body.weight[0]: 32 units" in text
    assert "stem.weight[0]" in text
    assert f"{Path(__file__).name}:" in text
    assert "pinned by node" in ok("groups", NET, "--why", "fc.weight")


def test_why_to_shows_one_path() -> None:
    lines = ok("groups", NET, "--why", "body", "--to", "stem").splitlines()
    assert lines[0].startswith("body.")
    assert "stem.weight[0]" in lines[-1]


def test_why_suggests_close_layers() -> None:
    message = refused("groups", NET, "--why", "bod")
    assert "no layer 'bod'" in message
    assert "body" in message


def test_groups_as_json_is_complete_and_stable() -> None:
    text = ok("groups", NET, "--format", "json")
    document = json.loads(text)
    (group,) = document["groups"]
    assert group["units"] == 32
    assert {"name": "stem.weight", "dim": 0, "index": [[i] for i in range(32)]} in group["members"]
    assert any(pin["name"] == "fc.weight" and pin["dim"] == 0 for pin in document["pins"])
    assert text == ok("groups", NET, "--format", "json")


def test_groups_as_graph(tmp_path: Path) -> None:
    graph = nx.parse_graphml(ok("groups", NET, "--format", "graphml"))
    assert nx.has_path(graph, "stem.weight[0]", "body.weight[0]")
    file = tmp_path / "deep" / "net.dot"
    ok("groups", NET, "--format", "dot", "-o", file)
    assert file.read_text(encoding="utf-8").startswith("graph channels {")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet50"], "names no model"),
        (["torchvision:resnet5"], "did you mean resnet50"),
        (["timm:resnet_18"], "did you mean resnet18"),
        (["no_such_package.nets:make"], "no module 'no_such_package'"),
        ([f"{__name__}:make_ned"], "did you mean make_net"),
        ([f"{__name__}:COMMANDS"], "must return an nn.Module"),
        ([f"{__name__}:make_nothing"], "returned a int"),
        ([f"{__name__}:make_broken"], "RuntimeError: no such luck"),
        ([NET, "--input", "3by4"], "is no shape"),
        ([NET, "--input", "2x3x16x16:float8"], "unknown dtype"),
        ([NET, "--to", "stem"], "--why"),
        ([NET, "--why", "stem", "--format", "json"], "--format"),
        ([NET, "-o", "x.txt"], "--output"),
        ([NET, "--why", "stem", "--to", "fc.bias"], "not coupled"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    text = refused("groups", *arguments)
    assert message in text
    assert text.count("\n") == 1


def test_debug_keeps_the_error() -> None:
    result = call("groups", "resnet50", "--debug")
    assert isinstance(result.exception, InputError)


def test_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DependencyError, match=r'pip install "halp-fx\[timm\]"'):
        models.load_model("timm:resnet18")


def test_weights_are_loaded(tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in Net().state_dict().items()}
    save_file(state, tmp_path / "net.safetensors")
    model, inputs = models.load_model(NET, weights=tmp_path / "net.safetensors")
    assert inputs is not None
    assert inputs[0].shape == (2, 3, 16, 16)
    assert torch.equal(model.state_dict()["fc.bias"], state["fc.bias"])


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"fc.bias": torch.zeros(10), "other": torch.zeros(1)}, path)
    with pytest.raises(HalpError, match=r"missing \(as .*unknown \(as other"):
        models.load_model(NET, weights=path)
    path.write_text("not safetensors")
    with pytest.raises(InputError, match="can't be read"):
        models.load_model(NET, weights=path)


def test_input_shapes() -> None:
    assert models.parse_input("2x3x8x8").shape == (2, 3, 8, 8)
    tokens = models.parse_input("1x16:int64")
    assert tokens.dtype == torch.int64
    assert torch.equal(models.parse_input("4"), models.parse_input("4"))


def test_prune_leaves_network_and_reports(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    text = ok("prune", NET, "--budget", "0.5", "--latency", "analytic", "-o", folder, "--no-onnx")
    assert "certified gap" in text
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "report.json",
        "report.md",
    ]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    latency = report["latency_ms"]
    assert latency["budget"] == pytest.approx(0.5 * latency["dense"])
    assert report["met"] is (latency["predicted"] <= latency["budget"])
    pruned = halp_fx.load(folder / "model.safetensors")
    assert report["state_size"]["kept"] == sum(t.numel() for t in pruned.state_dict().values())
    assert report["state_size"]["dense"] == sum(t.numel() for t in Net().state_dict().values())
    (group,) = report["groups"]
    assert 0 < group["kept"] < group["units"] == 32
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert markdown.startswith("# Net, pruned to a latency budget")
    assert f"| `{group['name']}` | {group['kept']} | 32 |" in markdown
    assert "fc.weight[0]" in markdown
    stored = load_file(folder / "model.safetensors")
    assert any(value.shape[:1] == (group["kept"],) for value in stored.values())


def kept_of(folder: Path, *options: object) -> dict[str, int]:
    """Output channels of the layers after `halp-fx prune` with these options."""
    fixed = ("--latency", "analytic", "--no-onnx", "-o", folder)
    ok("prune", f"{__name__}:make_chain", *fixed, *options)
    state = load_file(folder / "model.safetensors")
    return {name: state[f"{name}.weight"].shape[0] for name in ("0", "2", "4")}


def make_chain() -> tuple[nn.Module, torch.Tensor]:
    first, second = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 48, 3)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(48, 8, 1))
    return net, torch.randn(2, 3, 12, 12)


def test_prune_takes_what_compile_takes(tmp_path: Path) -> None:
    half = ("-b", 0.5)
    assert kept_of(tmp_path, *half, "--exclude", "0")["0"] == 32
    assert kept_of(tmp_path, *half, "--exclude", "[24]", "--exclude", "3")["2"] == 48
    only = kept_of(tmp_path, *half, "--include", "0", "--include", "4")
    assert only["0"] < 32
    assert only["2"] == 48
    rounded = kept_of(tmp_path, *half, "--round-to", 16, "--solver", "uniform")
    assert rounded["0"] % 16 == rounded["2"] % 16 == 0
    assert rounded["2"] < 48
    least = kept_of(tmp_path, *half, "--min-share", 0.5, "--min-width", 20)
    assert least["0"] >= 20
    assert least["2"] >= 24
    small = kept_of(tmp_path, "--params", 0.25)
    assert small["0"] * (27 + 1 + 9 * small["2"]) <= 0.3 * 32 * (28 + 9 * 48)
    assert kept_of(tmp_path, "--macs", 0.5, *half)["2"] < 48


def test_prune_refuses_wrong_options(tmp_path: Path) -> None:
    fixed = ("prune", NET, "--latency", "analytic", "--no-onnx", "-o", tmp_path)
    assert "give --budget, --params, --macs or --memory" in refused(*fixed)
    unknown = call(*fixed, "-b", 0.5, "--exclude", "bdy")
    assert unknown.exit_code == 2
    assert "error: exclude: no module or parameter of Net matches 'bdy'" in unknown.stderr
    assert "did you mean 'body'" in unknown.stderr
    assert "takes a limit on latency alone" in refused(
        *fixed, "-b", 0.5, "--params", 0.5, "--solver", "greedy"
    )
    assert "solver is 'best'" in refused(*fixed, "-b", 0.5, "--solver", "best")
    assert "params of the budget is -1.0" in refused(*fixed, "--params=-1")
    assert "min_share is 2.0" in refused(*fixed, "-b", 0.5, "--min-share", 2)
    assert "leave `also` out" in refused(
        *fixed, "-b", 0.5, "--also", "analytic=0.5", "--solver", "halp"
    )


def rows_of(text: str, start: str) -> list[str]:
    """Rows of the table at the end, from where they start so."""
    return [" ".join(line.split()) for line in text.splitlines() if start in line]


def test_prune_within_further_latencies(tmp_path: Path) -> None:
    fixed = ("prune", NET, "-b", 0.9, "--latency", "analytic", "--no-onnx", "-o", tmp_path)
    (row,) = rows_of(ok(*fixed, "--also", "analytic=50%"), "also analytic")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    (entry,) = report["facts"]["also"]
    assert entry["budget_ms"] == pytest.approx(0.5 * entry["dense_ms"])
    assert report["latency_ms"]["predicted"] == entry["predicted_ms"] <= entry["budget_ms"]
    assert "also analytic, met" in row
    assert f"{entry['predicted_ms']:.3f} of {entry['budget_ms']:.3f} ms by the table" in row
    two = rows_of(ok(*fixed, "--also", "analytic=0.7", "--also", " analytic = 9s"), "also analytic")
    assert "also analytic (1), met" in two[0]
    assert "also analytic (2), met" in two[1]
    assert "of 9000.000 ms" in two[1]


def test_a_further_latency_is_measured(tmp_path: Path) -> None:
    fixed = ("prune", NET, "-b", 0.9, "--latency", "analytic", "--no-onnx", "-o", tmp_path)
    (row,) = rows_of(ok(*fixed, "--also", "torch=9s"), "also torch")
    (entry,) = json.loads((tmp_path / "report.json").read_text())["facts"]["also"]
    assert entry["met"]
    assert "also torch, met" in row
    spread = f"{entry['measured_ms']:.3f} +- {entry['measured_spread_ms']:.3f}"
    assert f"{spread} of 9000.000 ms measured" in row


def test_a_further_latency_that_is_missed_is_told() -> None:
    model, x = make_chain()
    plan = halp_fx.plan_of(halp_fx.compile(model, 0.5, x, latency="analytic"))
    assert further_latencies(plan) == []
    entry = {"backend": "[board]", "predicted_ms": 3.0, "budget_ms": 2.0}
    measured = {"measured_ms": 1.5, "measured_spread_ms": 0.1, "measured_budget_ms": 1.4}
    entries = [entry, {**entry, **measured, "met": False}]
    plan = replace(plan, report={**plan.report, "also": entries})
    assert further_latencies(plan) == [
        ("[board] (1)", "3.000 of 2.000 ms by the table", False),
        ("[board] (2)", "1.500 +- 0.100 of 1.400 ms measured", False),
    ]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(summary_table(plan))
    assert "also [board] (2), missed" in captured.get()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch", "--also torch: give LATENCY=BUDGET, as --also torch=0.7"),
        ("=4ms", "--also =4ms: give LATENCY=BUDGET"),
        ("torch=", "--also torch=: give LATENCY=BUDGET"),
        ("torch=soon", "--also torch=soon: the budget 'soon' can't be parsed"),
        ("torch=7", "--also torch=7: the budget 7.0 is above 1"),
        ("tpu=0.5", "--also tpu=0.5: there is no back-end 'tpu' and no such file; give torch"),
        ("no=w/b.sqlite=4ms", "--also no=w/b.sqlite=4ms: there is no latency table no=w/b.sqlite"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "sweep"])
def test_further_latencies_that_are_none(
    command: str, text: str, message: str, tmp_path: Path
) -> None:
    budget = ("-b", 0.5) if command == "prune" else ("--budgets", 0.5)
    fixed = (command, NET, *budget, "--latency", "analytic", "-o", tmp_path / "out")
    assert message in refused(*fixed, "--also", "analytic=0.9", "--also", text)
    assert not (tmp_path / "out").exists()


def test_prune_scores_by_samples(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((40, 3, 16, 16))
    np.save(tmp_path / "one.npy", images)
    np.savez(tmp_path / "named.npz", images=images)
    fixed = ("prune", NET, "-b", 0.5, "--latency", "analytic", "--no-onnx", "-o", tmp_path)
    for name in ("one.npy", "named.npz"):
        more = ("--samples", tmp_path / name, "--candidates", 2, "--steps", 2, "--reconstruct")
        result = call(*fixed, *more)
        assert result.exit_code == 0, result.output + result.stderr
        assert "channels scored by" in result.stdout
        assert "fitted to the dense network" in result.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["saliency"] in ("output", "output1.5")
        assert report["data_free"] is False
        assert report["facts"]["reconstructed_layers"] > 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "can't be read"),
        ({}, "has no arrays"),
        ({"a": np.zeros(()), "b": np.zeros(2)}, r"has (), (2,): give N samples of each input"),
        ({"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}, "has (2, 3), (3, 3): give N samples"),
    ],
)
def test_samples_that_are_none(arrays: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "samples.npz"
    if arrays is not None:
        np.savez(file, **arrays)
    fixed = ("prune", NET, "-b", 0.5, "--latency", "analytic", "-o", tmp_path / "out")
    assert message in refused(*fixed, "--samples", file)
    file.write_text("1, 2, 3")
    assert "no .npy or .npz file of plain arrays" in refused(*fixed, "--samples", file)
    assert "give --samples FILE" in refused(*fixed, "--candidates", 2)
    assert "give --samples FILE" in refused(*fixed, "--reconstruct")
    assert not (tmp_path / "out").exists()


def test_prune_exports_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    ok("prune", NET, "-b", "0.6", "--latency", "analytic", "-o", tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(3, 3, 16, 16)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = halp_fx.load(tmp_path / "model.safetensors").eval()(x)
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-4)


class Doubled(nn.Module):
    """Decides by a value, so it is held whole; a weight of its own, tied to another."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.mean() if float(x.sum()) > 0 else x


def make_normed() -> tuple[nn.Module, torch.Tensor]:
    net, x = make_chain()
    parametrizations.weight_norm(net.get_submodule("2"))
    return net, x


def make_opaque() -> tuple[nn.Module, torch.Tensor]:
    net, x = make_chain()
    return nn.Sequential(net, Doubled(net.get_submodule("4").weight)), x  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "reason"),
    [("make_normed", "remove_parametrizations"), ("make_opaque", "a recipe holds no code")],
)
def test_prune_leaves_weights_where_there_is_no_recipe(
    model: str, reason: str, tmp_path: Path
) -> None:
    fixed = ("--latency", "analytic", "--no-onnx", "-o", tmp_path)
    result = call("prune", f"{__name__}:{model}", "-b", 0.6, *fixed)
    assert result.exit_code == 0, result.output + result.stderr
    assert "no model.safetensors: module" in result.stderr
    assert reason in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.json", "report.md", "weights.safetensors",
    ]  # fmt: skip
    assert f"wrote {tmp_path / 'weights.safetensors'}" in result.stdout
    state = load_file(tmp_path / "weights.safetensors")
    dense = globals()[model]()[0].state_dict()
    assert state.keys() == dense.keys()
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["state_size"]["kept"] == sum(tensor.numel() for tensor in state.values())
    assert sum(tensor.numel() for tensor in dense.values()) > report["state_size"]["kept"]


def test_prune_exports_what_has_no_recipe(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    text = ok(
        "prune", f"{__name__}:make_normed", "-b", 0.6, "--latency", "analytic", "-o", tmp_path
    )
    assert f"wrote {tmp_path / 'model.onnx'}" in text
    assert (tmp_path / "model.onnx").is_file()


def test_prune_tells_what_it_wrote_also_if_the_export_fails(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_text("of an earlier run")
    fixed = ("--latency", "analytic", "-o", tmp_path)
    result = call("prune", f"{__name__}:make_opaque", "-b", 0.6, *fixed)
    assert result.exit_code == 2
    assert f"wrote {tmp_path / 'weights.safetensors'}" in result.stdout
    assert f"{tmp_path / 'model.onnx'} was there before" in result.stderr
    assert "can't be exported to ONNX" in result.stderr


def test_prune_claims_no_file_of_an_earlier_run(tmp_path: Path) -> None:
    stale = ("model.onnx", "model.onnx.data", "weights.safetensors")
    for name in (*stale, "model.safetensors", "model.py"):
        (tmp_path / name).write_text("of an earlier run")
    fixed = ("--latency", "analytic", "--no-onnx", "-o", tmp_path)
    for _ in range(2):
        result = call("prune", NET, "-b", 0.6, *fixed)
        assert result.exit_code == 0, result.output + result.stderr
        written = [line for line in result.stdout.splitlines() if line.startswith("wrote ")]
        names = ("model.safetensors", "report.json", "report.md")
        assert written == [f"wrote {tmp_path / name}" for name in names]
        told = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        assert told == [
            f"warning: {tmp_path / name} was there before and is not of this run" for name in stale
        ]
    assert (tmp_path / "model.onnx").read_text() == "of an earlier run"


def test_prune_refuses_what_can_not_be(tmp_path: Path) -> None:
    assert "budget" in refused("prune", NET, "-b", "soon", "--latency", "analytic", "-o", tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("prune", NET, "-b", "0.5", "-o", tmp_path / "file")
    assert "no latency table" in refused(
        "prune", NET, "-b", "0.5", "--latency", tmp_path / "t.sqlite", "-o", tmp_path
    )
    assert "--latency tpu: there is no back-end 'tpu'" in refused(
        "prune", NET, "-b", "0.5", "--latency", "tpu", "-o", tmp_path
    )
    assert not (tmp_path / "model.safetensors").exists()


def test_bench_discover_writes_csv(tmp_path: Path) -> None:
    file = tmp_path / "bench.csv"
    text = ok(
        "bench", "discover", "--models", f"{NET},torchvision:resnet5", "--runs", 1, "-o", file
    )
    assert NET in text
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert rows[0]["model"] == NET
    assert float(rows[0]["total_s"]) > 0
    assert int(rows[0]["groups"]) == 1
    assert "did you mean" in rows[1]["note"]


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = demo.run(tmp_path, epochs=2, tune_epochs=1, widths=(16, 32), latency="analytic")
    assert result["accuracy"] > 0.8
    assert result["onnx_difference"] < 1e-3
    assert {path.name for path in tmp_path.iterdir()} >= {"model.onnx", "report.md", "report.json"}
    printed = capsys.readouterr().out
    assert "The budget is" in printed
