"""Values as JSON and back, type for type.

None, bool, int, finite float, str and list are themselves; every other value is an object with one
key, its tag: `{"tuple": [1, 2]}`, `{"dtype": "float32"}`, `{"node": "conv1"}`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from halp_fx.errors import RecipeError
from halp_fx.recipe.names import (
    function_name,
    resolve_function,
    resolve_tuple,
    tuple_name,
)

__all__ = ["LEAF", "decode", "encode"]


class _Leaf:
    """Stands for a leaf in the structure of a call's arguments or results."""


LEAF = _Leaf()

# Tensors in values are facts (indices, figures), not weights: those have names and go elsewhere.
_TORCH_NAMES: dict[str, type[Any]] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def encode(value: Any, where: str, *, text: bool = False) -> Any:
    """Return `value` as what `json.dumps` takes.

    Args:
        value: nested Python values, torch constants, graph nodes, functions.
        where: where it stands, for messages.
        text: what can't be encoded becomes its `str()` instead of an error; arrays become lists.

    Raises:
        RecipeError: a value inside can't be encoded.
    """

    def inner(item: Any) -> Any:
        return encode(item, where, text=text)

    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Size):
        return {"size": [inner(item) for item in value]}
    if isinstance(value, tuple):
        items = [inner(item) for item in value]
        if type(value) is tuple:
            return {"tuple": items}
        if text:
            return {"tuple": items}
        return {"namedtuple": [tuple_name(type(value), where), items]}
    if isinstance(value, list):
        return [inner(item) for item in value]
    if isinstance(value, Mapping):
        tag = "ordered_dict" if isinstance(value, OrderedDict) else "dict"
        return {tag: [[inner(key), inner(item)] for key, item in value.items()]}
    return _encode_constant(value, where, text)


def _encode_constant(value: Any, where: str, text: bool) -> Any:
    for tag, cls in _TORCH_NAMES.items():
        if isinstance(value, cls):
            return {tag: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [encode(part, where) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, where), encode(value.imag, where)]}
    if value is LEAF:
        return {"leaf": None}
    if text:
        if isinstance(value, (np.ndarray, torch.Tensor)):
            return encode(value.tolist(), where)
        return str(value)
    if callable(value) and not isinstance(value, type):
        return {"function": function_name(value, where)}
    raise RecipeError(
        f"{where}: a value of class {type(value).__module__}.{type(value).__qualname__} can't be "
        "saved. Numbers, strings, tuples, lists, dicts and torch's dtypes and devices can; a "
        "tensor has to be a registered parameter or buffer"
    )


def decode(data: Any, where: str, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """Return the value that `encode` was given.

    Args:
        data: what `encode` returned.
        where: where it stands, for messages.
        nodes: graph nodes by name, where the value may refer to them.

    Raises:
        RecipeError: `data` isn't what `encode` returns, or names what a recipe may not.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(item, where, nodes) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise RecipeError(f"{where}: the file is damaged; save the network again")
    ((tag, body),) = data.items()

    def inner(item: Any) -> Any:
        return decode(item, where, nodes)

    if tag == "node":
        return (nodes or {})[body]
    if tag in _TORCH_NAMES:
        found = getattr(torch, body, None)
        if isinstance(found, _TORCH_NAMES[tag]):
            return found
        raise RecipeError(f"{where}: torch {torch.__version__} has no {tag} {body!r}; update torch")
    match tag:
        case "tuple":
            return tuple(inner(item) for item in body)
        case "size":
            return torch.Size(inner(item) for item in body)
        case "dict":
            return {inner(key): inner(item) for key, item in body}
        case "ordered_dict":
            return OrderedDict((inner(key), inner(item)) for key, item in body)
        case "namedtuple":
            name, items = body
            return resolve_tuple(name, where)(*(inner(item) for item in items))
        case "slice":
            return slice(*(inner(part) for part in body))
        case "complex":
            return complex(*(inner(part) for part in body))
        case "function":
            return resolve_function(body, where)
    return _decode_constant(tag, body, where)


def _decode_constant(tag: str, body: Any, where: str) -> Any:
    match tag:
        case "float":
            return float(body)
        case "range":
            return range(*body)
        case "device":
            return torch.device(body)
        case "ellipsis":
            return Ellipsis
        case "leaf":
            return LEAF
    raise RecipeError(f"{where}: unknown kind of value {tag!r}; update halp_fx")
