"""Whether a pruned network computes what the dense one does, judged from outside of the passes.

The dense network is run with the removed slices of every parameter set to zero, as `Plan.kept`
names them, beside the pruned network, in float64. Norms over pruned channels (LayerNorm,
GroupNorm, RMSNorm) take their statistics over the survivors in both.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from halp_fx.errors import InputError
from halp_fx.tools.survivor_norms import survivor_statistics

__all__ = ["Exactness", "calibrate", "compare", "masked_dense", "randomize"]

Kept = Mapping[str, tuple[Tensor | None, ...]]

_EXACT = {torch.float64: 1e-6, torch.float32: 1e-3}
_LEAST_SIGNAL = 1e-6


@dataclass(frozen=True)
class Exactness:
    """How far a pruned network is from the dense one with the removed channels masked."""

    error: float  # largest absolute difference, relative to the largest magnitude of that output
    # Largest difference between two samples of the dense outputs, relative to their magnitude (1
    # where only one could be run): random weights may make outputs that hardly depend on the
    # input, and an error is then held to what does depend on it.
    signal: float
    batches: tuple[int, ...]  # batch sizes compared
    dtype: torch.dtype  # float64, or float32 where the dense network can't run in float64
    note: str = ""  # what could not be compared, or what differs besides values

    @property
    def exact(self) -> bool:
        """Equal up to rounding, with the state that the plan says."""
        limit = _EXACT[self.dtype] * min(max(self.signal, _LEAST_SIGNAL), 1.0)
        return not self.note.startswith("state:") and self.error < limit


def compare(
    model: nn.Module, pruned: nn.Module, kept: Kept, inputs: Sequence[Any], *, seed: int = 0
) -> Exactness:
    """Compare at the example's batch size and one more, in eval mode.

    Args:
        model: the dense network as it was compiled; it is left as it is.
        pruned: the smaller network; it is left as it is.
        kept: `Plan.kept` of the pruned network.
        inputs: positional inputs that `model` accepts.
        seed: of the samples for the second batch size.

    Raises:
        InputError: the dense network rejects its own inputs.
    """
    note = _state_note(model, pruned, kept)
    dtype = torch.float64
    try:
        return _compare(model, pruned, kept, inputs, dtype, seed, note)
    except _DenseError:
        dtype = torch.float32
    try:
        return _compare(model, pruned, kept, inputs, dtype, seed, note)
    except _DenseError as error:
        raise InputError(
            f"the dense {type(model).__name__} rejects its example inputs: {error}"
        ) from error


class _DenseError(Exception):
    """The dense network does not run at this precision."""


def _compare(
    model: nn.Module,
    pruned: nn.Module,
    kept: Kept,
    inputs: Sequence[Any],
    dtype: torch.dtype,
    seed: int,
    note: str,
) -> Exactness:
    masked = masked_dense(model, kept).to(dtype).eval()
    small = copy.deepcopy(pruned).to(dtype).eval()
    size = _batch_of(inputs)
    error = signal = 0.0
    batches: list[int] = []
    for batch in (size, size + 1):
        chosen = _samples(inputs, size, batch, dtype, seed)
        try:
            wanted = _run(masked, chosen, survivor_statistics(masked, kept))
        except Exception as reason:
            if not batches:
                raise _DenseError(_first_line(reason)) from reason
            note = note or f"the dense network takes no batch of {batch}"
            break
        try:
            got = _run(small, chosen, nullcontext())
        except Exception as reason:
            reason.add_note(f"the pruned network was run at batch {batch}, the example has {size}")
            raise
        if [t.shape for t in wanted] != [t.shape for t in got]:
            return Exactness(math.inf, 0.0, (*batches, batch), dtype, "shapes of outputs differ")
        batches.append(batch)
        for want, have in zip(wanted, got, strict=True):
            error = max(error, _difference(want, have))
            signal = max(signal, _spread(want, batch))
    return Exactness(error, signal if len(batches) > 1 else 1.0, tuple(batches), dtype, note)


def masked_dense(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of `model` with the removed slices of every floating tensor zero.

    Zero along every dim, producers and consumers alike, so that products of two activations
    (attention's q and k) vanish for removed channels as well. Buffers with one number a channel,
    as running statistics, stay: they may be divided by. Where all of a tensor is gone, the branch
    that it was in still adds what it makes of zeros: only weights that read channels are zero.
    """
    masked = copy.deepcopy(model)
    parameters = {id(p) for p in masked.parameters()}
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in _tensors(masked).items():
            table = tensor.ndim < 2 and id(tensor) not in parameters
            if not tensor.is_floating_point() or table or id(tensor) in done:
                continue
            if (dims := kept.get(name)) is None:
                continue
            done.add(id(tensor))
            gone = any(index is not None and not len(index) for index in dims)
            if gone and tensor.numel() == max(tensor.shape):  # a bias, a scale
                continue
            tensor.copy_(_masked(tensor, dims))  # may be expanded memory: not in place by index
    return masked


