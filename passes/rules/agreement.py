"""Whether a traced graph gives what its model gives, seen on data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halp_fx.passes.rules.core import tensors_in
from halp_fx.passes.rules.structure import detached_copy

__all__ = ["difference"]

_BATCH = 2  # images to compare on, where the example has more
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}


def difference(model: nn.Module, graph: nn.Module, inputs: tuple[Any, ...]) -> str | None:
    """What differs between the outputs of both, or None.

    Both run once in the mode they are in, on the same random numbers. None also where the model
    itself does not run on the inputs, or gives no tensors that could be compared.
    """
    devices = sorted({t.device.index or 0 for t in tensors_in(inputs) if t.device.type == "cuda"})
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for given in _candidates(inputs):
            try:
                expected = _run(model, given)
            except Exception:  # noqa: BLE001, S112  it decides which batch it takes
                continue
            try:
                found = _run(graph, given)
            except Exception as error:  # noqa: BLE001  whatever its operators raise
                if given is inputs:
                    return f"it fails where the network runs ({type(error).__name__}: {error})"
                continue
            return _compare(expected, list(tensors_in(found)))
    return None


def _run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    torch.manual_seed(0)
    return detached_copy(module).forward(*inputs)  # hooks of the whole are not in the graph


def _candidates(inputs: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The inputs with few images, if they may be told from the other dims, and as they are."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    sizes = {t.shape[0] if t.ndim else 0 for t in tensors}
    whole = [inputs]
    if len(sizes) != 1 or sizes.pop() <= _BATCH or len(tensors) != len(inputs):
        return whole
    return [tuple(value[:_BATCH] for value in inputs), *whole]


def _compare(expected: Any, found: list[torch.Tensor]) -> str | None:
    wanted = list(tensors_in(expected))
    if not wanted or len(wanted) != len(found):  # an output of a class of its own: not compared
        return None
    for k, (one, other) in enumerate(zip(wanted, found, strict=True)):
        if one.shape != other.shape:
            return f"output {k} has the shape {tuple(other.shape)}, not {tuple(one.shape)}"
        if not one.is_floating_point() or one.numel() == 0:
            continue
        scale = max(float(one.abs().nan_to_num(0.0, 0.0, 0.0).max()), 1e-6)
        limit = _TOLERANCES.get(one.dtype, 0.1) * scale
        if not torch.allclose(one, other, rtol=0.0, atol=limit, equal_nan=True):
            return f"output {k} differs by {float((one - other).abs().max()) / scale:.2g}, relative"
    return None
