"""Residual branches that can be dropped whole: without their channels they add a constant."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from halp_fx.minibatches import device_of
from halp_fx.passes.rules.kernels import specs_in
from halp_fx.types import Branch, Extent, Group, TensorSpec, Work

__all__ = ["branch_constant", "find_branches"]

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CONTRACTIONS = (nn.modules.conv._ConvNd, nn.Linear)
_PASSES = (nn.modules.batchnorm._BatchNorm, nn.Identity, nn.Dropout, nn.Dropout2d)


def find_branches(
    module: fx.GraphModule,
    groups: tuple[Group, ...],
    outputs: Mapping[str, Any],
    parameters: Mapping[str, TensorSpec],
    work: tuple[Work, ...],
    writes: Mapping[str, Collection[str]],
) -> tuple[Branch, ...]:
    """Operands of sums that become constant when all groups that live only in them are empty.

    Args:
        writes: node -> those whose tensors it changes in place.
    """
    where = _places(module, groups, outputs, parameters)
    elementwise = _elementwise_nodes(module, work)
    live = _fed(module)
    found: list[Branch] = []
    taken: set[int] = set()
    for node in module.graph.nodes:
        if node.target not in _SUMS or len(node.all_input_nodes) != 2:
            continue
        one, two = node.all_input_nodes
        shape = _shape(outputs, node)
        if not {one, two} <= live or _shape(outputs, one) != shape or _shape(outputs, two) != shape:
            continue
        for operand in (one, two):
            region = _without_writers(_region(operand, node), writes)
            inside = {n.name for n in region}
            own = {g for g, nodes in enumerate(where) if nodes and nodes <= inside}
            if not own or own & taken:
                continue
            if _becomes_constant(region, operand, own, outputs, module, elementwise):
                taken |= own
                found.append(
                    Branch(
                        operand=operand.name,
                        nodes=tuple(n.name for n in module.graph.nodes if n in region),
                        groups=tuple(sorted(own)),
                        tensors=_owned_tensors(module, region),
                    )
                )
                break  # were both operands dropped, nothing would reach what follows
    return tuple(found)


def _fed(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes that depend on the network's inputs."""
    fed: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(n in fed for n in node.all_input_nodes):
            fed.add(node)
    return fed


def _shape(outputs: Mapping[str, Any], node: fx.Node) -> tuple[int, ...] | None:
    spec = outputs.get(node.name)
    return spec.dense_shape if isinstance(spec, TensorSpec) else None


def _places(
    module: fx.GraphModule,
    groups: tuple[Group, ...],
    outputs: Mapping[str, Any],
    parameters: Mapping[str, TensorSpec],
) -> list[set[str]]:
    """For each group the nodes that give its channels or read its parameters."""
    where: list[set[str]] = [set() for _ in groups]
    users: dict[str, list[str]] = {}
    for node in module.graph.nodes:
        for spec in specs_in(outputs.get(node.name)):
            for extent in spec.extents:
                for g, _ in extent.parts:
                    where[g].add(node.name)
        if node.op in ("call_module", "get_attr"):
            users.setdefault(str(node.target), []).append(node.name)
    for name, spec in parameters.items():
        readers = users.get(name, []) + users.get(name.rpartition(".")[0], [])
        for extent in spec.extents:
            for g, _ in extent.parts:
                where[g].update(readers or ["?"])
    return where


def _region(operand: fx.Node, join: fx.Node) -> set[fx.Node]:
    """`operand` and all nodes that serve nothing but it."""
    if set(operand.users) != {join} or operand.op in ("placeholder", "get_attr"):
        return set()
    region, stack = {operand}, [operand]
    while stack:
        for before in stack.pop().all_input_nodes:
            if before.op == "placeholder" or before in region:
                continue
            if all(user in region for user in before.users):
                region.add(before)
                stack.append(before)
    # A node may have been left out because one of its users joined the region after it.
    grown = True
    while grown:
        grown = False
        for node in region:
            for before in node.all_input_nodes:
                fits = before.op != "placeholder" and before not in region
                if fits and all(user in region for user in before.users):
                    region.add(before)
                    grown = True
    return region


def _without_writers(region: set[fx.Node], writes: Mapping[str, Collection[str]]) -> set[fx.Node]:
    """The region without what changes a tensor from outside in place, and what that depends on.

    As an activation in place at the beginning of a branch, which the trunk goes through too.
    """
    inside = {node.name for node in region}
    stack = [node for node in region if not inside.issuperset(writes.get(node.name, ()))]
    left = set(region)
    while stack:
        node = stack.pop()
        if node in left:
            left.remove(node)
            stack += node.all_input_nodes
    return left


