"""Operators on tensors without data (device "meta")."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OnMeta", "run_on_meta"]


class OnMeta(TorchDispatchMode):
    """Makes every new tensor without data (device "meta")."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(  # noqa: D105
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run_on_meta(func, args, kwargs or {})


def run_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on tensors without data."""
    if func in _BATCH_NORMS and not args[5]:
        # In eval mode; torch's own way takes some milliseconds, more than all the rest.
        empty = args[0].new_empty(0)
        return torch.empty_like(args[0]), empty, empty
    return func(*args, **_on_meta(func, kwargs))


_BATCH_NORMS = {
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten.cudnn_batch_norm.default,
}


def _on_meta(func: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not _makes_tensor(func) and "device" not in kwargs:
        return kwargs
    kwargs = {**kwargs, "device": torch.device("meta")}
    kwargs.pop("pin_memory", None)
    return kwargs


def _makes_tensor(func: Any) -> bool:
    """Whether the operator makes a tensor from no tensor (zeros, arange ...)."""
    cached = _FACTORY.get(func)
    if cached is None:
        arguments = func._schema.arguments
        cached = any(a.name == "device" for a in arguments) and not any(
            "Tensor" in str(a.type) for a in arguments
        )
        _FACTORY[func] = cached
    return cached


_FACTORY: dict[Any, bool] = {}
