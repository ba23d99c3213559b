"""Layer, RMS and group norms over the surviving channels of a network that is only masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["survivor_statistics"]

Kept = Mapping[str, tuple[Tensor | None, ...]]


@contextmanager
def survivor_statistics(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Layer, RMS and group norms inside take their statistics over the survivors of their weight.

    A norm without weights is left as it is: nothing names its channels.
    """
    alive: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        dims = kept.get(name, ())
        if any(index is not None and len(index) for index in dims):
            mask = torch.ones(parameter.shape, dtype=torch.bool)
            for dim, index in enumerate(dims):
                if index is not None and len(index):
                    inside = torch.zeros(parameter.shape[dim], dtype=torch.bool)
                    inside[index.cpu()] = True
                    shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
                    mask &= inside.reshape(shape)
            alive[id(parameter)] = mask
    with _Norms(alive):
        yield


class _Norms(TorchFunctionMode):
    """Computes norms by hand where some channels of their weight are removed."""

    def __init__(self, alive: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.alive = alive

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        names = _ARGUMENTS.get(func)
        if names is None:
            return func(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = self.alive.get(id(given.get("weight")))
        if mask is None:
            return func(*args, **kwargs)
        if names == _GROUP:
            return _group_norm(mask, given)
        return _layer_norm(mask, given, centered=names == _LAYER)


_LAYER = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS = ("input", "normalized_shape", "weight", "eps")
_GROUP = ("input", "num_groups", "weight", "bias", "eps")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.layer_norm: _LAYER,
    torch.layer_norm: _LAYER,
    F.rms_norm: _RMS,
    torch.rms_norm: _RMS,
    F.group_norm: _GROUP,
    torch.group_norm: _GROUP,
}


def _layer_norm(mask: Tensor, given: Mapping[str, Any], *, centered: bool) -> Tensor:
    """Input (..., *normalized_shape), mask (*normalized_shape)."""
    x, eps = given["input"], given.get("eps", 1e-5 if centered else None)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = list(range(x.ndim - mask.ndim, x.ndim))
    weights = mask.to(x.dtype)
    count = weights.sum()
    mean = (x * weights).sum(dims, keepdim=True) / count if centered else 0.0
    power = ((x - mean).square() * weights).sum(dims, keepdim=True) / count
    y = (x - mean) * torch.rsqrt(power + eps) * given["weight"]
    bias = given.get("bias")
    return y if bias is None else y + bias


def _group_norm(mask: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Input (N, C, ...), mask (C); a group of which nothing is left may have any statistics."""
    x, groups, eps = given["input"], given["num_groups"], given.get("eps", 1e-5)
    parts = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    weights = mask.to(x.dtype).reshape(1, groups, -1, 1)
    count = weights.sum(2, keepdim=True).clamp(min=1) * parts.shape[3]
    mean = (parts * weights).sum((2, 3), keepdim=True) / count
    variance = ((parts - mean).square() * weights).sum((2, 3), keepdim=True) / count
    y = ((parts - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    bias = given.get("bias")
    y = y * given["weight"].reshape(shape)
    return y if bias is None else y + bias.reshape(shape)
