"""A `torch.fx` graph as JSON and back, with its call signature."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from halp_fx.errors import RecipeError
from halp_fx.recipe.names import (
    check_attribute,
    check_method,
    check_path,
    function_name,
    is_identifier,
    resolve_function,
)
from halp_fx.recipe.values import LEAF, decode, encode

__all__ = ["decode_graph", "encode_graph"]


def encode_graph(graph: fx.Graph, where: str) -> dict[str, Any]:
    """Return `graph` as what `json.dumps` takes: its nodes in order and its signature.

    Raises:
        RecipeError: a node calls or holds what a recipe can't name.
    """
    rows = []
    for node in graph.nodes:
        place = f"{where}, node {node.name!r}"
        target = node.target
        _check_node(node.op, target, node.args, node.kwargs, place)
        if node.op == "call_function":
            target = function_name(node.target, place)
        args, kwargs = encode(tuple(node.args), place), encode(dict(node.kwargs), place)
        rows.append([node.op, node.name, target, args["tuple"], kwargs["dict"]])
    return {"nodes": rows, "signature": _encode_signature(graph, where)}


def decode_graph(data: Any, where: str) -> fx.Graph:
    """Return the graph that `encode_graph` was given, without its `meta`.

    Raises:
        RecipeError: a node calls or holds what a recipe may not name.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, name, named, args_data, kwargs_data in data["nodes"]:
        place = f"{where}, node {name!r}"
        if not is_identifier(name) or name in nodes:
            raise RecipeError(f"{place}: not a name that a node can have")
        args = tuple(decode(item, place, nodes) for item in args_data)
        kwargs = {key: decode(item, place, nodes) for key, item in kwargs_data}
        target = resolve_function(named, place) if op == "call_function" else named
        _check_node(op, target, args, kwargs, place)
        nodes[name] = graph.create_node(op, target, args, kwargs, name=name)
    signature = data["signature"]
    if signature is not None:
        graph.set_codegen(_PyTreeCodeGen(_decode_signature(signature, where)))
    return graph


def _check_node(op: Any, target: Any, args: Any, kwargs: Any, where: str) -> None:
    """Check what becomes source text when the graph is compiled, and what it reaches for."""
    if not all(is_identifier(key) for key in kwargs):
        raise RecipeError(f"{where}: {list(kwargs)} are not names of arguments")
    if op == "placeholder":
        name = target.removeprefix("*").removeprefix("*") if isinstance(target, str) else target
        if not is_identifier(name):
            raise RecipeError(f"{where}: {target!r} is not the name of an argument")
    elif op in ("get_attr", "call_module"):
        check_path(target, where)
    elif op == "call_method":
        check_method(target, where)
    elif op == "call_function":
        if target is getattr:
            if len(args) not in (2, 3) or kwargs:
                raise RecipeError(f"{where}: getattr takes an object, a name and a default")
            check_attribute(args[1], where)
    elif op != "output":
        raise RecipeError(f"{where}: unknown kind of node {op!r}")


def _encode_signature(graph: fx.Graph, where: str) -> dict[str, Any] | None:
    codegen = graph._codegen
    if codegen._body_transformer is not None:
        raise RecipeError(
            f"{where}: the graph rewrites its own source (Graph.on_generate_code), which can't be "
            "saved; remove that transformer first"
        )
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise RecipeError(
            f"{where}: a graph with the code generator {type(codegen).__qualname__} can't be "
            "saved; set graph.set_codegen(torch.fx.graph.CodeGen()) and recompile first"
        )
    info = codegen.pytree_info
    return {
        "args": list(info.orig_args),
        "inputs": _encode_spec(info.in_spec, where),
        "outputs": None if info.out_spec is None else _encode_spec(info.out_spec, where),
    }


def _decode_signature(data: Any, where: str) -> _PyTreeInfo:
    args = list(data["args"])
    if not all(is_identifier(arg) for arg in args):
        raise RecipeError(f"{where}: {args} are not names of arguments")
    outputs = data["outputs"]
    return _PyTreeInfo(
        args,
        _decode_spec(data["inputs"], where),
        None if outputs is None else _decode_spec(outputs, where),
    )


def _encode_spec(spec: pytree.TreeSpec, where: str) -> Any:
    # A structure of leaves, not torch's own text form: that one names classes to import.
    return encode(pytree.tree_unflatten([LEAF] * spec.num_leaves, spec), f"{where}, signature")


def _decode_spec(data: Any, where: str) -> pytree.TreeSpec:
    return pytree.tree_structure(decode(data, f"{where}, signature"))
