"""What a back-end is, what it is asked to measure, and what it answers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..devices import named_devices, rename_devices
from ..errors import InputError, LatencyError

__all__ = [
    "GPU_SENTINEL",
    "SENTINEL",
    "Backend",
    "BlockTimer",
    "Job",
    "Timing",
    "iter_tensors",
    "map_tensors",
    "placed",
    "require_count",
    "require_positive",
    "settle",
    "wall_ms",
]


# Images (N, C, H, W) of the reference convolution: on a GPU it must be more than its launch.
SENTINEL = (1, 16, 28, 28)
GPU_SENTINEL = (32, 128, 56, 56)


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Raises:
        LatencyError: a figure is negative or not finite, or there are no samples.
    """

    median_ms: float  # median of the samples, milliseconds a call
    spread_ms: float  # half the interquartile range of the samples, milliseconds
    samples: int  # how many samples; each is a block of calls

    def __post_init__(self) -> None:
        for name in ("median_ms", "spread_ms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise LatencyError(f"{name} is {value!r}: a time is finite and at least 0")
        if self.samples < 1:
            raise LatencyError(f"samples is {self.samples!r}: a timing has at least one")


@dataclass(frozen=True)
class Job:
    """A kernel to measure."""

    key: str  # signature of the kernel: op, shapes, dtype, memory layout
    # Makes the kernel and inputs for it; called only when the key is not in the table yet.
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    optional: bool = False  # left out where it can't be built or run, which is no error then


@runtime_checkable
class Backend(Protocol):
    """What runs kernels: this is all that a back-end of your own needs.

    A back-end on which calls return before the work is done also needs `block_ms`
    (`BlockTimer`). `min_sample_ms` and `samples`, where present, replace the defaults of
    `measure_jobs`. With `copies = True` a transpose or a split of a tensor is a kernel, where
    PyTorch only looks at it in another way. With `coarse = True` few widths are measured, for
    measurements that are dear, and a finished network is looked at once. `sentinel` is the shape
    (N, C, H, W) of the images that the reference convolution takes, where (1, 16, 28, 28) is too
    small to tell how fast the device is: one whose clock takes half a second to rise, so what is
    measured runs that long before it counts.
    """

    @property
    def name(self) -> str:
        """Name of the back-end, as "torch"."""
        ...

    @property
    def measured(self) -> bool:
        """True: costs are measured. False: they are computed."""
        ...

    @property
    def fuses(self) -> bool:
        """True: convolution, norm, activation and addition run as one kernel."""
        ...

    def fingerprint(self) -> str:
        """JSON text of an object: what identifies the device and the settings; names no host."""
        ...

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        """A callable that runs `module(*inputs)` once; the module itself is left as it is."""
        ...


@runtime_checkable
class BlockTimer(Backend, Protocol):
    """A back-end that times blocks of calls itself (asynchronous devices, thread settings)."""

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        """Milliseconds that `calls` calls of `run` take together."""
        ...


def require_count(name: str, value: Any) -> None:
    """Check an option of a back-end.

    Raises:
        InputError: the value is no whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}: pass a whole number of at least 1")


def require_positive(name: str, value: Any) -> None:
    """Check an option of a back-end.

    Raises:
        InputError: the value is no finite number above 0.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{name} is {value!r}: pass a finite number above 0")


def wall_ms(run: Callable[[], None], calls: int) -> float:
    """Milliseconds on the wall clock that `calls` calls of `run` take together."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        run()
    return (time.perf_counter_ns() - start) / 1e6


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with every tensor in its tuples, lists and dicts replaced by `change(tensor)`."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def iter_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in `value`, in the order in which `map_tensors` meets them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from iter_tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from iter_tensors(item)


def placed(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor on a device (and in a type); one that repeats along its first dim is written out.

    Of such a one only what repeats is moved there.
    """
    tensor = tensor.detach()
    if tensor.dim() and tensor.shape[0] > 1 and tensor.stride(0) == 0:
        return tensor[:1].to(device=device, dtype=dtype).expand(tensor.shape).contiguous()
    return tensor.to(device=device, dtype=dtype)


def settle(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """`module` in eval mode on `device` (and in `dtype`): itself if it is so, else a copy."""
    state = [*module.parameters(), *module.buffers()]
    fits = all(
        tensor.device == device
        and (dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype)
        for tensor in state
    )
    fits = fits and all(named == device for named in named_devices(module))
    if fits and not any(part.training for part in module.modules()):
        return module
    settled = copy.deepcopy(module).eval().to(device)
    rename_devices(settled, device)
    return settled if dtype is None else settled.to(dtype)
