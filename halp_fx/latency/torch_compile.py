"""Measuring with compiled PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import LatencyError
from .torch_backend import Torch

__all__ = ["TorchCompile"]


@dataclass(frozen=True)
class TorchCompile(Torch):
    """PyTorch with `torch.compile`; a convolution or matrix product runs as one kernel with the
    pointwise operators that follow it.

    Every kernel is compiled on its own, with shapes fixed to those of its inputs, which takes
    seconds each: widths are measured at few points, and steps are not looked for. On a CPU the
    compiler needs a C++ compiler.
    """

    name: ClassVar[str] = "torch.compile"
    fuses: ClassVar[bool] = True
    coarse: ClassVar[bool] = True  # a measurement is dear: few points

    def _ready(self, module: nn.Module, device: torch.device) -> Callable[..., Any]:
        compiled = torch.compile(super()._ready(module, device), dynamic=False)
        started = False

        def run(*arguments: Any) -> Any:
            nonlocal started
            if started:
                return compiled(*arguments)
            try:
                result = compiled(*arguments)
            except Exception as e:  # the compiler raises errors of many unrelated classes
                reason = (str(e).splitlines() or [""])[0]
                raise LatencyError(
                    f"torch.compile failed ({type(e).__name__}: {reason}): measure with the "
                    'back-end "torch" or "onnxruntime" instead'
                ) from e
            started = True
            return result

        return run
