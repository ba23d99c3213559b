"""The module tree of a network as JSON and back.

Three kinds of module: `graph` (a GraphModule), `class` (a layer of torch.nn or torchvision.ops,
rebuilt from its attributes without running its constructor) and `shell` (a plain `nn.Module` that
only holds what is below it). A module of any other class becomes a shell if the graph never calls
it, and can't be saved if it does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from halp_fx.errors import RecipeError, warn_caller
from halp_fx.idle import acts_in_training_only
from halp_fx.recipe.graphs import decode_graph, encode_graph
from halp_fx.recipe.names import class_name, is_identifier, resolve_class
from halp_fx.recipe.tensors import TensorReader, TensorWriter
from halp_fx.recipe.values import decode, encode

__all__ = ["TreeReader", "TreeWriter"]

# What every module has: rebuilt by nn.Module's constructor or stored in a place of its own.
_COMMON = frozenset(nn.Module().__dict__)
# Lists of a recurrent layer's own parameters, rebuilt after them.
_RECURRENT = frozenset({"_flat_weights", "_flat_weight_refs"})


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _label(path: str) -> str:
    return f"module {path!r}" if path else "the network"


class TreeWriter:
    """Encodes the modules below one GraphModule."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.tensors = TensorWriter()
        self._seen: dict[int, str] = {}
        self._left_out: set[int] = set()  # modules in whose place there is nothing
        self._called: set[int] = set()
        self._read: dict[int, set[str]] = {}  # module -> its plain attributes that graphs read
        self._mark(root)

    def _mark(self, module: nn.Module) -> None:
        if id(module) in self._called:
            return
        self._called.add(id(module))
        if not isinstance(module, fx.GraphModule):
            for child in module.children():
                self._mark(child)
            return
        for node in module.graph.nodes:
            if node.op == "call_module":
                self._mark(module.get_submodule(str(node.target)))
            elif node.op == "get_attr":
                owner, name = _owner(module, str(node.target))
                if not _is_registered(owner, name):
                    self._read.setdefault(id(owner), set()).add(name)

    def encode(self, module: nn.Module, path: str = "") -> dict[str, Any]:
        """Return `module`, which is at `path`, as what `json.dumps` takes.

        Raises:
            RecipeError: a module, function or value can't be saved; the message names it.
        """
        if id(module) in self._seen:
            return {"kind": "same", "path": self._seen[id(module)]}
        self._seen[id(module)] = path
        data = self._encode_own(module, path)
        data["training"] = module.training
        data["parameters"] = [
            [name, None if tensor is None else self.tensors.add(tensor, _join(path, name))]
            for name, tensor in module._parameters.items()
        ]
        data["buffers"] = [
            [
                name,
                None if tensor is None else self.tensors.add(tensor, _join(path, name)),
                name not in module._non_persistent_buffers_set,
            ]
            for name, tensor in module._buffers.items()
        ]
        data["children"] = [
            [name, None if child is None else self.encode(child, _join(path, name))]
            for name, child in module._modules.items()
            if id(module) not in self._left_out
        ]
        return data

    def _encode_own(self, module: nn.Module, path: str) -> dict[str, Any]:
        called = id(module) in self._called
        if called and any(_is_foreign(hook) for hook in _forward_hooks(module)):
            raise RecipeError(
                f"{_label(path)} has forward hooks, which are code and can't be saved; remove "
                "them first (handle.remove(), or torch.nn.utils.remove_weight_norm and the like)"
            )
        if called and isinstance(module, fx.GraphModule):
            return {
                "kind": "graph",
                "name": type(module).__name__,
                "graph": encode_graph(module.graph, _label(path)),
                "attributes": self._encode_read(module, path),
            }
        name = class_name(type(module))
        if name is not None:
            try:
                return {"kind": "class", "class": name, "attributes": _attributes(module, path)}
            except RecipeError:
                if called:
                    raise
        elif called and acts_in_training_only(module):
            warn_caller(
                f"halp_fx: {_label(path)} is of class {type(module).__name__}, which does "
                "something in train mode alone; a recipe holds no code, so the network that is "
                "loaded does without it. To train on, keep state_dict() and your own code"
            )
            self._left_out.add(id(module))
            return {"kind": "class", "class": class_name(nn.Identity), "attributes": []}
        elif called and parametrize.is_parametrized(module):
            names = ", ".join(map(repr, module.parametrizations))  # type: ignore[arg-type]
            raise RecipeError(
                f"{_label(path)} computes {names} by parametrizations, which are code and can't be "
                "saved; call torch.nn.utils.parametrize.remove_parametrizations on it before "
                "pruning, keep state_dict() and your own code instead, or use halp_fx.export_onnx"
            )
        elif called and type(module) is not nn.Module:
            cls = type(module)
            raise RecipeError(
                f"{_label(path)} is of class {cls.__module__}.{cls.__qualname__}. The network "
                "calls it as a whole, and a recipe holds no code: only layers of torch.nn and "
                "torchvision.ops can be called. Write it so that it can be traced, keep "
                "state_dict() and your own code instead, or use halp_fx.export_onnx"
            )
        return {"kind": "shell", "attributes": self._encode_read(module, path)}

    def _encode_read(self, module: nn.Module, path: str) -> list[list[Any]]:
        names = sorted(self._read.get(id(module), ()))
        where = _label(path)
        return [
            [name, encode(getattr(module, name), f"{where}, attribute {name!r}")] for name in names
        ]


