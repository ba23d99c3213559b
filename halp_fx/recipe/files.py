"""Recipes as files: safetensors with the structure in the header."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx, nn

from halp_fx.errors import DependencyError, InputError, RecipeError
from halp_fx.recipe.modules import TreeReader, TreeWriter
from halp_fx.recipe.plans import decode_plan, encode_plan
from halp_fx.recipe.tensors import TensorReader, check_plain, checksum, own_copy
from halp_fx.recipe.values import decode, encode

__all__ = ["FORMAT_VERSION", "load", "save", "save_weights"]

FORMAT_VERSION = 1

_RECIPE = "halp_fx"  # keys of the file's header
_CRC = "halp_fx.crc32"
_PLAN = "halp_fx"  # keys of GraphModule.meta
_EXAMPLE = "halp_fx_example"
_INDICES = ":halp_fx.plan"  # a colon can't start the path of a parameter


def save(pruned: fx.GraphModule, path: str | os.PathLike[str]) -> Path:
    """Write a network to one file that `halp_fx.load` opens without the original class.

    The file is in the safetensors format: the weights have their `state_dict()` names in it, and
    the graph, the layers' settings and the plan are JSON in its header. It holds no code and no
    pickle. An existing file is replaced only when the new one is complete.

    Args:
        pruned: what `halp_fx.compile` returned, also after more training; any GraphModule does
            whose graph uses functions of torch, operator, math and torchvision.ops and layers of
            torch.nn and torchvision.ops.
        path: the file to write; ".safetensors" is the usual ending.

    Returns:
        The path written.

    Raises:
        InputError: `pruned` is not a GraphModule.
        RecipeError: the network has a part that can't be described (a layer of a class of your
            own, a wrapped function, hooks), or the file can't be written.

    Example:
        >>> halp_fx.save(pruned, "small.safetensors")
        >>> network = halp_fx.load("small.safetensors")
    """
    if not isinstance(pruned, fx.GraphModule):
        raise InputError(
            f"save takes a torch.fx.GraphModule, as halp_fx.compile returns, not a "
            f"{type(pruned).__qualname__}"
        )
    try:
        metadata, tensors = _encode(pruned)
    except (RecursionError, AttributeError) as error:
        raise RecipeError(f"the network can't be described: {error}") from error
    return _write(Path(path), tensors, metadata)


def save_weights(network: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the `state_dict()` of a network alone, where there can be no recipe of it.

    Tied tensors are written under each of their names, so that `load_state_dict` takes what
    `safetensors.torch.load_file` reads. Extra state that is no tensor is left out.

    Args:
        network: any module.
        path: the file to write; one that is there is replaced only when the new one is complete.

    Returns:
        The path written.

    Raises:
        RecipeError: a tensor is not a dense one with data, or the file can't be written.
    """
    tensors = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            check_plain(tensor, name)
            tensors[name] = own_copy(tensor)
    return _write(Path(path), tensors, {"format": "pt"})


def _write(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    if not target.parent.is_dir():
        raise RecipeError(f"{target}: there is no folder {str(target.parent)!r}; create it first")
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.touch()  # safetensors alone would make it unreadable for other users
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)
        os.replace(partial, target)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise RecipeError(f"{target} can't be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _encode(network: fx.GraphModule) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    writer = TreeWriter(network)
    recipe: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "torch": str(torch.__version__),
        "network": writer.encode(network),
        "plan": None,
        "example": _encode_example(network),
    }
    tensors = dict(writer.tensors.stored)
    if network.meta.get(_PLAN) is not None:
        recipe["plan"], tensors[_INDICES] = encode_plan(network.meta[_PLAN])
    recipe["checksums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
    text = json.dumps(recipe, allow_nan=False, separators=(",", ":"))
    return {"format": "pt", _RECIPE: text, _CRC: str(zlib.crc32(text.encode()))}, tensors


def _encode_example(network: fx.GraphModule) -> Any:
    try:
        return encode(network.meta.get(_EXAMPLE), f"meta[{_EXAMPLE!r}]")
    except RecipeError:
        return None  # only spares the caller an argument of export_onnx


def load(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Read a network that `halp_fx.save` wrote.

    No code of the file is run, as it holds none: functions and layers are found by name among
    those of torch, operator, math and torchvision. The weights are on the CPU and in memory of
    their own; the modules are in training or evaluation mode, as they were. The plan is in
    `meta["halp_fx"]` again, where `halp_fx.plan_of` finds it, but with `plan.groups = None`, since
    those describe the dense network.

    Args:
        path: the file to read.

    Returns:
        A GraphModule with the same outputs, call signature and `state_dict()`, to be run, trained,
        exported or saved again.

    Raises:
        RecipeError: there is no such file, it is damaged, of another kind or of a newer halp_fx,
            or names something that this torch doesn't have.
        DependencyError: the network uses torchvision, which isn't installed.
    """
    source = Path(path)
    if not source.is_file():
        raise RecipeError(f"there is no file {str(source)!r}; pass the path given to halp_fx.save")
    metadata, tensors = _read(source)
    recipe = _parse(metadata, source)
    try:
        _check_data(recipe["checksums"], tensors)
        return _decode(recipe, tensors)
    except (RecipeError, DependencyError) as error:
        raise type(error)(f"{source}: {error}") from error
    except Exception as error:  # whatever a damaged description leads to
        raise RecipeError(
            f"{source} is damaged ({type(error).__name__}: {error}); save the network again"
        ) from error


def _read(source: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if _RECIPE not in metadata:
                raise RecipeError(
                    f"{source} has weights but no network; it wasn't written by halp_fx.save. "
                    "Load it with safetensors.torch.load_file and load_state_dict"
                )
            names = list(file.keys())
            # Copies: what is handed out would otherwise be the file itself, mapped.
            return metadata, {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError) as error:
        raise RecipeError(
            f"{source} is not a file of halp_fx.save, or is damaged or cut off ({error}); "
            "save the network again, or copy the file again"
        ) from error


def _parse(metadata: dict[str, str], source: Path) -> dict[str, Any]:
    text = metadata[_RECIPE]
    try:
        recipe = json.loads(text)
        version = int(recipe["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(f"the header of {source} is damaged; save the network again") from error
    if version > FORMAT_VERSION:
        raise RecipeError(
            f"{source} has format {version}, this halp_fx reads up to {FORMAT_VERSION}; update it: "
            "pip install -U halp_fx"
        )
    if metadata.get(_CRC) != str(zlib.crc32(text.encode())):
        raise RecipeError(f"the header of {source} is damaged; save the network again")
    return dict(recipe)


def _check_data(checksums: Any, tensors: dict[str, torch.Tensor]) -> None:
    if set(checksums) != set(tensors):
        raise RecipeError("tensors are missing or added; save the network again")
    for name, tensor in tensors.items():
        if checksum(tensor) != checksums[name]:
            raise RecipeError(f"the data of {name!r} is damaged; save or copy the network again")


def _decode(recipe: dict[str, Any], tensors: dict[str, torch.Tensor]) -> fx.GraphModule:
    indices = tensors.pop(_INDICES, torch.empty(0, dtype=torch.int64))
    network = TreeReader(TensorReader(tensors)).decode(recipe["network"])
    if not isinstance(network, fx.GraphModule):
        raise RecipeError("it holds no graph; save the network again")
    if recipe["plan"] is not None:
        network.meta[_PLAN] = decode_plan(recipe["plan"], indices)
    example = decode(recipe["example"], f"meta[{_EXAMPLE!r}]")
    if example is not None:
        network.meta[_EXAMPLE] = example
    return network
