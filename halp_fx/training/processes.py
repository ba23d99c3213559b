"""Several processes that train one network: they decide as one.

What is exchanged are tensors; texts go as their bytes. In a single process nothing is exchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from halp_fx import errors
from halp_fx.errors import HalpError, InputError

__all__ = ["agreed", "check_same", "several", "sum_up"]


def several() -> bool:
    """Whether a default process group with more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_up(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in one exchange."""
    if not several() or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors]).to(_device(tensors[0].device))
    dist.all_reduce(flat)
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].reshape(tensor.shape))
        start += tensor.numel()


def agreed(decide: Callable[[], str], device: torch.device) -> str:
    """What `decide` returns in the first process, in every process.

    Raises:
        HalpError: `decide` failed in the first process; every process raises the same.
    """
    if not several():
        return decide()
    if dist.get_rank() != 0:
        return _unpacked(json.loads(_broadcast("", device)))
    try:
        text = decide()
    except BaseException as error:
        _broadcast(json.dumps(_packed(error)), device)
        raise
    _broadcast(json.dumps({"text": text}), device)
    return text


def check_same(text: str, what: str, device: torch.device) -> None:
    """Whether all processes have the same text.

    Raises:
        InputError: they have not, in every process.
    """
    if not several():
        return
    digest = hashlib.sha256(text.encode()).digest()[:7]  # 7 bytes: never negative as int64
    own = torch.tensor([int.from_bytes(digest, "big")], device=_device(device))
    least, most = own.clone(), own.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if bool(least != most):
        raise InputError(
            f"the processes have different {what}: build the same model with the same arguments "
            "in each of them, and load the same checkpoint"
        )


def _device(device: torch.device) -> torch.device:
    """Where the process group takes tensors."""
    return _taking(dist.get_backend_config(), device)


def _taking(backends: str, device: torch.device) -> torch.device:
    """The CPU where one of the back-ends, as "cpu:gloo,cuda:nccl", is for it; else the device."""
    kinds = [each.partition(":")[0] for each in backends.split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return device if device.type in kinds else torch.device(kinds[0])


def _broadcast(text: str, device: torch.device) -> str:
    """The first process' text."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor([len(data)], device=_device(device))
    dist.broadcast(length, 0)
    if dist.get_rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    data = data.to(_device(device))
    dist.broadcast(data, 0)
    return bytes(data.cpu().tolist()).decode()


def _packed(error: BaseException) -> dict[str, Any]:
    kind = type(error).__name__ if isinstance(error, HalpError) else "HalpError"
    least = getattr(error, "least", None)
    return {"kind": kind, "error": str(error) or type(error).__name__, "least": least}


def _unpacked(message: dict[str, Any]) -> str:
    if "text" in message:
        return str(message["text"])
    kind = getattr(errors, message["kind"], HalpError)
    text = f"in the first process: {message['error']}"
    if kind is errors.InfeasibleError:
        raise errors.InfeasibleError(text, float(message["least"]))
    raise kind(text)
