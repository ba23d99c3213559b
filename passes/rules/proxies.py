"""Values of a graph while it is traced, and what Python code may do with them."""

from __future__ import annotations

import builtins
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

__all__ = [
    "ValueProxy",
    "facts_are_values",
    "facts_as_values",
    "plain_function",
    "proxies_as_values",
]

_FACTS = ("dtype", "device")
_AS_VALUES: ContextVar[bool] = ContextVar("_AS_VALUES", default=False)


@contextmanager
def facts_as_values(wanted: bool = True) -> Iterator[None]:
    """While this lasts, `x.dtype` and `x.device` are what they are for the example.

    Else they are values of the graph, which moves to other devices and dtypes; but `is`, `str` and
    dicts take those for what they are, an object.
    """
    token = _AS_VALUES.set(wanted)
    try:
        yield
    finally:
        _AS_VALUES.reset(token)


def facts_are_values() -> bool:
    """Whether `facts_as_values` lasts."""
    return _AS_VALUES.get()


class ValueProxy(fx.Proxy):
    """A value of the graph whose length, items and truth are known where shapes tell them."""

    tracer: Any  # our `Tracer`, whose module imports this one

    def __getattr__(self, k: str) -> Any:
        # Protocols of arrays: torch.tensor(size) should ask for a number. `_is_param` and the like
        # tell torch whether a tensor is a parameter.
        if k.startswith(("__", "_is_")):
            raise AttributeError(k)
        found = ValueAttribute(self, k)
        if k in _FACTS and facts_are_values():
            try:
                value = self.tracer.known(found.node)
            except fx.proxy.TraceError:  # it depends on data
                return found
            self.tracer.graph.erase_node(found.node)
            return value
        return found

    def __len__(self) -> int:
        return int(self.tracer.decided(self.node, len))

    def __index__(self) -> int:
        return int(self.tracer.same_in_any_batch(self.node, int))

    def __int__(self) -> int:
        return int(self.tracer.same_in_any_batch(self.node, (int, float)))

    def __float__(self) -> float:
        return float(self.tracer.same_in_any_batch(self.node, (int, float)))

    def __setitem__(self, item: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, item, value), {})


class ValueAttribute(fx.proxy.Attribute, ValueProxy):
    """`x.shape` and the like: a value too."""


_KINDS = (ValueProxy, ValueAttribute)
_PATCHING = threading.RLock()
_LEN = builtins.len


@contextmanager
def proxies_as_values() -> Iterator[None]:
    """While this lasts, Python code may treat proxies as what they stand for.

    One thread at a time.
    """
    with (
        _PATCHING, _numbers_as_tensors(), _packed_sizes(), _proxies_as_tensors(),
        _lengths_as_sizes(),
    ):  # fmt: skip
        yield


def plain_function(target: Any) -> Any:
    """The function that a target of a node stands for, where that is one of these."""
    return _LEN if target is _length else target


@contextmanager
def _lengths_as_sizes() -> Iterator[None]:
    """`len(x)` of a tensor is its size in the graph, where that depends on the batch."""
    before = builtins.len
    builtins.len = _length
    try:
        yield
    finally:
        builtins.len = before


def _length(value: Any, /) -> Any:
    # All code calls this meanwhile: no more than a look at the type.
    if type(value) in _KINDS and value.tracer.grows_with_batch(value.node):
        return value.size(0)
    return _LEN(value)


@contextmanager
def _proxies_as_tensors() -> Iterator[None]:
    """`isinstance(x, torch.Tensor)` is answered for the value, or the graph takes a wrong branch.

    The function itself is replaced: a proxy with another `__class__` would deceive C code, too.
    """
    plain = builtins.isinstance

    def typed(value: Any, kinds: Any, /) -> bool:
        if plain(value, kinds):
            return True
        if not plain(value, ValueProxy):
            return False
        named = kinds if plain(kinds, tuple) else getattr(kinds, "__args__", (kinds,))
        return torch.Tensor in named and value.tracer.is_tensor(value.node)

    builtins.isinstance = typed
    try:
        yield
    finally:
        builtins.isinstance = plain


@contextmanager
def _packed_sizes() -> Iterator[None]:
    """`torch.zeros(x.shape[0], 4)` takes proxies when its sizes are one argument."""
    factories = ("zeros", "ones", "empty", "rand", "randn")
    plain = {name: getattr(torch, name) for name in factories}
    expand = torch.Tensor.expand

    def packing(function: Callable[..., Any]) -> Callable[..., Any]:
        def packed(*args: Any, **kwargs: Any) -> Any:
            if any(map(_is_number, args)):
                args = (tuple(args),)
            return function(*args, **kwargs)

        return packed

    def expanded(tensor: torch.Tensor, *sizes: Any, **kwargs: Any) -> Any:
        if "size" in kwargs:
            sizes = (kwargs.pop("size"),)
        given = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        proxy = next((size for size in given if isinstance(size, ValueProxy)), None)
        if proxy is None:
            return expand(tensor, *sizes, **kwargs)
        return proxy.tracer.create_proxy("call_method", "expand", (tensor, *given), kwargs)

    for name, function in plain.items():
        setattr(torch, name, packing(function))
    torch.Tensor.expand = expanded  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(torch, name, function)
        del torch.Tensor.expand


def _is_number(value: Any) -> bool:
    return isinstance(value, ValueProxy) and isinstance(value.tracer.known(value.node), int)


@contextmanager
def _numbers_as_tensors() -> Iterator[None]:
    """While this lasts, `torch.tensor(x.shape[1])` makes a constant: it takes no proxies."""
    plain, like = torch.tensor, torch.as_tensor

    def unwrapped(data: Any) -> Any:
        if isinstance(data, ValueProxy):
            return data.tracer.same_in_any_batch(data.node, (int, float))
        if isinstance(data, (list, tuple)):
            return type(data)(unwrapped(item) for item in data)
        return data

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(unwrapped(data), *args, **kwargs)

    def as_tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, ValueProxy) and isinstance(data.tracer.known(data.node), torch.Tensor):
            return data
        return like(unwrapped(data), *args, **kwargs)

    torch.tensor, torch.as_tensor = tensor, as_tensor
    try:
        yield
    finally:
        torch.tensor, torch.as_tensor = plain, like
