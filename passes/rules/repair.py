"""Constants of a graph that repeat a channel count or position, set to the shrunk network's.

One handler a family of graph-level functions and methods. A handler sees the node, its arguments
as evaluated in the shrunk network, and what the dense network had; it changes the node's
arguments. It need not be right for every use: the result of each node is compared with what the
labels say, and what doesn't agree is pinned.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from halp_fx.passes.rules.interpret import Snapshot
from halp_fx.passes.rules.structure import known_values
from halp_fx.types import IntArray

__all__ = ["Shrunk", "repair"]


@dataclass(frozen=True)
class Shrunk:
    """The dense network's snapshots and which labels are still there."""

    snapshots: Mapping[str, Any]  # node -> nest of `Snapshot`s
    values: Mapping[str, Any]  # node -> what it gave in the dense network
    alive: np.ndarray[Any, np.dtype[np.bool_]]  # by label

    def shape(self, dense: Snapshot) -> tuple[int, ...]:
        """Shape of a tensor in the shrunk network."""
        return tuple(
            int(self.alive[dense.labels[d]].sum()) if d in dense.labels else size
            for d, size in enumerate(dense.shape)
        )

    def dense(self, value: Any) -> Any:
        """Arguments as the dense network evaluated them: nodes become numbers or snapshots."""
        return fx.map_arg(value, lambda n: self.snapshots.get(n.name, self.values.get(n.name)))

    def moved(self, labels: IntArray, positions: Any) -> list[int]:
        """Where dense `positions` along a dim are in the shrunk network; the removed drop out."""
        alive = self.alive[labels]
        new = np.cumsum(alive) - 1
        return [int(new[p]) for p in positions if alive[p]]


# (node, evaluated args, evaluated kwargs, facts) -> None
Handler = Callable[[fx.Node, tuple[Any, ...], dict[str, Any], Shrunk], None]
_HANDLERS: dict[Any, Handler] = {}


def _handles(*targets: Any) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        for target in targets:
            if target in _HANDLERS:
                raise ValueError(f"{target} has a handler already")
            _HANDLERS[target] = handler
        return handler

    return add


def repair(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk) -> None:
    """Set the constants in a node's arguments for the shrunk network."""
    handler = _HANDLERS.get(node.target) if node.op in ("call_function", "call_method") else None
    if handler is not None:
        handler(node, args, kwargs, shrunk)
    elif node.op in ("call_function", "call_method"):
        _freeze_numbers(node, args, kwargs, shrunk)


def _freeze_numbers(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk
) -> None:
    """Numbers computed from channel counts (`d ** -0.5`) stay what they were in the dense network.

    Otherwise the function would change with the width. Sizes are another family.
    """
    if not isinstance(shrunk.snapshots.get(node.name), Snapshot):
        return

    node.args = tuple(_frozen(node, a, v, shrunk) for a, v in zip(node.args, args, strict=True))
    node.kwargs = {k: _frozen(node, a, kwargs[k], shrunk) for k, a in node.kwargs.items()}


def _frozen(node: fx.Node, argument: Any, value: Any, shrunk: Shrunk) -> Any:
    """A number among the arguments of a node, as in the dense network."""
    if not isinstance(argument, fx.Node) or isinstance(value, (bool, torch.Tensor)):
        return argument
    dense = shrunk.values.get(argument.name)
    if not isinstance(value, (int, float)) or value == dense:
        return argument
    if not isinstance(dense, (int, float)) or not value or not _varies(argument, shrunk):
        return dense
    return _scaled(node, argument, value, dense)


def _scaled(node: fx.Node, argument: fx.Node, value: float, wanted: float) -> fx.Node:
    """A number computed before `node`, which is `value` now, such that it is `wanted`.

    In proportion, since it may hold the batch or the size of the image besides.
    """
    with node.graph.inserting_before(node):
        if not isinstance(value, int) or not isinstance(wanted, int):
            return node.graph.call_function(operator.mul, (argument, wanted / value))
        ratio = Fraction(wanted, value)
        times = node.graph.call_function(operator.mul, (argument, ratio.numerator))
        if ratio.denominator == 1:
            return times
        return node.graph.call_function(operator.floordiv, (times, ratio.denominator))


