"""Parameters and buffers in a recipe: each memory once, ties kept."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn

from halp_fx.errors import RecipeError

__all__ = ["TensorReader", "TensorWriter", "check_plain", "checksum", "own_copy"]


def checksum(tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a contiguous CPU tensor's bytes."""
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy on the CPU: safetensors refuses tensors that overlap in memory."""
    return tensor.detach().resolve_conj().resolve_neg().to("cpu", copy=True).contiguous()


class TensorWriter:
    """Collects tensors under the path where each is first met."""

    def __init__(self) -> None:
        self.stored: dict[str, torch.Tensor] = {}  # name in the file -> contiguous, on the CPU
        self._objects: dict[int, str] = {}
        self._memories: dict[tuple[Any, ...], str] = {}
        self._alive: list[torch.Tensor] = []  # ids are reused once a tensor is gone

    def add(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        """Return the entry for `tensor`, at `path` of the module tree.

        `data` is the tensor's name in the file, `same` the path of the same object if it was met
        before, `stride` its layout in memory if that isn't the contiguous one.

        Raises:
            RecipeError: it isn't a plain dense tensor with data.
        """
        check_plain(tensor, path)
        self._alive.append(tensor)
        if id(tensor) in self._objects:
            return {"same": self._objects[id(tensor)]}
        self._objects[id(tensor)] = path
        entry: dict[str, Any] = {"data": self._store(tensor.detach(), path)}
        if isinstance(tensor, nn.Parameter):
            entry["requires_grad"] = tensor.requires_grad
        if not tensor.is_contiguous() and _is_dense(tensor):
            entry["stride"] = list(tensor.stride())
        return entry

    def _store(self, tensor: torch.Tensor, path: str) -> str:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in self._memories:
            return self._memories[place]
        self._memories[place] = path
        self.stored[path] = own_copy(tensor)
        return path


def check_plain(tensor: torch.Tensor, path: str) -> None:
    """Refuse what is no dense tensor with data.

    Raises:
        RecipeError: the message has the `path` and what to do.
    """
    if nn.parameter.is_lazy(tensor):
        raise RecipeError(f"{path!r} is uninitialised; run the network on an input once, then save")
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        raise RecipeError(
            f"{path!r} is a {type(tensor).__qualname__}; only plain tensors can be saved, so "
            "convert it to one first"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise RecipeError(f"{path!r} is sparse or quantized; make it dense first")
    if tensor.device.type == "meta":
        raise RecipeError(f"{path!r} is on the meta device and has no data; load its weights first")


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the strides are those of a contiguous tensor with its dims permuted."""
    expected = 1
    dims = ((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    for step, size in sorted(dim for dim in dims if dim[1] != 1):
        if step != expected:
            return False
        expected *= size
    return True


class TensorReader:
    """Gives out the tensors of a file, tied as they were."""

    def __init__(self, stored: dict[str, torch.Tensor]) -> None:
        self._stored = stored  # name in the file -> contiguous tensor
        self._by_path: dict[str, torch.Tensor] = {}
        self._laid_out: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def get(self, entry: dict[str, Any], path: str, *, parameter: bool) -> torch.Tensor:
        """Return the tensor of an entry that `TensorWriter.add` returned for `path`."""
        if "same" in entry:
            return self._by_path[entry["same"]]
        tensor = self._data(entry["data"], tuple(entry.get("stride", ())))
        if parameter:
            tensor = nn.Parameter(tensor, requires_grad=bool(entry["requires_grad"]))
        else:
            # An object of its own: two buffers on one memory are tied, not the same.
            tensor = tensor.view_as(tensor)
        self._by_path[path] = tensor
        return tensor

    def _data(self, name: str, stride: tuple[int, ...]) -> torch.Tensor:
        if not stride:
            return self._stored[name]
        if (name, stride) not in self._laid_out:
            source = self._stored[name]
            target = torch.empty_strided(source.shape, stride, dtype=source.dtype)
            if len(stride) != source.dim() or not _is_dense(target):
                raise RecipeError(f"{name!r}: strides {stride} don't fit; save the network again")
            self._laid_out[name, stride] = target.copy_(source)
        return self._laid_out[name, stride]
