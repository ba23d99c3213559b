"""Rules: what each operator does with labels, one row an operator.

A row gives tensors whose dims carry labels 1, 2, 3 ... in the order in which they are listed, and
says what comes out: along each dim of the output the least label that each slice is tied to (0:
always there), which labels are tied, and which are pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halp_fx
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rules import core
from halp_fx.passes.rules.components import connected_components
from halp_fx.passes.rules.core import (
    FunctionMode,
    LabelMode,
    LabelRun,
    OpCall,
    labels_of,
    register,
    rule_for,
    set_labels,
    set_stored,
    tensors_in,
)
from halp_fx.passes.rules.pointwise import pointwise
from halp_fx.passes.rules.source import source_of
from halp_fx.passes.trace import trace
from tests import oracle

__all__: list[str] = []


@dataclass(frozen=True)
class T:
    """A tensor of the row: its shape, and the dims that carry labels."""

    shape: tuple[int, ...]
    dims: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32
    values: Any = None  # known values of an index
    stored: bool = False  # it is a parameter, or computed from parameters alone


@dataclass(frozen=True)
class Row:
    call: Callable[..., Any]
    tensors: tuple[T, ...]
    out: dict[int, list[int]]
    tied: list[tuple[int, ...]] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    exact: bool = False


X, Y = T((2, 4, 6, 6)), T((2, 4, 6, 6))
TOKENS = T((2, 5, 4), (2,))
SAME = [1, 2, 3, 4]
PAIRS = [(1, 5), (2, 6), (3, 7), (4, 8)]
INDEX = T((3,), (), torch.int64, [2, 0, 0])
KNOWN_NOTHING = T((3,), (), torch.int64)
VEC = T((4,), (0,))
PLAIN = T((2, 4, 6, 6), ())


def _seq(start: int, stop: int) -> list[int]:
    return list(range(start, stop))


ROWS: dict[str, Row] = {
    # Pointwise: labels that meet are tied.
    "relu": Row(F.relu, (X,), {1: SAME}),
    "relu_": Row(lambda x: F.relu_(x.clone()), (X,), {1: SAME}),
    "hardswish": Row(F.hardswish, (X,), {1: SAME}),
    "hardswish_": Row(lambda x: F.hardswish(x.clone(), inplace=True), (X,), {1: SAME}),
    "silu_": Row(lambda x: F.silu(x.clone(), inplace=True), (X,), {1: SAME}),
    "sigmoid": Row(torch.sigmoid, (X,), {1: SAME}),
    "clamp": Row(lambda x: x.clamp(0, 6), (X,), {1: SAME}),
    "number": Row(lambda x: 2 * x - 1, (X,), {1: SAME}),
    "add": Row(torch.add, (X, Y), {1: SAME}, PAIRS),
    "add_": Row(lambda x, y: x.clone().add_(y), (X, Y), {1: SAME}, PAIRS),
    "mul gate": Row(torch.mul, (X, T((2, 4, 1, 1))), {1: SAME}, PAIRS),
    "mul spatial gate": Row(torch.mul, (X, T((2, 1, 6, 6), ())), {1: SAME}),
    "add bias": Row(lambda x, b: x + b[:, None, None], (X, VEC), {1: SAME}, PAIRS),
    "add broadcast": Row(torch.add, (T((2, 1, 6, 6), ()), X), {1: SAME}),
    "add unlabelled": Row(torch.add, (X, PLAIN), {}, pinned=SAME),
    "where": Row(lambda x, y: torch.where(x > 0, x, y), (X, Y), {1: SAME}, PAIRS),
    "maximum": Row(torch.maximum, (X, Y), {1: SAME}, PAIRS),
    "max of two": Row(torch.max, (X, Y), {1: SAME}, PAIRS),
    "addcmul": Row(lambda x, y: torch.addcmul(x, y, y), (X, Y), {1: SAME}, PAIRS),
    "lerp": Row(lambda x, y: torch.lerp(x, y, 0.3), (X, Y), {1: SAME}, PAIRS),
    "prelu": Row(F.prelu, (X, VEC), {1: SAME}, PAIRS),
    "glu": Row(lambda x: F.glu(x, 1), (X,), {1: [1, 2]}, [(1, 3), (2, 4)]),
    "dropout": Row(lambda x: F.dropout(x, 0.5, True), (X,), {1: SAME}),
    "to": Row(lambda x: x.to(torch.float64), (X,), {1: SAME}),
    "contiguous": Row(lambda x: x.transpose(2, 3).contiguous(), (X,), {1: SAME}),
    "zeros_like": Row(torch.zeros_like, (X,), {1: SAME}),
    "new_zeros": Row(lambda x: x.new_zeros(2, 4), (X,), {}),
    # Data movement: labels go where the elements go.
    "permute": Row(lambda x: x.permute(0, 2, 3, 1), (X,), {3: SAME}),
    "transpose": Row(lambda x: x.transpose(1, -1), (X,), {3: SAME}),
    "t": Row(lambda x: x.t(), (T((4, 6), (0, 1)),), {0: _seq(5, 11), 1: SAME}),
    "flatten space": Row(lambda x: x.flatten(2), (X,), {1: SAME}),
    "flatten channels": Row(
        lambda x: x.flatten(1), (T((2, 2, 1, 3)),), {1: [1, 1, 1, 2, 2, 2]}
    ),
    "view to heads": Row(
        lambda x: x.view(2, 5, 2, 2), (TOKENS,), {2: [1, 3]}, [(1, 2), (3, 4)]
    ),
    "view to few heads": Row(
        lambda x: x.view(2, 2, 4), (T((2, 8)),), {2: SAME}, [(1, 5), (2, 6), (3, 7), (4, 8)]
    ),
    "unflatten": Row(lambda x: x.unflatten(1, (1, 4)), (X,), {2: SAME}),
    "merged channels": Row(
        lambda x: x.flatten(1), (T((2, 2, 3), (1, 2)),), {}, pinned=_seq(1, 6)
    ),
    "view as dtype": Row(lambda x: x.view(torch.int32), (X,), {}, pinned=SAME),
    "squeeze": Row(lambda x: x[:, :, :1, :1].squeeze(-1).squeeze(-1), (X,), {1: SAME}),
    "unsqueeze": Row(lambda x: x.unsqueeze(1), (X,), {2: SAME}),
    "expand": Row(lambda x: x.expand(2, 4, 6), (T((4, 1), (0,)),), {1: SAME}),
    "repeat": Row(lambda x: x.repeat(1, 2), (T((2, 4)),), {1: SAME + SAME}),
    "repeat_interleave": Row(
        lambda x: x.repeat_interleave(2, 1), (T((2, 2)),), {1: [1, 1, 2, 2]}
    ),
    "slice": Row(lambda x: x[:, 1:3], (X,), {1: [2, 3]}),
    "slice by steps": Row(lambda x: x[:, ::2], (X,), {1: [1, 3]}),
    "narrow": Row(lambda x: x.narrow(1, 1, 2), (X,), {1: [2, 3]}),
    "select channel": Row(lambda x: x[:, 2], (X,), {}, pinned=[3]),
    "select sample": Row(lambda x: x[0], (X,), {0: SAME}),
    "select token": Row(lambda x: x[:, 0], (TOKENS,), {1: SAME}),
    "split": Row(lambda x: x.split([1, 3], 1)[1], (X,), {1: [2, 3, 4]}),
    "chunk": Row(lambda x: x.chunk(2, 1)[1], (X,), {1: [3, 4]}),
    "unbind": Row(lambda x: x.unbind(1)[0], (X,), {}, pinned=SAME),
    "unbind tokens": Row(lambda x: x.unbind(1)[0], (TOKENS,), {1: SAME}),
    "flip": Row(lambda x: x.flip(1), (X,), {1: [4, 3, 2, 1]}),
    "flip image": Row(lambda x: x.flip(3), (X,), {1: SAME}),
    "roll": Row(lambda x: x.roll(1, 1), (X,), {1: [4, 1, 2, 3]}),
    "roll image": Row(lambda x: x.roll((1, 2), (2, 3)), (X,), {1: SAME}),
    "cat": Row(lambda x, y: torch.cat([x, y], 1), (X, T((2, 2, 6, 6))), {1: _seq(1, 7)}),
    "cat unlabelled": Row(
        lambda x, y: torch.cat([x, y], 1), (X, T((2, 2, 6, 6), ())), {1: [*SAME, 0, 0]}
    ),
    "cat images": Row(lambda x, y: torch.cat([x, y], 2), (X, Y), {1: SAME}, PAIRS),
    "stack": Row(lambda x, y: torch.stack([x, y]), (X, Y), {2: SAME}, PAIRS),
    "pad image": Row(lambda x: F.pad(x, (1, 1, 1, 1)), (X,), {1: SAME}),
    "pad channels": Row(
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), (X,), {1: [0, *SAME, 0, 0]}
    ),
    "crop channels": Row(lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)), (X,), {1: [2, 3, 4]}),
    "reflection pad": Row(lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), (X,), {1: SAME}),
    "index_select": Row(lambda x, i: x.index_select(1, i), (X, INDEX), {1: [3, 1, 1]}),
    "index": Row(lambda x, i: x[:, i], (X, INDEX), {1: [3, 1, 1]}),
    "index at run time": Row(
        lambda x, i: x[:, i], (X, KNOWN_NOTHING), {}, pinned=SAME
    ),
    "index by a mask": Row(
        lambda x, m: torch.ops.aten.index_put(x, [m], x.new_zeros(())),
        (X, T((2, 4, 6, 6), (), torch.bool)),
        {},
        pinned=SAME,
    ),
    "embedding": Row(
        lambda w, i: F.embedding(i, w),
        (T((3, 2), (0, 1)), T((2, 5), (), torch.int64)),
        {2: [4, 5]},
        pinned=[1, 2, 3],
    ),
    "pixel_shuffle": Row(
        lambda x: F.pixel_shuffle(x, 2),
        (T((2, 8, 3, 3)),),
        {1: [1, 5]},
        [(1, 2, 3, 4), (5, 6, 7, 8)],
    ),
    "pixel_unshuffle": Row(
        lambda x: F.pixel_unshuffle(x, 2), (T((2, 2, 4, 4)),), {1: [1] * 4 + [2] * 4}
    ),
    "channel_shuffle": Row(
        lambda x: F.channel_shuffle(x, 2), (X,), {1: [1, 1, 2, 2]}, [(1, 3), (2, 4)]
    ),
    "shuffle by views": Row(
        lambda x: x.view(2, 2, 4, 6, 6).transpose(1, 2).reshape(2, 8, 6, 6),
        (T((2, 8, 6, 6)),),
        {1: [1, 1, 2, 2, 3, 3, 4, 4]},
        PAIRS,
    ),
    "unfold": Row(lambda x: F.unfold(x, 2), (T((2, 2, 6, 6)),), {1: [1] * 4 + [2] * 4}),
    "fold": Row(
        lambda x: F.fold(x, (6, 6), 2, stride=2),
        (T((2, 8, 9)),),
        {1: [1, 5]},
        [(1, 2, 3, 4), (5, 6, 7, 8)],
    ),
    # Contractions: the summed dims are tied, the output carries the weight's rows.
    "conv2d": Row(
        F.conv2d, (X, T((2, 4, 3, 3), (0, 1))), {1: [5, 6]},
        [(1, 7), (2, 8), (3, 9), (4, 10)],
    ),
    "conv2d bias": Row(
        F.conv2d, (PLAIN, T((2, 4, 3, 3), (0,)), T((2,), (0,))), {1: [1, 2]}, [(1, 3), (2, 4)]
    ),
    "conv2d whole input": Row(
        F.conv2d, (PLAIN, T((2, 4, 3, 3), (0, 1))), {1: [1, 2]}, pinned=[3, 4, 5, 6]
    ),
    "conv_transpose2d": Row(
        F.conv_transpose2d, (X, T((4, 2, 3, 3), (0, 1))), {1: [9, 10]}, PAIRS
    ),
    "conv2d in groups": Row(
        lambda x, w: F.conv2d(x, w, groups=2),
        (X, T((6, 2, 3, 3), (0,))),
        {1: [1, 1, 1, 3, 3, 3]},
        [(1, 2, 5, 6, 7), (3, 4, 8, 9, 10)],
    ),
    "conv2d depthwise": Row(
        lambda x, w: F.conv2d(x, w, groups=4), (X, T((4, 1, 3, 3), (0,))), {1: SAME}, PAIRS
    ),
    "conv1d": Row(
        F.conv1d, (T((2, 2, 8)), T((3, 2, 3), (0, 1))), {1: [3, 4, 5]}, [(1, 6), (2, 7)]
    ),
    "conv1d of kernel 1 over other channels": Row(
        F.conv1d, (T((2, 2, 4), (1, 2)), T((3, 2, 1), (0, 1))), {1: [7, 8, 9], 2: [3, 4, 5, 6]},
        [(1, 10), (2, 11)],
    ),
    "conv1d by steps over other channels": Row(
        lambda x, w: F.conv1d(x, w, stride=2),
        (T((2, 2, 4), (2,)), T((3, 2, 1), ())), {}, pinned=SAME,
    ),
    "conv1d with a border of other channels": Row(
        lambda x, w: F.conv1d(x, w, padding=1),
        (T((2, 2, 4), (2,)), T((3, 2, 1), ())), {}, pinned=SAME,
    ),
    "conv1d of kernel 3 over other channels": Row(
        F.conv1d, (T((2, 2, 4), (2,)), T((3, 2, 3), ())), {}, pinned=SAME,
    ),
    "conv_transpose1d of kernel 1 over other channels": Row(
        F.conv_transpose1d, (T((2, 2, 4), (2,)), T((2, 3, 1), (1,))), {1: [5, 6, 7], 2: SAME}
    ),
    "linear": Row(
        F.linear, (TOKENS, T((2, 4), (0, 1))), {2: [5, 6]},
        [(1, 7), (2, 8), (3, 9), (4, 10)],
    ),
    "addmm": Row(
        torch.addmm,
        (T((3,), (0,)), T((2, 2)), T((2, 3), (0, 1))),
        {1: [1, 2, 3]},
        [(1, 8), (2, 9), (3, 10), (4, 6), (5, 7)],
    ),
    "matmul": Row(
        torch.matmul, (TOKENS, T((4, 3), (0, 1))), {2: [9, 10, 11]}, PAIRS
    ),
    "bmm": Row(
        torch.bmm, (TOKENS, T((2, 4, 5), (1,))), {}, PAIRS
    ),
    "attention": Row(
        F.scaled_dot_product_attention,
        (T((2, 1, 5, 3), (3,)), T((2, 1, 5, 3), (3,)), T((2, 1, 5, 2), (3,))),
        {3: [7, 8]},
        [(1, 4), (2, 5), (3, 6)],
    ),
    "attention over heads": Row(
        F.scaled_dot_product_attention,
        (T((2, 2, 5, 3)), T((2, 2, 5, 3)), T((2, 2, 5, 3))),
        {1: [1, 2]},
        [(1, 3, 5), (2, 4, 6)],
    ),
    "einsum": Row(
        lambda x, w: torch.einsum("nchw,oc->nohw", x, w),
        (X, T((2, 4), (0, 1))),
        {1: [5, 6]},
        [(1, 7), (2, 8), (3, 9), (4, 10)],
    ),
    # Norms.
    "batch_norm": Row(
        lambda x, m, w: F.batch_norm(x, m, m, w), (X, VEC, VEC), {1: SAME},
        [(1, 5, 9), (2, 6, 10), (3, 7, 11), (4, 8, 12)],
    ),
    "batch_norm of tokens": Row(
        lambda x, m: F.batch_norm(x, m, m),
        (T((2, 5, 4), (2,)), T((5,), ())), {2: SAME}
    ),
    "instance_norm of tokens": Row(F.instance_norm, (TOKENS,), {2: SAME}, pinned=SAME),
    "weight standardisation": Row(
        lambda w: F.batch_norm(w.reshape(1, 2, -1), None, None, training=True).reshape_as(w),
        (T((2, 4, 3, 3), (0, 1), stored=True),),
        {0: [1, 2], 1: [3, 4, 5, 6]},
    ),
    "weight standardisation exact": Row(
        lambda w: F.batch_norm(w.reshape(1, 2, -1), None, None, training=True).reshape_as(w),
        (T((2, 4, 3, 3), (0, 1), stored=True),),
        {0: [1, 2], 1: [3, 4, 5, 6]},
        pinned=[3, 4, 5, 6],
        exact=True,
    ),
    "layer_norm": Row(
        lambda x, w: F.layer_norm(x, (4,), w, w), (TOKENS, VEC), {2: SAME}, PAIRS
    ),
    "layer_norm exact": Row(
        lambda x: F.layer_norm(x, (4,)), (TOKENS,), {2: SAME}, pinned=SAME, exact=True
    ),
    "rms_norm": Row(lambda x, w: F.rms_norm(x, (4,), w), (TOKENS, VEC), {2: SAME}, PAIRS),
    "rms_norm by keywords": Row(
        lambda x, w: F.rms_norm(x, normalized_shape=(4,), weight=w), (TOKENS, VEC), {2: SAME}, PAIRS
    ),
    "group_norm": Row(
        lambda x, w: F.group_norm(x, 2, w, w), (X, VEC), {1: [1, 1, 3, 3]},
        [(1, 2, 5, 6), (3, 4, 7, 8)],
    ),
    "group_norm one exact": Row(
        lambda x: F.group_norm(x, 1), (X,), {1: SAME}, pinned=SAME, exact=True
    ),
    "instance_norm": Row(F.instance_norm, (X,), {1: SAME}),
    # Reductions and pooling.
    "mean over space": Row(lambda x: x.mean((2, 3)), (X,), {1: SAME}),
    "mean keepdim": Row(lambda x: x.mean((2, 3), keepdim=True), (X,), {1: SAME}),
    "mean over channels": Row(lambda x: x.mean(1), (X,), {}, pinned=SAME),
    "divided by its own mean": Row(
        lambda x: x / (x.mean(1, keepdim=True) + 1e-6).clamp(min=0.1), (X,), {1: SAME}
    ),
    "divided by its own mean exact": Row(
        lambda x: x / x.mean(1, keepdim=True), (X,), {1: SAME}, pinned=SAME, exact=True
    ),
    "divided by another's mean": Row(
        lambda x, y: x / y.mean(1, keepdim=True), (X, Y), {1: SAME}, pinned=_seq(5, 9)
    ),
    "less its own mean": Row(
        lambda x: x - x.mean(1, keepdim=True), (X,), {1: SAME}, pinned=SAME
    ),
    "its own mean divided": Row(
        lambda x: x.mean(1, keepdim=True) / x, (X,), {1: SAME}, pinned=SAME
    ),
    "divided by its own mean, and more": Row(
        lambda x: x / (mean := x.mean(1, keepdim=True)) * torch.sigmoid(mean), (X,), {1: SAME},
        pinned=SAME,
    ),
    "divided by its own sum": Row(
        lambda x: x / x.sum(1, keepdim=True), (X,), {1: SAME}, pinned=SAME
    ),
    "sum of all": Row(lambda x: x.sum(), (X,), {}, pinned=SAME),
    "max over channels": Row(lambda x: x.max(1)[0], (X,), {}, pinned=SAME),
    "amax over space": Row(lambda x: x.amax((-2, -1)), (X,), {1: SAME}),
    "var": Row(lambda x: x.var(2), (X,), {1: SAME}),
    "norm": Row(lambda x: x.norm(dim=1, keepdim=True), (X,), {}, pinned=SAME),
    "argmax": Row(lambda x: x.argmax(1), (X,), {}, pinned=SAME),
    "softmax over channels": Row(lambda x: x.softmax(1), (X,), {}, pinned=SAME),
    "softmax over space": Row(lambda x: x.softmax(-1), (X,), {1: SAME}),
    "log_softmax": Row(lambda x: F.log_softmax(x, -1), (X,), {1: SAME}),
    "cumsum over channels": Row(lambda x: x.cumsum(1), (X,), {}, pinned=SAME),
    "topk": Row(lambda x: x.topk(2, 1)[0], (X,), {}, pinned=SAME),
    "sort": Row(lambda x: x.sort(-1)[0], (X,), {1: SAME}),
    "max_pool2d": Row(lambda x: F.max_pool2d(x, 2), (X,), {1: SAME}),
    "avg_pool2d": Row(lambda x: F.avg_pool2d(x, 2), (X,), {1: SAME}),
    "adaptive_avg_pool2d": Row(lambda x: F.adaptive_avg_pool2d(x, 3), (X,), {1: SAME}),
    "adaptive to 1": Row(lambda x: F.adaptive_avg_pool2d(x, 1), (X,), {1: SAME}),
    "adaptive_max_pool2d": Row(lambda x: F.adaptive_max_pool2d(x, 2), (X,), {1: SAME}),
    "pool over channels": Row(
        lambda x: F.avg_pool1d(x, 2), (T((2, 5, 4), (2,)),), {}, pinned=SAME
    ),
    "interpolate": Row(lambda x: F.interpolate(x, scale_factor=2), (X,), {1: SAME}),
    "bilinear": Row(
        lambda x: F.interpolate(x, size=(9, 9), mode="bilinear"), (X,), {1: SAME}
    ),
    "grid_sample": Row(
        lambda x, g: F.grid_sample(x, g, align_corners=False),
        (X, T((2, 3, 3, 2), ())),
        {1: SAME},
    ),
    # Unknown: pinned, never guessed.
    "unknown: fft": Row(torch.fft.fft, (X,), {}, pinned=SAME),
    "unknown: tril": Row(torch.tril, (T((4, 4), (0, 1)),), {}, pinned=_seq(1, 9)),
    "unknown: cdist": Row(
        torch.cdist, (TOKENS, TOKENS), {}, pinned=_seq(1, 9)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    out: dict[int, list[int]]
    tied: list[tuple[int, ...]]
    pinned: list[int]
    reasons: list[str]


def _run(row: Row) -> Outcome:
    run = LabelRun(exact=row.exact)
    tensors: list[Tensor] = []
    for i, spec in enumerate(row.tensors):
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        set_labels(tensor, {d: run.new_block(f"t{i}", d, spec.shape[d]) for d in spec.dims})
        if spec.stored:
            set_stored(tensor)
        if spec.values is not None:
            tensor._halp_values = np.array(spec.values)  # type: ignore[attr-defined]
        tensors.append(tensor)
    with torch.no_grad(), FunctionMode(run), LabelMode(run):
        result = row.call(*tensors)
    roots = connected_components(run.size, [(t.left, t.right) for t in run.ties])
    classes: dict[int, list[int]] = {}
    for label in range(1, run.size):
        classes.setdefault(int(roots[label]), []).append(label)
    pinned = sorted({int(label) for pin in run.pins for label in pin.labels})
    first = next(tensors_in(result))
    return Outcome(
        out={d: [int(n) for n in roots[v]] for d, v in sorted(labels_of(first).items())},
        tied=[tuple(c) for c in classes.values() if len(c) > 1],
        pinned=pinned,
        reasons=[pin.reason for pin in run.pins],
    )


@pytest.mark.parametrize("name", ROWS)
def test_labels(name: str) -> None:
    row = ROWS[name]
    got = _run(row)
    assert got.out == row.out
    assert got.tied == row.tied
    assert got.pinned == row.pinned


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unknown: fft", "no rule for the operator '_fft_"),
        ("unknown: cdist", "no rule for the operator"),
        ("softmax over channels", "_softmax reads all channels"),
        ("mean over channels", "mean reads all channels"),
        ("add unlabelled", "meets a dim that can't shrink"),
        ("select channel", "a single channel is picked by its index"),
        ("conv2d whole input", "reads channels that can't be removed"),
        ("index at run time", "known only at run time"),
        ("layer_norm exact", "native_layer_norm takes statistics over the channels"),
    ],
)
def test_pins_have_a_reason(name: str, reason: str) -> None:
    reasons = _run(ROWS[name]).reasons
    assert any(reason in r for r in reasons), reasons


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.layer_norm(x, (4,)),
        lambda x: F.group_norm(x, 1),
        lambda x: x / x.mean(1, keepdim=True),
    ],
)
def test_norms_over_channels_are_noted(norm: Callable[[Tensor], Tensor]) -> None:
    run = LabelRun()
    run.node = "norm"
    x = torch.empty(2, 4, device="meta")
    set_labels(x, {1: run.new_block("x", 1, 4)})
    with LabelMode(run):
        norm(x)
    ((labels, node),) = run.inexact
    assert (labels.tolist(), node) == (SAME, "norm")
    assert run.pins == []


def test_a_mean_that_must_stay_pins() -> None:
    run = LabelRun()
    x = torch.empty(2, 4, device="meta")
    set_labels(x, {1: run.new_block("x", 1, 4)})
    with LabelMode(run):
        mean = x.mean(1, keepdim=True)
    assert run.pins == []
    run.pin_tensor(mean, "output of the network")
    (pin,) = run.pins
    assert (pin.labels.tolist(), pin.reason) == (SAME, "mean reads all channels")


# The registry ---------------------------------------------------------------------------------


def test_registering_twice_raises() -> None:
    def rule(run: LabelRun, call: OpCall) -> None: ...

    with pytest.raises(ValueError, match="the operator 'relu_of_mine' has a rule already"):
        register("relu_of_mine", "relu_of_mine")(rule)
    core._RULES.pop("relu_of_mine")
    with pytest.raises(
        ValueError, match="the operator 'convolution' has a rule already: <function"
    ):
        register("convolution")(rule)


def test_which_rule_an_operator_has() -> None:
    aten = torch.ops.aten
    assert rule_for(aten.relu.default) is pointwise
    assert rule_for(aten.relu_.default) is pointwise
    assert rule_for(aten.hardswish_.default) is pointwise
    assert rule_for(aten.add_.Tensor) is pointwise
    assert rule_for(aten.convolution.default) is not pointwise
    assert rule_for(aten.tril.default) is None
    assert rule_for(aten.sort.default) is not None


def test_a_rule_must_give_labels_of_the_right_size() -> None:
    with pytest.raises(
        core.StructureError, match=r"3 labels for dim 1 of a tensor of shape \(2, 4"
    ):
        set_labels(torch.empty(2, 4), {1: np.arange(1, 4)})


@pytest.fixture
def swapped_halves() -> Iterator[Callable[[Tensor], Tensor]]:
    """An operator of its own library: swaps the halves of the channels and doubles them."""
    with torch.library._scoped_library("halp_fx_tests", "DEF") as library:
        library.define("swap(Tensor x) -> Tensor")

        def swap(x: Tensor) -> Tensor:
            first, second = x.chunk(2, 1)
            return torch.cat([2 * second, 2 * first], 1)

        library.impl("swap", swap, "CompositeExplicitAutograd")
        library.impl("swap", torch.empty_like, "Meta")
        yield torch.ops.halp_fx_tests.swap
    core._RULES.pop("halp_fx_tests::swap", None)


class Swapping(nn.Module):
    def __init__(self, swap: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.swap = [swap]  # kept from the eyes of torch.fx
        self.one, self.two = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.two(self.swap[0](self.one(x)))))


def test_an_operator_without_a_rule_pins(swapped_halves: Callable[[Tensor], Tensor]) -> None:
    groups = find_groups(trace(Swapping(swapped_halves).eval(), torch.randn(2, 3, 4, 4)))
    assert [g.name for g in groups.groups] == ["two"]
    pin = next(p for p in groups.pins if (p.name, p.dim) == ("one.weight", 0))
    assert pin.node == "swap"
    assert pin.reason == "no rule for the operator 'swap'"
    assert "self.two(self.swap[0](self.one(x)))" in pin.source


def test_an_operator_can_be_taught(swapped_halves: Callable[[Tensor], Tensor]) -> None:
    @register("halp_fx_tests::swap")
    def rule(run: LabelRun, call: OpCall) -> None:
        labels = dict(labels_of(call.args[0]))
        if 1 in labels:
            first, second = labels[1].reshape(2, -1)
            run.tie(first, second)  # either half keeps as many as the other
            labels[1] = np.concatenate([second, first])
        set_labels(call.out, labels)

    model = oracle.randomize(Swapping(swapped_halves)).eval()
    x = torch.randn(2, 3, 4, 4)
    pruned = halp_fx.compile(model, 0.6, x, latency="analytic")
    assert pruned.one.out_channels < 16
    oracle.assert_exact(model, pruned, (x,), strict=True)


def test_the_line_of_a_node() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.relu(x)

    graph = trace(Net(), torch.randn(2, 3)).module.graph
    node = next(n for n in graph.nodes if n.op == "call_function")
    file, line, code = source_of(node).split(":", 2)
    assert file.endswith("test_rules.py")
    assert int(line) > 0
    assert code.strip() == "return torch.relu(x)"
    assert source_of(next(iter(graph.nodes))) == ""
