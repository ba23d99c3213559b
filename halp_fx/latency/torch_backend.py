"""Measuring with eager PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import InputError, LatencyError
from .backend import (
    GPU_SENTINEL,
    SENTINEL,
    map_tensors,
    placed,
    require_count,
    require_positive,
    settle,
    wall_ms,
)
from .device import cpu_facts, cuda_facts, fingerprint_text

__all__ = ["Torch"]

_GRAPH_MS = 0.5  # least length of a CUDA graph
_MOST_RECORDED = 50  # calls in a CUDA graph


@dataclass(frozen=True)
class Torch:
    """Eager PyTorch, in eval and inference mode; every operator is a kernel of its own.

    On a CPU the number of threads is set while a kernel is timed and restored afterwards. On a
    CUDA device a block of calls is timed by events on the current stream, so that the launches
    overlap with the work as they do in a network.

    Raises:
        InputError: an option is out of range, or the device has no name torch knows.
    """

    device: str = "cpu"
    threads: int | None = None  # CPU threads within an operator; None: torch's setting now
    dtype: torch.dtype | None = None  # run in this type; None: leave modules and inputs as they are
    # Images and convolution weights with channels last in memory; False: first, whatever layout
    # the network has.
    channels_last: bool = False
    # Replay a CUDA graph in place of launching each operator: how a network is run whose operators
    # are shorter than their launches.
    cuda_graphs: bool = False
    min_sample_ms: float = 1.0  # a sample is a block of calls of at least this long
    samples: int = 9  # samples a kernel

    name: ClassVar[str] = "torch"
    measured: ClassVar[bool] = True
    fuses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        try:
            device = torch.device(self.device)
        except (RuntimeError, TypeError) as e:
            raise InputError(f'device is {self.device!r}: pass "cpu" or "cuda"') from e
        object.__setattr__(self, "device", str(device))
        if self.threads is None:
            # Fixed now: the fingerprint must not change with torch's setting later.
            object.__setattr__(self, "threads", torch.get_num_threads())
        require_count("threads", self.threads)
        known: Any = self.dtype
        if known is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
            raise InputError(
                f"dtype is {known!r}: pass a floating point type, as torch.bfloat16, or None"
            )
        if self.cuda_graphs and device.type != "cuda":
            raise InputError(f"cuda_graphs is for a CUDA device, and device is {self.device!r}")
        require_count("samples", self.samples)
        require_positive("min_sample_ms", self.min_sample_ms)

    @property
    def sentinel(self) -> tuple[int, ...]:
        """Shape of the images of the reference convolution."""
        return SENTINEL if torch.device(self.device).type == "cpu" else GPU_SENTINEL

    @property
    def _device(self) -> torch.device:
        device = torch.device(self.device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def fingerprint(self) -> str:
        """JSON text of device, versions and settings.

        Raises:
            InputError: the device is not there.
        """
        kind = torch.device(self.device).type
        fields: dict[str, Any] = {
            "backend": self.name,
            "device": kind,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "float32_matmul": _matmul_precision(),
            "layout": "channels_last" if self.channels_last else "contiguous",
            **cpu_facts(),
        }
        if kind == "cpu":
            fields["threads"] = self.threads
        elif kind == "cuda":
            fields.update(cuda_facts(torch.device(self.device)))
            fields["cudnn_benchmark"] = torch.backends.cudnn.benchmark
            fields["convolution_float32"] = _convolution_precision()
            fields["cuda_graphs"] = self.cuda_graphs
        return fingerprint_text(fields)

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        """A callable that runs the module once; time it with `block_ms`.

        Args:
            module: any module; it is copied where it is not in eval mode, on the device and in
                the type, and left as it is.
            inputs: positional arguments of it; tensors are moved to the device.

        Raises:
            InputError: the device is not there.
        """
        if torch.device(self.device).type == "cuda":
            cuda_facts(torch.device(self.device))
        device = self._device
        ready = self._ready(module, device)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            dtype = self.dtype if tensor.is_floating_point() else None
            moved = placed(tensor, device, dtype)
            return moved.to(memory_format=self._layout) if moved.ndim == 4 else moved

        arguments = map_tensors(inputs, place)

        def run() -> Any:
            return ready(*arguments)

        return _replay(run, device) if self.cuda_graphs else run

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _ready(self, module: nn.Module, device: torch.device) -> Callable[..., Any]:
        """The module on its device, in its type and layout; itself if it is so, else a copy."""
        ready = settle(module, device, self.dtype)
        if all(t.is_contiguous(memory_format=self._layout) for t in _images(ready)):
            return ready
        ready = copy.deepcopy(ready) if ready is module else ready
        for tensor in _images(ready):
            tensor.data = tensor.data.contiguous(memory_format=self._layout)
        return ready

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        """Milliseconds that `calls` calls of `run` take together, the device's work included."""
        device = self._device
        with torch.inference_mode():
            if device.type == "cpu":
                with _threads(self.threads or 1):
                    return wall_ms(run, calls)
            if device.type == "cuda":
                return _cuda_ms(run, calls, device)
            return _accelerator_ms(run, calls, device)


