"""What a network does in train mode, as far as a graph can: constants that are `self.training`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn

from halp_fx.passes.rules.source import located
from halp_fx.passes.rules.structure import structural_copy
from halp_fx.passes.rules.tracer import Tracer, opened_functions

__all__ = ["link_training_flags"]


def link_training_flags(
    graph: fx.Graph, model: nn.Module, inputs: tuple[Any, ...], opaque: Mapping[str, str]
) -> str | None:
    """Constants that are False in eval and True in train mode read `training` when they run.

    Tracing freezes `F.dropout(x, training=self.training)`; a second graph, traced in train mode,
    shows which constants those are. The count of batches of a batch norm, which is there in train
    mode only, is left out.

    Returns:
        Where the two graphs differ in more, and nothing is linked; None where they don't, or where
        there is no second one.
    """
    twin = structural_copy(model).train()
    try:
        with nullcontext() if opaque else opened_functions():
            other = Tracer(inputs, opaque).trace(twin)
    except Exception:  # noqa: BLE001  whatever it is, the graph traced in eval mode stands
        return None
    others = _live(_without_counts(other))
    nodes = _live(list(graph.nodes))
    read = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
    twins: dict[fx.Node, fx.Node] = {}
    given: list[tuple[fx.Node, Any, Any]] = []

    def own(used: fx.Node) -> fx.Node:
        """Which node of the one graph it is; of those that read one tensor, always the same."""
        return read[str(used.target)] if used.op == "get_attr" else twins.get(used, used)

    for a, b in itertools.zip_longest(_acting(nodes), _acting(others)):
        if (
            a is None
            or b is None
            or a.op != b.op
            or str(a.target) != str(b.target)
            or not all(
                used in twins or (used.op == "get_attr" and str(used.target) in read)
                for used in b.all_input_nodes
            )
        ):
            return _where(a, b)
        args, kwargs = (fx.node.map_arg(x, own) for x in (b.args, b.kwargs))
        given.append((a, args, kwargs))
        twins[b] = a
    flags = []
    for a, args, kwargs in given:
        mine, named = (fx.node.map_arg(x, own) for x in (a.args, a.kwargs))
        if (str(mine), str(named)) != (str(args), str(kwargs)):
            if not _flag_only(mine, named, args, kwargs):
                return _where(a, None)
            flags.append((a, args, kwargs))
    if not flags:
        return None
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        training = graph.create_node("get_attr", "training")
    for a, args, kwargs in flags:
        a.args = tuple(_linked(x, y, training) for x, y in zip(a.args, args, strict=True))
        a.kwargs = {k: _linked(v, kwargs[k], training) for k, v in a.kwargs.items()}
    return None


def _where(a: fx.Node | None, b: fx.Node | None) -> str:
    """Where two graphs differ first, for people."""
    node = b if b is not None and b.op != "output" else a
    assert node is not None
    return f"first at {node.name}{located(node)}"


def _without_counts(graph: fx.Graph) -> list[fx.Node]:
    """The nodes, save those that count the batches of a batch norm, which nobody reads."""
    found = list(graph.nodes)
    counted: set[fx.Node] = set()
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if (
            node.op == "call_method"
            and node.target == "add_"
            and isinstance(first, fx.Node)
            and first.op == "get_attr"
            and str(first.target).endswith("num_batches_tracked")
            and not node.users
        ):
            found.remove(node)
            counted.add(first)
    for first in counted:  # of a norm that runs more than once there is one
        if not any(user in found for user in first.users):
            found.remove(first)
    return found


def _live(nodes: list[fx.Node]) -> list[fx.Node]:
    """Those that something comes of: an output, or a change in place."""
    live: set[fx.Node] = set()
    for node in reversed(nodes):
        name = getattr(node.target, "__name__", str(node.target))
        in_place = name.endswith("_") or name in ("setitem", *_IN_PLACE)
        acts = node.op in ("placeholder", "output", "call_module") or node.target is torch._assert
        if acts or in_place or any(user in live for user in node.users):
            live.add(node)
    return [node for node in nodes if node in live]


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")


def _flag_only(args: Any, kwargs: Any, others: Any, other_kwargs: Any) -> bool:
    if len(args) != len(others) or kwargs.keys() != other_kwargs.keys():
        return False
    pairs = [*zip(args, others, strict=True), *((v, other_kwargs[k]) for k, v in kwargs.items())]
    return all(str(x) == str(y) or (x is False and y is True) for x, y in pairs)


def _acting(nodes: list[fx.Node]) -> list[fx.Node]:
    """Those that do more than read a tensor."""
    return [node for node in nodes if node.op != "get_attr"]


def _linked(eval_value: Any, train_value: Any, training: fx.Node) -> Any:
    return training if eval_value is False and train_value is True else eval_value
