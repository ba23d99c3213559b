"""Models in wrappers: what is inside is pruned."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from halp_fx.errors import InputError

__all__ = ["inside_of", "unwrapped"]


def unwrapped(model: Any, stacklevel: int = 2) -> Any:
    """The network inside of DataParallel, DistributedDataParallel and `torch.compile`.

    Warns for each wrapper that it takes off; what is no wrapper is given back as it is.

    Args:
        stacklevel: as in `warnings.warn`; 2 is the caller of this function.

    Raises:
        InputError: a TorchScript module, which has lost what a graph is traced from.
    """
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise InputError(
                "model is a TorchScript module, which can't be traced: pass the original "
                "torch.nn.Module, from before torch.jit.script or torch.jit.trace"
            )
        inner = inside_of(model)
        if inner is None:
            return model
        name, model = inner
        warnings.warn(
            f"halp_fx: the model is wrapped; what is in its `.{name}` ({type(model).__name__}) is "
            f"pruned and returned without the wrapper, with the names and state dict keys of "
            f"`.{name}`. Wrap the result again where that is needed",
            UserWarning,
            stacklevel=stacklevel,
        )


def inside_of(model: Any) -> tuple[str, nn.Module] | None:
    """Attribute and module that a wrapper holds, or None where there's no wrapper."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module", model.module
    if isinstance(model, nn.Module) and type(model).__name__ == "OptimizedModule":
        # By name: torch._dynamo, where the class is, takes seconds to import.
        original = model._modules.get("_orig_mod")
        if original is not None:
            return "_orig_mod", original
    return None