def _forward_hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _is_foreign(hook: Any) -> bool:
    # torch.export hangs a check of the inputs on its modules; that one can go.
    home = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return not home.startswith(("torch.export.", "torch._export."))


def _attributes(module: nn.Module, path: str) -> list[list[Any]]:
    skipped = _COMMON | _RECURRENT if isinstance(module, nn.RNNBase) else _COMMON
    return [
        [name, encode(value, f"{_label(path)}, attribute {name!r}")]
        for name, value in module.__dict__.items()
        if name not in skipped
    ]


def _owner(root: nn.Module, target: str) -> tuple[nn.Module, str]:
    path, _, name = target.rpartition(".")
    owner = root.get_submodule(path)
    if _is_registered(owner, name) or (hasattr(owner, name) and name not in _COMMON):
        return owner, name
    raise RecipeError(f"the graph reads {target!r}, which the network doesn't have")


def _is_registered(owner: nn.Module, name: str) -> bool:
    return (
        name in owner._parameters
        or name in owner._buffers
        or name in owner._modules
        or name == "training"
    )


class TreeReader:
    """Builds the modules that a `TreeWriter` encoded."""

    def __init__(self, tensors: TensorReader) -> None:
        self._tensors = tensors
        self._by_path: dict[str, nn.Module] = {}

    def decode(self, data: dict[str, Any], path: str = "") -> nn.Module:
        """Return the module that `TreeWriter.encode` was given for `path`, on the CPU.

        Raises:
            RecipeError: the data names what a recipe may not, or doesn't fit together.
        """
        if data["kind"] == "same":
            return self._by_path[data["path"]]
        module = self._by_path[path] = _create(data, path)
        for name, entry in data["parameters"]:
            module._parameters[_atom(name)] = self._parameter(entry, _join(path, name))
        for name, entry, persistent in data["buffers"]:
            module._buffers[_atom(name)] = self._buffer(entry, _join(path, name))
            if not persistent:
                module._non_persistent_buffers_set.add(name)
        for name, child in data["children"]:
            module._modules[_atom(name)] = (
                None if child is None else self.decode(child, _join(path, name))
            )
        module.training = bool(data["training"])
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        if isinstance(module, fx.GraphModule):
            _install_graph(module, data["graph"], path)
        return module

    def _parameter(self, entry: Any, path: str) -> nn.Parameter | None:
        if entry is None:
            return None
        tensor = self._tensors.get(entry, path, parameter=True)
        if not isinstance(tensor, nn.Parameter):
            raise RecipeError(f"{path!r} is not a parameter; save the network again")
        return tensor

    def _buffer(self, entry: Any, path: str) -> torch.Tensor | None:
        return None if entry is None else self._tensors.get(entry, path, parameter=False)


def _create(data: dict[str, Any], path: str) -> nn.Module:
    """The module without what is registered in it."""
    kind, where = data["kind"], _label(path)
    if kind == "graph":
        if not is_identifier(data["name"]):
            raise RecipeError(f"{where}: {data['name']!r} is not the name of a class")
        module: nn.Module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=data["name"])
    elif kind == "class":
        cls = resolve_class(data["class"], where)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
    elif kind == "shell":
        module = nn.Module()
    else:
        raise RecipeError(f"{where}: unknown kind of module {kind!r}; update halp_fx")
    for name, value in data["attributes"]:
        # Neither what nn.Module keeps there nor a method may be replaced by a file.
        if not isinstance(name, str) or name in _COMMON or callable(getattr(module, name, None)):
            raise RecipeError(f"{where}: the attribute {name!r} can't be set by a recipe")
        module.__dict__[name] = decode(value, f"{where}, attribute {name!r}")
    return module


def _install_graph(module: fx.GraphModule, data: Any, path: str) -> None:
    graph = decode_graph(data, _label(path))
    for node in graph.nodes:
        if node.op == "call_module":
            module.get_submodule(str(node.target))
        elif node.op == "get_attr":
            owner, name = _owner(module, str(node.target))
            if not _is_registered(owner, name) and name not in owner.__dict__:
                raise RecipeError(f"{_label(path)}: {node.target!r} can't be read by a graph")
    module.graph = graph
    graph.lint()


def _atom(name: Any) -> str:
    if isinstance(name, str) and name and "." not in name:
        return name
    raise RecipeError(f"{name!r} can't be the name of a parameter, buffer or module")
