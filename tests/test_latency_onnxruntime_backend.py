"""ONNX Runtime as a back-end."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from halp_fx.errors import DependencyError, InputError, LatencyError
from halp_fx.latency import Backend, BlockTimer, OnnxRuntime, measure_network
from halp_fx.latency import onnxruntime_backend as module_under_test

onnxruntime = pytest.importorskip("onnxruntime")


def _outputs(run: Any) -> list[np.ndarray]:
    """What the last run computed."""
    run()
    return [value.numpy() for value in run.binding.get_outputs()]


def test_it_is_a_backend_that_measures_and_fuses() -> None:
    backend = OnnxRuntime()
    assert isinstance(backend, Backend)
    assert isinstance(backend, BlockTimer)
    assert (backend.name, backend.measured, backend.fuses) == ("onnxruntime", True, True)


def test_it_runs_the_module_itself() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).train()
    module[1].running_mean.uniform_(-1, 1)
    x = torch.randn(2, 3, 9, 9)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    (out,) = _outputs(OnnxRuntime().prepare(module, (x,)))
    assert all(part.training for part in module.modules())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        np.testing.assert_allclose(out, module.eval()(x).numpy(), atol=1e-5)


def test_parts_in_different_modes_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    module.train()
    module[1].eval()
    OnnxRuntime().prepare(module, (torch.zeros(2, 2),))
    assert [part.training for part in module.modules()] == [True, True, False]


class Mixed(nn.Module):
    """Takes and gives nested structures."""

    def forward(self, parts: dict[str, list[torch.Tensor]], scale: float, flag: None) -> Any:
        first, second = parts["x"]
        assert flag is None
        return {"sum": scale * (first + second), "rest": [first - second, None]}


def test_structures_and_constants_are_kept() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    run = OnnxRuntime().prepare(Mixed(), ({"x": [a, b]}, 3.0, None))
    total, difference = _outputs(run)
    np.testing.assert_array_equal(total, [33.0, 66.0])
    np.testing.assert_array_equal(difference, [-9.0, -18.0])


class Add(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


def test_one_tensor_may_be_given_twice() -> None:
    x = torch.tensor([1.0, 2.0])
    (out,) = _outputs(OnnxRuntime().prepare(Add(), (x, x)))
    np.testing.assert_array_equal(out, [2.0, 4.0])


def test_an_input_that_is_not_used_does_no_harm() -> None:
    class First(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a * 2

    (out,) = _outputs(OnnxRuntime().prepare(First(), (torch.ones(2), torch.zeros(3))))
    np.testing.assert_array_equal(out, [2.0, 2.0])


def test_a_traced_graph_runs() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU()).eval())
    x = torch.randn(1, 3, 4, 4)
    (out,) = _outputs(OnnxRuntime().prepare(graph, (x,)))
    np.testing.assert_allclose(out, graph(x).detach().numpy(), atol=1e-5)


def test_it_times_what_it_prepared() -> None:
    backend = OnnxRuntime(samples=3, min_sample_ms=0.05)
    timing = measure_network(nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),), backend)
    assert timing.samples == 3
    assert timing.median_ms > 0


def test_no_warnings_reach_the_caller(recwarn: pytest.WarningsRecorder) -> None:
    OnnxRuntime().prepare(nn.ReLU(), (torch.zeros(2),))
    assert [str(warning.message) for warning in recwarn] == []


def test_the_newer_exporter_helps_out(monkeypatch: pytest.MonkeyPatch) -> None:
    export = torch.onnx.export
    modes: list[bool] = []

    def without_torchscript(*args: Any, dynamo: bool, **options: Any) -> Any:
        modes.append(dynamo)
        if not dynamo:
            raise TypeError("export() got an unexpected keyword argument")
        return export(*args, dynamo=dynamo, **options)

    monkeypatch.setattr(torch.onnx, "export", without_torchscript)
    (out,) = _outputs(OnnxRuntime().prepare(Add(), (torch.ones(2), torch.ones(2))))
    assert modes == [False, True]
    np.testing.assert_array_equal(out, [2.0, 2.0])


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x)


def test_what_cannot_be_exported_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LatencyError) as e:
        OnnxRuntime().prepare(Unknown(), (torch.eye(3),))
    assert "Unknown on ((3, 3) torch.float32) can't be exported to ONNX" in str(e.value)
    assert 'the back-end "torch"' in str(e.value)
    assert "graph(" not in "".join(capfd.readouterr())


def test_a_failing_exporter_prints_no_graph(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module_under_test, "_export_by_dynamo", lambda *args: b"newer")
    switch = torch._C._jit_set_onnx_log_enabled
    assert module_under_test._export(Unknown(), (torch.eye(3),)) == b"newer"
    assert capfd.readouterr().out == ""
    assert torch._C._jit_set_onnx_log_enabled is switch


def test_attention_goes_through_the_fast_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_export_by_dynamo", lambda *args: pytest.fail("slow"))
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 5, 8)
    enabled = torch.backends.mha.get_fastpath_enabled()
    out, _ = _outputs(OnnxRuntime().prepare(attention, (x, x, x)))
    assert torch.backends.mha.get_fastpath_enabled() is enabled
    with torch.no_grad():
        np.testing.assert_allclose(out, attention(x, x, x)[0].numpy(), atol=1e-5)


def test_what_the_runtime_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_export", lambda module, tensors: b"no model")
    with pytest.raises(LatencyError, match=r"ONNX Runtime can't run ReLU on \(\(2,\) torch"):
        OnnxRuntime().prepare(nn.ReLU(), (torch.zeros(2),))


def test_a_type_that_the_runtime_lacks_is_told_with_what_to_do() -> None:
    convolution, x = nn.Conv2d(2, 2, 1).to(torch.bfloat16), torch.zeros(1, 2, 4, 4).bfloat16()
    with pytest.raises(LatencyError, match='Measure with the back-end "torch" instead, or in fl'):
        OnnxRuntime().prepare(convolution, (x,))


def test_a_missing_exporter_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*args: Any, **options: Any) -> Any:
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(DependencyError, match=r'onnxscript: run pip install "halp_fx\[onnx\]"'):
        OnnxRuntime().prepare(nn.ReLU(), (torch.zeros(1),))


def test_the_fingerprint_names_what_changes_a_latency() -> None:
    fields = json.loads(OnnxRuntime(threads=2).fingerprint())
    assert fields["backend"] == "onnxruntime"
    assert fields["threads"] == 2
    assert fields["provider"] == "CPUExecutionProvider"
    assert fields["onnxruntime"] == onnxruntime.__version__
    assert {"cpu", "cores", "instructions", "system"} <= fields.keys()


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'")
        return original(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    backend = OnnxRuntime()  # only using it needs the package
    with pytest.raises(DependencyError, match=r'pip install "halp_fx\[onnx\]"'):
        backend.fingerprint()
    with pytest.raises(DependencyError, match=r'pip install "halp_fx\[onnx\]"'):
        backend.prepare(nn.ReLU(), (torch.zeros(1),))


def test_an_unknown_provider_is_told() -> None:
    with pytest.raises(InputError, match=r"this build of onnxruntime has .*CPUExecutionProvider"):
        OnnxRuntime(provider="AbacusExecutionProvider").fingerprint()


def test_a_provider_that_falls_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "get_providers", lambda self: ["OtherExecutionProvider"]
    )
    with pytest.raises(LatencyError, match="fell back from CPUExecutionProvider to Other"):
        OnnxRuntime().prepare(nn.ReLU(), (torch.zeros(1),))


def test_what_tensorrt_does_not_take_goes_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    options_of: list[dict[str, str]] = []

    class Session:
        def __init__(
            self, model: bytes, options: Any, providers: list[Any], enable_fallback: int
        ) -> None:
            assert not enable_fallback
            pairs = [one if isinstance(one, tuple) else (one, {}) for one in providers]
            asked.append([name for name, _ in pairs])
            options_of.append(pairs[0][1])

        def get_providers(self) -> list[str]:
            return asked[-1]

    everything = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: everything)
    half = (torch.zeros(1, dtype=torch.float16),)
    for provider in everything:
        OnnxRuntime(provider=provider)._session(onnxruntime, b"", (torch.zeros(1),))
    OnnxRuntime(provider=everything[0])._session(onnxruntime, b"", half)
    assert asked == [everything[:2], everything[1:2], everything[2:], everything[:2]]
    single, *others, halved = options_of
    assert others == [{}, {}]
    assert "trt_fp16_enable" not in single
    assert halved == {**single, "trt_fp16_enable": "True"}
    assert Path(single["trt_timing_cache_path"]).is_dir()
    assert [OnnxRuntime(provider=p).coarse for p in everything] == [True, False, False]


def test_libraries_that_packages_brought_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bool] = []
    everything = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: everything)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append(True), raising=False)
    module_under_test._preload.cache_clear()
    for provider in (everything[1], everything[0], everything[0]):
        OnnxRuntime(provider=provider).fingerprint()
    assert loaded == [True]
    module_under_test._preload.cache_clear()


def test_a_gpu_that_torch_does_not_see_is_in_the_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answers = {"A": "GPU A, 8.6, 550.1\n", "B": "GPU B, 8.6, 550.1\n", "": ""}
    texts = []
    for answer in answers.values():
        done = subprocess.CompletedProcess([], 0, answer, "")
        monkeypatch.setattr(subprocess, "run", lambda *args, done=done, **kwargs: done)
        texts.append(OnnxRuntime(provider="CUDAExecutionProvider").fingerprint())
    assert '"gpu": "GPU A"' in texts[0] and '"driver": "550.1"' in texts[0]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0: pass a whole number"),
        ({"samples": 0}, "samples is 0"),
        ({"min_sample_ms": float("inf")}, "min_sample_ms is inf"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxRuntime(**options)
