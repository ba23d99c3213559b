"""Activation checkpointing: what it calls is traced as if it were called without."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.utils import checkpoint as library

__all__ = ["in_checkpoint", "opened_checkpoints"]

_OPTIONS = {"use_reentrant", "preserve_rng_state"} | {
    name
    for name, parameter in inspect.signature(library.checkpoint).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}
_inside = ContextVar("_inside", default=False)


def in_checkpoint() -> bool:
    """Whether what is traced now is under `torch.utils.checkpoint`."""
    return _inside.get()


def _called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = _inside.set(True)
    try:
        return function(*args, **{k: v for k, v in kwargs.items() if k not in _OPTIONS})
    finally:
        _inside.reset(token)


@contextmanager
def opened_checkpoints() -> Iterator[None]:
    """While this lasts, `torch.utils.checkpoint.checkpoint` calls its function and no more.

    It asks its arguments for their device and their storage, which what is traced does not have.
    """
    original = library.checkpoint
    # Most files have the function by a name of their own: from torch.utils.checkpoint import ...
    try:
        _put(_called, original)
        yield
    finally:
        _put(original, _called)  # what was imported meanwhile has it too


def _put(new: Callable[..., Any], old: Callable[..., Any]) -> None:
    """One function in place of another in all modules; not in this one, which defines it."""
    for module in list(sys.modules.values()):
        space = getattr(module, "__dict__", None)
        if space is globals() or not isinstance(space, dict):  # not of a class in their place
            continue
        for name, value in list(space.items()):
            if value is old:
                space[name] = new