def _images(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers that have a layout."""
    return (t for t in [*module.parameters(), *module.buffers()] if t.dim() == 4)


@dataclass(frozen=True)
class _Replay:
    """A recorded CUDA graph, and what it works on: it keeps no memory alive by itself."""

    graph: Any
    run: Callable[[], Any]  # holds the module and its inputs
    output: Any
    calls: int = 1  # of `run`, recorded one after the other

    def __call__(self) -> None:
        self.graph.replay()


def _replay(run: Callable[[], Any], device: torch.device) -> _Replay:
    """The same work, recorded as a CUDA graph.

    Short work is recorded several times: to start a graph takes microseconds too, which a network
    spends once and not for each of its kernels.

    Raises:
        LatencyError: the work can't be recorded (it copies to the host, or waits for it).
    """
    side = torch.cuda.Stream(device)
    try:
        # A recording that fails would leave its stream the current one.
        here = torch.cuda.stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), here, torch.inference_mode():
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # libraries set themselves up at the first calls
                for _ in range(3):
                    run()
            torch.cuda.current_stream(device).wait_stream(side)
            once = _recorded(run, 1, side)
            once()  # the first time it is sent to the device
            took = _cuda_ms(once, 1, device)
            calls = min(math.ceil(_GRAPH_MS / max(took, 1e-3)), _MOST_RECORDED)
            return once if calls == 1 else _recorded(run, calls, side)
    except RuntimeError as e:
        # To end a recording that failed fails too, which says less.
        raise LatencyError(
            f"the work can't be recorded as a CUDA graph ({e.__context__ or e}): measure with "
            "cuda_graphs=False"
        ) from e


def _recorded(run: Callable[[], Any], calls: int, stream: torch.cuda.Stream) -> _Replay:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # the usual one is of the first device
        for _ in range(calls):
            output = run()
    return _Replay(graph, run, output, calls)


def _matmul_precision() -> str:
    """How float32 matrices are multiplied (as "highest", "tf32")."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch's newer names, which the older ones don't know
        return str(torch.backends.cuda.matmul.fp32_precision)


def _convolution_precision() -> str | None:
    """How cuDNN computes float32 convolutions (as "tf32"), where torch tells."""
    settings: Any = getattr(torch.backends.cudnn, "conv", None)
    return getattr(settings, "fp32_precision", None)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cuda_ms(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    recorded = run.calls if isinstance(run, _Replay) else 1
    replays = max(round(calls / recorded), 1)
    with torch.cuda.device(device):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)  # work of the kernel before must not be counted
        start.record()
        for _ in range(replays):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * calls / (replays * recorded)


def _accelerator_ms(run: Callable[[], None], calls: int, device: torch.device) -> float:
    def block() -> None:
        for _ in range(calls):
            run()
        torch.accelerator.synchronize(device)

    torch.accelerator.synchronize(device)
    return wall_ms(block, 1)