def _varies(number: fx.Node, shrunk: Shrunk) -> bool:
    """Whether a number is computed from sizes that need not be those of the example."""
    seen, stack = {number}, [number]
    while stack:
        node = stack.pop()
        first = node.args[0] if node.args else None
        source = shrunk.snapshots.get(first.name) if isinstance(first, fx.Node) else None
        if isinstance(source, Snapshot):  # a size, or the whole shape
            if first.op == "get_attr":  # type: ignore[union-attr]
                continue
            dims = _dims_of(node, source, seen)
            if any(d not in source.labels for d in dims):
                return True
            continue
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
    return False


def _dims_of(node: fx.Node, source: Snapshot, users: Collection[fx.Node]) -> Iterable[int]:
    """The dims of a tensor that `users` look at: of `x.size(k)` and `x.shape[k]` one."""
    rank = len(source.shape)
    if node.op == "call_method" and len(node.args) > 1 and isinstance(node.args[1], int):
        return [node.args[1] % rank]
    dims: list[int] = []
    for user in node.users:
        if user in users:
            item = user.args[1] if user.target is operator.getitem else None
            if not isinstance(item, int):
                return range(rank)
            dims.append(item % rank)
    return dims


def _source(node: fx.Node, shrunk: Shrunk) -> Snapshot | None:
    """The dense snapshot of a node's first argument, if that is a tensor."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    found = shrunk.snapshots.get(first.name) if isinstance(first, fx.Node) else None
    return found if isinstance(found, Snapshot) else None


@_handles("view", "reshape", "expand", torch.reshape, torch.broadcast_to, "broadcast_to")
def _sizes(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk) -> None:
    out = shrunk.snapshots[node.name]
    if not isinstance(out, Snapshot) or len(node.args) < 2 or node.kwargs:
        return
    packed = len(node.args) == 2 and not isinstance(args[1], int)
    given = node.args[1] if packed else node.args[1:]
    evaluated = tuple(args[1] if packed else args[1:])
    new = _fitted(node, given, evaluated, shrunk.shape(out), shrunk)
    if new is not None:
        node.args = (node.args[0], new) if packed else (node.args[0], *new)


@_handles("unflatten", torch.unflatten)
def _unflatten(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk
) -> None:
    out = shrunk.snapshots[node.name]
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("sizes")
    evaluated = args[2] if len(args) > 2 else kwargs.get("sizes")
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    if not isinstance(out, Snapshot) or evaluated is None:
        return
    first = dim % (len(out.shape) - len(evaluated) + 1)
    want = shrunk.shape(out)[first : first + len(evaluated)]
    new = _fitted(node, given, tuple(evaluated), want, shrunk)
    if new is not None:
        node.args = (node.args[0], dim, tuple(new))
        node.kwargs = {}


def _fitted(
    node: fx.Node, given: Any, evaluated: tuple[int, ...], want: tuple[int, ...], shrunk: Shrunk
) -> tuple[Any, ...] | None:
    """`given` sizes with those replaced that don't evaluate to `want`; None: all are right."""
    if len(evaluated) != len(want):
        return None
    wrong = [k for k, (e, w) in enumerate(zip(evaluated, want, strict=True)) if e not in (-1, w)]
    if not wrong:
        return None
    if isinstance(given, fx.Node):
        with node.graph.inserting_before(node):
            items: list[Any] = [
                None if k in wrong else node.graph.call_function(operator.getitem, (given, k))
                for k in range(len(want))
            ]
    else:
        items = list(given)
    inferred = -1 in evaluated or "expand" in str(node.target)
    for k in wrong:
        # A size that is computed may hold the batch, so it is best inferred when it runs.
        if isinstance(items[k], fx.Node) and not inferred:
            items[k], inferred = -1, True
        elif isinstance(items[k], fx.Node) and evaluated[k] and _varies(items[k], shrunk):
            items[k] = _scaled(node, items[k], evaluated[k], want[k])
        else:
            items[k] = want[k]
    return tuple(items)


@_handles("split", "chunk", torch.split, torch.chunk, "tensor_split",
          torch.tensor_split, "split_with_sizes", torch.split_with_sizes)  # fmt: skip
