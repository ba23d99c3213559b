"""A kernel cut out of the graph at given widths, as a module that runs alone."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from halp_fx.passes.rules.core import OnMeta, tensors_in
from halp_fx.passes.rules.interpret import Snapshot, map_tensors, snapshots_in
from halp_fx.passes.rules.repair import Shrunk, repair
from halp_fx.passes.rules.resize import fit_to_input, fit_to_weights
from halp_fx.passes.rules.shrink import Labelled
from halp_fx.passes.rules.structure import named_tensors, substitute_copy
from halp_fx.types import ChannelGroups, TensorSpec

__all__ = ["cut", "signature"]

_LARGE = 2**20  # numbers, from which on to draw them takes longer than to measure

_SIZES = {
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features",
    "normalized_shape", "num_channels", "num_parameters", "training", "inplace",
}  # fmt: skip


def signature(groups: ChannelGroups, nodes: tuple[str, ...], kept: Mapping[int, int]) -> str:
    """What identifies a kernel in a table: operators, constants, shapes and dtypes."""
    module = groups.traced.module
    inside = set(nodes)
    parts: list[str] = []
    for node in _ordered(groups, nodes):
        inputs = [
            _shapes(groups.outputs.get(n.name), kept)
            for n in node.all_input_nodes
            if n.name not in inside
        ]
        if node.op == "call_module":
            target = module.get_submodule(str(node.target))
            tensors = [_shape(groups.parameters[f"{node.target}.{name}"], kept)
                       for name, _ in named_tensors(target)]  # fmt: skip
            text = f"{_kind(target)}({_attributes(target)}) parameters {tensors}"
        else:
            name = node.target if isinstance(node.target, str) else node.target.__name__
            text = f"{name}({_constants(node)})"
        parts.append(f"{text} inputs {inputs}")
    last = _shapes(groups.outputs.get(nodes[-1]), kept)
    return " -> ".join(parts) + f" gives {last}"


def _kind(module: nn.Module) -> str:
    """Class of a module; of the user's own ones also what is in them, and their code."""
    kind = type(module)
    if kind.__module__.startswith(("torch.", "torchvision.")):
        return kind.__name__
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        own: Any = type(part)
        digest.update(f"{path} {_source(own)} {part.extra_repr()}\n".encode())
    return f"{kind.__name__}#{digest.hexdigest()[:12]}"


@lru_cache(maxsize=1024)
def _source(kind: Any) -> str:
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):  # made in a console, or in C
        code = ""
    return f"{kind.__module__}.{kind.__qualname__} {code}"


def _attributes(module: nn.Module) -> str:
    plain = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in sorted(vars(module).items())
        if not k.startswith("_")
        and k not in _SIZES
        and isinstance(v, (int, float, str, tuple, list))
    }
    if isinstance(normalized := getattr(module, "normalized_shape", None), (tuple, list)):
        plain["normalized_dims"] = len(normalized)
    return ", ".join(f"{k}={v!r}" for k, v in plain.items())


def _constants(node: fx.Node) -> str:
    """Arguments other than nodes; sizes that the shapes tell already are harmless here."""

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return "%"
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(text(v) for v in value) + "]"
        return repr(value)

    named = [f"{k}={text(v)}" for k, v in sorted(node.kwargs.items()) if k != "inplace"]
    return ", ".join([*(text(a) for a in node.args), *named])


def _shape(spec: TensorSpec, kept: Mapping[int, int]) -> str:
    size = "x".join(str(int(s)) for s in spec.shape(kept))
    return f"{size or 'scalar'}:{str(spec.dtype).removeprefix('torch.')}"


def _shapes(value: Any, kept: Mapping[int, int]) -> Any:
    if isinstance(value, TensorSpec):
        return _shape(value, kept)
    if isinstance(value, (tuple, list)):
        return [_shapes(v, kept) for v in value]
    if isinstance(value, dict):
        return {str(key): _shapes(v, kept) for key, v in value.items()}
    return value if isinstance(value, (int, float, bool)) else None


def _ordered(groups: ChannelGroups, nodes: tuple[str, ...]) -> list[fx.Node]:
    inside = set(nodes)
    return [n for n in groups.traced.module.graph.nodes if n.name in inside]


