"""Data movement: the labels go where the elements go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from halp_fx.passes.rules.core import (
    FIXED,
    Choice,
    LabelRun,
    OpCall,
    labels_of,
    register,
    set_labels,
)
from halp_fx.passes.rules.pointwise import join
from halp_fx.passes.rules.structure import known_values
from halp_fx.types import IntArray

__all__ = ["rectangular", "reshape_labels"]


@register("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy")
def view(run: LabelRun, call: OpCall) -> None:
    """Reshape; labels that come to vary along several dims are tied along all but one."""
    if call.args[0].dtype != call.out.dtype:  # view(dtype) reinterprets bytes
        run.pin_all(call, "view of the bytes as another dtype")
        return
    reshape_labels(run, call.args[0], call.out)


def reshape_labels(run: LabelRun, source: torch.Tensor, out: torch.Tensor) -> None:
    """Set the labels of `out`, which is `source` reshaped."""
    labels = labels_of(source)
    result: dict[int, IntArray] = {}
    for ins, outs in _blocks(tuple(source.shape), tuple(out.shape)):
        labelled = [dim for dim in ins if dim in labels]
        if not labelled:
            continue
        if len(labelled) > 1:
            for dim in labelled:
                run.pin(labels[dim], "two channel dims are merged into one")
            continue
        dim = labelled[0]
        if len(ins) == len(outs) == 1:
            result[outs[0]] = labels[dim]
            continue
        vector = labels[dim].reshape([-1 if d == dim else 1 for d in ins])
        full = np.broadcast_to(vector, [source.shape[d] for d in ins])
        position, kept = rectangular(run, full.reshape([out.shape[d] for d in outs]))
        result[outs[position]] = kept
    set_labels(out, result)


def _blocks(source: tuple[int, ...], out: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """The least runs of dims of equal size in both shapes; dims of size 1 are left out."""
    ins = [d for d, size in enumerate(source) if size != 1]
    outs = [d for d, size in enumerate(out) if size != 1]
    if 0 in source:
        return
    i = j = 0
    while i < len(ins) and j < len(outs):
        left, right = [ins[i]], [outs[j]]
        i, j = i + 1, j + 1
        while (a := math.prod(source[d] for d in left)) != (b := math.prod(out[d] for d in right)):
            if a < b:
                left.append(ins[i])
                i += 1
            else:
                right.append(outs[j])
                j += 1
        yield left, right


def rectangular(run: LabelRun, full: IntArray, free: int | None = None) -> tuple[int, IntArray]:
    """Tie labels along all dims but one, so that every removal leaves a box.

    Args:
        full: labels of any number of dims.
        free: the dim to leave free; by default the largest along which labels vary.

    Returns:
        The free dim and its labels.
    """
    if free is None:
        varying = [d for d in range(full.ndim) if (full != full.take([0], axis=d)).any()]
        dims = tuple(sorted(varying or range(full.ndim), key=lambda d: -full.shape[d]))
        key, free = run.choose(dims)
        if len(varying) > 1:
            labels = np.moveaxis(full, free, 0).reshape(full.shape[free], -1)[:, 0]
            run.choices.append(Choice(key, dims, free, labels))
    lines = np.moveaxis(full, free, 0).reshape(full.shape[free], -1)
    run.tie(lines[:, :1], lines)
    return free, np.ascontiguousarray(lines[:, 0])


@register("permute", "permute_copy")
def permute(run: LabelRun, call: OpCall) -> None:
    source, dims = call.args[0], call.arg(1, "dims")
    labels = labels_of(source)
    set_labels(call.out, {i: labels.get(d % source.ndim) for i, d in enumerate(dims)})


@register("transpose", "transpose_copy", "swapaxes")
def transpose(run: LabelRun, call: OpCall) -> None:
    source = call.args[0]
    a, b = (d % max(source.ndim, 1) for d in call.args[1:3])
    labels = dict(labels_of(source))
    swapped = {{a: b, b: a}.get(d, d): v for d, v in labels.items()}
    set_labels(call.out, swapped)


@register("t", "t_copy")
def t(run: LabelRun, call: OpCall) -> None:
    labels = labels_of(call.args[0])
    if call.out.ndim < 2:
        set_labels(call.out, labels)
    else:
        set_labels(call.out, {0: labels.get(1), 1: labels.get(0)})


@register("unsqueeze", "squeeze", "unsqueeze_copy", "squeeze_copy")
def squeeze(run: LabelRun, call: OpCall) -> None:
    reshape_labels(run, call.args[0], call.out)


@register("expand", "expand_copy")
def expand(run: LabelRun, call: OpCall) -> None:
    source = call.args[0]
    shift = call.out.ndim - source.ndim
    set_labels(call.out, {d + shift: v for d, v in labels_of(source).items()})


@register("repeat", "tile")
def repeat(run: LabelRun, call: OpCall) -> None:
    source, times = call.args[0], call.arg(1, "repeats")
    shift = call.out.ndim - source.ndim
    labels = labels_of(source)
    set_labels(call.out, {d + shift: np.tile(v, times[d + shift]) for d, v in labels.items()})


@register("select", "select_copy")
def select(run: LabelRun, call: OpCall) -> None:
    source = call.args[0]
    dim = call.arg(1, "dim") % source.ndim
    labels = labels_of(source)
    if dim in labels:
        index = call.arg(2, "index")
        if len(np.unique(labels[dim])) > 1:
            run.pin(labels[dim][[index]], "a single channel is picked by its index")
    set_labels(call.out, {d - (d > dim): v for d, v in labels.items() if d != dim})


@register("slice", "slice_copy")
def slice_(run: LabelRun, call: OpCall) -> None:
    source = call.args[0]
    dim = call.arg(1, "dim", 0) % source.ndim
    window = slice(call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1))
    labels = dict(labels_of(source))
    if dim in labels:
        labels[dim] = labels[dim][window]
    set_labels(call.out, labels)


@register("split", "split_with_sizes", "split_copy", "split_with_sizes_copy", "unsafe_split")
def split(run: LabelRun, call: OpCall) -> None:
    source = call.args[0]
    dim = call.arg(2, "dim", 0) % source.ndim
    start = 0
    for piece in call.out:
        labels = dict(labels_of(source))
        if dim in labels:
            labels[dim] = labels[dim][start : start + piece.shape[dim]]
        start += piece.shape[dim]
        set_labels(piece, labels)


@register("unbind", "unbind_copy")
def unbind(run: LabelRun, call: OpCall) -> None:
    source = call.args[0]
    dim = call.arg(1, "dim", 0) % source.ndim
    labels = labels_of(source)
    if dim in labels:
        run.pin(labels[dim], "the channels are taken apart one by one")
    for piece in call.out:
        set_labels(piece, {d - (d > dim): v for d, v in labels.items() if d != dim})


@register("flip")
def flip(run: LabelRun, call: OpCall) -> None:
    source = call.args[0]
    dims = {d % source.ndim for d in call.arg(1, "dims")}
    labels = labels_of(source)
    set_labels(call.out, {d: v[::-1].copy() if d in dims else v for d, v in labels.items()})


@register("roll")
def roll(run: LabelRun, call: OpCall) -> None:
    source, shifts, dims = call.args[0], call.arg(1, "shifts"), call.arg(2, "dims", [])
    if not dims:
        run.pin_all(call, "roll over the flattened tensor")
        return
    labels = dict(labels_of(source))
    for shift, dim in zip(shifts, dims, strict=True):
        if dim % source.ndim in labels:
            labels[dim % source.ndim] = np.roll(labels[dim % source.ndim], shift)
    set_labels(call.out, labels)


@register("cat", "concat")
def cat(run: LabelRun, call: OpCall) -> None:
    # Tensors of shape (0,) are skipped by torch whatever the others' rank.
    parts = [t for t in call.args[0] if not (t.ndim == 1 and t.shape[0] == 0)]
    dim = call.arg(1, "dim", 0) % call.out.ndim
    labels: dict[int, IntArray] = {}
    for other in range(call.out.ndim):
        vectors = [labels_of(t).get(other) for t in parts]
        if all(v is None for v in vectors):
            continue
        if other == dim:
            labels[dim] = np.concatenate(
                [_or_fixed(v, t.shape[dim]) for v, t in zip(vectors, parts, strict=True)]
            )
            continue
        first = next(v for v in vectors if v is not None)
        for vector in vectors:
            run.tie(first, vector)
        if all(vector is not None for vector in vectors):
            labels[other] = first
    set_labels(call.out, labels)


@register("stack")
def stack(run: LabelRun, call: OpCall) -> None:
    parts = call.args[0]
    dim = call.arg(1, "dim", 0) % call.out.ndim
    labels = join(run, list(parts), tuple(parts[0].shape))
    set_labels(call.out, {d + (d >= dim): v for d, v in labels.items()})


def _or_fixed(vector: IntArray | None, size: int) -> IntArray:
    return np.full(size, FIXED, dtype=np.int64) if vector is None else vector


@register("constant_pad_nd")
def constant_pad_nd(run: LabelRun, call: OpCall) -> None:
    """What is added along a channel dim is never removed; negative padding cuts."""
    source, pad = call.args[0], call.arg(1, "pad")
    labels = dict(labels_of(source))
    for i in range(len(pad) // 2):
        dim, before, after = source.ndim - 1 - i, pad[2 * i], pad[2 * i + 1]
        if dim not in labels or (before == 0 and after == 0):
            continue
        vector = labels[dim][max(-before, 0) : len(labels[dim]) - max(-after, 0)]
        labels[dim] = np.pad(vector, (max(before, 0), max(after, 0)), constant_values=FIXED)
    set_labels(call.out, labels)


@register("index_select")
def index_select(run: LabelRun, call: OpCall) -> None:
    source, dim, index = call.args[0], call.args[1] % call.args[0].ndim, call.args[2]
    labels = dict(labels_of(source))
    if dim in labels:
        labels.update(_picked(run, labels, dim, index))
    set_labels(call.out, {d: v for d, v in labels.items() if v is not None})


def _picked(run: LabelRun, labels: Any, dim: int, index: torch.Tensor) -> dict[int, Any]:
    """Labels of `dim` after `index` has picked some, where its values are known."""
    values = known_values(index)
    if values is None or values.ndim != 1:
        run.pin(labels[dim], "channels are picked by an index that is known only at run time")
        return {dim: None}
    return {dim: labels[dim][values]}


@register("index", "_unsafe_index")
def index(run: LabelRun, call: OpCall) -> None:
    source, indices = call.args[0], list(call.arg(1, "indices"))
    labels = dict(labels_of(source))
    indexed = [d for d, i in enumerate(indices) if i is not None]
    rank = max(indices[d].ndim for d in indexed)
    if any(indices[d].dtype in (torch.bool, torch.uint8) for d in indexed):
        run.pin_all(call, "indexed by a mask")
        return
    contiguous = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    front = indexed[0] if contiguous else 0
    result: dict[int, Any] = {}
    for dim, vector in labels.items():
        if dim not in indexed:
            before = sum(1 for d in range(dim) if d not in indexed)
            result[before + (rank if before >= front else 0)] = vector
        elif len(indexed) == 1:
            result[front] = _picked(run, labels, dim, indices[dim])[dim]
        else:
            run.pin(vector, "channels are picked by several indices at once")
    set_labels(call.out, result)


@register("embedding")
def embedding(run: LabelRun, call: OpCall) -> None:
    labels = labels_of(call.args[0])
    run.pin(labels.get(0), "rows of an embedding table")
    set_labels(call.out, {call.out.ndim - 1: labels.get(1)})


@register("pixel_shuffle")
def pixel_shuffle(run: LabelRun, call: OpCall) -> None:
    """(N, C r r, H, W) -> (N, C, H r, W r): the r * r channels of one output channel are tied."""
    labels = dict(labels_of(call.args[0]))
    channel = call.out.ndim - 3
    if channel in labels:
        full = labels[channel].reshape(call.out.shape[channel], -1)
        labels[channel] = rectangular(run, full, free=0)[1]
    set_labels(call.out, _without_space(run, labels, channel))


@register("pixel_unshuffle")
def pixel_unshuffle(run: LabelRun, call: OpCall) -> None:
    labels = dict(labels_of(call.args[0]))
    channel = call.out.ndim - 3
    if channel in labels:
        times = call.out.shape[channel] // len(labels[channel])
        labels[channel] = np.repeat(labels[channel], times)
    set_labels(call.out, _without_space(run, labels, channel))


def _without_space(run: LabelRun, labels: dict[int, IntArray], channel: int) -> dict[int, IntArray]:
    for dim in [d for d in labels if d > channel]:
        run.pin(labels.pop(dim), "moved over image rows or columns")
    return labels


@register("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(run: LabelRun, call: OpCall) -> None:
    """(N, g n, ...): channels of the same place in each of the g parts are tied."""
    labels = dict(labels_of(call.args[0]))
    groups = call.arg(1, "groups")
    if 1 in labels:
        free = rectangular(run, labels[1].reshape(groups, -1), free=1)[1]
        labels[1] = np.repeat(free, groups)
    set_labels(call.out, labels)


@register("im2col")
def im2col(run: LabelRun, call: OpCall) -> None:
    """(N, C, H, W) -> (N, C k k, L)."""
    labels = labels_of(call.args[0])
    channel = call.args[0].ndim - 3
    area = math.prod(call.arg(1, "kernel_size"))
    for dim in [d for d in labels if d > channel]:
        run.pin(labels[dim], "moved over image rows or columns")
    vector = labels.get(channel)
    set_labels(call.out, {channel: None if vector is None else np.repeat(vector, area)})


@register("col2im")
def col2im(run: LabelRun, call: OpCall) -> None:
    """(N, C k k, L) -> (N, C, H, W): the k * k parts of a channel are tied."""
    labels = labels_of(call.args[0])
    channel = call.args[0].ndim - 2
    run.pin(labels.get(channel + 1), "moved over image rows or columns")
    vector = labels.get(channel)
    if vector is not None:
        vector = rectangular(run, vector.reshape(call.out.shape[channel], -1), free=0)[1]
    set_labels(call.out, {channel: vector})


@register("as_strided", "as_strided_copy")
def as_strided(run: LabelRun, call: OpCall) -> None:
    """Only a change of memory layout, where the shape stays."""
    source = call.args[0]
    if source.shape == call.out.shape:
        set_labels(call.out, labels_of(source))
    else:
        run.pin_all(call, "as_strided to another shape")
