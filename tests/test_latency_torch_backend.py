"""Eager PyTorch as a back-end."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from halp_fx.errors import InputError, LatencyError
from halp_fx.latency import Backend, BlockTimer, Torch, measure_network
from halp_fx.latency import torch_backend as module_under_test

QUICK = {"samples": 2, "min_sample_ms": 0.01}


class Recorder(nn.Module):
    """Keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: Any, **options: Any) -> torch.Tensor:
        tensor = x["x"][0] if isinstance(x, dict) else x
        out = self.linear(tensor)
        self.calls.append(
            {
                "training": self.training,
                "grad": torch.is_grad_enabled(),
                "inference": torch.is_inference_mode_enabled(),
                "threads": torch.get_num_threads(),
                "dtype": out.dtype,
            }
        )
        return out


def test_it_is_a_backend_that_measures() -> None:
    backend = Torch()
    assert isinstance(backend, Backend)
    assert isinstance(backend, BlockTimer)
    assert (backend.name, backend.measured, backend.fuses) == ("torch", True, False)


def test_it_runs_in_eval_and_inference_mode_and_leaves_the_module_as_it_is() -> None:
    recorder = Recorder().train()
    backend = Torch(threads=1, **QUICK)  # type: ignore[arg-type]
    run = backend.prepare(recorder, (torch.zeros(2, 3),))
    assert recorder.training
    assert recorder.calls == []
    assert backend.block_ms(run, 3) > 0
    assert recorder.calls == []  # a copy ran
    assert recorder.linear.weight.dtype == torch.float32


def test_a_module_in_eval_mode_is_not_copied() -> None:
    recorder = Recorder().eval()
    backend = Torch(threads=1)
    run = backend.prepare(recorder, (torch.zeros(2, 3),))
    backend.block_ms(run, 3)
    assert (
        recorder.calls
        == [
            {
                "training": False,
                "grad": False,
                "inference": True,
                "threads": 1,
                "dtype": torch.float32,
            }
        ]
        * 3
    )
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recorder = Recorder().eval()
        backend = Torch(threads=2)
        backend.block_ms(backend.prepare(recorder, (torch.zeros(2, 3),)), 1)
        assert recorder.calls[0]["threads"] == 2
        assert torch.get_num_threads() == 1

        def fail() -> None:
            raise RuntimeError("broken kernel")

        with pytest.raises(RuntimeError, match="broken kernel"):
            backend.block_ms(fail, 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_threads_are_fixed_when_it_is_made() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        backend = Torch()
        text = backend.fingerprint()
        torch.set_num_threads(2)
        assert backend.threads == 1
        assert backend.fingerprint() == text
    finally:
        torch.set_num_threads(before)


def test_a_type_is_applied_to_module_and_inputs_but_not_to_indices() -> None:
    network = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3)).eval()
    backend = Torch(threads=1, dtype=torch.float64)
    backend.block_ms(backend.prepare(network, (torch.tensor([1, 2]),)), 1)
    assert network[1].weight.dtype == torch.float32
    seen: list[torch.dtype] = []
    watched = nn.Identity().eval()
    watched.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    backend.block_ms(backend.prepare(watched, (torch.zeros(2),)), 1)
    assert seen == [torch.float64]


def test_inputs_may_be_nested() -> None:
    recorder = Recorder().eval()
    timing = measure_network(recorder, ({"x": [torch.zeros(2, 3)]},), Torch(threads=1, **QUICK))  # type: ignore[arg-type]
    assert timing.samples == 2
    assert timing.median_ms > 0


