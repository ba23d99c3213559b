"""Which channels a caller leaves to be pruned: patterns over the names of modules and parameters.

A pattern is a glob (`fnmatch`) over dotted names; "layer1" is the module and all that is below it,
and "*" crosses dots. What a pattern decides about is the *output* channels of what it matches: the
rows of a weight, and whatever else has one value for each of those channels.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from halp_fx.errors import InputError
from halp_fx.passes.rules.core import Block, PinRecord
from halp_fx.passes.rules.structure import named_tensors
from halp_fx.types import IntArray

__all__ = [
    "Scope",
    "Selection",
    "check_patterns",
    "matches",
    "output_dims",
    "owner_of",
    "scope_of",
]

Selection: TypeAlias = str | Sequence[str] | Callable[[str, int], bool]
_Slices: TypeAlias = frozenset[tuple[str, int]]

_EXCLUDED = "excluded by the caller"
_NOT_INCLUDED = "excluded by the caller: not in include"
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Scope:
    """The dims of parameters and buffers that the caller wants whole."""

    excluded: _Slices = frozenset()  # (parameter or buffer, dim)
    not_included: _Slices = frozenset()

    def pins(self, blocks: Iterable[Block]) -> Iterator[PinRecord]:
        """Pins of all labels of those dims."""
        everything = list(blocks)
        for slices, reason in ((self.excluded, _EXCLUDED), (self.not_included, _NOT_INCLUDED)):
            labels: list[IntArray] = [
                np.arange(b.start, b.start + b.size, dtype=np.int64)
                for b in everything
                if (b.name, b.dim) in slices
            ]
            if labels:
                yield PinRecord(np.concatenate(labels), "", "", reason)

    def holds(self, names: Iterable[str]) -> bool:
        """Whether one of these parameters and buffers has a dim that stays whole.

        A residual branch that has one is not to be dropped.
        """
        held = {name for name, _ in self.excluded | self.not_included}
        return any(name in held for name in names)


def scope_of(
    module: nn.Module, include: Selection | None = None, exclude: Selection | None = None
) -> Scope | None:
    """What `include` and `exclude` leave to be pruned of `module`; None where that's everything.

    Args:
        include: only the output channels of what this matches may go. Norms, biases and depthwise
            convolutions follow the channels that come in: they needn't be named.
        exclude: the output channels of what this matches stay, whatever `include` says.

    Both are a glob, several, or a callable `(parameter name, dim) -> bool`. `include` is asked
    about the dims that hold output channels (0; 1 in transposed convolutions), `exclude` about
    every dim, and what it says True of stays whole.

    Raises:
        InputError: a pattern matches nothing, or is no pattern; the message has close matches.
    """
    if include is None and exclude is None:
        return None
    included = None if include is None else _predicate(module, include, "include")
    excluded = None if exclude is None else _predicate(module, exclude, "exclude")
    kept_whole: set[tuple[str, int]] = set()
    outside: set[tuple[str, int]] = set()
    for names, tensor in _by_tensor(module):
        owners = [owner_of(module, name) for name in names]
        outputs = [output_dims(owner, tensor) for owner in owners]
        for name, dims in zip(names, outputs, strict=True):
            if excluded is None:
                continue
            asked = range(tensor.ndim) if callable(exclude) else dims
            # A tensor that is shared is the same one under every name.
            kept_whole.update((n, dim) for dim in asked if excluded(name, dim) for n in names)
        follows = any(_follows(owner, tensor) for owner in owners)
        if included is None or follows:
            continue
        asked_of = [(name, dim) for name, dims in zip(names, outputs, strict=True) for dim in dims]
        if not any(included(name, dim) for name, dim in asked_of):
            outside.update(asked_of)
    return Scope(frozenset(kept_whole), frozenset(outside))


def matches(pattern: str, name: str) -> bool:
    """Whether a glob matches a dotted name, or a module that it is in."""
    parts = itertools.accumulate(name.split("."), lambda path, leaf: f"{path}.{leaf}")
    return any(fnmatchcase(path, pattern) for path in parts)


def check_patterns(
    patterns: Iterable[str], module: nn.Module, what: str, further: Iterable[str] = ()
) -> None:
    """Each pattern must match a module, parameter or buffer, or one of the `further` names.

    Raises:
        InputError: one matches nothing; the message names it and the closest names.
    """
    names = [name for name, _ in module.named_modules() if name]
    names = [*names, *(name for name, _ in named_tensors(module)), *further]
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else _some(names)
        raise InputError(
            f"{what}: no module or parameter of {type(module).__name__} matches {pattern!r}; {hint}"
        )


def output_dims(owner: nn.Module | None, tensor: torch.Tensor) -> tuple[int, ...]:
    """The dims of a parameter or buffer that hold the channels its module gives."""
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) and tensor.ndim > 1:
        # (I, O / groups, ...): in groups, whole groups of both are removed.
        return (1,) if owner.groups == 1 else (0, 1)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return (1,)
    if not isinstance(owner, _LAYERS) and tensor.ndim > 1 and tensor.shape[0] == 1:
        return tuple(range(tensor.ndim))  # broadcast over samples, as a position embedding
    return (0,) if tensor.ndim else ()


def owner_of(module: nn.Module, name: str) -> nn.Module | None:
    """The module that a parameter belongs to, seen through parametrisations."""
    outer, found, _ = f".{name}".rpartition(".parametrizations.")
    try:
        return module.get_submodule(outer[1:] if found else name.rpartition(".")[0])
    except AttributeError:
        return None


def _follows(owner: nn.Module | None, tensor: torch.Tensor) -> bool:
    """Whether a tensor has a value for each channel that comes in, and makes none of its own."""
    if isinstance(owner, nn.modules.conv._ConvNd) and tensor.ndim > 1:
        return owner.groups == owner.in_channels > 1
    if isinstance(owner, _LAYERS):
        return tensor.ndim < 2  # a bias: its weight decides
    return tensor.ndim < 2 or tensor.shape[0] == 1 or tensor.numel() == max(tensor.shape)


def _by_tensor(module: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """Every parameter and buffer once, with all its names."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in named_tensors(module):
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _predicate(module: nn.Module, selection: Any, what: str) -> Callable[[str, int], bool]:
    if callable(selection):
        return lambda name, dim: bool(selection(name, dim))
    patterns = [selection] if isinstance(selection, str) else selection
    if not isinstance(patterns, Iterable):
        raise InputError(_unfit(what, selection))
    patterns = list(patterns)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(_unfit(what, selection))
    if not patterns and what == "include":
        raise InputError("include is empty: then nothing may be pruned. Leave it out to prune all")
    check_patterns(patterns, module, what)
    return lambda name, dim: any(matches(pattern, name) for pattern in patterns)


def _unfit(what: str, selection: Any) -> str:
    return (
        f"{what} is {selection!r}: pass a pattern over names ('layer1', '*.conv2'), several, or a "
        "callable (parameter name, dim) -> bool"
    )


def _some(names: Sequence[str]) -> str:
    return f"there are {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
