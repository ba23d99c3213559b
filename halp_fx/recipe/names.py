"""The functions, methods, attributes and classes that a recipe may name.

A recipe is read from files of unknown origin, so every name goes through a list of what is known to
compute and nothing else. The same check runs on saving: what can be saved can be loaded.
"""

from __future__ import annotations

import builtins
import importlib
import keyword
import math
import operator
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional

from halp_fx.errors import DependencyError, RecipeError

__all__ = [
    "check_attribute",
    "check_method",
    "check_path",
    "class_name",
    "function_name",
    "is_identifier",
    "resolve_class",
    "resolve_function",
    "resolve_tuple",
    "tuple_name",
]

_CLASS_ROOTS = ("torch.nn.modules.", "torchvision.ops.")
_OP_NAMESPACES = frozenset({"aten", "prims", "torchvision"})

# Python functions of `torch` itself; its native ones are `torch._C._VariableFunctions`.
_TORCH_FUNCTIONS = frozenset(
    {"_assert", "finfo", "iinfo", "is_tensor", "sym_float", "sym_int", "sym_ite", "sym_max"}
    | {"sym_min", "sym_not", "sym_sqrt", "sym_sum"}
    | set(torch.functional.__all__)
)
_NATIVE_MODULES = (
    "torch._C._nn",
    "torch._C._linalg",
    "torch._C._special",
    "torch._C._fft",
    "torch._C._sparse",
)
_BUILTINS = frozenset(
    {"abs", "bool", "dict", "float", "getattr", "int", "len", "list", "max", "min", "range"}
    | {"round", "slice", "sum", "tuple"}
)
# These make callables of their arguments, or call them: a way around the list.
_OPERATOR_REFUSED = frozenset({"attrgetter", "call", "itemgetter", "methodcaller"})
# Functions that torchvision's models register with `torch.fx.wrap`.
_TORCHVISION_FUNCTIONS = {
    "torchvision.models.swin_transformer": frozenset(
        {"_get_relative_position_bias", "_patch_merging_pad", "shifted_window_attention"}
    ),
    "torchvision.models.video.swin_transformer": frozenset(
        {"_compute_attention_mask_3d", "_compute_pad_size_3d", "_get_relative_position_bias"}
        | {"_get_window_and_shift_size", "shifted_window_attention_3d"}
    ),
    "torchvision.models.video.mvit": frozenset(
        {"_add_rel_pos", "_add_shortcut", "_squeeze", "_unsqueeze"}
    ),
}

