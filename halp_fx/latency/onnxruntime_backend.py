"""Measuring with ONNX Runtime."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..errors import DependencyError, InputError, LatencyError
from .backend import (
    GPU_SENTINEL,
    SENTINEL,
    iter_tensors,
    map_tensors,
    placed,
    require_count,
    require_positive,
    settle,
    wall_ms,
)
from .device import cpu_facts, cuda_facts, driver_facts, fingerprint_text

__all__ = ["OnnxRuntime", "onnx_bytes"]

_CUDA, _TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_ON_CUDA = frozenset({_CUDA, _TENSORRT})


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime with all graph optimisations; a convolution runs as one kernel with the batch
    norm, activation and addition that follow it.

    The module is exported in memory, with shapes fixed to those of the inputs. Inputs and outputs
    are allocated once, outside of what is timed.

    Raises:
        InputError: an option is out of range.
    """

    threads: int = 1  # CPU threads within an operator
    provider: str = "CPUExecutionProvider"  # execution provider, as ONNX Runtime names it
    min_sample_ms: float = 1.0  # a sample is a block of calls of at least this long
    samples: int = 9  # samples a kernel

    name: ClassVar[str] = "onnxruntime"
    measured: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    copies: ClassVar[bool] = True  # a transpose or a split is an operator

    def __post_init__(self) -> None:
        require_count("threads", self.threads)
        require_count("samples", self.samples)
        require_positive("min_sample_ms", self.min_sample_ms)

    def fingerprint(self) -> str:
        """JSON text of device, versions and settings.

        Raises:
            DependencyError: onnxruntime is not installed.
            InputError: this build of onnxruntime lacks the provider.
        """
        runtime = _runtime(self.provider)
        fields: dict[str, Any] = {
            "backend": self.name,
            "provider": self.provider,
            "onnxruntime": runtime.__version__,
            "optimization": "all",
            "threads": self.threads,
            **cpu_facts(),
        }
        if self.provider in _ON_CUDA:
            # A torch without CUDA may stand beside an ONNX Runtime that has it.
            known = torch.cuda.is_available()
            fields.update(cuda_facts(torch.device("cuda", 0)) if known else driver_facts())
        return fingerprint_text(fields)

    @property
    def coarse(self) -> bool:
        """Whether a measurement is dear: TensorRT builds an engine for each."""
        return self.provider == _TENSORRT

    @property
    def sentinel(self) -> tuple[int, ...]:
        """Shape of the images of the reference convolution."""
        return GPU_SENTINEL if self.provider in _ON_CUDA else SENTINEL

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        """A callable that runs the exported module once.

        Args:
            module: any module that exports to ONNX; it is left as it is.
            inputs: positional arguments of it; numbers and None become constants.

        Raises:
            DependencyError: onnxruntime is not installed.
            InputError: this build of onnxruntime lacks the provider.
            LatencyError: the module can't be exported, or ONNX Runtime can't run it.
        """
        runtime = _runtime(self.provider)
        model = onnx_bytes(module, inputs)
        tensors = tuple(iter_tensors(_on_cpu(inputs)))
        try:
            session = self._session(runtime, model, tensors)
            return _bound_run(runtime, session, tensors, self.provider in _ON_CUDA)
        except LatencyError:
            raise
        except Exception as e:  # onnxruntime's exceptions share no base class of their own
            raise LatencyError(
                f"ONNX Runtime can't run {_describe(module, tensors)}: {e}. Measure with the "
                'back-end "torch" instead, or in float32: it lacks many operators of other types.'
            ) from e

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        """Milliseconds that `calls` calls of `run` take together."""
        return wall_ms(run, calls)  # a run returns when the provider has finished

    def _session(self, runtime: Any, model: bytes, tensors: tuple[torch.Tensor, ...]) -> Any:
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads of idle sessions would spin on the cores that the session being timed needs:
        # a convolution on two cores took twice as long, and up to twenty times beside others.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers: list[Any] = [self.provider]
        if self.provider == _TENSORRT:
            half = any(tensor.dtype == torch.float16 for tensor in tensors)
            providers = [(_TENSORRT, _tensorrt_options(half))]
            # What TensorRT does not take goes to CUDA, as in use, and not to the CPU.
            providers += [name for name in [_CUDA] if name in runtime.get_available_providers()]
        # Without the fallback, why a provider does not start is told, memory that lacks too.
        session = runtime.InferenceSession(model, options, providers=providers, enable_fallback=0)
        active = session.get_providers()
        if active[0] != self.provider:
            raise LatencyError(
                f"ONNX Runtime fell back from {self.provider} to {active[0]}: the libraries of the "
                "provider could not be loaded. Install them, or pass another provider."
            )
        return session


