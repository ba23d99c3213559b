"""Array algorithms on labels: coupled components, groups of alike components, least widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from halp_fx.passes.rules.core import FIXED, TieRecord
from halp_fx.types import IntArray

__all__ = ["connected_components", "least_units", "signatures", "where_tied"]


def connected_components(size: int, pairs: list[tuple[IntArray, IntArray]]) -> IntArray:
    """The least label of each label's component, by hooking and pointer jumping on arrays."""
    parent = np.arange(size, dtype=np.int64)
    if not pairs:
        return parent
    left = np.concatenate([a for a, _ in pairs])
    right = np.concatenate([b for _, b in pairs])
    while True:
        a, b = parent[left], parent[right]
        differ = a != b
        if not differ.any():
            return parent
        left, right, a, b = left[differ], right[differ], a[differ], b[differ]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(grand := parent[parent], parent):
            parent = grand


def signatures(components: IntArray, blocks: list[IntArray], vectors: list[IntArray]) -> IntArray:
    """Group of each component: those that occur equally often in every dim of every tensor.

    Each occurrence adds a random number of its dim to the component's sum, so equal sums mean
    equal occurrences (up to a chance of 2^-64 a pair).

    Args:
        components: label -> component.
        blocks: components along each dim of each parameter.
        vectors: components along each dim of each activation.

    Returns:
        By component: number of its group, or -1 for FIXED and for those without a parameter.
    """
    generator = np.random.default_rng(20221103)
    sums = np.zeros(len(components), dtype=np.uint64)
    owned = np.zeros(len(components), dtype=bool)
    for vector in blocks:
        owned[vector] = True
    for vector in [*blocks, *vectors]:
        key = np.uint64(generator.integers(1, 1 << 63))
        found, counts = np.unique(vector, return_counts=True)
        sums[found] += key * counts.astype(np.uint64)
    owned[FIXED] = False
    group = np.full(len(components), -1, dtype=np.int64)
    members = np.flatnonzero(owned)
    if members.size:
        _, first, inverse = np.unique(sums[members], return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))  # in order of the least label
        group[members] = rank[inverse]
    return group


def least_units(group_of: IntArray, dims: list[IntArray]) -> IntArray:
    """The fewest units of each group that leave no dim empty: 1, or 0 where others remain.

    Small groups are let go first: a dim that a large group shares never runs empty.
    """
    count = int(group_of.max(initial=-1)) + 1
    least = np.ones(count, dtype=np.int64)
    sizes = np.bincount(group_of[group_of >= 0], minlength=count)
    present: list[list[int]] = [[] for _ in range(count)]
    sharing: list[tuple[set[int], bool]] = []
    for vector in dims:
        found = np.unique(group_of[vector])
        fixed = bool((vector == FIXED).any() or (found < 0).any())
        groups = {int(g) for g in found if g >= 0}
        for g in groups:
            present[g].append(len(sharing))
        sharing.append((groups, fixed))
    for g in np.argsort(sizes, kind="stable"):
        if all(
            fixed or any(o != g and least[o] > 0 for o in groups)
            for groups, fixed in (sharing[i] for i in present[g])
        ):
            least[g] = 0
    return least


def where_tied(
    wanted: np.ndarray[Any, np.dtype[np.bool_]],
    roots: IntArray,
    starts: IntArray,
    ties: Sequence[TieRecord],
) -> dict[int, str]:
    """The graph node that ties the slices of each wanted component.

    That is the first which ties slices of one dim of one tensor with each other, or else any.

    Args:
        wanted: by component.
        roots: label -> component.
        starts: first label of each dim of each parameter, ascending.

    Returns:
        component -> node, for those with a tie.
    """
    found: dict[int, str] = {}
    anywhere: dict[int, str] = {}
    for tie in ties:
        chosen = wanted[roots[tie.left]]
        if not chosen.any():
            continue
        left, right = tie.left[chosen], tie.right[chosen]
        same = np.searchsorted(starts, left, "right") == np.searchsorted(starts, right, "right")
        for component in np.unique(roots[left]):
            anywhere.setdefault(int(component), tie.node)
        for component in np.unique(roots[left[same]]):
            found.setdefault(int(component), tie.node)
    return anywhere | found
