"""The sum that a layer ends in: what a residual branch can make up for."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from halp_fx.idle import is_idle
from halp_fx.reconstruction.norms import Norm, Tensors, main_input

__all__ = ["Sum", "sum_after"]

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# What does nothing in eval mode.
_IDLE_CALLS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
_SHAPE_ATTRIBUTES = ("ndim", "shape", "dtype", "device")
_SHAPE_METHODS = ("size", "dim", "numel")


@dataclass(frozen=True)
class Sum:
    """Of what a layer gives and what is known before the layer runs."""

    node: fx.Node  # of the dense graph
    addend: fx.Node  # of the pruned graph


def sum_after(
    layer: fx.Node, tensors: Tensors, twins: Mapping[str, fx.Node]
) -> tuple[Norm | None, Sum | None]:
    """The batch norm right after a layer, and the sum that the two end in.

    Only where nothing else runs in between, in either graph: neither the stream nor the sum
    changes on the way, and the dense graph passes no other layer.
    """
    norm: Norm | None = None
    chain, node = [layer], layer
    while True:
        users = [user for user in node.users if not _reads_shape(user)]
        if len(users) != 1:
            return norm, None
        user = users[0]
        if node is layer and norm is None and main_input(user) is node:
            norm = tensors.norm_at(user)
            if norm is not None:
                chain.append(user)
                node = user
                continue
        if _is_sum(user):
            first, second = user.args
            addend: Any = second if first is node else first
            twin = twins.get(user.name)
            known = addend.op == "get_attr" or addend < layer
            if twin is None or not _is_sum(twin) or not known or not _direct(chain, user):
                return norm, None
            between = [twins.get(passed.name) for passed in chain]
            if None in between or not _direct(between, twin):
                return norm, None
            return norm, Sum(twin, addend)
        if not _is_idle(user, tensors):
            return norm, None
        chain.append(user)
        node = user


def _direct(chain: list[Any], end: fx.Node) -> bool:
    """Whether nothing but the chain, and what is computed from no tensor, runs up to `end`."""
    plain: set[fx.Node] = set()
    node = chain[0].next
    while node is not end:
        if node.op == "root":
            return False
        if node not in chain:
            inputs = node.all_input_nodes
            if not _reads_shape(node) and not all(before in plain for before in inputs):
                return False
            if node.op == "call_module":
                return False
            plain.add(node)
        node = node.next
    return True


def _reads_shape(node: fx.Node) -> bool:
    """Whether it reads no values of a tensor."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SHAPE_METHODS


def _is_idle(node: fx.Node, tensors: Tensors) -> bool:
    if node.op == "call_module":
        return is_idle(tensors.network.get_submodule(str(node.target)))
    return node.op == "call_function" and node.target in _IDLE_CALLS


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and node.target in _SUMS
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(arg, fx.Node) for arg in node.args)
        and node.args[0] is not node.args[1]
    )