# Ways from a tensor to a file, to raw memory or to a callback.
_MEMBERS_REFUSED = frozenset(
    {"apply_", "map2_", "map_", "module_load", "numpy", "register_hook", "share_memory_"}
    | {"register_post_accumulate_grad_hook", "storage", "typed_storage", "untyped_storage"}
)
_METHOD_OWNERS = (torch.Tensor, torch.Size, dict, list, str, int, float, slice)
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_DUNDERS = frozenset(
    [f"__{side}{name}__" for side in ("", "r", "i") for name in (*_BINARY, "lshift", "rshift")]
    + [f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs")]
    + [f"__{name}__" for name in ("invert", "getitem", "setitem", "len", "contains", "rdiv")]
)


def is_identifier(name: Any) -> bool:
    """Whether `name` can stand in generated Python source as a plain name."""
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def check_path(target: Any, where: str) -> str:
    """Return the dotted path `target` if it is safe in generated source.

    Raises:
        RecipeError: it has quotes, backslashes or control characters.
    """
    if isinstance(target, str) and target.isprintable() and not set(target) & set("\"'\\"):
        return target
    raise RecipeError(f"{where}: {target!r} can't be the name of a module or parameter")


def check_method(name: Any, where: str) -> str:
    """Return `name` if it is a method that a graph may call.

    Raises:
        RecipeError: it isn't a method of a tensor or of a plain Python value, or leads out of them.
    """
    known = name in _DUNDERS or (
        is_identifier(name)
        and not name.startswith("_")
        and name not in _MEMBERS_REFUSED
        and any(hasattr(owner, name) for owner in _METHOD_OWNERS)
    )
    if known:
        return str(name)
    raise RecipeError(
        f"{where}: the method {name!r} can't be in a recipe. Only methods of torch.Tensor and of "
        "Python's own values can; write the model with those, or use halp_fx.export_onnx"
    )


def check_attribute(name: Any, where: str) -> str:
    """Return `name` if `getattr(value, name)` may stand in a graph.

    Raises:
        RecipeError: it isn't a constant, or is a private name.
    """
    if is_identifier(name) and not name.startswith("_") and name not in _MEMBERS_REFUSED:
        return str(name)
    raise RecipeError(f"{where}: reading the attribute {name!r} can't be in a recipe")


def function_name(function: Callable[..., Any], where: str) -> str:
    """Return the `"module:name"` under which `resolve_function` finds this very object.

    Raises:
        RecipeError: the function isn't one that a recipe may name.
    """
    for candidate in _candidates(function):
        try:
            found = resolve_function(candidate, where)
        except (RecipeError, DependencyError):
            continue
        if found is function:
            return candidate
    module = getattr(function, "__module__", None) or "?"
    name = getattr(function, "__qualname__", None) or repr(function)
    if isinstance(function, type):
        raise RecipeError(
            f"{where}: the class {module}.{name} can't be saved, as a recipe holds no code: return "
            "a tuple or a dict in its place, or use halp_fx.export_onnx, which stores the tensors"
        )
    raise RecipeError(
        f"{where}: the function {module}.{name} can't be saved, as a recipe holds no code: only "
        "functions of torch, torch.nn.functional, operator, math and torchvision can be named. "
        "Let it be traced (remove torch.fx.wrap), or use halp_fx.export_onnx, which stores what "
        "it computes"
    )


def _candidates(function: Any) -> Iterator[str]:
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        yield f"torch.ops:{function}"
        return
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        return
    own = getattr(function, "__module__", None)
    for module in (own, "torch", "torch.nn.functional", *_NATIVE_MODULES):
        if isinstance(module, str):
            yield f"{module}:{name}"
    yield f"operator:{name}"
    yield f"builtins:{name}"
    yield f"torchvision.ops:{name}"


def resolve_function(qualified: Any, where: str) -> Callable[..., Any]:
    """Return the function called `"module:name"`, if it is on the list.

    Raises:
        RecipeError: it isn't on the list, or this installation has no such function.
        DependencyError: it is torchvision's, which isn't installed.
    """
    module_name, name = _split(qualified, where)
    found: Callable[..., Any] | None = _lookup(module_name, name, where)
    if not callable(found):
        raise RecipeError(
            f"{where}: {qualified!r} is not a function that a recipe may name, or not one that "
            f"torch {torch.__version__} has. Update torch and torchvision; if that doesn't help, "
            "don't trust the file"
        )
    return found


def _split(qualified: Any, where: str) -> tuple[str, str]:
    if not isinstance(qualified, str) or qualified.count(":") != 1:
        raise RecipeError(f"{where}: {qualified!r} is not a name of the form 'module:name'")
    module_name, name = qualified.split(":")
    return module_name, name


def _lookup(module_name: str, name: str, where: str) -> Any:
    """The object if it is on the list, else None."""
    if module_name == "torch.ops":
        return _resolve_op(name)
    if not is_identifier(name):
        return None
    if module_name == "torch":
        native = hasattr(torch._C._VariableFunctions, name) and name != "from_file"
        allowed = native and not name.startswith("__")
        return getattr(torch, name, None) if allowed or name in _TORCH_FUNCTIONS else None
    if module_name == "torch.nn.functional":
        found = None if name.startswith("_") else getattr(functional, name, None)
        homes = (module_name, "torch", *_NATIVE_MODULES)
        return found if getattr(found, "__module__", None) in homes else None
    if module_name == "torch.functional":
        return getattr(torch.functional, name) if name in torch.functional.__all__ else None
    if module_name in _NATIVE_MODULES:
        found = getattr(getattr(torch._C, module_name.rsplit(".", 1)[1]), name, None)
        return found if type(found) is type(len) else None
    if module_name == "operator":
        public = name in operator.__all__ and name not in _OPERATOR_REFUSED
        return getattr(operator, name) if public else None
    if module_name == "math":
        return None if name.startswith("_") else getattr(math, name, None)
    if module_name == "builtins":
        return getattr(builtins, name) if name in _BUILTINS else None
    return _resolve_torchvision(module_name, name, where)


def _resolve_op(name: str) -> Any:
    """`aten.conv2d.default` or `aten.conv2d`, unless an overload of it touches files."""
    namespace, *path = name.split(".")
    if namespace not in _OP_NAMESPACES or len(path) not in (1, 2):
        return None
    if not all(part.isidentifier() and not part.startswith("__") for part in path):
        return None
    packet = getattr(getattr(torch.ops, namespace), path[0], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    if any(arg.name == "filename" for op in overloads for arg in op._schema.arguments):
        return None
    found = packet if len(path) == 1 else getattr(packet, path[1], None)
    return found if isinstance(found, (torch._ops.OpOverload, type(packet))) else None


def _resolve_torchvision(module_name: str, name: str, where: str) -> Any:
    if module_name in _TORCHVISION_FUNCTIONS:
        allowed = name in _TORCHVISION_FUNCTIONS[module_name]
        return getattr(_import(module_name, where), name, None) if allowed else None
    if module_name.startswith("torchvision.models."):
        found = getattr(_import(module_name, where), name, None)
        return found if _is_named_tuple(found) else None
    if module_name != "torchvision.ops" and not module_name.startswith("torchvision.ops."):
        return None
    found = getattr(_import(module_name, where), name, None)
    home = getattr(found, "__module__", None)
    # A module's own functions only: what it imported from elsewhere isn't on the list.
    own = isinstance(home, str) and home.startswith("torchvision.ops.")
    return found if own and not isinstance(found, type) else None


def _import(module_name: str, where: str) -> ModuleType:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise RecipeError(f"{where}: {module_name!r} is not the name of a module")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == "torchvision":
            raise DependencyError(f"{where} needs torchvision: pip install torchvision") from error
        raise RecipeError(f"{where}: there is no module {module_name!r} here") from error


def class_name(cls: type[nn.Module]) -> str | None:
    """Return the `"module:name"` of a class whose instances can be saved, None for any other."""
    name = f"{cls.__module__}:{cls.__qualname__}"
    try:
        return name if resolve_class(name, "") is cls else None
    except (RecipeError, DependencyError):
        return None


def _is_module_class(found: Any) -> TypeGuard[type[nn.Module]]:
    return isinstance(found, type) and issubclass(found, nn.Module)


def resolve_class(qualified: Any, where: str) -> type[nn.Module]:
    """Return the module class called `"module:name"`, of `torch.nn` or `torchvision.ops`.

    Raises:
        RecipeError: it isn't such a class, or this installation has no such class.
        DependencyError: it is torchvision's, which isn't installed.
    """
    module_name, name = _split(qualified, where)
    if module_name.startswith(_CLASS_ROOTS) and is_identifier(name):
        found = getattr(_import(module_name, where), name, None)
        # A class that the module merely imports would be reached around its own name.
        if _is_module_class(found) and found.__module__ == module_name:
            return found
    raise RecipeError(
        f"{where}: {qualified!r} is not a module class of torch.nn or torchvision.ops, or not one "
        f"that torch {torch.__version__} has; update torch and torchvision"
    )


def _is_named_tuple(found: Any) -> TypeGuard[type[Any]]:
    return isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")


def tuple_name(cls: type[Any], where: str) -> str:
    """Return the `"module:name"` of a named tuple that a network of torchvision returns.

    Raises:
        RecipeError: it is any other class.
    """
    name = f"{cls.__module__}:{cls.__qualname__}"
    try:
        if resolve_tuple(name, where) is cls:
            return name
    except (RecipeError, DependencyError):
        pass
    raise RecipeError(
        f"{where}: the named tuple {cls.__module__}.{cls.__qualname__} can't be saved, as a recipe "
        "holds no classes; let the model return a tuple or a dict"
    )


def resolve_tuple(qualified: Any, where: str) -> type[Any]:
    """Return the named tuple called `"module:name"` of `torchvision.models`.

    Raises:
        RecipeError: it isn't one.
        DependencyError: torchvision isn't installed.
    """
    module_name, name = _split(qualified, where)
    if module_name.startswith("torchvision.models.") and is_identifier(name):
        found = getattr(_import(module_name, where), name, None)
        if _is_named_tuple(found):
            return found
    raise RecipeError(f"{where}: {qualified!r} is not a named tuple of torchvision.models")