def _pieces(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk) -> None:
    source = _source(node, shrunk)
    out = shrunk.snapshots[node.name]
    if source is None or not isinstance(out, (tuple, list)):
        return
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(source.shape)
    if shrunk.shape(source)[dim] == source.shape[dim]:
        return
    node.op, node.target = "call_function", torch.split
    node.args = (node.args[0], [shrunk.shape(piece)[dim] for piece in out], dim)
    node.kwargs = {}


@_handles(operator.getitem, operator.setitem)
def _getitem(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk) -> None:
    source = _source(node, shrunk)
    if source is None:
        return
    given = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    evaluated = args[1] if isinstance(args[1], tuple) else (args[1],)
    dense = tuple(shrunk.dense(item) for item in given)
    new = list(given)
    dim = 0
    for k, item in enumerate(dense):
        if item is None:
            continue
        if item is Ellipsis:
            used = sum(1 for i in dense[k + 1 :] if i is not None and i is not Ellipsis)
            dim = len(source.shape) - used
            continue
        if dim in source.labels:
            new[k] = _moved_item(item, given[k], evaluated[k], source, dim, shrunk)
        dim += 1
    if any(a is not b for a, b in zip(new, given, strict=True)):
        item = tuple(new) if isinstance(node.args[1], tuple) else new[0]
        node.args = (node.args[0], item, *node.args[2:])
    if len(node.args) > 2:  # what is written
        node.args = (*node.args[:2], _frozen(node, node.args[2], args[2], shrunk))


def _moved_item(
    dense: Any, given: Any, evaluated: Any, source: Snapshot, dim: int, shrunk: Shrunk
) -> Any:
    labels = source.labels[dim]
    size = int(shrunk.alive[labels].sum())
    if isinstance(dense, slice):
        want = shrunk.moved(labels, range(*dense.indices(len(labels))))
        if isinstance(evaluated, slice) and list(range(*evaluated.indices(size))) == want:
            return given
        return _as_slice(want, size)
    if isinstance(dense, int) and not isinstance(dense, bool):
        moved = shrunk.moved(labels, [dense % len(labels)])
        return moved[0] if moved and moved[0] != evaluated else given
    if isinstance(dense, (list, tuple)) and all(isinstance(i, int) for i in dense):
        return shrunk.moved(labels, [i % len(labels) for i in dense])
    known = known_values(shrunk.values.get(given.name)) if isinstance(given, fx.Node) else None
    if known is not None and known.ndim == 1 and size < len(labels):
        return shrunk.moved(labels, [int(i) % len(labels) for i in known])
    return given


def _as_slice(positions: list[int], size: int) -> Any:
    """Positions as a slice where they are evenly spaced, else as a list."""
    if not positions:
        return slice(0, 0, None)
    steps = set(np.diff(positions).tolist()) or {1}
    if len(steps) > 1 or min(steps) < 1:
        return positions
    step = steps.pop()
    start = positions[0] or None
    stop = None if positions[-1] + step >= size else positions[-1] + 1
    return slice(start, stop, None if step == 1 else step)


@_handles("narrow", torch.narrow, "index_select", torch.index_select, "roll", torch.roll,
          "select", torch.select)  # fmt: skip
def _picked(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk) -> None:
    """Picking positions along one dim becomes indexing with the shrunk network's positions."""
    source = _source(node, shrunk)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    dense = [shrunk.dense(a) for a in node.args] + [shrunk.dense(v) for v in node.kwargs.values()]
    if source is None or len(dense) < 3:
        return
    dims = dense[2] if name == "roll" else dense[1]
    dims = list(dims) if isinstance(dims, (tuple, list)) else [dims]
    if not all(isinstance(d, int) for d in dims):
        return
    rank, shape = len(source.shape), shrunk.shape(source)
    changed = [i for i, d in enumerate(dims) if shape[d % rank] != source.shape[d % rank]]
    if len(changed) != 1:
        return
    dim = dims[changed[0]] % rank
    if name == "roll":
        shifts = list(dense[1]) if isinstance(dense[1], (tuple, list)) else [dense[1]]
        dense[1] = shifts[changed[0]]
    labels = source.labels[dim]
    positions = _positions(name, node, dense, len(labels), shrunk)
    if positions is None:
        return
    if name == "roll":
        _roll_others(node, shifts, dims, changed[0])
    item: Any = shrunk.moved(labels, positions)
    if name == "narrow":
        item = _as_slice(item, int(shrunk.alive[labels].sum()))
    elif name == "select":
        item = item[0]
    node.op, node.target = "call_function", operator.getitem
    node.args = (node.args[0], (*(slice(None),) * dim, item))
    node.kwargs = {}