def cut(
    groups: ChannelGroups, nodes: tuple[str, ...], kept: Mapping[int, int]
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The kernel of some nodes when the first `kept[g]` units of each group survive.

    Returns:
        a module with the surviving weights, and random inputs for it.
    """
    labelled: Labelled = groups.labelled
    snapshots = dict(labelled.snapshots)
    facts = Shrunk(snapshots, groups.traced.values, _first_units(groups, kept))
    graph, holder = fx.Graph(), nn.Module()
    copies: dict[fx.Node, Any] = {}
    meta: dict[fx.Node, Any] = {}
    inputs: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)
    device = next((t.device for _, t in named_tensors(groups.traced.module)), torch.device("cpu"))

    def outside(node: fx.Node) -> Any:
        """What a node outside the kernel gives: an input, or a number."""
        snap = labelled.snapshots.get(node.name)
        if next(snapshots_in(snap), None) is None:
            return groups.traced.values.get(node.name)
        if isinstance(snap, Snapshot):
            return entrance(node.name, snap)
        return map_tensors(snap, lambda part: entrance(f"part_{len(inputs)}_of_{node.name}", part))

    def entrance(name: str, snap: Snapshot) -> fx.Node:
        new = graph.placeholder(name)
        snapshots[new.name] = snap
        meta[new] = torch.empty(facts.shape(snap), dtype=snap.dtype, device="meta")
        inputs.append(_random(facts.shape(snap), snap.dtype, generator, device))
        return new

    for node in _ordered(groups, nodes):
        for source in node.all_input_nodes:
            if source not in copies:
                copies[source] = outside(source)
        args = fx.map_arg(node.args, lambda n: copies[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: copies[n])
        new = graph.create_node(node.op, node.target, args, kwargs, node.name)
        if node.op == "call_module":
            dense = groups.traced.module.get_submodule(str(node.target))
            own = _narrowed(groups, dense, facts)
            fit_to_weights(own, dense)
            _attach(holder, str(node.target), own)
        _settle(new, node, meta, facts, holder, groups)
        copies[node] = new
    graph.output(copies[_ordered(groups, nodes)[-1]])
    module = fx.GraphModule(holder, graph).eval()
    return module, tuple(inputs)


def _settle(
    new: fx.Node,
    node: fx.Node,
    meta: dict[fx.Node, Any],
    facts: Shrunk,
    holder: nn.Module,
    groups: ChannelGroups,
) -> None:
    """Set the constants of one node as in the shrunk network, and note what it gives."""
    args: Any = fx.map_arg(new.args, lambda n: meta[n])
    kwargs: Any = fx.map_arg(new.kwargs, lambda n: meta[n])
    stand_in = _Named(node, new)
    with stand_in:
        repair(new, args, kwargs, facts)
    out = facts.snapshots[node.name]
    if node.op == "call_module":
        first = next(iter(tensors_in(args)), None)
        if first is not None and isinstance(out, Snapshot):
            dense = groups.traced.module.get_submodule(str(node.target))
            own = holder.get_submodule(str(node.target))
            fit_to_input(own, dense, tuple(first.shape), facts.shape(out))

    def made(snap: Snapshot) -> torch.Tensor:
        with OnMeta():
            return torch.empty(facts.shape(snap), dtype=snap.dtype, device="meta")

    meta[new] = map_tensors(out, made)


class _Named:
    """Lets the copy of a node go by the original's name while its constants are set."""

    def __init__(self, node: fx.Node, new: fx.Node) -> None:
        self.node, self.new, self.own = node, new, new.name

    def __enter__(self) -> None:
        self.new.name = self.node.name

    def __exit__(self, *_: object) -> None:
        self.new.name = self.own


def _first_units(
    groups: ChannelGroups, kept: Mapping[int, int]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    components = groups.labelled.components
    survive = np.ones(len(components), dtype=bool)
    for g, own in enumerate(groups.unit_components):
        survive[own[kept[g] :]] = False
    return np.asarray(survive[components])


def _narrowed(groups: ChannelGroups, module: nn.Module, facts: Shrunk) -> nn.Module:
    """A copy of a leaf module with the first surviving slices of its tensors."""
    labelled: Labelled = groups.labelled
    replaced: dict[int, torch.Tensor] = {}
    for _, tensor in named_tensors(module):
        small = tensor.detach()
        for dim, labels in labelled.own[id(tensor)].items():
            count = int(facts.alive[labels].sum())
            if count < len(labels):
                small = small.narrow(dim, 0, count)
        small = small.contiguous().clone() if math.prod(small.shape) else small.clone()
        if isinstance(tensor, nn.Parameter):
            small = nn.Parameter(small, requires_grad=False)
        replaced[id(tensor)] = small
    copied: nn.Module = substitute_copy(module, replaced)
    return copied


def _attach(holder: nn.Module, path: str, module: nn.Module) -> None:
    *shells, leaf = path.split(".")
    for step in shells:
        if step not in holder._modules:
            holder.add_module(step, nn.Module())
        holder = holder.get_submodule(step)
    holder.add_module(leaf, module)


def _random(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Random numbers; in a large tensor each of a batch has the same ones, in the same memory."""
    if math.prod(shape) > _LARGE and shape[0] > 1:
        return _random((1, *shape[1:]), dtype, generator, device).expand(shape)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)