def _masked(tensor: Tensor, dims: Sequence[Tensor | None]) -> Tensor:
    result = tensor.clone()
    for dim, index in enumerate(dims):
        if index is not None:
            removed = torch.ones(tensor.shape[dim], dtype=torch.bool)
            removed[index.cpu()] = False
            result.index_fill_(dim, removed.nonzero().flatten().to(tensor.device), 0.0)
    return result


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Makes every channel of a freshly built network matter, in place; returns the model.

    Norms, biases and constant tensors get random values: zeros and ones (and layer scales of
    1e-6) would hide a wrong channel. Weights get the scale that keeps a signal alive through
    many layers, a standard deviation of sqrt(2 / fan-in) (He et al., 2015).
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {id(p) for p in model.parameters()}
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            if not tensor.is_floating_point() or not tensor.numel() or id(tensor) in done:
                continue
            done.add(id(tensor))
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            if name.endswith("running_var"):
                tensor.copy_(0.6 + 0.8 * torch.rand(tensor.shape, generator=generator).to(tensor))
            elif name.endswith("running_mean"):
                tensor.copy_(0.2 * noise)
            elif id(tensor) not in parameters:
                continue  # tables, means of the images ...: constants of the model's own
            elif bool((tensor == tensor.flatten()[0]).all()):
                center = 1.0 if name.endswith("weight") and tensor.ndim == 1 else 0.0
                tensor.copy_(center + 0.3 * noise)
        for module in model.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                _rescale(module)
    return model


def _rescale(layer: nn.Module) -> None:
    weight = layer._parameters.get("weight")  # none where the layer makes it from something else
    if weight is None or weight.ndim < 2 or not weight.is_floating_point():
        return
    rows = weight.shape[0]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        rows = weight.shape[1]
    spread = float(weight.std()) if weight.numel() > 1 else 0.0
    if spread > 0.0:
        weight.mul_(math.sqrt(2.0 * rows / weight.numel()) / spread)


def calibrate(model: nn.Module, inputs: Sequence[Any], seed: int = 0, batch: int = 4) -> None:
    """Sets the running statistics of batch norms to about those of random samples, in place.

    Behind dozens of batch norms with other statistics than their inputs', nothing is left of the
    input, and of what pruning got wrong. A model that takes no other batch than the example's is
    calibrated on that.
    """
    generator = torch.Generator().manual_seed(seed)

    def measure(norm: nn.Module, args: tuple[Any, ...]) -> None:
        mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
        if mean is None or variance is None or not isinstance(args[0], Tensor):
            return
        dims = [d for d in range(args[0].ndim) if d != 1]
        found, center = torch.var_mean(args[0].to(mean.dtype), dims, unbiased=False)
        noise = torch.rand((2, *mean.shape), generator=generator).to(mean)
        variance.copy_((found * (0.7 + 0.6 * noise[0])).clamp(min=1e-8))
        mean.copy_(center + (noise[1] - 0.5) * 0.4 * variance.sqrt())

    hooks = [
        module.register_forward_pre_hook(measure)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    size = _batch_of(inputs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                model(*_samples(inputs, size, max(batch, size + 1), torch.float32, seed))
            except Exception:  # noqa: BLE001 (whatever a model raises at another batch)
                model(*_samples(inputs, size, size, torch.float32, seed))
    finally:
        for hook in hooks:
            hook.remove()


def _state_note(model: nn.Module, pruned: nn.Module, kept: Kept) -> str:
    """What is wrong with the pruned network's tensors, or the empty string."""
    dense, small = _tensors(model), _tensors(pruned)
    if unknown := [name for name in pruned.state_dict() if name not in dense]:
        added = [name for name in unknown if not name.startswith("_constants.")]
        if added:
            return f"state: {added[0]} is not in the dense network"
    for name, tensor in dense.items():
        expected = tensor
        for dim, index in enumerate(kept.get(name, ())):
            if index is not None:
                expected = expected.index_select(dim, index.to(tensor.device))
        if name not in small:
            if expected.numel() and tensor.ndim and name in model.state_dict():
                return f"state: {name} is missing"
        elif small[name].shape != expected.shape or not torch.equal(
            small[name].nan_to_num(), expected.nan_to_num()
        ):
            return f"state: {name} is not the dense tensor cut by the plan"
    return ""


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _batch_of(inputs: Sequence[Any]) -> int:
    sizes = [t.shape[0] for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim]
    return sizes[0] if sizes else 1


def _samples(
    inputs: Sequence[Any], size: int, batch: int, dtype: torch.dtype, seed: int
) -> tuple[Any, ...]:
    """The inputs; at another batch size, new random samples of about the same size."""
    generator = torch.Generator().manual_seed(seed)

    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu().clone()
        if tensor.ndim and tensor.shape[0] == size and batch != size:
            rows = tensor.index_select(0, torch.arange(batch) % size)
            if rows.is_floating_point():
                rows = rows * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
            tensor = rows
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    converted: tuple[Any, ...] = pytree.tree_map_only(Tensor, convert, tuple(inputs))
    return converted


def _run(network: nn.Module, inputs: tuple[Any, ...], context: Any) -> list[Tensor]:
    # The fused transformer layer would compute its norms where nobody can see them.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), context:
            torch.manual_seed(0)
            return _tensors_in(network(*copy.deepcopy(inputs)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _tensors_in(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    elif isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in _tensors_in(item)]
    return []


def _difference(want: Tensor, have: Tensor) -> float:
    """Largest difference relative to the largest magnitude; infinite where one is not finite."""
    if not want.numel():
        return 0.0
    if not want.is_floating_point():
        return 0.0 if torch.equal(want, have) else math.inf
    if not torch.isfinite(want).all() or not torch.isfinite(have).all():
        return math.inf
    scale = float(want.abs().max())
    error = float((want - have.to(want.dtype)).abs().max())
    return error / scale if scale else error


def _spread(want: Tensor, batch: int) -> float:
    if not want.is_floating_point() or not want.ndim or want.shape[0] != batch or batch < 2:
        return 0.0
    scale = float(want.abs().max()) if want.numel() else 0.0
    return float((want[0] - want[1]).abs().max()) / scale if scale else 0.0


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
