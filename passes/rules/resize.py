"""After their tensors were cut: set the attributes of modules that repeat a size."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from halp_fx.passes.rules.leaves import resize_leaf

__all__ = ["fit_to_input", "fit_to_weights", "sizes_of"]


def fit_to_weights(module: nn.Module, dense: nn.Module) -> None:
    """Set sizes that follow from the module's own tensors; `dense` is its uncut twin."""
    resize_leaf(module, dense)
    match module:
        case _ConvNd():
            _fit_convolution(module, dense)
        case nn.Linear():
            module.out_features, module.in_features = _weight(module).shape
        case nn.Bilinear():
            module.out_features, module.in1_features, module.in2_features = module.weight.shape
        case nn.Embedding() | nn.EmbeddingBag():
            module.num_embeddings, module.embedding_dim = module.weight.shape
        case _NormBase():
            tensor = module.weight if module.weight is not None else module.running_mean
            if tensor is not None:
                module.num_features = tensor.shape[0]
        case nn.LayerNorm() | nn.RMSNorm():
            if module.weight is not None:
                module.normalized_shape = tuple(module.weight.shape)
        case nn.GroupNorm():
            if module.weight is not None:
                _fit_group_norm(module, dense, module.weight.shape[0])
        case nn.PReLU():
            module.num_parameters = module.weight.shape[0]
        case _:
            pass


def _weight(module: Any) -> torch.Tensor:
    """The weight, or what it is computed from before each call (weight norm, pruning by masks)."""
    for name in ("weight", "weight_orig", "weight_v"):
        found = module._parameters.get(name)
        if found is not None:
            return cast("torch.Tensor", found)
    return cast("torch.Tensor", module.weight)


def sizes_of(module: nn.Module) -> Any:
    """The sizes that `fit_to_input` sets and that a call goes by."""
    match module:
        case nn.LayerNorm() | nn.RMSNorm():
            return tuple(module.normalized_shape)
        case nn.GroupNorm():
            return module.num_groups
        case nn.Unflatten():
            return tuple(module.unflattened_size)
    return None


def _fit_convolution(module: _ConvNd, dense: nn.Module) -> None:
    assert isinstance(dense, _ConvNd)
    rows, columns = _weight(module).shape[:2]
    if dense.groups > 1:
        per_group = _weight(dense).shape[0] // dense.groups
        module.groups = max(rows // per_group, 1)
    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = rows, columns * module.groups
    else:
        module.in_channels, module.out_channels = columns * module.groups, rows


def _fit_group_norm(module: nn.GroupNorm, dense: nn.Module, channels: int) -> None:
    assert isinstance(dense, nn.GroupNorm)
    module.num_channels = channels
    if dense.num_groups > 1:
        module.num_groups = channels // (dense.num_channels // dense.num_groups)


def fit_to_input(
    module: nn.Module, dense: nn.Module, shape: tuple[int, ...], out: tuple[int, ...]
) -> None:
    """Set sizes of modules that have no tensors to tell them.

    Args:
        shape: shape of the module's first input in the shrunk network.
        out: shape of its output.
    """
    match module:
        case _NormBase():
            module.num_features = shape[1]
        case nn.LayerNorm() | nn.RMSNorm():
            module.normalized_shape = tuple(shape[len(shape) - len(module.normalized_shape) :])
        case nn.GroupNorm():
            _fit_group_norm(module, dense, shape[1])
        case nn.Unflatten() if isinstance(module.dim, int):
            dim = module.dim % len(shape)
            count = len(module.unflattened_size)
            module.unflattened_size = torch.Size(out[dim : dim + count])
        case _:
            pass