def _roll_others(node: fx.Node, shifts: list[int], dims: list[int], channel: int) -> None:
    """Put a roll over the other dims before `node`."""
    others = [i for i in range(len(dims)) if i != channel]
    if not others:
        return
    with node.graph.inserting_before(node):
        rolled = node.graph.call_function(
            torch.roll, (node.args[0], [shifts[i] for i in others], [dims[i] for i in others])
        )
    node.args = (rolled, *node.args[1:])


def _positions(
    name: str, node: fx.Node, dense: list[Any], size: int, shrunk: Shrunk
) -> list[int] | None:
    """Positions along the dim that a dense network's call picks, in order."""
    match name:
        case "narrow" if isinstance(dense[2], int) and isinstance(dense[3], int):
            return list(range(dense[2] % size, dense[2] % size + dense[3]))
        case "select" if isinstance(dense[2], int):
            return [dense[2] % size]
        case "roll":
            return [int(p) for p in np.roll(np.arange(size), dense[1])]
        case "index_select":
            index = [*node.args, *node.kwargs.values()][2]
            value = shrunk.values.get(index.name) if isinstance(index, fx.Node) else None
            known = known_values(value)
            return None if known is None else [int(i) % size for i in known]
    return None


@_handles(F.layer_norm, torch.layer_norm, F.rms_norm)
def _normalized_shape(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk
) -> None:
    source = _source(node, shrunk)
    given = args[1] if len(args) > 1 else kwargs.get("normalized_shape")
    if source is None or given is None:
        return
    want = shrunk.shape(source)[len(source.shape) - len(given) :]
    if tuple(given) == want:
        return
    if len(args) > 1:
        node.args = (node.args[0], list(want), *node.args[2:])
    else:
        node.kwargs = {**node.kwargs, "normalized_shape": list(want)}


@_handles(F.group_norm, torch.group_norm)
def _norm_groups(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk
) -> None:
    source = _source(node, shrunk)
    groups = shrunk.dense(node.args[1] if len(args) > 1 else node.kwargs["num_groups"])
    if source is None or groups == 1:
        return
    new = shrunk.shape(source)[1] // (source.shape[1] // groups)
    if len(args) > 1:
        node.args = (node.args[0], new, *node.args[2:])
    else:
        node.kwargs = {**node.kwargs, "num_groups": new}


_CONVOLUTIONS = {
    F.conv1d: 6, F.conv2d: 6, F.conv3d: 6,
    F.conv_transpose1d: 6, F.conv_transpose2d: 6, F.conv_transpose3d: 6,
}  # fmt: skip


@_handles(*_CONVOLUTIONS)
def _convolution_groups(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk
) -> None:
    place: int = _CONVOLUTIONS[node.target]  # type: ignore[index]
    positional = len(node.args) > place
    given = node.args[place] if positional else node.kwargs.get("groups", 1)
    groups = shrunk.dense(given)
    source = _source(node, shrunk)
    if source is None or groups == 1:
        return
    channel = 1 if len(source.shape) == args[1].ndim else 0
    new: Any = shrunk.shape(source)[channel] // (source.shape[channel] // groups)
    now = args[place] if positional else kwargs.get("groups", 1)
    if isinstance(given, fx.Node) and _varies(given, shrunk):  # as one that holds the batch
        if now == new:
            return
        new = _scaled(node, given, now, new)
    if positional:
        node.args = (*node.args[:place], new, *node.args[place + 1 :])
    else:
        node.kwargs = {**node.kwargs, "groups": new}


@_handles(F.scaled_dot_product_attention)
def _attention_scale(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], shrunk: Shrunk
) -> None:
    """The default scale is 1 / sqrt(width): keep the dense network's."""
    _freeze_numbers(node, args, kwargs, shrunk)
    query = _source(node, shrunk)
    if query is None or kwargs.get("scale") is not None:
        return
    if shrunk.shape(query)[-1] != query.shape[-1]:
        node.kwargs = {**node.kwargs, "scale": query.shape[-1] ** -0.5}
