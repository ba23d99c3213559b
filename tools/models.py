"""Networks by name: `torchvision:resnet50`, `timm:resnet18` or `package.module:factory`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from halp_fx.errors import DependencyError, InputError

__all__ = ["close_matches", "load_model", "parse_input"]

_FORMS = "torchvision:NAME, timm:NAME or package.module:factory"
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}


def load_model(
    spec: str, *, pretrained: bool = False, weights: Path | None = None
) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """The network that `spec` names, in eval mode, and its example inputs where it brings some.

    Args:
        spec: `torchvision:NAME`, `timm:NAME`, or `package.module:factory`, where the factory is an
            `nn.Module`, or returns one, or returns `(module, example_inputs)`.
        pretrained: load the library's trained weights (torchvision and timm; may download).
        weights: a safetensors file with the network's `state_dict`.

    Returns:
        The network, and a tuple of positional example inputs or None.

    Raises:
        InputError: the name is unknown, or the factory or the weights don't fit.
        DependencyError: torchvision or timm is not installed.
    """
    library, _, name = spec.partition(":")
    if not library or not name:
        raise InputError(f"{spec!r} names no model; write {_FORMS}")
    # Fixed, so that a network without trained weights is the same one in every run.
    torch.manual_seed(0)
    inputs: tuple[Any, ...] | None = None
    if library == "torchvision":
        model = _torchvision(name, pretrained)
    elif library == "timm":
        model = _timm(name, pretrained)
    elif pretrained:
        raise InputError(f"--pretrained is for torchvision and timm; let {spec!r} load its weights")
    else:
        model, inputs = _factory(library, name)
    if weights is not None:
        _load_weights(model, spec, weights)
    return model.eval(), inputs


def parse_input(text: str) -> torch.Tensor:
    """A random tensor for `1x3x224x224`, or with a dtype as `1x16:int64` (zeros, if not float).

    Raises:
        InputError: the text is no shape.
    """
    shape_text, _, dtype_text = text.partition(":")
    try:
        shape = tuple(int(size) for size in shape_text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"--input {text!r} is no shape; write it as 1x3x224x224 or 1x16:int64")
    if dtype_text and dtype_text not in _DTYPES:
        raise InputError(f"--input {text!r}: unknown dtype; use one of {', '.join(_DTYPES)}")
    dtype = _DTYPES[dtype_text or "float32"]
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def close_matches(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?` for an unknown name, or the empty string."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    if not close:
        close = [candidate for candidate in names if name.lower() in candidate.lower()][:5]
    return f"; did you mean {', '.join(close)}?" if close else ""


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    library = _optional("torchvision.models", "torchvision", "vision")
    known = library.list_models()
    if name not in known:
        raise InputError(f"torchvision has no model {name!r}{close_matches(name, known)}")
    accepted = inspect.signature(library.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in accepted:
        options["weights_backbone"] = None
    if not pretrained and name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # its truncated normal takes half a minute
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = _made(lambda: library.get_model(name, **options), f"torchvision:{name}")
    return model


def _timm(name: str, pretrained: bool) -> nn.Module:
    library = _optional("timm", "timm", "timm")
    architecture = name.partition(".")[0]
    if not library.is_model(architecture):
        raise InputError(f"timm has no model {name!r}{close_matches(name, library.list_models())}")
    model: nn.Module = _made(
        lambda: library.create_model(name, pretrained=pretrained), f"timm:{name}"
    )
    return model


def _factory(module_name: str, name: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    module = _import(module_name)
    spec = f"{module_name}:{name}"
    try:
        made: Any = module
        for part in name.split("."):
            made = getattr(made, part)
    except AttributeError as error:
        raise InputError(
            f"module {module_name!r} has no {name!r}{close_matches(name, _public(module))}"
        ) from error
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise InputError(f"{spec!r} is a {type(made).__name__}; it must return an nn.Module")
        made = _made(made, spec)
    inputs: tuple[Any, ...] | None = None
    if isinstance(made, tuple) and len(made) == 2:
        made, given = made
        inputs = given if isinstance(given, tuple) else (given,)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"{spec!r} returned a {type(made).__name__}; it must return an nn.Module, or a tuple "
            "(nn.Module, example inputs)"
        )
    return made, inputs


def _import(name: str) -> ModuleType:
    # As `python -m` does: modules of the folder that the user stands in can be named.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise InputError(
                f"there is no module {missing!r} here or on PYTHONPATH; write {_FORMS}"
            ) from error
        raise DependencyError(
            f"{name!r} needs the module {missing!r}, which is not installed; try "
            f"'pip install {missing.partition('.')[0]}'"
        ) from error


def _optional(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{package} is not installed; run 'pip install \"halp-fx[{extra}]\"'"
        ) from error


def _made(factory: Callable[[], Any], spec: str) -> Any:
    try:
        return factory()
    except Exception as error:  # anything may go wrong in the user's code
        raise InputError(f"{spec!r} could not be made: {type(error).__name__}: {error}") from error


def _public(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if name[0] != "_" and callable(value)]


def _load_weights(model: nn.Module, spec: str, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read as safetensors: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        expected, given = set(model.state_dict()), set(state)
        missing, extra = sorted(expected - given), sorted(given - expected)
        detail = (
            f"{len(missing)} missing (as {', '.join(missing[:3]) or 'none'}), "
            f"{len(extra)} unknown (as {', '.join(extra[:3]) or 'none'})"
            if missing or extra
            else str(error)
        )
        raise InputError(f"the weights in {path} don't fit {spec!r}: {detail}") from error