def _becomes_constant(
    region: set[fx.Node],
    operand: fx.Node,
    own: set[int],
    outputs: Mapping[str, Any],
    module: fx.GraphModule,
    elementwise: set[str],
) -> bool:
    constant: set[fx.Node] = set()
    for node in operand.graph.nodes:
        if node.op == "get_attr" or not any(specs_in(outputs.get(node.name))):
            constant.add(node)  # a parameter, or no tensor at all
        elif node in region and node.all_input_nodes:
            target = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            keeps = isinstance(target, _PASSES) or node.name in elementwise
            if _reads_nothing(node, target, own, outputs) or (
                keeps and all(n in constant for n in node.all_input_nodes)
            ):
                constant.add(node)
    return operand in constant


def _reads_nothing(
    node: fx.Node, target: nn.Module | None, own: set[int], outputs: Mapping[str, Any]
) -> bool:
    """Whether a node sums over channels that are all gone, and gives channels that stay."""
    return (
        isinstance(target, _CONTRACTIONS)
        and getattr(target, "groups", 1) == 1
        and _empty(node.all_input_nodes[0], own, outputs)
        and not _empty(node, own, outputs)
    )


def _empty(node: fx.Node, own: set[int], outputs: Mapping[str, Any]) -> bool:
    """Whether a node's output has no channels left when the groups `own` are empty."""
    spec = outputs.get(node.name)
    if not isinstance(spec, TensorSpec):
        return False
    return any(_only(extent, own) for extent in spec.extents)


def _only(extent: Extent, own: set[int]) -> bool:
    return extent.fixed == 0 and bool(extent.parts) and all(g in own for g, _ in extent.parts)


def _elementwise_nodes(module: fx.GraphModule, work: tuple[Work, ...]) -> set[str]:
    """Nodes of pointwise operators only, or of none that computes (views, dropout in eval)."""
    kinds: dict[str, set[str]] = {n.name: set() for n in module.graph.nodes}
    for item in work:
        kinds[item.node].add(item.kind)
    return {name for name, found in kinds.items() if found <= {"pointwise"}}


def _owned_tensors(module: fx.GraphModule, region: set[fx.Node]) -> tuple[str, ...]:
    """Parameters and buffers that only the region reads."""
    names: set[str] = set()
    for node in region:
        if node.op == "call_module":
            part = module.get_submodule(str(node.target))
            names |= {f"{node.target}.{leaf}" for leaf in part.state_dict()}
        elif node.op == "get_attr":
            names.add(str(node.target))
    outside = {
        str(node.target)
        for node in module.graph.nodes
        if node not in region and node.op in ("call_module", "get_attr")
    }
    return tuple(
        sorted(n for n in names if n not in outside and n.rpartition(".")[0] not in outside)
    )


def branch_constant(
    module: fx.GraphModule, branch: Branch, values: Mapping[str, Any], groups: set[int],
    outputs: Mapping[str, Any],
) -> torch.Tensor:  # fmt: skip
    """What a branch adds when its channels are gone, of the operand's rank, for broadcasting."""
    nodes = {n.name: n for n in module.graph.nodes}
    known: dict[fx.Node, Any] = {}
    device = device_of(module)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            known[node] = getattr(module.get_submodule(path), leaf)
        elif not any(specs_in(outputs.get(node.name))):
            known[node] = values.get(node.name)
    with torch.no_grad():
        for node in (nodes[name] for name in branch.nodes):
            if node in known or not node.all_input_nodes:
                continue
            target = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if target is not None and _reads_nothing(node, target, groups, outputs):
                like = values[node.all_input_nodes[0].name]
                known[node] = target(torch.zeros(like.shape, dtype=like.dtype, device=device))
            elif all(n in known for n in node.all_input_nodes):
                args = fx.map_arg(node.args, known.__getitem__)
                kwargs = fx.map_arg(node.kwargs, known.__getitem__)
                if target is not None:
                    known[node] = target(*args, **kwargs)
                elif node.op == "call_method":
                    known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                elif callable(node.target):
                    known[node] = node.target(*args, **kwargs)
    constant: torch.Tensor = known[nodes[branch.operand]]
    for dim in range(constant.ndim):
        first = constant.narrow(dim, 0, 1)
        if bool((constant == first).all()):
            constant = first
    return constant
