"""Values of a graph while it is traced, and what Python code may do with them."""

from __future__ import annotations

import builtins
import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

__all__ = ["ValueProxy", "proxies_as_values"]


class ValueProxy(fx.Proxy):
    """A value of the graph whose length, items and truth are known where shapes tell them."""

    tracer: Any  # our `Tracer`, whose module imports this one

    def __getattr__(self, k: str) -> Any:
        # Protocols of arrays: torch.tensor(size) should ask for a number. `_is_param` and the like
        # tell torch whether a tensor is a parameter.
        if k.startswith(("__", "_is_")):
            raise AttributeError(k)
        return super().__getattr__(k)

    def __len__(self) -> int:
        return len(self.tracer.known(self.node))

    def __index__(self) -> int:
        return int(self.tracer.same_in_any_batch(self.node, int))

    def __int__(self) -> int:
        return int(self.tracer.same_in_any_batch(self.node, (int, float)))

    def __float__(self) -> float:
        return float(self.tracer.same_in_any_batch(self.node, (int, float)))

    def __setitem__(self, item: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, item, value), {})


@contextmanager
def proxies_as_values() -> Iterator[None]:
    """While this lasts, Python code may treat proxies as what they stand for."""
    with _numbers_as_tensors(), _packed_sizes(), _proxies_as_tensors():
        yield


@contextmanager
def _proxies_as_tensors() -> Iterator[None]:
    """`isinstance(x, torch.Tensor)` is answered for the value, or the graph takes a wrong branch.

    The function itself is replaced: a proxy with another `__class__` would deceive C code, too.
    """
    plain = builtins.isinstance

    def typed(value: Any, kinds: Any, /) -> bool:
        if plain(value, kinds):
            return True
        if type(value) is not ValueProxy:
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

    def packing(function: Callable[..., Any], first: int) -> Callable[..., Any]:
        @functools.wraps(function)  # torch.fx reads the name of a method
        def packed(*args: Any, **kwargs: Any) -> Any:
            if any(map(_is_number, args[first:])):
                args = (*args[:first], tuple(args[first:]))
            return function(*args, **kwargs)

        return packed

    for name, function in plain.items():
        setattr(torch, name, packing(function, 0))
    torch.Tensor.expand = packing(expand, 1)  # type: ignore[method-assign]
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
