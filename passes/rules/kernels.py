"""Which graph nodes a back-end runs as one kernel, and the roofline of each."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from halp_fx.types import ChannelGroups, Extent, TensorSpec, Work

__all__ = ["Part", "axes_of", "kernel_parts", "reduced", "remainder", "roofline", "specs_in"]


@dataclass(frozen=True)
class Part:
    """One kernel: the nodes that run in it and what they compute and move."""

    nodes: tuple[str, ...]
    work: tuple[Work, ...]
    reads: tuple[TensorSpec, ...]  # from outside the kernel
    writes: tuple[TensorSpec, ...]

    @property
    def op(self) -> str:
        return " + ".join(w.op for w in self.work)

    @property
    def is_whole(self) -> bool:
        """Whether it is a node that nobody looks into."""
        return any(w.kind == "whole" for w in self.work)


_TURNED = {
    "permute", "transpose", "movedim", "swapaxes", "swapdims", "t", torch.permute, torch.transpose,
    torch.movedim, torch.swapaxes, torch.swapdims, torch.t,
}  # fmt: skip
_PIECES = {
    "split", "chunk", "unbind", "tensor_split", "split_with_sizes", torch.split, torch.chunk,
    torch.unbind, torch.tensor_split, torch.split_with_sizes,
}  # fmt: skip
_PRODUCTS = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__"}


def kernel_parts(
    groups: ChannelGroups, fuses: bool, split: bool, copies: bool = False
) -> list[Part]:
    """Cut the graph into kernels.

    Args:
        fuses: a pointwise or batch norm node runs with the node before it, where nothing else
            reads that one.
        split: a node of several operators (a function that tracing kept whole) is priced
            operator by operator.
        copies: views that turn a tensor or take it to pieces are kernels too, where they are not
            a part of a matrix product.
    """
    by_node: dict[str, list[Work]] = {}
    for item in groups.work:
        by_node.setdefault(item.node, []).append(item)
    parts: list[Part] = []
    open_in: dict[str, int] = {}  # node -> the kernel that ends with it
    for node in groups.traced.module.graph.nodes:
        work = by_node.get(node.name)
        if not work and copies and (copy := _copy(node, groups)) is not None:
            parts.append(_part(node, (copy,)))
            continue
        if not work:
            _follow(node, open_in)
            continue
        before = _producer(node, open_in) if fuses and _is_pointwise(work) else None
        if before is not None:
            where = open_in.pop(before.name)
            parts[where] = _joined(parts[where], node, work, before, groups)
            open_in[node.name] = where
            continue
        several = split and len(work) > 1 and not _is_simple(work)
        for piece in [(w,) for w in work] if several else [tuple(work)]:
            parts.append(_part(node, piece))
        if not several and not parts[-1].is_whole:
            open_in[node.name] = len(parts) - 1
    return parts


def _copy(node: fx.Node, groups: ChannelGroups) -> Work | None:
    """What a view moves that becomes an operator of its own, as in ONNX."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(
        read := groups.outputs.get(source.name), TensorSpec
    ):
        return None
    turned = node.target in _TURNED and not all(u.target in _PRODUCTS for u in node.users)
    sliced = node.target is operator.getitem and any(
        isinstance(item, slice) and item != slice(None) for item in _items(node.args[1])
    )
    if not (turned or sliced or node.target in _PIECES) or source.op == "get_attr":
        return None
    writes = tuple(specs_in(groups.outputs.get(node.name)))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return Work(node.name, name, "other", 0.0, (), (read,), writes) if writes else None


