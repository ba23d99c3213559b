"""Costs by formula: the roofline, for where there is no device, and for tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from ..errors import InputError, LatencyError
from .backend import require_count, require_positive
from .device import fingerprint_text

__all__ = ["Analytic"]


@dataclass(frozen=True)
class Analytic:
    """The roofline of Williams, Waterman and Patterson (CACM 52(4), 2009).

    A kernel takes `max(flops / peak, bytes / bandwidth) + overhead`: either the arithmetic or
    the memory is the bottleneck. With `step` above 1 the cost is a staircase, as on hardware
    that computes channels in blocks: channel counts are rounded up to a multiple of `step`
    before they are priced.

    Raises:
        InputError: a parameter is out of range.

    Example:
        >>> Analytic(peak_gflops=100.0, bandwidth_gbs=20.0).cost_ms(2e8, 1e6)
        2.0
    """

    peak_gflops: float = 100.0  # 1e9 floating point operations a second
    bandwidth_gbs: float = 20.0  # 1e9 bytes a second
    overhead_ms: float = 0.0  # added to each kernel
    step: int = 1  # channels are computed in blocks of this many

    name: ClassVar[str] = "analytic"
    measured: ClassVar[bool] = False
    fuses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("peak_gflops", "bandwidth_gbs"):
            require_positive(name, getattr(self, name))
        if not (math.isfinite(self.overhead_ms) and self.overhead_ms >= 0):
            raise InputError(f"overhead_ms is {self.overhead_ms!r}: pass a number of at least 0")
        require_count("step", self.step)

    def cost_ms(self, flops: Any, bytes_: Any) -> Any:
        """Cost of one kernel in milliseconds.

        Args:
            flops: floating point operations, a multiply-add counted as two; number or array.
            bytes_: bytes read and written; number or array that broadcasts with `flops`.

        Returns:
            A float where both are numbers, else a float64 array of the broadcast shape.
        """
        compute_ms = np.asarray(flops, dtype=np.float64) / (self.peak_gflops * 1e6)
        memory_ms = np.asarray(bytes_, dtype=np.float64) / (self.bandwidth_gbs * 1e6)
        cost = np.maximum(compute_ms, memory_ms) + self.overhead_ms
        return float(cost) if np.ndim(cost) == 0 else cost

    def round_channels(self, n: Any) -> Any:
        """Channel counts rounded up to a multiple of `step`; a number or an integer array."""
        counts = np.asarray(n, dtype=np.int64)
        rounded = -(-counts // self.step) * self.step
        return int(rounded) if np.ndim(rounded) == 0 else rounded

    def fingerprint(self) -> str:
        """JSON text of the parameters."""
        return fingerprint_text({"backend": self.name, **asdict(self)})

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:  # noqa: ARG002
        """Never runs anything.

        Raises:
            LatencyError: always; costs come from `cost_ms`.
        """
        raise LatencyError(
            "the analytic back-end computes costs and runs nothing: use cost_ms, or measure with "
            "halp_fx.latency.Torch or halp_fx.latency.OnnxRuntime"
        )