def test_the_fingerprint_names_what_changes_a_latency() -> None:
    fields = json.loads(Torch(threads=3, dtype=torch.bfloat16).fingerprint())
    assert fields["backend"] == "torch"
    assert fields["device"] == "cpu"
    assert fields["threads"] == 3
    assert fields["dtype"] == "bfloat16"
    assert fields["torch"] == torch.__version__
    assert {"cpu", "cores", "instructions", "system"} <= fields.keys()
    assert Torch(threads=1).fingerprint() != Torch(threads=2).fingerprint()
    assert Torch(threads=1, samples=3).fingerprint() == Torch(threads=1).fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "toaster"}, 'device is \'toaster\': pass "cpu" or "cuda"'),
        ({"threads": 0}, "threads is 0: pass a whole number"),
        ({"threads": True}, "threads is True"),
        ({"dtype": torch.int8}, "dtype is torch.int8: pass a floating point type"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16': pass a floating point type, as torch.bf"),
        ({"device": None}, 'device is None: pass "cpu" or "cuda"'),
        ({"samples": 0}, "samples is 0"),
        ({"min_sample_ms": -1.0}, "min_sample_ms is -1.0: pass a finite number above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Torch(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_missing_gpu_is_told() -> None:
    for ask in (
        lambda: Torch(device="cuda").fingerprint(),
        lambda: Torch(device="cuda").prepare(nn.Identity(), ()),
    ):
        with pytest.raises(InputError, match="torch sees no CUDA device here"):
            ask()


class Event:
    """Stands for a CUDA event: writes down what is done with it."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, end: Event) -> float:
        return 2.5


def test_a_gpu_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Event.log = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"wait {device}"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    backend = Torch(device="cuda:0")
    assert backend.block_ms(lambda: log.append("run"), 3) == 2.5
    assert log == ["wait cuda:0", "record", "run", "run", "run", "record", "wait"]


class Graph:
    """Stands for a CUDA graph."""

    made: list[Graph] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.replayed = 0
        self.device: torch.device | None = None
        self.made.append(self)

    def replay(self) -> None:
        self.replayed += 1


class _Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None: ...


def _recorded_on(graph: Graph, stream: _Stream) -> Any:
    graph.device = stream.device
    return torch.no_grad()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    Event.log, Graph.made = [], []
    for name, stand_in in {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": _Stream,
        "synchronize": lambda device: None,
        "current_stream": _Stream,
        "device": lambda device: torch.no_grad(),
        "stream": lambda stream: torch.no_grad(),
        "graph": _recorded_on,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return Graph.made


def test_what_a_cuda_graph_works_on_lives_as_long(graphs: list[Graph]) -> None:
    class Held(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    module, x = Held(), torch.zeros(3)
    alive = [weakref.ref(module), weakref.ref(x)]
    replay = module_under_test._replay(partial(module, x), torch.device("cuda:1"))
    assert all(graph.device == torch.device("cuda:1") for graph in graphs)
    del module, x
    gc.collect()
    assert all(one() is not None for one in alive)
    assert torch.equal(replay.output, torch.ones(3))
    before = graphs[-1].replayed
    replay()
    assert graphs[-1].replayed == before + 1


def test_short_work_is_recorded_several_times(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    monkeypatch.setattr(Event, "elapsed_time", lambda self, end: 0.1)
    device = torch.device("cuda:0")
    replay = module_under_test._replay(lambda: runs.append(1), device)
    assert replay.calls == 5 and len(runs) == 3 + 1 + 5
    before = graphs[-1].replayed
    # 20 calls are 4 replays of 0.1 ms in all, and one call a fifth of one replay.
    assert module_under_test._cuda_ms(replay, 20, device) == pytest.approx(0.1)
    assert graphs[-1].replayed - before == 4
    assert module_under_test._cuda_ms(replay, 1, device) == pytest.approx(0.1 / 5)


def test_why_work_can_not_be_recorded_is_told(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the stream that was current is so again: torch leaves that to the caller."""
    current: list[Any] = []

    @contextmanager
    def entered(stream: _Stream) -> Iterator[None]:
        before = list(current)
        current.append(stream)
        try:
            yield
        finally:
            current[:] = before

    @contextmanager
    def recording(graph: Graph, stream: _Stream) -> Iterator[None]:
        current.append(graph)
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def work() -> None:
        if isinstance(current[-1], Graph):
            raise RuntimeError("it copies to the host")

    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    with pytest.raises(LatencyError, match=r"recorded as a CUDA graph \(it copies to the host\)"):
        module_under_test._replay(work, torch.device("cuda:0"))
    assert current == []


def test_long_work_is_recorded_once(graphs: list[Graph]) -> None:
    assert module_under_test._replay(lambda: None, torch.device("cuda:0")).calls == 1
    assert len(graphs) == 1


def test_a_network_is_measured_in_the_layout_that_is_asked_for() -> None:
    seen: list[bool] = []

    class Seeing(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            last = {"memory_format": torch.channels_last}
            seen.append(self.weight.is_contiguous(**last) and x.is_contiguous(**last))
            return super().forward(x)

    model: Any = Seeing(4, 4, 3).eval()
    model.to(memory_format=torch.channels_last)
    x = torch.zeros(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    for backend in (Torch(threads=1), Torch(threads=1, channels_last=True)):
        backend.prepare(model, (x,))()
    assert seen == [False, True]
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_precisions_set_by_their_newer_names_are_known() -> None:
    script = (
        "import json, torch\n"
        "from halp_fx.latency import Torch\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "print(json.loads(Torch().fingerprint())['float32_matmul'])\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("tf32", "high")


def test_other_accelerators_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: log.append("wait"))
    device = torch.device("mps")
    ms = module_under_test._accelerator_ms(lambda: log.append("run"), 2, device)
    assert ms > 0
    assert log == ["wait", "run", "run", "wait"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu() -> None:
    backend = Torch(device="cuda")
    fields = json.loads(backend.fingerprint())
    assert fields["gpu"] == torch.cuda.get_device_name()
    assert "threads" not in fields
    convolution = nn.Conv2d(8, 8, 3)
    timing = measure_network(convolution, (torch.zeros(1, 8, 16, 16),), backend)
    assert timing.median_ms > 0
    assert convolution.weight.device.type == "cpu"
