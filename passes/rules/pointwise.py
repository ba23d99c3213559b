"""Pointwise operators and those that keep the shape: labels that meet are tied."""

from __future__ import annotations

import torch

from halp_fx.passes.rules.core import LabelRun, OpCall, labels_of, register, set_labels, tensors_in
from halp_fx.types import IntArray

__all__ = ["join"]


@register(
    "pointwise",
    "alias",
    "clone",
    "contiguous",
    "detach",
    "_to_copy",
    "to",
    "lift",
    "lift_fresh",
    "lift_fresh_copy",
    "copy",
    "fill",
    "zero",
    "positive",
    "dropout",
    "native_dropout",
    "bernoulli",
    "hardswish",
    "leaky_relu",  # not tagged before torch 2.11
    "prelu",
    "_prelu_kernel",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "normal_functional",
    "where",
    "masked_fill",
)
def pointwise(run: LabelRun, call: OpCall) -> None:
    """Elementwise with broadcasting."""
    outputs = list(tensors_in(call.out))
    if not outputs:
        return
    labels = join(run, call.tensors(), tuple(outputs[0].shape))
    for output in outputs:
        set_labels(output, labels)


def join(
    run: LabelRun, operands: list[torch.Tensor], shape: tuple[int, ...], dims: int | None = None
) -> dict[int, IntArray]:
    """Tie the operands of a broadcasting operator; returns the labels of its output.

    Args:
        shape: the output's shape.
        dims: only so many leading dims broadcast (the batch dims of a matrix product).
    """
    labels: dict[int, IntArray] = {}
    for dim in range(len(shape) if dims is None else dims):
        if shape[dim] <= 1 and not run.checking:
            continue
        first: IntArray | None = None
        meeting: list[IntArray | None] = []
        for operand in operands:
            own = dim - (len(shape) - operand.ndim)
            if own < 0 or operand.shape[own] != shape[dim]:
                continue
            vector = labels_of(operand).get(own)
            meeting.append(vector)
            if first is None:
                first = vector
        if first is None:
            continue
        for vector in meeting:
            run.tie(first, vector)
        if all(vector is not None for vector in meeting):
            labels[dim] = first
    return labels


@register("glu")
def glu(run: LabelRun, call: OpCall) -> None:
    """`a * sigmoid(b)` with a, b the halves along a dim: the halves are tied."""
    source = call.args[0]
    split = call.arg(1, "dim", -1) % source.ndim
    labels = dict(labels_of(source))
    if split in labels:
        first, second = labels[split].reshape(2, -1)
        run.tie(first, second)
        labels[split] = first
    set_labels(call.out, labels)


@register("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided")
def unrelated(run: LabelRun, call: OpCall) -> None:
    """A new tensor that only takes dtype and device from its argument."""
    set_labels(call.out, {})
