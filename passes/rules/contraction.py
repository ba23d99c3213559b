"""Operators that sum over a pair of dims: convolution, matrix products, attention."""

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
)
from halp_fx.passes.rules.movement import rectangular
from halp_fx.passes.rules.pointwise import join
from halp_fx.types import IntArray

__all__: list[str] = []

_READS_FIXED = "reads channels that can't be removed"


@register("convolution", "_convolution", "convolution_overrideable")
def convolution(run: LabelRun, call: OpCall) -> None:
    """Input (N, C, ...), weight (O, C/g, ...), or (C, O/g, ...) when transposed.

    With g > 1 whole convolution groups are removed: all channels of one are tied.
    """
    source, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    channel = source.ndim - (weight.ndim - 1)
    inputs = labels_of(source)
    own = labels_of(weight)
    passing: dict[int, IntArray | None] = {}
    for dim in [d for d in inputs if d > channel]:
        if _leaves_alone(call, dim - channel - 1):
            passing[dim] = inputs[dim]
        else:
            run.pin(inputs[dim], "convolved over")
    for dim in [d for d in own if d > 1]:
        run.pin(own[dim], "a dim of the convolution's kernel")
    read = inputs.get(channel)
    if groups == 1:
        rows, columns = (own.get(1), own.get(0)) if transposed else (own.get(0), own.get(1))
        run.tie(columns, read, _READS_FIXED)
    else:
        rows = _grouped(run, own, weight, read, transposed, groups)
    if bias is not None:
        run.tie(rows, labels_of(bias).get(0))
    result: dict[int, IntArray | None] = {**passing, channel: rows}
    if channel == 1 and 0 in inputs:
        result[0] = inputs[0]
    set_labels(call.out, result)


def _leaves_alone(call: OpCall, place: int) -> bool:
    """Whether a convolution's kernel has size 1 along its dim `place` and moves nothing there."""
    stride, padding, shift = (call.args[i][place % len(call.args[i])] for i in (3, 4, 7))
    return call.args[1].shape[2 + place] == stride == 1 and padding == shift == 0


def _grouped(
    run: LabelRun,
    own: dict[int, IntArray],
    weight: torch.Tensor,
    read: IntArray | None,
    transposed: bool,
    groups: int,
) -> IntArray | None:
    """Ties of a convolution in groups; returns the labels of its output channels."""
    run.pin(own.get(1), "channels within a convolution group")
    first = own.get(0)
    if first is None:
        run.pin(read, "meets a weight that can't shrink")
        return None
    head = rectangular(run, first.reshape(groups, -1), free=0)[1]
    if read is None:
        run.pin(first, _READS_FIXED)
    else:
        run.tie(rectangular(run, read.reshape(groups, -1), free=0)[1], head)
    if not transposed:
        return first
    return np.repeat(head, weight.shape[1])


@register("mm", "bmm", "mv", "dot", "matmul")
def product(run: LabelRun, call: OpCall) -> None:
    """(..., I, K) @ (..., K, J)."""
    left, right = call.args[:2]
    if call.out.ndim == 0 and is_stored(left) and is_stored(right):
        for tensor in (left, right):  # a norm of weights, that all of them are scaled by
            run.pin_tensor(tensor, "goes into one number of all weights")
        return
    set_labels(call.out, _multiply(run, left, right, tuple(call.out.shape)))


@register("addmm", "baddbmm", "addmv", "addbmm")
def product_sum(run: LabelRun, call: OpCall) -> None:
    """bias + (..., I, K) @ (..., K, J)."""
    bias, left, right = call.args[:3]
    if call.name == "addbmm":
        run.pin_all(call, "sums over the batch of a matrix product")
        return
    set_labels(call.out, _multiply(run, left, right, tuple(call.out.shape)))
    set_labels(call.out, join(run, [call.out, bias], tuple(call.out.shape)))


@register("linear")
def linear(run: LabelRun, call: OpCall) -> None:
    """(..., I) with weight (O, I) and bias (O)."""
    source, weight = call.args[:2]
    bias = call.arg(2, "bias")
    labels: dict[int, IntArray | None] = dict(labels_of(source))
    own = labels_of(weight)
    run.tie(own.get(1), labels.pop(source.ndim - 1, None), _READS_FIXED)
    labels[call.out.ndim - 1] = own.get(0)
    if bias is not None:
        run.tie(own.get(0), labels_of(bias).get(0))
    set_labels(call.out, labels)


def _multiply(
    run: LabelRun, left: torch.Tensor, right: torch.Tensor, shape: tuple[int, ...]
) -> dict[int, IntArray | None]:
    a, b = labels_of(left), labels_of(right)
    k = max(right.ndim - 2, 0)  # the summed dim of `right`
    run.tie(a.get(left.ndim - 1), b.get(k), _READS_FIXED)
    result: dict[int, IntArray | None] = {}
    batch = max(left.ndim, right.ndim) - 2
    if batch > 0:
        result.update(join(run, [left, right], shape, dims=batch))
    last = len(shape) - 1
    if right.ndim > 1:
        result[last] = b.get(right.ndim - 1)
        last -= 1
    if left.ndim > 1:
        result[last] = a.get(left.ndim - 2)
    return result


@register("_trilinear")
def trilinear(run: LabelRun, call: OpCall) -> None:
    """Product of three tensors, broadcast after new dims are put in, summed over some dims."""
    operands, summed = [], set(call.args[6])
    rank = call.args[0].ndim + len(call.args[3])
    for tensor, new in zip(call.args[:3], call.args[3:6], strict=True):
        dims = iter(range(tensor.ndim))
        operands.append((tensor, [None if d in new else next(dims) for d in range(rank)]))
    result: dict[int, IntArray | None] = {}
    for dim in range(rank):
        present = [(t, own) for t, place in operands if (own := place[dim]) is not None]
        vectors = [labels_of(t).get(own) for t, own in present if t.shape[own] > 1]
        for vector in vectors[1:]:
            run.tie(vectors[0], vector, _READS_FIXED)
        if dim not in summed and vectors:
            result[dim - sum(1 for s in summed if s < dim)] = vectors[0]
    set_labels(call.out, result)


@register(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "scaled_dot_product_attention",
)
def attention(run: LabelRun, call: OpCall) -> None:
    """Query (..., L, E), key (..., S, E), value (..., S, V)."""
    query, key, value = call.args[:3]
    q, k, v = labels_of(query), labels_of(key), labels_of(value)
    rank = query.ndim
    run.tie(q.get(rank - 1), k.get(rank - 1))
    for labels in (k, v):
        run.pin(labels.get(rank - 2), "attended over")
    out = call.out[0] if isinstance(call.out, (tuple, list)) else call.out
    result: dict[int, IntArray | None] = {}
    result.update(join(run, [query, key, value], tuple(out.shape), dims=rank - 2))
    result[rank - 2] = q.get(rank - 2)
    result[rank - 1] = v.get(rank - 1)
    set_labels(out, result)
    mask = call.kwargs.get("attn_mask", call.kwargs.get("attn_bias"))
    if mask is None and len(call.args) > 3 and isinstance(call.args[3], torch.Tensor):
        mask = call.args[3]
    if mask is not None:
        run.pin_tensor(mask, "a mask of attention")
