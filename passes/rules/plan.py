"""A choice of units as survivors of each label and each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from halp_fx.passes.rules.structure import named_tensors
from halp_fx.types import ChannelGroups, IntArray

__all__ = ["BoolArray", "alive_labels", "kept_indices"]

BoolArray: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


def alive_labels(groups: ChannelGroups, units: Sequence[IntArray]) -> BoolArray:
    """By label: whether it survives when `units[g]` are kept of group g."""
    components = groups.labelled.components
    survive = np.ones(len(components), dtype=bool)
    for own, kept in zip(groups.unit_components, units, strict=True):
        survive[own] = False
        survive[own[kept]] = True
    return np.asarray(survive[components])


def kept_indices(
    groups: ChannelGroups, units: Sequence[IntArray]
) -> dict[str, tuple[torch.Tensor | None, ...]]:
    """`Plan.kept` for a choice of units: parameter or buffer -> survivors along each dim."""
    alive = alive_labels(groups, units)
    nothing = torch.empty(0, dtype=torch.int64)
    gone = {
        name
        for branch in groups.branches
        if not any(len(units[g]) for g in branch.groups)
        for name in branch.tensors
    }
    kept: dict[str, tuple[torch.Tensor | None, ...]] = {}
    for name, tensor in named_tensors(groups.traced.root):
        if name in gone:
            kept[name] = (nothing,) * tensor.ndim
            continue
        own = groups.labelled.own.get(id(tensor), {})  # none: the graph never reads it
        dims: list[torch.Tensor | None] = []
        for dim in range(tensor.ndim):
            survive = alive[own[dim]] if dim in own else np.ones(1, dtype=bool)
            whole = bool(survive.all())
            dims.append(None if whole else torch.from_numpy(np.flatnonzero(survive)))
        kept[name] = tuple(dims)
    return kept
