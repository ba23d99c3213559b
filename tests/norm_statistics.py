"""Norms whose statistics run over the surviving channels only, for the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["NormChannels", "survivor_statistics"]

# Module name of a norm -> (parameter, dim) whose survivors are the norm's channels.
NormChannels = Mapping[str, tuple[str, int]]
Survivors = tuple[Tensor | None, ...]


def _select(x: Tensor, dims: Sequence[int], survivors: Survivors) -> Tensor:
    for dim, index in zip(dims, survivors, strict=True):
        if index is not None and len(index):  # empty: a dead branch, nobody reads it
            x = x.index_select(dim, index)
    return x


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def _layer_norm(
    survivors: Survivors,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    dims = list(range(x.ndim - len(normalized_shape), x.ndim))
    chosen = _select(x, dims, survivors)
    mean = chosen.mean(dims, keepdim=True)
    variance = chosen.var(dims, unbiased=False, keepdim=True)
    return _affine((x - mean) / torch.sqrt(variance + eps), weight, bias)


def _rms_norm(
    survivors: Survivors,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = list(range(x.ndim - len(normalized_shape), x.ndim))
    square = _select(x, dims, survivors).square().mean(dims, keepdim=True)
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    return _affine(x / torch.sqrt(square + floor), weight, None)


def _group_norm(
    survivors: Survivors,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    channels = x.shape[1]
    alive = torch.zeros(channels, dtype=torch.bool)
    index = survivors[0]
    alive[:] = index is None
    if index is not None:
        alive[index] = True
    dims = [1, *range(2, x.ndim)]
    parts = []
    for part, mask in zip(x.chunk(num_groups, dim=1), alive.chunk(num_groups, dim=0), strict=True):
        chosen = part[:, mask] if bool(mask.any()) else part
        mean = chosen.mean(dims, keepdim=True)
        variance = chosen.var(dims, unbiased=False, keepdim=True)
        parts.append((part - mean) / torch.sqrt(variance + eps))
    shape = (1, channels, *[1] * (x.ndim - 2))
    return _affine(
        torch.cat(parts, dim=1),
        None if weight is None else weight.reshape(shape),
        None if bias is None else bias.reshape(shape),
    )


_NORMS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
_WEIGHT_POSITION = 2  # in all of them: (input, shape or groups, weight, ...)


class _Statistics(TorchFunctionMode):
    """Replaces the norms' functions; finds the survivors by the weight or the module at work."""

    def __init__(self, by_weight: Mapping[int, Survivors]) -> None:
        super().__init__()
        self.by_weight = by_weight
        self.current: list[Survivors] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func not in _NORMS:
            return func(*args, **options)
        norm = _NORMS[func]
        position = _WEIGHT_POSITION
        weight = args[position] if len(args) > position else options.get("weight")
        survivors = self.by_weight.get(id(weight)) if weight is not None else None
        if self.current:
            survivors = self.current[-1]
        if survivors is None or all(index is None for index in survivors):
            return func(*args, **options)
        options.pop("cudnn_enabled", None)
        if "input" in options:
            args = (options.pop("input"), *args)
        return norm(survivors, *args, **options)


@contextmanager
def survivor_statistics(
    model: nn.Module, kept: Mapping[str, Survivors], norm_channels: NormChannels
) -> Iterator[None]:
    """Layer, group and RMS norms inside compute their statistics over the survivors.

    Args:
        model: the masked dense network that is run inside.
        kept: survivors of every parameter; a norm's are those of its weight.
        norm_channels: for norms without weights, the (parameter, dim) that has their channels.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_weight = {id(parameter): kept[name] for name, parameter in parameters.items()}
    mode = _Statistics(by_weight)
    with ExitStack() as stack:
        for name, (parameter, dim) in norm_channels.items():
            module = model.get_submodule(name)
            survivors: Survivors = (kept[parameter][dim],)

            def enter(_: nn.Module, __: Any, survivors: Survivors = survivors) -> None:
                mode.current.append(survivors)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                mode.current.pop()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(mode)
        yield
