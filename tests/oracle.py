"""The truth that every pruned network is held to, independent of the passes.

A pruned network must compute what the dense one computes when the consumers' weights for the
removed channels are zero. `masked_dense` builds that network from the dense one and the plan's
`kept`; `assert_exact` compares the two in float64 and checks the state dict besides.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.norm_statistics import NormChannels, survivor_statistics
from tests.state import Kept, check_state, cut_state_dict, kept_of, named_tensors, snapshot

__all__ = [
    "Kept",
    "assert_close",
    "assert_exact",
    "check_state",
    "cut_state_dict",
    "flatten_outputs",
    "kept_of",
    "masked_dense",
    "randomize",
    "rebatch",
    "shrunk",
    "snapshot",
]

_STATISTICS = ("running_mean", "running_var")
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def _column_dims(owner: nn.Module, tensor: Tensor) -> tuple[int, ...]:
    """Dims of a parameter that read channels, where a consumer's weights are set to zero."""
    layer = isinstance(owner, (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear))
    per_channel = tensor.numel() == max(tensor.shape, default=0)  # as a layer scale (1, C, 1, 1)
    if tensor.ndim < 2 or (per_channel and not layer):
        return ()
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return (0,)
    if isinstance(owner, nn.Bilinear):
        return (1, 2)
    if isinstance(owner, (*_NORMS, nn.Embedding)):
        return ()
    return (1,)


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The layer that a tensor belongs to, seen through parametrisations."""
    outer, found, _ = f".{name}".rpartition(".parametrizations.")
    return model.get_submodule(outer[1:] if found else name.rpartition(".")[0])


def masked_dense(
    model: nn.Module,
    kept: Kept,
    *,
    strict: bool = False,
    columns: Mapping[str, tuple[int, ...]] | None = None,
    unmasked: Sequence[str] = (),
) -> nn.Module:
    """A copy of `model` in which the removed channels are without effect.

    Not strict: the removed slices of every floating tensor are zero, producers and consumers,
    which serves products of activations (attention's q and k) as well. Strict: only the
    consumers' columns are zero, and the removed channels still carry their values, so that
    whatever reads them without weights (a sum over channels) shows.

    Args:
        columns: dims that read channels, for bare parameters where it isn't dim 1.
        unmasked: tensors to leave alone, as a weight that is divided by its own norm.
    """
    masked = copy.deepcopy(model)
    special = columns or {}
    resolved = kept_of(model, kept)
    with torch.no_grad():
        for name, tensor in named_tensors(masked).items():
            if not tensor.is_floating_point() or name.endswith(_STATISTICS) or name in unmasked:
                continue
            owner = _owner(masked, name)
            dims = resolved[name]
            gone = any(index is not None and not len(index) for index in dims)
            # What follows the last weights of a dead branch still adds its constant.
            chosen: Sequence[int] = range(tensor.ndim)
            if strict or gone:
                chosen = special.get(name, _column_dims(owner, tensor))
            for dim in chosen:
                index = dims[dim]
                if index is None:
                    continue
                removed = torch.ones(tensor.shape[dim], dtype=torch.bool)
                removed[index.cpu()] = False
                tensor.index_fill_(dim, removed.nonzero().flatten().to(tensor.device), 0.0)
    return masked


def flatten_outputs(output: Any, path: str = "output") -> dict[str, Tensor]:
    """Tensors of a nested output (tuple, list, mapping, dataclass, NamedTuple) by their path."""
    if isinstance(output, Tensor):
        return {path: output}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in dataclasses.fields(output)]
        items = [(f"{path}.{name}", getattr(output, name)) for name in names]
    elif isinstance(output, Mapping):
        items = [(f"{path}[{key!r}]", value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        items = [(f"{path}[{i}]", value) for i, value in enumerate(output)]
    else:
        return {}
    return {
        key: tensor for name, value in items for key, tensor in flatten_outputs(value, name).items()
    }


def _structure(output: Any) -> Any:
    if isinstance(output, Tensor):
        return "tensor"
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = dataclasses.fields(output)
        return type(output).__name__, [_structure(getattr(output, f.name)) for f in fields]
    if isinstance(output, Mapping):
        return "mapping", [(key, _structure(value)) for key, value in output.items()]
    if isinstance(output, (tuple, list)):
        kind = "named" if hasattr(output, "_fields") else type(output).__name__
        return kind, [_structure(value) for value in output]
    return output


def assert_close(actual: Any, expected: Any, *, tolerance: float = 1e-9, where: str = "") -> None:
    """Nested outputs are equal to `tolerance` times the largest magnitude of each tensor."""
    assert _structure(actual) == _structure(expected), (
        f"{where}: structure {_structure(actual)}, expected {_structure(expected)}"
    )
    wanted = flatten_outputs(expected)
    for path, got in flatten_outputs(actual).items():
        want = wanted[path]
        assert got.shape == want.shape, f"{where}: {path} is {got.shape}, expected {want.shape}"
        assert got.dtype == want.dtype, f"{where}: {path} is {got.dtype}, expected {want.dtype}"
        if not want.numel():
            continue
        if not want.is_floating_point():
            assert torch.equal(got, want), f"{where}: {path} differs"
            continue
        assert torch.isfinite(want).all(), f"{where}: {path} of the dense network is not finite"
        scale = float(want.abs().max())
        error = float((got - want).abs().max())
        assert error <= tolerance * max(scale, 1e-12), (
            f"{where}: {path} differs by {error:.3g} at a scale of {scale:.3g}"
        )


def rebatch(inputs: Sequence[Any], batch: int) -> tuple[Any, ...]:
    """The inputs at another batch size: samples repeated, each scaled a little differently."""
    size = next(item.shape[0] for item in inputs if isinstance(item, Tensor) and item.ndim)

    def resize(item: Any) -> Any:
        if not isinstance(item, Tensor) or not item.ndim or item.shape[0] != size:
            return item
        rows = item.index_select(0, torch.arange(batch) % size)
        if not item.is_floating_point():
            return rows
        factors = 1.0 + 0.1 * torch.arange(batch, dtype=item.dtype)
        return rows * factors.reshape(-1, *[1] * (item.ndim - 1))

    return tuple(resize(item) for item in inputs)


def _convert(inputs: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(
        item.detach().clone().to(dtype)
        if isinstance(item, Tensor) and item.is_floating_point()
        else item
        for item in inputs
    )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """The fused transformer layer would compute its norms where nobody can see them."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def assert_exact(
    model: nn.Module,
    pruned: nn.Module,
    inputs: Sequence[Any],
    *,
    kept: Kept | None = None,
    strict: bool = False,
    norm_stats: bool = False,
    norm_channels: NormChannels | None = None,
    columns: Mapping[str, tuple[int, ...]] | None = None,
    unmasked: Sequence[str] = (),
    batches: Sequence[int] | None = None,
    rebatch: Callable[[Sequence[Any], int], tuple[Any, ...]] = rebatch,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
) -> None:
    """`pruned` is `model` with the removed channels gone, in eval mode and at each batch size.

    Args:
        model: the dense network, as it was given to `compile`.
        pruned: the network to hold to it.
        inputs: positional inputs that `model` accepts.
        kept: what survives; by default that of the plan of `pruned`.
        strict, columns, unmasked: see `masked_dense`.
        norm_stats: norms over channels compute their statistics over the survivors.
        norm_channels: survivors of norms without weights, see `survivor_statistics`.
        batches: batch sizes; by default that of `inputs` and one more.
        rebatch: makes inputs of another batch size.
        dtype: precision of the comparison.
        tolerance: relative to the largest magnitude of each output.
    """
    if kept is None:
        import halp_fx

        kept = halp_fx.plan_of(pruned).kept
    check_state(model, pruned, kept)
    if any(key.startswith("_constants.") for key in pruned.state_dict()):
        tolerance = max(tolerance, 1e-6)  # a constant was rounded to the network's own dtype
    masked = masked_dense(model, kept, strict=strict, columns=columns, unmasked=unmasked)
    dense = masked.to(dtype).eval()
    small = copy.deepcopy(pruned).to(dtype).eval()
    size = next(item.shape[0] for item in inputs if isinstance(item, Tensor) and item.ndim)
    for batch in batches or (size, size + 1):
        chosen = _convert(inputs if batch == size else rebatch(inputs, batch), dtype)
        with torch.no_grad(), _plain_attention():
            if norm_stats:
                with survivor_statistics(dense, kept_of(model, kept), norm_channels or {}):
                    expected = dense(*copy.deepcopy(chosen))
            else:
                expected = dense(*copy.deepcopy(chosen))
            actual = small(*copy.deepcopy(chosen))
        assert_close(actual, expected, tolerance=tolerance, where=f"batch {batch}")


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives norms, biases and constant tensors random values, in place; returns the model.

    So that no channel is trivially zero or one, as it is in a freshly built network.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            if not tensor.is_floating_point() or not tensor.numel() or id(tensor) in done:
                continue
            done.add(id(tensor))
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            uniform = torch.rand(tensor.shape, generator=generator).to(tensor)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + 1.5 * uniform)
            elif name.endswith("running_mean"):
                tensor.copy_(0.5 * noise)
            elif bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(0.3 * noise)
            elif name.endswith("bias"):
                tensor.copy_(0.3 * noise)
    return model


def shrunk(model: nn.Module, pruned: nn.Module) -> float:
    """Share of the parameters that is left, 1.0 when nothing was removed."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    names = dict(model.named_parameters(remove_duplicate=False))
    left = sum(p.numel() for name, p in pruned.named_parameters() if name in names)
    return left / dense
