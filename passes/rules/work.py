"""What each operator computes and moves, as a function of the widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from halp_fx.passes.rules.core import (
    LabelRun,
    OpCall,
    is_stored,
    labels_of,
    rule_for,
    tensors_in,
)
from halp_fx.passes.rules.interpret import Snapshot
from halp_fx.passes.rules.norm import batch_norm
from halp_fx.passes.rules.pointwise import pointwise
from halp_fx.types import Extent, TensorSpec, Traced, Work

__all__ = ["WorkLog"]

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "linear", "mv", "addmv", "dot", "matmul"}
_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable"}
# Operations for each output element, roughly; the default is 1.
_PER_ELEMENT = {"native_batch_norm": 2, "native_layer_norm": 8, "native_group_norm": 8,
                "_softmax": 5, "gelu": 8, "silu": 5, "sigmoid": 4, "tanh": 4}  # fmt: skip
_MOVES = {"cat", "stack", "clone", "contiguous", "roll", "flip", "index", "index_select", "repeat",
          "constant_pad_nd", "copy_", "_to_copy", "pixel_shuffle", "channel_shuffle",
          "native_channel_shuffle", "pixel_unshuffle", "embedding", "im2col"}  # fmt: skip
_FREE = {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze",
         "expand", "select", "slice", "split", "split_with_sizes", "unbind", "alias", "detach",
         "lift", "lift_fresh", "lift_fresh_copy", "as_strided", "empty_like", "_reshape_alias",
         "new_empty", "empty", "empty_strided", "native_dropout"}  # fmt: skip


@dataclass(frozen=True)
class _Logged:
    node: str
    op: str
    kind: str
    flops: float
    factors: tuple[tuple[Snapshot, int], ...]  # (tensor, dim): its size is a factor
    reads: tuple[Snapshot, ...]
    writes: tuple[Snapshot, ...]


class WorkLog:
    """Listens to a `LabelRun` and notes every operator that computes or moves something.

    Args:
        run: what is listened to.
        traced: the network that it runs.
    """

    def __init__(self, run: LabelRun, traced: Traced) -> None:
        self.run = run
        self.traced = traced
        self.logged: list[_Logged] = []
        run.observer = self.note
        run.whole_observer = self.note_whole

    def note_whole(self, read: list[torch.Tensor], out: list[torch.Tensor]) -> None:
        """A node that nobody looks into, in place of what it did before it failed.

        Its operations are taken to be in proportion to its largest weight.
        """
        node = self.run.node
        self.logged = [item for item in self.logged if item.node != node]
        flops = float(self.traced.flops.get(node, 0.0))
        reads, writes = (tuple(_snap(t) for t in tensors) for tensors in (read, out))
        weights = [_snap(t) for t in read if is_stored(t)] or list(writes)
        factors: tuple[tuple[Snapshot, int], ...] = ()
        if weights and flops:
            largest = max(weights, key=lambda s: math.prod(s.shape))
            flops /= max(math.prod(largest.shape), 1)
            factors = _dims(largest)
        self.logged.append(_Logged(node, self.run.op, "whole", flops, factors, reads, writes))

    def note(self, call: OpCall) -> None:
        name = call.name.removesuffix("_") if call.name not in _MOVES else call.name
        out = [_snap(t) for t in tensors_in(call.out)]
        if name in _FREE or not out:
            return
        tensors = [_snap(t) for t in call.tensors()]
        kind = "other"
        if name in _CONVOLUTIONS:
            kind, (flops, factors) = "contraction", _convolution(call, tensors, out)
        elif name in _PRODUCTS:
            kind, (flops, factors) = "contraction", _product(name, tensors, out)
        elif name in _MOVES:
            flops, factors = 0.0, ()
        else:
            rule = rule_for(call.func)
            if rule in (pointwise, batch_norm):
                kind = "pointwise"
            # Reductions and pooling touch each input, windows each element of a window.
            largest = max([*tensors, *out[:1]], key=lambda s: math.prod(s.shape))
            window = math.prod(call.args[1]) if _has_window(name) else 1
            touched = out[0] if window > 1 or kind == "pointwise" else largest
            flops = float(_PER_ELEMENT.get(name, 1) * window)
            factors = _dims(touched)
        if name == "cat":  # its inputs are as large as its output, and one axis prices it
            tensors = out
        self.logged.append(
            _Logged(self.run.node, name, kind, flops, factors, tuple(tensors), tuple(out[:1]))
        )

    def specify(self, spec: Callable[[Snapshot], TensorSpec]) -> Iterator[Work]:
        """The log with sizes as functions of the units kept."""
        for item in self.logged:
            factors: list[Extent] = []
            constant = item.flops
            for snap, dim in item.factors:
                extent = spec(snap).extents[dim]
                if extent.parts:
                    factors.append(extent)
                else:
                    constant *= extent.dense
            yield Work(
                node=item.node,
                op=item.op,
                kind=item.kind,
                flops=constant,
                factors=tuple(factors),
                reads=tuple(spec(s) for s in item.reads),
                writes=tuple(spec(s) for s in item.writes),
            )


def _has_window(name: str) -> bool:
    return "pool" in name and "adaptive" not in name and "unpool" not in name


def _snap(tensor: torch.Tensor) -> Snapshot:
    return Snapshot(tuple(tensor.shape), tensor.dtype, dict(labels_of(tensor)))


def _dims(snap: Snapshot) -> tuple[tuple[Snapshot, int], ...]:
    return tuple((snap, d) for d in range(len(snap.shape)))


def _convolution(call: OpCall, tensors: list[Snapshot], out: list[Snapshot]) -> Any:
    """2 operations for each output (input, when transposed) and each weight of a filter."""
    source, weight = tensors[0], tensors[1]
    touched = source if call.args[6] else out[0]
    kernel = tuple((weight, d) for d in range(1, len(weight.shape)))
    return 2.0, (*_dims(touched), *kernel)


def _product(name: str, tensors: list[Snapshot], out: list[Snapshot]) -> Any:
    left = tensors[1] if name in ("addmm", "baddbmm", "addmv") else tensors[0]
    return 2.0, (*_dims(out[0]), (left, len(left.shape) - 1))
