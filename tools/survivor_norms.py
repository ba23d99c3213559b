"""Norms over the surviving channels of a network that is only masked.

Layer, RMS and group norms, weights standardised by batch norm (NFNets), and tensors divided by
their own mean over channels (the global response norm of ConvNeXtV2).
"""

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

    A norm without weights is left as it is: nothing names its channels. Means over channels
    that a tensor is divided by leave out what is zero throughout, as masked channels are.
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
        self.alive = dict(alive)
        self.weights: list[Tensor] = []  # kept, so that no other tensor gets their ids

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RESHAPES and (mask := self.alive.get(id(args[0]))) is not None:
            return self._reshaped(func(*args, **kwargs), mask)
        if func is F.batch_norm and (mask := self.alive.get(id(args[0]))) is not None:
            return _standardised(mask, args, kwargs)
        if func is torch.Tensor.mean and _over_channels_alone(args[0], kwargs):
            return _mean_of_nonzero(args[0], kwargs["dim"])
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

    def _reshaped(self, result: Tensor, mask: Tensor) -> Tensor:
        """A weight in another shape has its mask in that shape."""
        self.alive[id(result)] = mask.reshape(result.shape)
        self.weights.append(result)
        return result


_RESHAPES = (torch.Tensor.reshape, torch.Tensor.view, torch.reshape)
_LAYER = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS = ("input", "normalized_shape", "weight", "eps")
_GROUP = ("input", "num_groups", "weight", "bias", "eps")
_BATCH = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
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


def _standardised(mask: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """A weight (1, O, I k k) by the statistics of its surviving columns; the others are zero."""
    given = {**dict(zip(_BATCH, args, strict=False)), **kwargs}
    x, weights = given["input"], mask.to(given["input"].dtype)
    count = weights.sum(2, keepdim=True).clamp(min=1)
    mean = (x * weights).sum(2, keepdim=True) / count
    variance = ((x - mean).square() * weights).sum(2, keepdim=True) / count
    y: Tensor = (x - mean) * torch.rsqrt(variance + given.get("eps", 1e-5)) * weights
    return y if given.get("weight") is None else y * given["weight"].reshape(1, -1, 1)


def _over_channels_alone(x: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether a mean runs over the only dim of what was reduced over space before."""
    dim = kwargs.get("dim")
    if x.ndim != 4 or not isinstance(dim, int) or not kwargs.get("keepdim"):
        return False
    return all(x.shape[d] == 1 for d in range(1, 4) if d != dim % 4)


def _mean_of_nonzero(x: Tensor, dim: int) -> Tensor:
    count = (x != 0).sum(dim, keepdim=True).clamp(min=1)
    return x.sum(dim, keepdim=True) / count
