"""A pruned core, cut into its parts and put back into the model around it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from halp_fx.cores.assembly import CUTS, cut_name
from halp_fx.cores.calls import Call
from halp_fx.errors import InputError, TraceError
from halp_fx.passes.rules.structure import HOOKS, named_tensors, tensor_at

__all__ = ["core_of", "put_back"]

_META = "halp_fx_core"


def put_back(model: nn.Module, calls: Mapping[str, Call], core: fx.GraphModule) -> nn.Module:
    """A copy of `model` in which the parts are those of the pruned core.

    Each part is of a subclass of its class, and keeps its name and its attributes; its `forward`
    runs its share of the graph. Everything else is copied as it is.

    Raises:
        TraceError: a part reads what is not among its arguments.
        InputError: two parts share a layer, or `core` was made from other parts.
    """
    whole = _copy_around(model, list(calls))
    graph = copy.deepcopy(core.graph)
    for i, (name, call) in enumerate(calls.items()):
        part, small = whole.get_submodule(name), core.get_submodule(name)
        if type(small) is not nn.Module:
            _replace_layer(whole, name, small)
            continue
        _graft(part, small)
        own, adopted = _part_graph(core, i, call, list(calls))
        for target, local in adopted.items():
            _adopt(part, core, target, local)
            for node in graph.nodes:
                if node.op == "get_attr" and node.target == target:
                    node.target = f"{name}.{local}"
        compiled = fx.GraphModule(part, own)
        compiled.graph.lint()
        _run_by_graph(part, call, compiled)
    known = getattr(model, "meta", None)
    meta: Any = {**(known if isinstance(known, dict) else {}), **core.meta, _META: graph}
    whole.meta = meta
    return whole


def core_of(pruned: nn.Module) -> fx.GraphModule:
    """The pruned core of a model as one `torch.fx.GraphModule`, which shares its weights.

    Between the parts stands what the core was pruned with: for detectors with regions of
    interest a resize in place of their pooling. To run such a core is of use for measuring only.

    Raises:
        InputError: the model has no core of ours.
    """
    meta: Any = getattr(pruned, "meta", {})
    graph = meta.get(_META)
    if graph is None:
        raise InputError(
            f"{type(pruned).__name__} has no pruned core: pass what compile_core gave, or "
            "halp_fx.compile for a detector"
        )
    root = nn.Module()
    root._modules.update(pruned._modules)
    cuts = nn.Module()
    for node in graph.nodes:
        if str(node.target).startswith(f"{CUTS}."):
            cuts.add_module(str(node.target).rpartition(".")[2], nn.Identity())
    root.add_module(CUTS, cuts)
    root.training = pruned.training
    core = fx.GraphModule(root, copy.deepcopy(graph), class_name=type(pruned).__name__)
    core.meta.update({key: value for key, value in meta.items() if key != _META})
    return core


def _copy_around(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy of the model, without copies of the tensors of the parts: they will be replaced."""
    memo: dict[int, Any] = {}
    for name in names:
        memo.update({id(t): t for _, t in named_tensors(model.get_submodule(name))})
    inside = set(memo)
    for name, tensor in named_tensors(model):
        if id(tensor) in inside and not name.startswith(tuple(f"{n}." for n in names)):
            raise InputError(
                f"{name!r} is shared with the core: take in the submodule that it belongs to, so "
                "that both are pruned together"
            )
    return copy.deepcopy(model, memo)


def _replace_layer(whole: nn.Module, name: str, layer: nn.Module) -> None:
    """A part that is one layer is put back as it is, with the hooks that it had."""
    owner, _, leaf = name.rpartition(".")
    before = whole.get_submodule(name)
    for hooks in HOOKS:
        getattr(layer, hooks).update(getattr(before, hooks))
    whole.get_submodule(owner)._modules[leaf] = layer


def _graft(part: nn.Module, small: nn.Module) -> None:
    """Put the tensors and layers of the pruned part into a copy of the dense one, in place."""
    for name, child in list(part._modules.items()):
        twin = small._modules.get(name)
        if child is None:
            continue
        if twin is not None and type(twin) is nn.Module:
            _graft(child, twin)
        elif twin is not None:
            part._modules[name] = twin
        elif any(True for _ in named_tensors(child)):
            del part._modules[name]  # the branch is gone
    for name, extra in small._modules.items():  # constants, where the core was put back before
        part._modules.setdefault(name, extra)
    part._parameters = small._parameters
    part._buffers = small._buffers
    part._non_persistent_buffers_set = set(small._non_persistent_buffers_set)