def onnx_bytes(module: nn.Module, inputs: tuple[Any, ...]) -> bytes:
    """A module as ONNX, with shapes fixed to those of the inputs and the weights inside.

    The ONNX inputs are named "input_0", "input_1" ... in the order in which tensors occur in
    `inputs`; those that the module doesn't use may be missing.

    Args:
        module: any module that exports to ONNX; it is exported in eval mode and left as it is.
        inputs: positional arguments of it; numbers and None become constants.

    Raises:
        DependencyError: a package that the export needs is not installed.
        LatencyError: the module can't be exported.

    Example:
        >>> import onnx, torch
        >>> from torch import nn
        >>> data = onnx_bytes(nn.Conv2d(3, 8, 3), (torch.zeros(1, 3, 9, 9),))
        >>> [node.op_type for node in onnx.load_from_string(data).graph.node]
        ['Conv']
    """
    arguments = _on_cpu(inputs)
    flat = _Flat(settle(module, torch.device("cpu"), None), arguments).eval()
    return _export(flat, tuple(iter_tensors(arguments)))


def _on_cpu(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    cpu = torch.device("cpu")
    return cast("tuple[Any, ...]", map_tensors(inputs, lambda tensor: placed(tensor, cpu)))


class _Flat(nn.Module):
    """A module seen from tensors to a tuple of tensors; what else it takes is held constant."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.module = module
        # Only the structure is needed; the tensors themselves would be exported as constants.
        self.structure = map_tensors(inputs, lambda _: torch.empty(0))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        remaining = iter(tensors)
        arguments = map_tensors(self.structure, lambda _: next(remaining))
        return tuple(iter_tensors(self.module(*arguments)))


def _runtime(provider: str) -> Any:
    """The onnxruntime package, with the provider in it."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as e:
        raise DependencyError(
            "the onnxruntime back-end needs the onnxruntime package: "
            'run pip install "halp_fx[onnx]"'
        ) from e
    available = runtime.get_available_providers()
    if provider not in available:
        raise InputError(
            f"provider is {provider!r}: this build of onnxruntime has {', '.join(available)}"
        )
    _preload(runtime, provider)
    return runtime


@functools.cache
def _preload(runtime: Any, provider: str) -> None:
    """Load the libraries of CUDA that packages brought, which the loader does not find itself."""
    preload = getattr(runtime, "preload_dlls", None)
    if provider in _ON_CUDA and preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            preload()


def _tensorrt_options(half: bool) -> dict[str, str]:
    """Options of TensorRT's provider for a model in half precision, or not.

    What its kernels took once is kept for this process, so that a network that is prepared twice
    runs the same ones.
    """
    kept = {"trt_timing_cache_enable": "True", "trt_timing_cache_path": _timing_cache().name}
    return {**kept, "trt_fp16_enable": "True"} if half else kept


@functools.cache
def _timing_cache() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="halp_fx-")


