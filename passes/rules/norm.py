"""Normalisation: tie the input with the affine parameters and the running statistics."""

from __future__ import annotations

import numpy as np
import torch

from halp_fx.passes.rules.core import (
    LabelRun,
    OpCall,
    is_stored,
    labels_of,
    register,
    set_labels,
    tensors_in,
)
from halp_fx.passes.rules.movement import rectangular
from halp_fx.types import IntArray

__all__ = ["statistics_over"]


@register(
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def batch_norm(run: LabelRun, call: OpCall) -> None:
    """Input (N, C, ...); weight, bias, running mean and variance (C).

    Other dims may have channels, too: tokens that are normed, weights that are standardised.
    """
    source = call.args[0]
    labels = dict(labels_of(source))
    own = [t for t in call.args[1:5] if isinstance(t, torch.Tensor)]
    others = {d: v for d, v in labels.items() if d != 1}
    if _takes_statistics(call):
        for vector in others.values():
            reason = "batch norm takes statistics over the channels"
            if is_stored(source):
                statistics_over(run, vector, reason)
                if source.numel() == source.shape[1] * len(np.unique(vector)):
                    run.pin(vector[:2], "statistics are not defined over fewer than two values")
            else:
                run.pin(vector, reason)
    channels = labels.get(1)
    if channels is None:
        channels = next((v for t in own if (v := labels_of(t).get(0)) is not None), None)
    for tensor in own:
        run.tie(channels, labels_of(tensor).get(0))
    if 1 not in labels:
        run.pin(channels, "normalises channels that can't be removed")
        channels = None
    out = next(iter(tensors_in(call.out)))
    set_labels(out, {**others, 1: channels})


def _takes_statistics(call: OpCall) -> bool:
    """Whether a batch norm uses the statistics of its input rather than the running ones."""
    names = [argument.name for argument in call.func._schema.arguments]
    if "training" in names:
        return bool(call.arg(names.index("training"), "training"))
    return call.name == "_batch_norm_with_update" or call.arg(3, "running_mean") is None


def statistics_over(run: LabelRun, labels: IntArray, reason: str) -> None:
    """Removing some of these channels changes what the others become."""
    if run.exact:
        run.pin(labels, reason)
    else:
        run.note_inexact(labels)


@register("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(run: LabelRun, call: OpCall) -> None:
    """Statistics over the last dims: removing channels changes them (or pins, when exact)."""
    source, shape = call.args[0], call.arg(1, "normalized_shape")
    labels = dict(labels_of(source))
    affine = [t for t in call.tensors()[1:] if t.ndim == len(shape)]
    first = source.ndim - len(shape)
    for dim in range(first, source.ndim):
        vector = labels.get(dim)
        for tensor in affine:
            run.tie(vector, labels_of(tensor).get(dim - first))
        if vector is None:
            continue
        statistics_over(run, vector, f"{call.name} takes statistics over the channels")
    set_labels(next(iter(tensors_in(call.out))), labels)


@register("native_group_norm", "group_norm")
def group_norm(run: LabelRun, call: OpCall) -> None:
    """Input (N, C, ...); whole norm groups are removed, which keeps the others as they were.

    With a single group the statistics run over all channels, as in layer norm.
    """
    source = call.args[0]
    labels = dict(labels_of(source))
    if call.name == "native_group_norm":
        affine, groups = call.args[1:3], call.args[6]
    else:
        affine, groups = (call.arg(2, "weight"), call.arg(3, "bias")), call.args[1]
    for dim in [d for d in labels if d > 1]:
        run.pin(labels[dim], "group norm takes statistics over it")
    vector = labels.get(1)
    for tensor in affine:
        if tensor is not None:
            run.tie(vector, labels_of(tensor).get(0), "normalises channels that can't be removed")
    if vector is not None and groups > 1:
        rectangular(run, vector.reshape(groups, -1), free=0)
    elif vector is not None:
        reason = "group norm with one group takes statistics over the channels"
        statistics_over(run, vector, reason)
    set_labels(next(iter(tensors_in(call.out))), {1: vector})


@register("_weight_norm_interface", "_weight_norm")
def weight_norm(run: LabelRun, call: OpCall) -> None:
    """g * v / |v|, the norm over all dims but one."""
    direction, magnitude = call.args[:2]
    dim = call.arg(2, "dim", 0) % direction.ndim
    labels = labels_of(direction)
    for other in [d for d in labels if d != dim]:
        run.pin(labels[other], "weight norm reads the whole row")
    run.tie(labels.get(dim), labels_of(magnitude).get(dim))
    set_labels(next(iter(tensors_in(call.out))), {dim: labels.get(dim)})