def _items(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _follow(node: fx.Node, open_in: dict[str, int]) -> None:
    """A node that moves nothing (dropout in eval mode, identity) passes its kernel on."""
    if node.op == "call_module" and len(node.all_input_nodes) == 1:
        before = node.all_input_nodes[0]
        if before.name in open_in and len(before.users) == 1:
            open_in[node.name] = open_in.pop(before.name)


def _producer(node: fx.Node, open_in: dict[str, int]) -> fx.Node | None:
    found = [n for n in node.all_input_nodes if n.name in open_in and len(n.users) == 1]
    return max(found, key=lambda n: open_in[n.name]) if found else None


def _is_pointwise(work: list[Work]) -> bool:
    return all(w.kind == "pointwise" for w in work)


def _is_simple(work: list[Work]) -> bool:
    """One operator that counts, and only pointwise ones or copies beside it."""
    return sum(1 for w in work if w.kind not in ("pointwise",) and w.flops > 0) <= 1


def _part(node: fx.Node, work: tuple[Work, ...]) -> Part:
    first, last = work[0], work[-1]
    reads = list(first.reads)
    for item in work[1:]:
        reads += item.reads[1:]
    return Part((node.name,), work, tuple(reads), last.writes)


def _joined(
    part: Part, node: fx.Node, work: list[Work], before: fx.Node, groups: ChannelGroups
) -> Part:
    """A kernel with one more pointwise node: what it reads besides the kernel's own result."""
    others = [
        spec
        for n in node.all_input_nodes
        if n is not before
        for spec in specs_in(groups.outputs.get(n.name))
    ]
    return replace(
        part,
        nodes=(*part.nodes, node.name),
        work=(*part.work, *work),
        reads=(*part.reads, *others),
        writes=work[-1].writes,
    )


def remainder(part: Part, gone: Collection[str]) -> Part | None:
    """The same kernel without some of its nodes; None where nothing or all of it is left."""
    nodes = tuple(name for name in part.nodes if name not in gone)
    if not nodes or len(nodes) == len(part.nodes):
        return None
    work = tuple(item for item in part.work if item.node in nodes)
    if not work:
        return None
    # What comes after reads the result so far, as in a kernel that is joined.
    reads = [*work[0].reads, *(spec for item in work[1:] for spec in item.reads[1:])]
    lost = [spec for item in part.work if item.node in gone for spec in item.writes]
    if lost and lost[-1] in reads:
        reads.remove(lost[-1])  # a constant of a few numbers takes its place
    return Part(nodes, work, tuple(reads), work[-1].writes)


def specs_in(value: Any) -> Iterator[TensorSpec]:
    """All specs in what a node gives: one, or a container of some."""
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from specs_in(item)
    elif isinstance(value, dict):
        yield from specs_in(list(value.values()))


@dataclass(frozen=True)
class _Size:
    """An extent as `fixed + scale * axis`."""

    fixed: int
    scale: int = 0
    axis: int = -1


def axes_of(part: Part) -> tuple[tuple[Extent, ...], Callable[[Extent], _Size]]:
    """The distinct dims of a kernel that can change, and each extent in terms of them.

    Extents that are multiples of each other (C and 49 C after a flatten) share an axis.
    """
    axes: list[Extent] = []
    known: dict[tuple[tuple[int, int], ...], int] = {}
    for extent in _extents(part):
        if extent.parts and (key := reduced(extent)[0]) not in known:
            known[key] = len(axes)
            divisor = reduced(extent)[1]
            axes.append(Extent((extent.dense - extent.fixed) // divisor, 0, key))

    def locate(extent: Extent) -> _Size:
        if not extent.parts:
            return _Size(extent.dense)
        key, divisor = reduced(extent)
        return _Size(extent.fixed, divisor, known[key])

    return tuple(axes), locate


def reduced(extent: Extent) -> tuple[tuple[tuple[int, int], ...], int]:
    """What extents that are multiples of each other have in common, and how many times it."""
    divisor = math.gcd(*(c for _, c in extent.parts))
    return tuple((g, c // divisor) for g, c in extent.parts), divisor


def _extents(part: Part) -> Iterable[Extent]:
    for item in part.work:
        yield from item.factors
    for spec in (*part.reads, *part.writes):
        yield from spec.extents


def roofline(
    part: Part, cost_ms: Callable[[Any, Any], Any], round_channels: Callable[[Any], Any]
) -> tuple[tuple[Extent, ...], Callable[..., Any]]:
    """A kernel's axes, and its cost in milliseconds at given sizes of them."""
    axes, locate = axes_of(part)
    products: list[tuple[float, list[_Size]]] = []
    for item in part.work:
        products.append((item.flops, [locate(e) for e in item.factors]))
    moved: list[tuple[float, list[_Size]]] = []
    for spec in (*part.reads, *part.writes):
        moved.append((float(spec.dtype.itemsize), [locate(e) for e in spec.extents]))

    def total(products: list[tuple[float, list[_Size]]], sizes: tuple[Any, ...]) -> Any:
        result: Any = 0.0
        for factor, dims in products:
            term: Any = factor
            for size in dims:
                if size.axis < 0:
                    term = term * size.fixed
                else:
                    term = term * round_channels(size.fixed + size.scale * sizes[size.axis])
            result = result + term
        return result

    products, moved = _merged(products), _merged(moved)

    def cost(*sizes: Any) -> Any:
        return cost_ms(total(products, sizes), total(moved, sizes))

    return axes, cost


def _merged(products: list[tuple[float, list[_Size]]]) -> list[tuple[float, list[_Size]]]:
    """Multiply constants out and add products of the same dims."""
    merged: dict[tuple[tuple[int, int, int], ...], float] = {}
    for factor, dims in products:
        constant = factor * math.prod(s.fixed for s in dims if s.axis < 0)
        key = tuple(sorted((s.axis, s.scale, s.fixed) for s in dims if s.axis >= 0))
        merged[key] = merged.get(key, 0.0) + constant
    return [
        (factor, [_Size(fixed, scale, axis) for axis, scale, fixed in key])
        for key, factor in merged.items()
        if factor
    ]