def _export(module: nn.Module, tensors: tuple[torch.Tensor, ...]) -> bytes:
    """ONNX bytes of `module(*tensors)`.

    The TorchScript exporter takes some 5 ms a kernel and the newer one some 500 ms, which counts
    for thousands of kernels; the newer one is used where the older one fails or is gone.
    """
    names = [f"input_{i}" for i in range(len(tensors))]
    with warnings.catch_warnings(), _without_fast_path():
        warnings.simplefilter("ignore")
        try:
            return _export_by_torchscript(module, tensors, names)
        except Exception:  # noqa: BLE001  # of many unrelated classes; the other exporter reports
            return _export_by_dynamo(module, tensors, names)


def _export_by_torchscript(
    module: nn.Module, tensors: tuple[torch.Tensor, ...], names: list[str]
) -> bytes:
    buffer = io.BytesIO()
    with torch.no_grad(), _without_exporter_log():
        torch.onnx.export(
            module,
            tensors,
            buffer,  # type: ignore[arg-type]  # the annotation leaves out open files
            input_names=names,
            dynamo=False,
        )
    return buffer.getvalue()


def _export_by_dynamo(
    module: nn.Module, tensors: tuple[torch.Tensor, ...], names: list[str]
) -> bytes:
    try:
        program = torch.onnx.export(
            module, tensors, input_names=names, dynamo=True, verbose=False, optimize=True
        )
    except ImportError as e:
        raise DependencyError(
            f'the export to ONNX needs the package {e.name}: run pip install "halp_fx[onnx]"'
        ) from e
    except Exception as e:  # torch's exporters raise errors of many unrelated classes
        inner = module.module if isinstance(module, _Flat) else module
        raise LatencyError(
            f"{_describe(inner, tensors)} can't be exported to ONNX, so ONNX Runtime can't "
            f'measure it: {e}. Measure with the back-end "torch" instead.'
        ) from e
    if program is None:
        raise LatencyError("torch.onnx.export returned no program; use another torch version")
    return bytes(program.model_proto.SerializeToString())


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Attention as the operators that ONNX has, not as the one fused operator of eager mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _without_exporter_log() -> Iterator[None]:
    """No graphs on standard output: the TorchScript exporter prints each one that it fails on.

    It switches its log on for every export, and neither `verbose` nor the log's own switch
    prevents that, so the switch is taken away from it.
    """
    switch = getattr(torch._C, "_jit_set_onnx_log_enabled", None)
    if switch is None:
        yield
        return
    switch(False)
    torch._C._jit_set_onnx_log_enabled = lambda enabled: None  # noqa: ARG005
    try:
        yield
    finally:
        torch._C._jit_set_onnx_log_enabled = switch


def _describe(module: nn.Module, tensors: tuple[torch.Tensor, ...]) -> str:
    shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
    return f"{type(module).__name__} on ({shapes})"


@dataclass(frozen=True)
class _BoundRun:
    """Runs a session; holds the memory, to which the binding keeps no references of its own."""

    session: Any
    binding: Any
    memory: Any

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)


def _bound_run(
    runtime: Any, session: Any, tensors: tuple[torch.Tensor, ...], on_cuda: bool
) -> Callable[[], None]:
    """A run with inputs and outputs that are allocated once, on the device of the provider."""
    device = "cuda" if on_cuda else "cpu"
    arrays = {f"input_{i}": tensor.numpy() for i, tensor in enumerate(tensors)}
    binding = session.io_binding()
    held = []
    for node in session.get_inputs():
        value = runtime.OrtValue.ortvalue_from_numpy(arrays[node.name], device, 0)
        binding.bind_ortvalue_input(node.name, value)
        held.append(value)
    names = [node.name for node in session.get_outputs()]
    for name in names:
        binding.bind_output(name, device)
    session.run_with_iobinding(binding)
    outputs = binding.get_outputs()
    for name, value in zip(names, outputs, strict=True):
        binding.bind_ortvalue_output(name, value)
    return _BoundRun(session, binding, (held, outputs, arrays))
