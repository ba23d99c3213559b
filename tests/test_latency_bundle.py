"""Bundles: kernels measured where there is no PyTorch, and what becomes of the results."""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import halp_fx
from halp_fx.errors import DeviceMismatchError, InputError, LatencyError
from halp_fx.latency import Job, LatencyTable, OnnxRuntime, Source, Stored, resolve_backend
from halp_fx.latency import bundle as module_under_test
from halp_fx.latency.bundle import import_results, write_bundle
from halp_fx.latency.device import cpu_facts
from halp_fx.latency.onnxruntime_backend import onnx_bytes
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import measurements, price
from halp_fx.passes.trace import trace
from halp_fx.tools import bundle_runner
from halp_fx.types import ChannelGroups
from tests import oracle

onnxruntime = pytest.importorskip("onnxruntime")

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
QUICK = ("--samples", "2", "--min-sample-ms", "0.05")
# The runner, where importing PyTorch or halp_fx fails.
ALONE = (
    "import runpy, sys; sys.modules.update(torch=None, halp_fx=None, onnx=None); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Written:
    """A bundle on the disk, and what it is of."""

    folder: Path
    net: nn.Module
    groups: ChannelGroups
    jobs: list[Job]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_bytes())

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    def copy(self, folder: Path) -> Written:
        shutil.copytree(self.folder, folder)
        return replace(self, folder=folder)


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the runner of a bundle as on a device without PyTorch."""
    command = [sys.executable, "-c", ALONE, str(folder / "run.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A bundle that nobody has measured."""
    net = oracle.randomize(Net()).eval()
    groups = find_groups(trace(net, (X,)))
    jobs = measurements(groups, fuses=True)
    folder = write_bundle(jobs, tmp_path_factory.mktemp("bundle"), network=(net, (X,)))
    return Written(folder, net, groups, jobs)


