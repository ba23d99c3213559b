"""Copies of modules that share or drop their data, and tensors addressed by name."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from halp_fx.errors import InputError

__all__ = [
    "HOOKS",
    "detached_copy",
    "empty_like",
    "keep_values",
    "known_values",
    "named_tensors",
    "structural_copy",
    "substitute_copy",
    "tensor_at",
    "without_data",
]

# Where a module keeps the hooks of its forward pass.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

_MAX_VALUES = 1 << 16  # integer tensors up to this size keep their values: they may be indices


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, then buffers, under every name they have (shared ones more than once)."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer called `name`."""
    path, _, leaf = name.rpartition(".")
    found = getattr(module.get_submodule(path), leaf)
    assert isinstance(found, torch.Tensor)
    return found


def structural_copy(module: nn.Module) -> nn.Module:
    """A copy of the modules that shares all tensors with the original.

    Raises:
        InputError: a module holds what can't be copied.
    """
    shared = {
        id(t): t
        for own in module.modules()
        for store in (own._parameters, own._buffers, own.__dict__)
        for t in store.values()
        if isinstance(t, torch.Tensor)
    }
    return _copied(module, shared | _computed_tensors(module))


def detached_copy(module: nn.Module) -> nn.Module:
    """A copy that shares the parameters but has buffers of its own: it may be run."""
    return _copied(module, {id(p): p for p in module.parameters()} | _computed_tensors(module))


def _computed_tensors(module: nn.Module) -> dict[int, Any]:
    """Tensors with a history, without it: they can't be copied as such.

    Old-style weight norm keeps one on its module; a `forward` may keep features.
    """
    return {
        id(t): t.detach()
        for own in module.modules()
        for store in (own._buffers, own.__dict__)
        for name, value in store.items()
        if name not in _STORES
        for t in _tensors_within(value)
        if not t.is_leaf
    }


_STORES = ("_modules", "_parameters", "_buffers")


def _tensors_within(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in containers of Python's own, which may contain themselves."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, (list, tuple, set, frozenset, dict, deque)) and id(one) not in seen:
            seen.add(id(one))
            stack += one.values() if isinstance(one, dict) else one


def _copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, with an error that names what can't be copied."""
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception as error:
        found = _uncopyable(module, memo)
        raise InputError(
            f"{type(module).__name__} can't be copied, and pruning works on copies: "
            f"{found or ''}{type(error).__name__}: {error}. Set it to None or delete it before, "
            "give it a __deepcopy__, or make it where it is used"
        ) from error


def _uncopyable(module: nn.Module, memo: dict[int, Any]) -> str | None:
    """The first attribute of a module that can't be copied, for people."""
    for path, own in module.named_modules():
        for name, value in own.__dict__.items():
            if name in _STORES:
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # noqa: BLE001  the one that is looked for
                attribute = f"{path}.{name}" if path else name
                return f"the attribute {attribute!r} is of type {type(value).__name__}, "
    return None


def substitute_copy(module: nn.Module, tensors: dict[int, torch.Tensor]) -> Any:
    """A copy of the modules with tensor `t` replaced by `tensors[id(t)]`."""
    return _copied(module, _computed_tensors(module) | tensors)


def without_data(value: Any) -> Any:
    """The same nest with tensors on the device "meta"; small integer tensors keep their values."""
    if isinstance(value, torch.Tensor):
        empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        keep_values(empty, value)
        return empty
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(without_data(v) for v in value))
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(without_data(v) for v in value)
    if isinstance(value, dict):
        return {k: without_data(v) for k, v in value.items()}
    return value


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in without data; a parameter stays a parameter, small integers keep their values."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=False)
    keep_values(empty, tensor)
    return empty


def keep_values(empty: torch.Tensor, value: torch.Tensor) -> None:
    """Note the values of an integer tensor beside its stand-in without data."""
    if value.is_floating_point() or value.is_complex() or value.numel() > _MAX_VALUES:
        return
    known = known_values(value) if value.is_meta else value.detach().cpu().numpy().copy()
    if known is not None:
        empty._halp_values = known  # type: ignore[attr-defined]


def known_values(stand_in: Any) -> np.ndarray[Any, np.dtype[Any]] | None:
    """The values noted beside a stand-in; None where there are none, or it was written to since."""
    if not isinstance(stand_in, torch.Tensor) or stand_in._version:
        return None
    found: np.ndarray[Any, np.dtype[Any]] | None = getattr(stand_in, "_halp_values", None)
    return found
