"""Reductions, scans and pooling: labels pass along the dims that are not reduced."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from halp_fx.passes.rules.core import (
    LabelRun,
    OpCall,
    labels_of,
    register,
    set_labels,
    tensors_in,
    watch,
)
from halp_fx.types import IntArray

__all__: list[str] = []


def _dims(given: object, rank: int) -> set[int]:
    """Dims of an argument that is None (all), a number or a list of numbers."""
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return set(range(rank))
    items: Iterable[int] = given if isinstance(given, (list, tuple)) else [given]  # type: ignore[list-item]
    return {item % max(rank, 1) for item in items}


@register(
    "sum", "nansum", "mean", "nanmean", "prod", "amax", "amin", "aminmax", "max", "min", "any",
    "all", "argmax", "argmin", "var", "std", "var_mean", "std_mean", "logsumexp", "median",
    "nanmedian", "mode", "norm", "linalg_vector_norm", "count_nonzero", "kthvalue",
)  # fmt: skip
def reduction(run: LabelRun, call: OpCall) -> None:
    source = call.args[0]
    if call.name in ("max", "min") and len(call.tensors()) == 2:  # the elementwise overload
        from halp_fx.passes.rules.pointwise import pointwise

        pointwise(run, call)
        return
    names = {argument.name: i for i, argument in enumerate(call.func._schema.arguments)}
    given = call.arg(names["dim"], "dim") if "dim" in names else None
    dims = _dims(given, source.ndim)
    labels = labels_of(source)
    read = sorted(dims & labels.keys())
    if call.name == "mean" and len(read) == 1 and call.out.ndim == source.ndim and not run.exact:
        _expect_division(call, labels[read[0]])
    else:
        for dim in read:
            run.pin(labels[dim], f"{call.name} reads all channels")
    for out in tensors_in(call.out):
        kept = {d: v for d, v in labels.items() if d not in dims}
        if out.ndim != source.ndim:
            kept = {d - sum(1 for r in dims if r < d): v for d, v in kept.items()}
        set_labels(out, kept)


def _expect_division(call: OpCall, labels: IntArray) -> None:
    """A tensor that is divided by its own mean over the channels is normalised (GRN).

    Removing channels changes that like any norm's statistics. Whatever else the mean goes into,
    they all stay.
    """
    source: torch.Tensor = call.args[0]

    def follow(run: LabelRun, reader: OpCall | None, tensor: torch.Tensor) -> None:
        if reader is None:
            run.pin(labels, "mean reads all channels")
        elif reader.name == "div" and reader.args[0] is source and reader.args[1] is tensor:
            run.note_inexact(labels)
        elif reader.name in ("add", "clamp", "clamp_min") and len(reader.tensors()) == 1:
            watch(reader.out, follow)
        else:
            run.pin(labels, "mean reads all channels")

    watch(call.out, follow)


@register(
    "_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumsum", "cumprod",
    "cummax", "cummin", "logcumsumexp", "sort", "argsort", "topk",
)  # fmt: skip
def along_dim(run: LabelRun, call: OpCall) -> None:
    """Operators that mix one dim and keep the number of dims."""
    source = call.args[0]
    names = {argument.name: i for i, argument in enumerate(call.func._schema.arguments)}
    dim = call.arg(names["dim"], "dim", -1) % max(source.ndim, 1)
    labels = labels_of(source)
    if dim in labels:
        run.pin(labels[dim], f"{call.name} reads all channels")
    for out in tensors_in(call.out):
        set_labels(out, {d: v for d, v in labels.items() if d != dim})


_SPATIAL = {
    name + f"{n}d" + suffix: n
    for n in (1, 2, 3)
    for name, suffix in [
        ("max_pool", "_with_indices"),
        ("max_pool", ""),
        ("avg_pool", ""),
        ("adaptive_avg_pool", ""),
        ("_adaptive_avg_pool", ""),
        ("adaptive_max_pool", ""),
        ("fractional_max_pool", ""),
        ("reflection_pad", ""),
        ("replication_pad", ""),
        ("upsample_nearest", ""),
        ("_upsample_nearest_exact", ""),
        ("max_unpool", ""),
    ]
} | {
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3,
    "grid_sampler_2d": 2,
    "grid_sampler_3d": 3,
    "grid_sampler": 2,
}


@register(*_SPATIAL)
def spatial(run: LabelRun, call: OpCall) -> None:
    """Pooling, resizing and padding of the last dims; channels are left alone."""
    source: torch.Tensor = call.args[0]
    last = source.ndim - _SPATIAL[call.name]
    labels = dict(labels_of(source))
    for dim in [d for d in labels if d >= last]:
        run.pin(labels.pop(dim), f"{call.name} mixes it")
    for other in call.tensors()[1:]:
        for dim, vector in labels_of(other).items():
            same = other.ndim == source.ndim and call.name.startswith("max_unpool")
            run.tie(labels.get(dim), vector) if same else run.pin(vector, f"read by {call.name}")
    for out in tensors_in(call.out):
        set_labels(out, labels)