@pytest.fixture(scope="module")
def measured(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A bundle with results."""
    copy = written.copy(tmp_path_factory.mktemp("measured") / "b")
    done = run(copy.folder, *QUICK)
    assert done.returncode == 0, done.stderr
    return copy


def conv(out: int = 4) -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Conv2d(3, out, 3), (X,)


# --- writing ------------------------------------------------------------------------------------


def test_a_bundle_holds_each_kernel_once(written: Written) -> None:
    manifest = written.manifest
    keys = [entry["key"] for entry in manifest["kernels"]]
    assert keys == [*(job.key for job in written.jobs), manifest["network"]]
    files = {entry["file"] for entry in manifest["kernels"]}
    found = {p.relative_to(written.folder).as_posix() for p in written.folder.rglob("*")}
    weights = manifest["weights"]["file"]
    sentinels = {"sentinel.onnx", "gpu_sentinel.onnx"}
    assert found == files | sentinels | {"kernels", "manifest.json", "run.py", weights}
    references = [manifest["sentinel"], manifest["gpu_sentinel"]]
    for entry in [*references, manifest["weights"], *manifest["kernels"]]:
        data = (written.folder / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        if entry is manifest["weights"]:
            assert len(data) == max(e["shared_bytes"] for e in manifest["kernels"]) > 0
            continue
        model = onnx.load_model_from_string(data)
        onnx.checker.check_model(str(written.folder / entry["file"]))
        assert entry["opset"] == model.opset_import[0].version


def test_a_gpu_has_a_reference_kernel_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bundle([Job("conv", conv)], tmp_path / "bundle")
    meter = SimpleNamespace(fingerprint=lambda: {"backend": "onnxruntime"})
    taken: list[str] = []
    monkeypatch.setattr(bundle_runner, "_Meter", lambda folder, options: meter)
    monkeypatch.setattr(bundle_runner, "_measure", lambda todo, own, *_: taken.append(own["file"]))
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"):
        options = argparse.Namespace(
            provider=provider, output=tmp_path / f"{provider}.jsonl", samples=1, min_sample_ms=1.0
        )
        bundle_runner._measure_bundle(folder, options)
    assert taken == ["sentinel.onnx", "gpu_sentinel.onnx", "gpu_sentinel.onnx"]


def test_the_files_compute_what_the_kernels_do(written: Written) -> None:
    stated = {entry["key"]: entry for entry in written.manifest["kernels"]}
    for job in written.jobs[::5]:
        module, inputs = job.build()
        entry = stated[job.key]
        assert [tuple(i["shape"]) for i in entry["inputs"]] == [tuple(t.shape) for t in inputs]
        assert [i["dtype"] for i in entry["inputs"]] == ["float32"] * len(inputs)
        session = onnxruntime.InferenceSession(written.folder / entry["file"])
        names = [i["name"] for i in entry["inputs"]]
        feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        (out,) = session.run(None, feed)
        assert out.shape == module(*inputs).shape
        assert np.isfinite(out).all()
        # But for large weights, which are random, the file is what the exporter gave.
        expected = onnx.load_model_from_string(onnx_bytes(module, inputs)).graph
        graph = onnx.load(written.folder / entry["file"], load_external_data=False).graph
        assert list(graph.node) == list(expected.node)
        for tensor, other in zip(graph.initializer, expected.initializer, strict=True):
            assert (tensor.name, tensor.dims) == (other.name, other.dims)
            assert tensor == other or len(other.raw_data) >= 1024


def test_one_key_is_written_once_and_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    jobs = [Job("a", conv), Job("b", lambda: conv(5)), Job("a", lambda: pytest.fail("built"))]
    write_bundle(iter(jobs), tmp_path / "new" / "b", progress=lambda *a: told.append(a))
    assert told == [(1, 2, "a"), (2, 2, "b")]


def test_a_killed_write_goes_on_where_it_stopped(tmp_path: Path) -> None:
    built: list[str] = []

    def job(key: str, fails: bool = False) -> Job:
        def build() -> tuple[nn.Module, tuple[Any, ...]]:
            if fails:
                raise KeyboardInterrupt
            built.append(key)
            return conv()

        return Job(key, build)

    with pytest.raises(KeyboardInterrupt):
        write_bundle([job("a"), job("b", fails=True)], tmp_path)
    assert not json.loads((tmp_path / "manifest.json").read_bytes())["complete"]
    (file,) = (tmp_path / "kernels").iterdir()
    (tmp_path / "kernels" / "half.onnx.tmp").write_bytes(b"half")
    before = file.stat().st_mtime_ns
    write_bundle([job("a"), job("b")], tmp_path)
    assert built == ["a", "b"]
    assert file.stat().st_mtime_ns == before
    assert {p.suffix for p in (tmp_path / "kernels").iterdir()} == {".onnx"}
    whole = (tmp_path / "manifest.json").read_bytes()
    write_bundle([job("a"), job("b")], tmp_path)
    assert built == ["a", "b"]
    assert (tmp_path / "manifest.json").read_bytes() == whole  # its results stay valid


def test_an_incomplete_bundle_is_not_measured(tmp_path: Path) -> None:
    write_bundle([Job("a", conv)], tmp_path)
    with pytest.raises(LatencyError, match=r"kernel b .*ZeroDivisionError"):
        write_bundle([Job("a", conv), Job("b", lambda: 1 / 0)], tmp_path)  # type: ignore[arg-type, return-value]
    done = run(tmp_path)
    assert done.returncode == 1
    assert "is not complete, writing it was stopped: write it again" in done.stderr


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_kernel_that_was_damaged_is_written_again(tmp_path: Path, content: bytes) -> None:
    torch.manual_seed(0)
    kernel = conv()
    write_bundle([Job("a", lambda: kernel)], tmp_path)
    (file,) = (tmp_path / "kernels").iterdir()
    good = file.read_bytes()
    file.write_bytes(content)
    write_bundle([Job("a", lambda: kernel)], tmp_path)
    assert file.read_bytes() == good


def test_kernels_of_other_versions_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []

    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        built.append(1)
        return conv()

    write_bundle([Job("a", build)], tmp_path)
    monkeypatch.setattr(module_under_test, "__version__", "0.0.0")
    write_bundle([Job("a", build)], tmp_path)
    assert len(built) == 2


def test_the_folder_becomes_the_bundle_of_the_jobs(tmp_path: Path) -> None:
    write_bundle([Job("a", conv), Job("b", conv)], tmp_path)
    (tmp_path / "results.jsonl").write_text("mine")
    write_bundle([Job("b", conv)], tmp_path)
    assert len(list((tmp_path / "kernels").iterdir())) == 1
    assert (tmp_path / "results.jsonl").read_text() == "mine"


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"no bundle and holds other files \(thesis.txt\): pass a"):
        write_bundle([Job("a", conv)], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match=r"thesis.txt is a file: pass a folder"):
        write_bundle([Job("a", conv)], tmp_path / "thesis.txt")


@pytest.mark.parametrize("content", ["[]", "{", '{"format": "of another program"}'])
def test_a_manifest_of_another_program_is_no_bundle(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"holds other files \(manifest.json\)"):
        write_bundle([Job("a", conv)], tmp_path)
    assert (tmp_path / "manifest.json").read_text() == content


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no jobs: pass the kernels"):
        write_bundle([], tmp_path)
    with pytest.raises(InputError, match=r"jobs has 'conv': pass halp_fx.latency.Job"):
        write_bundle(["conv"], tmp_path)  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"pass network=\(model, \(x,\)\)"):
        write_bundle([], tmp_path, network=(nn.ReLU(), X))  # type: ignore[arg-type]
    with pytest.raises(LatencyError, match=r"kernel eig: Unknown on .* can't be exported to ONNX"):
        write_bundle([Job("eig", lambda: (Unknown(), (torch.eye(3),)))], tmp_path)
    half = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(LatencyError, match=r"kernel half: it takes an input of torch.bfloat16"):
        write_bundle([Job("half", lambda: (nn.ReLU(), (half,)))], tmp_path)


def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LatencyError, match=r"can't be written to .*No space left"):
        write_bundle([Job("a", conv)], tmp_path)


def test_the_caller_finds_all_as_it_was(tmp_path: Path) -> None:
    net = Net().train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    write_bundle([Job("a", conv)], tmp_path, network=(net, (X,)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


# --- the runner ---------------------------------------------------------------------------------


def test_the_runner_stands_alone() -> None:
    spec = importlib.util.find_spec("halp_fx.tools.bundle_runner")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    for node in ast.walk(tree):
        names = [alias.name for alias in getattr(node, "names", [])]
        if isinstance(node, ast.Import):
            assert {n.partition(".")[0] for n in names} <= sys.stdlib_module_names
        if isinstance(node, ast.ImportFrom):
            assert str(node.module).partition(".")[0] in sys.stdlib_module_names
            assert node.level == 0
    for name in ("MANIFEST_FORMAT", "VERSION"):
        assert getattr(bundle_runner, name) == getattr(module_under_test, name)


def test_the_runner_measures_all_without_pytorch(measured: Written) -> None:
    header, *records = lines_of(measured.results)
    manifest = (measured.folder / "manifest.json").read_bytes()
    assert header["bundle"] == hashlib.sha256(manifest).hexdigest()
    assert header["kernels"] == len(records)
    assert header["settings"] == {"samples": 2, "min_sample_ms": 0.05}
    assert {r["key"] for r in records} == {e["key"] for e in measured.manifest["kernels"]}
    for record in records:
        assert record["median_ms"] > 0
        assert record["spread_ms"] >= 0
        assert record["samples"] in (2, 4, 6)  # more where they scatter
    again = run(measured.folder, *QUICK)
    assert again.returncode == 0
    assert "to measure" not in again.stderr
    assert "the whole network takes" in again.stderr


def test_the_fingerprint_is_that_of_the_back_end(measured: Written) -> None:
    fingerprint = lines_of(measured.results)[0]["fingerprint"]
    expected = json.loads(OnnxRuntime().fingerprint())
    assert fingerprint.keys() == expected.keys()
    known = f"{platform.system()} {platform.machine()}" == "Linux x86_64"
    if not known or "ATEN_CPU_CAPABILITY" in os.environ:
        expected["instructions"] = fingerprint["instructions"]
    assert fingerprint == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx avx2 fma avx512f avx512vl avx512bw avx512dq", "AVX512"),
        ("avx avx2 fma avx512f", "AVX2"),
        ("avx avx2", "DEFAULT"),
        ("", "DEFAULT"),
    ],
)
def test_instruction_sets(flags: str, expected: str) -> None:
    assert bundle_runner._instructions(set(flags.split())) == expected


def test_a_device_without_proc_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any, **options: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", none)
    facts = bundle_runner._cpu_facts()
    assert facts.keys() == cpu_facts().keys()
    assert facts["cpu"]
    assert facts["instructions"] == "DEFAULT"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Orin, 8.7, 540.2", {"gpu": "Orin", "capability": "8.7", "driver": "540.2"}),
        ("", {"gpu": "unknown"}),
    ],
)
def test_a_gpu_is_described(
    answer: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_runner, "_answer", lambda command: answer)
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: "unknown\0")
    assert bundle_runner._gpu_facts() == expected


def test_a_killed_run_goes_on_where_it_was(written: Written, tmp_path: Path) -> None:
    copy = written.copy(tmp_path / "b")
    options = ("--samples", "3", "--min-sample-ms", "2")
    command = [sys.executable, "-c", ALONE, str(copy.folder / "run.py"), *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if copy.results.exists() and copy.results.read_bytes().count(b"\n") > 1:
                break
            time.sleep(0.005)
        process.kill()
    first = copy.results.read_bytes()
    first = first[: first.rfind(b"\n") + 1]
    total = len(copy.manifest["kernels"])
    assert 1 < first.count(b"\n") < total
    with copy.results.open("ab") as file:
        file.write(b'{"key": "Conv2d(dila')  # killed while it wrote
    with LatencyTable.open(":memory:") as table:
        with pytest.raises(LatencyError, match=r"cut off in line \d+: run run.py again"):
            import_results(copy.results, table)
        done = run(copy.folder, *options)
        assert done.returncode == 0, done.stderr
        left = total - first.count(b"\n") + 1  # less the header line
        assert f"{total} kernels, {left} to measure" in done.stderr
        assert copy.results.read_bytes().startswith(first)
        fingerprint = import_results(copy.results, table, manifest=copy.folder)
        assert len(table.entries(fingerprint)) == total


@pytest.mark.parametrize("length", [0, 1, 40])
def test_a_run_killed_in_the_first_line_starts_again(measured: Written, length: int) -> None:
    path = measured.folder / "torn.jsonl"
    path.write_bytes(measured.results.read_bytes()[:length])
    done = run(measured.folder, *QUICK, "-o", str(path))
    assert done.returncode == 0, done.stderr
    assert len(lines_of(path)) == len(lines_of(measured.results))
    path.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threads", "2"), "threads 1, now 2"),
        (("--samples", "3"), "samples 2, now 3"),
        (("--min-sample-ms", "0.1"), "min_sample_ms 0.05, now 0.1"),
    ],
)
def test_other_settings_are_not_appended(
    measured: Written, options: tuple[str, ...], message: str
) -> None:
    before = measured.results.read_bytes()
    done = run(measured.folder, *QUICK, *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert "pass another -o" in done.stderr
    assert measured.results.read_bytes() == before


def test_another_bundle_is_not_appended(measured: Written, tmp_path: Path) -> None:
    write_bundle([Job("a", conv)], tmp_path)
    results = tmp_path / "results.jsonl"
    shutil.copy(measured.results, results)
    done = run(tmp_path, *QUICK)
    assert done.returncode == 1
    assert "has the results of another bundle: pass another -o" in done.stderr
    assert results.read_bytes() == measured.results.read_bytes()


@pytest.mark.parametrize("content", [b"years of work", b"years\nof work", b"[1]\n", b"\0\0\n"])
def test_a_file_of_another_program_stays_as_it_is(measured: Written, content: bytes) -> None:
    path = measured.folder / "other.txt"
    path.write_bytes(content)
    done = run(measured.folder, *QUICK, "-o", str(path))
    assert done.returncode == 1
    assert "is another file, left as it is: pass another -o" in done.stderr
    assert path.read_bytes() == content
    path.unlink()


def test_a_damaged_line_is_named(measured: Written, tmp_path: Path) -> None:
    lines = measured.results.read_bytes().splitlines(keepends=True)
    for at, line in ((3, b"{}\n"), (4, lines[1])):  # the latter occurs twice
        path = tmp_path / "r.jsonl"
        path.write_bytes(b"".join([*lines[: at - 1], line, *lines[at:]]))
        done = run(measured.folder, *QUICK, "-o", str(path))
        assert done.returncode == 1
        assert f"is damaged in line {at}: move it away" in done.stderr


def test_damaged_files_are_told_before_anything_is_measured(tmp_path: Path) -> None:
    write_bundle([Job("a", conv)], tmp_path)
    (file,) = (tmp_path / "kernels").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    done = run(tmp_path, *QUICK)
    assert done.returncode == 1
    assert f"{file} differs from its checksum: copy the bundle again" in done.stderr
    file.unlink()
    assert "can't be read" in run(tmp_path, *QUICK).stderr
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"version": 1', b'"version": 2'))
    assert "is of version 2, and this run.py reads version 1" in run(tmp_path).stderr
    manifest.write_bytes(b"{}")
    assert "is not the manifest of a bundle" in run(tmp_path).stderr
    assert not (tmp_path / "results.jsonl").exists()


def test_options_out_of_range_are_refused(written: Written) -> None:
    for options, message in (
        (("--threads", "0"), "'0' is no whole number of at least 1"),
        (("--min-sample-ms", "nan"), "'nan' is no finite number above 0"),
        (("--provider", "Abacus"), "provider is 'Abacus': this build of onnxruntime has"),
        (("-o", str(written.folder / "no" / "r")), "can't be written"),
    ):
        done = run(written.folder, *options)
        assert done.returncode != 0
        assert message in done.stderr


def test_a_kernel_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    write_bundle([Job("a kernel", conv)], tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    manifest["kernels"][0]["inputs"][0]["shape"] = [1, 3, 2, 2]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = run(tmp_path, *QUICK)
    assert done.returncode == 1
    opset = manifest["kernels"][0]["opset"]
    assert f"kernel a kernel can't be run ({manifest['kernels'][0]['file']}, opset {opset}" in (
        done.stderr
    )


def test_two_runs_at_a_time_are_refused(measured: Written) -> None:
    fcntl = pytest.importorskip("fcntl")
    with measured.results.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run(measured.folder, *QUICK)
    assert done.returncode == 1
    assert "another run is writing to" in done.stderr


class Chooses(nn.Module):
    """Takes what is no float, too."""

    def forward(self, x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, x[index], -x[index])


def test_inputs_of_other_types_are_made(tmp_path: Path) -> None:
    inputs = (torch.randn(3, 4).half(), torch.tensor([1, 2]), torch.ones(4, dtype=torch.bool))
    write_bundle([Job("a", lambda: (Chooses(), inputs))], tmp_path)
    (entry,) = json.loads((tmp_path / "manifest.json").read_bytes())["kernels"]
    assert [i["dtype"] for i in entry["inputs"]] == ["float16", "int64", "bool"]
    done = run(tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr


class Simulated(bundle_runner._Meter):
    """Runs nothing; a kernel takes what its entry says, times the speed of the attempt."""

    def __init__(self, speeds: list[float]) -> None:
        self.samples, self.numpy, self.speeds = 4, np, speeds
        self.attempt = -1
        self.orders: list[list[float]] = []

    def probe(self, entry: dict[str, Any]) -> bundle_runner._Probe:
        probe = bundle_runner._Probe.__new__(bundle_runner._Probe)
        probe.calls = 2

        def take() -> None:
            CLOCK[0] += int(entry["ms"] * 1e6 * self.speeds[min(self.attempt, 9)])
            self.orders[-1].append(entry["ms"])

        probe.run = take
        return probe

    def round_robin(self, probes: Any, order: random.Random) -> list[list[float]]:
        self.attempt += 1
        self.orders.append([])
        return super().round_robin(probes, order)


CLOCK = [0]


@pytest.mark.parametrize(
    ("speeds", "expected", "attempts"),
    [
        ([1.0, 1.0], 1.0, 1),
        ([1.0, 3.0, 1.1], 1.1, 2),
        ([1.0, 3.0, 2.0, 9.0], 2.0, 3),
    ],
)
def test_a_batch_is_measured_again_while_the_sentinel_drifts(
    speeds: list[float],
    expected: float,
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", lambda: CLOCK[0])
    meter = Simulated([*speeds, *[1.0] * 10])
    order = random.Random(0)
    sentinel = bundle_runner._Sentinel({"ms": 2.0}, meter, order)
    entries = [{"ms": 1.0}, {"ms": 5.0}]
    timings = bundle_runner._measure_batch(entries, meter, sentinel, order)
    assert [t["median_ms"] for t in timings] == pytest.approx([expected, 5 * expected])
    assert [t["spread_ms"] for t in timings] == pytest.approx([0, 0])
    assert meter.attempt == attempts
    rounds = np.array(meter.orders[1]).reshape(4, 3, 2)[:, :, 0]  # blocks of two calls
    assert all(sorted(turn) == [1.0, 2.0, 5.0] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    unsteady = "the device is unsteady" in capfd.readouterr().err
    assert unsteady == (attempts == 3)


def test_kernels_whose_times_scatter_are_sampled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", lambda: CLOCK[0])
    meter = Simulated([1.0] * 10)
    order, jitter = random.Random(0), random.Random(1)
    sentinel = bundle_runner._Sentinel({"ms": 2.0}, meter, order)
    steady = meter.probe

    def probe(entry: dict[str, Any]) -> bundle_runner._Probe:
        made = steady(entry)
        take = made.run

        def unsteady() -> None:
            take()
            CLOCK[0] += int(1e6 * jitter.uniform(0, entry.get("jitter", 0.0)))

        made.run = unsteady
        return made

    monkeypatch.setattr(meter, "probe", probe)
    entries = [{"ms": 1.0}, {"ms": 1.0, "jitter": 2.0}]
    timings = bundle_runner._measure_batch(entries, meter, sentinel, order)
    assert [t["samples"] for t in timings] == [4, 12]
    assert timings[0]["median_ms"] == pytest.approx(1.0)


def test_what_does_not_fit_together_is_measured_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", lambda: CLOCK[0])
    meter = Simulated([1.0] * 20)
    order = random.Random(0)
    sentinel = bundle_runner._Sentinel({"ms": 2.0}, meter, order)
    whole, sizes = meter.round_robin, []

    def crowded(probes: Any, order: random.Random) -> list[list[float]]:
        sizes.append(len(probes))
        if len(probes) > 3:
            lacks = RuntimeError("std::bad_alloc")
            raise bundle_runner.BundleError("kernel k can't be run") from lacks
        return whole(probes, order)

    monkeypatch.setattr(meter, "round_robin", crowded)
    entries = [{"ms": float(ms)} for ms in (1, 5, 3, 4, 7)]
    timings = bundle_runner._measure_parts(entries, meter, sentinel, order)
    assert [t["median_ms"] for t in timings] == pytest.approx([1, 5, 3, 4, 7])
    assert max(sizes) == 6 and sizes[-1] <= 3

    def broken(probes: Any, order: random.Random) -> list[list[float]]:
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(meter, "round_robin", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        bundle_runner._measure_parts(entries, meter, sentinel, order)


def test_half_precision_is_allowed_to_tensorrt(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Session:
        def __init__(
            self, path: str, options: Any, providers: list[Any], enable_fallback: int
        ) -> None:
            assert not enable_fallback
            asked.append(providers)

        def get_providers(self) -> list[str]:
            return ["TensorrtExecutionProvider"]

    everything = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: everything)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    options = bundle_runner._options(written.folder, ["--provider", everything[0]])
    meter = bundle_runner._Meter(written.folder, options)
    for dtype in ("float32", "float16"):
        meter._session({"file": "kernels/a.onnx", "inputs": [{"dtype": dtype}]})
    halves = ("False", "True")
    assert asked == [[(everything[0], {"trt_fp16_enable": h}), everything[1]] for h in halves]


def test_a_block_is_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter_ns", lambda: CLOCK[0])

    def take() -> None:
        CLOCK[0] += 7_000

    probe = bundle_runner._Probe(take, 1.0)
    assert 1.0 <= probe.calls * 0.007 < 2.0


# --- importing ----------------------------------------------------------------------------------


def foreign(measured: Written, path: Path) -> Path:
    """The results as another device would give them."""
    header, *records = measured.results.read_bytes().splitlines(keepends=True)
    changed = json.loads(header)
    changed["fingerprint"]["cpu"] = "Abacus"
    path.write_bytes(json.dumps(changed).encode() + b"\n" + b"".join(records))
    return path


def test_results_come_into_the_table(measured: Written, tmp_path: Path) -> None:
    header, *records = lines_of(measured.results)
    with LatencyTable.open(tmp_path / "t.sqlite") as table:
        fingerprint = import_results(measured.results, table, manifest=measured.folder)
        assert import_results(str(measured.results), table) == fingerprint
        assert table.fingerprints() == (fingerprint,)
        assert json.loads(fingerprint) == header["fingerprint"]
        found = {e.key: e.timing for e in table.entries(fingerprint)}
    assert found.keys() == {r["key"] for r in records}
    for record in records:
        timing = found[record["key"]]
        assert timing.median_ms == record["median_ms"]
        assert timing.spread_ms == record["spread_ms"]
        assert timing.samples == record["samples"]


def test_a_network_is_pruned_for_the_device(measured: Written, tmp_path: Path) -> None:
    path = tmp_path / "device.sqlite"
    with LatencyTable.open(path) as table:
        fingerprint = import_results(foreign(measured, tmp_path / "r.jsonl"), table)
    source = resolve_backend(path)
    assert isinstance(source.backend, Stored)
    assert source.backend.fuses
    assert source.table is not None
    model = price(measured.groups, source)
    times = {e.key: e.timing.median_ms for e in source.table.entries(fingerprint)}
    for kernel in model.kernels:
        dense = float(kernel.cost(*(axis.dense for axis in kernel.axes)))
        assert any(dense == pytest.approx(ms) for ms in times.values()), kernel.name
    with pytest.warns(UserWarning, match="made on another device"):
        pruned = halp_fx.compile(measured.net, 0.6, X, latency=str(path))
    plan = halp_fx.plan_of(pruned)
    assert plan.dense_ms == pytest.approx(model.dense_ms)
    assert plan.predicted_ms <= plan.budget_ms
    assert oracle.shrunk(measured.net, pruned) < 1
    oracle.assert_exact(measured.net, pruned, (X,))


def test_what_was_not_bundled_is_not_measured_here(measured: Written, tmp_path: Path) -> None:
    with LatencyTable.open(tmp_path / "t.sqlite") as table:
        import_results(foreign(measured, tmp_path / "r.jsonl"), table)
        wider = find_groups(trace(nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 5, 1)), (X,)))
        with pytest.raises(DeviceMismatchError, match="cpu: Abacus, here"):
            price(wider, resolve_backend(table))


def test_the_table_of_this_device_is_live(measured: Written) -> None:
    expected = OnnxRuntime()
    if lines_of(measured.results)[0]["fingerprint"] != json.loads(expected.fingerprint()):
        pytest.skip("PyTorch names the instruction set of this machine in words of its own")
    with LatencyTable.open(":memory:") as table:
        import_results(measured.results, table)
        assert resolve_backend(table) == Source(expected, table)


Change = Callable[[list[Any]], Any]


def _set(line: int, **values: Any) -> Change:
    def change(lines: list[Any]) -> None:
        lines[line - 1] = {**lines[line - 1], **values}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.clear(), "is empty: run run.py on the device first"),
        (_set(1, format="of another program"), r"no results file of a bundle \(line 1\)"),
        (lambda lines: lines.pop(0), r"no results file of a bundle \(line 1\)"),
        (_set(1, version=9), r"has version 9, and this halp_fx reads 1 \(line 1\)"),
        (_set(1, fingerprint="a board"), r"line 1 \(the header lacks the device\)"),
        (_set(1, fingerprint={"backend": "torch"}), r"line 1 \(the header lacks the device\)"),
        (_set(1, fingerprint={"backend": "onnxruntime", "x": [1]}), "line 1 .*more than texts"),
        (_set(1, kernels=0), r"line 1 \(the header lacks the number of kernels\)"),
        (_set(1, kernels=2), r"damaged in line 4 \(the bundle has 2 kernels\)"),
        (_set(3, median_ms=float("nan")), "damaged in line 3 .median_ms is nan"),
        (_set(3, median_ms=float("inf")), "damaged in line 3 .median_ms is inf"),
        (_set(3, median_ms=-1.0), "damaged in line 3 .median_ms is -1.0"),
        (_set(3, median_ms=10**400), "damaged in line 3 .*too large"),
        (_set(3, median_ms="1.0"), "damaged in line 3 .median_ms is '1.0'"),
        (_set(3, spread_ms=None), "damaged in line 3 .spread_ms is None"),
        (_set(3, samples=True), "damaged in line 3 .samples is True"),
        (_set(3, samples=10**30), "damaged in line 3 .samples is 1000"),
        (_set(3, key=""), "damaged in line 3 .key is ''"),
        (_set(3, key="\ud800"), r"damaged in line 3 .key is '\\ud800'"),
        (lambda lines: lines.insert(4, lines[1]), r"damaged in line 5 \(kernel .* occurs twice"),
        (lambda lines: lines.insert(2, b"\xff{"), r"damaged in line 3 \(no JSON object\)"),
        (lambda lines: lines.insert(2, b"[" * 99999), r"damaged in line 3 \(no JSON object\)"),
        (lambda lines: lines.insert(2, b""), r"damaged in line 3 \(no JSON object\)"),
        (lambda lines: lines.pop(), r"has (\d+) of \d+ kernels: run run.py again on the device"),
    ],
)
def test_damaged_and_foreign_files_are_refused_whole(
    measured: Written, tmp_path: Path, change: Change, message: str
) -> None:
    lines: list[Any] = list(lines_of(measured.results))
    change(lines)
    path = tmp_path / "r.jsonl"
    coded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in coded))
    with LatencyTable.open(":memory:") as table:
        with pytest.raises(LatencyError, match=message):
            import_results(path, table)
        assert table.fingerprints() == ()


def test_results_of_another_bundle_are_refused(measured: Written, tmp_path: Path) -> None:
    other = write_bundle([Job("a", conv)], tmp_path / "other")
    with LatencyTable.open(":memory:") as table:
        for manifest in (other, other / "manifest.json"):
            with pytest.raises(LatencyError, match=r"results of another bundle than .*other"):
                import_results(measured.results, table, manifest=manifest)
        again = tmp_path / "again.json"  # the same kernels, written another time
        again.write_text(json.dumps({**measured.manifest, "made_by": {}}))
        with pytest.raises(LatencyError, match="results of another bundle"):
            import_results(measured.results, table, manifest=again)
        with pytest.raises(LatencyError, match="is not the manifest of a complete bundle"):
            import_results(measured.results, table, manifest=measured.results)
        with pytest.raises(LatencyError, match=r"can't be read .*pass the bundle"):
            import_results(measured.results, table, manifest=tmp_path / "gone")
        assert table.fingerprints() == ()


def test_wrong_arguments_are_told(measured: Written, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"halp_fx.LatencyTable.open\(path\)"):
        import_results(measured.results, "t.sqlite")  # type: ignore[arg-type]
    with LatencyTable.open(":memory:") as table:
        for path in (tmp_path, tmp_path / "gone.jsonl"):
            with pytest.raises(LatencyError, match=r"can't be read .*pass the results.jsonl"):
                import_results(path, table)
        with pytest.raises(LatencyError, match=r"no results file of a bundle \(line 1\)"):
            import_results(measured.folder / "manifest.json", table)