def _part_graph(
    core: fx.GraphModule, index: int, call: Call, names: list[str]
) -> tuple[fx.Graph, dict[str, str]]:
    """The graph of one part, and tensors of the core that it needs: name there -> name in it."""
    nodes = list(core.graph.nodes)
    by_target = {str(n.target): i for i, n in enumerate(nodes) if n.op == "call_module"}
    starts = [by_target.get(cut_name("in", index, i)) for i in range(len(call.given.places))]
    stops = [by_target.get(cut_name("out", index, i)) for i in range(len(call.result.places))]
    unused = any(stop is None or not nodes[stop].users for stop in stops)
    if unused or all(start is None for start in starts):
        raise InputError(
            f"the graph has no part {call.name!r} with {len(starts)} inputs and {len(stops)} "
            "outputs: put it back into the model that it came from, and let the flow use every "
            "output of a part"
        )
    graph, copied, adopted = fx.Graph(), {}, {}
    for i, start in enumerate(starts):
        copied_input = graph.placeholder(f"input_{i}")
        if start is not None:
            copied[nodes[start]] = copied_input

    def take(node: fx.Node) -> None:
        for before in node.all_input_nodes:
            if before in copied:
                continue
            if before.op != "get_attr":
                raise TraceError(
                    f"{call.name!r} reads {before.format_node()}, which is not among its "
                    "arguments: take in the part that gives it, or name a part around both"
                )
            take(before)
        twin = graph.node_copy(node, copied.__getitem__)
        if node.op in ("get_attr", "call_module"):
            twin.target = _local(str(node.target), call.name, names)
            if node.op == "get_attr" and twin.target == node.target != "training":
                adopted[str(node.target)] = twin.target
        copied[node] = twin

    begin = max(start for start in starts if start is not None)
    end = min(stop for stop in stops if stop is not None)
    for node in nodes[begin + 1 : end]:
        if node not in copied:
            take(node)
    ends = [nodes[stop].args[0] for stop in stops if stop is not None]
    for node in ends:
        if isinstance(node, fx.Node) and node not in copied:
            take(node)
    graph.output(tuple(copied[node] if isinstance(node, fx.Node) else node for node in ends))
    return graph, adopted


def _local(target: str, name: str, names: list[str]) -> str:
    """A name of the core as a name in the part."""
    if target.startswith(f"{name}."):
        return target[len(name) + 1 :]
    other = next((n for n in names if target == n or target.startswith(f"{n}.")), None)
    if other is not None:
        raise InputError(
            f"{target!r} can't be cut from {other!r} for {name!r}: a core has to be made of "
            "submodules with layers of their own"
        )
    return target


def _adopt(part: nn.Module, core: nn.Module, target: str, local: str) -> None:
    """Give the part a constant that tracing or pruning put at the root of the core."""
    path, _, leaf = local.rpartition(".")
    owner = part
    for step in path.split(".") if path else []:
        if step not in owner._modules:
            owner.add_module(step, nn.Module())
        owner = owner.get_submodule(step)
    if hasattr(owner, leaf):
        raise InputError(f"{type(part).__name__} has {local!r} already: rename that attribute")
    holder = core.get_submodule(target.rpartition(".")[0])
    persistent = leaf in holder._buffers and leaf not in holder._non_persistent_buffers_set
    owner.register_buffer(leaf, tensor_at(core, target), persistent=persistent)


def _run_by_graph(part: nn.Module, call: Call, compiled: fx.GraphModule) -> None:
    """From now on `part` runs the compiled graph, on its own tensors."""
    run: Callable[..., tuple[torch.Tensor, ...]] = type(compiled).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call.result.fill(run(self, *call.tensors_in(args, kwargs)))

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.Signature([itself, *call.signature.parameters.values()])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    kind = type(part)
    if kind.__name__.startswith("Pruned") and kind.forward.__qualname__ == forward.__qualname__:
        kind = kind.__mro__[1]  # pruned before
    members = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    part.__class__ = type(f"Pruned{kind.__name__}", (kind,), members)
