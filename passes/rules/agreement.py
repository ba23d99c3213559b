"""Whether a traced graph gives what its model gives, seen on data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from halp_fx.passes.rules.core import tensors_in
from halp_fx.passes.rules.structure import detached_copy

__all__ = [
    "difference",
    "difference_in_batch",
    "difference_in_size",
    "has_rows",
    "other_sizes",
    "rows_of",
]

_T = TypeVar("_T")

_BATCH = 2  # images to compare on, where the example has more
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}


def difference(
    model: nn.Module, graph: nn.Module, inputs: tuple[Any, ...], *, whole: bool = False
) -> str | None:
    """What differs between the outputs of both, or None.

    Both run once in the mode they are in, on the same random numbers. None also where the model
    itself does not run on the inputs, or gives no tensors that could be compared.

    Args:
        whole: on all of the inputs; a few images are enough where their number is no matter.
    """
    for given in [inputs] if whole else _candidates(inputs):
        try:
            return _difference(model, graph, given)
        except _ModelFailsError:
            continue
        except _GraphFailsError as error:
            if given is inputs:
                return str(error)
    return None


def difference_in_batch(
    model: nn.Module, graph: nn.Module, inputs: tuple[Any, ...]
) -> tuple[int, str] | None:
    """What differs where there are more or fewer images than in the example, and how many."""
    return _first(model, graph, _other_batches(inputs))


def difference_in_size(
    model: nn.Module, graph: nn.Module, inputs: tuple[Any, ...]
) -> tuple[tuple[int, ...], str] | None:
    """What differs for images of another size, and which size."""
    return _first(model, graph, _other_sizes(inputs))


def _first(
    model: nn.Module, graph: nn.Module, cases: Iterator[tuple[_T, tuple[Any, ...]]]
) -> tuple[_T, str] | None:
    for what, given in cases:
        try:
            differs = _difference(model, graph, given, counted=True)
        except _ModelFailsError:
            continue
        except _GraphFailsError as error:
            differs = str(error)
        if differs is not None:
            return what, differs
    return None


class _ModelFailsError(Exception):
    """The model does not take these inputs."""


class _GraphFailsError(Exception):
    """The graph does not run where the model does."""


def _difference(
    model: nn.Module, graph: nn.Module, inputs: tuple[Any, ...], *, counted: bool = False
) -> str | None:
    """What differs on these inputs.

    Args:
        counted: whether there must be as many outputs.

    Raises:
        _ModelFailsError, _GraphFailsError: one of them does not run on the inputs.
    """
    devices = sorted({t.device.index or 0 for t in tensors_in(inputs) if t.device.type == "cuda"})
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            expected = list(tensors_in(_run(model, inputs)))
        except Exception as error:
            raise _ModelFailsError from error
        try:
            found = list(tensors_in(_run(graph, inputs)))
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            text = f"it fails where the network runs ({type(error).__name__}: {first})"
            raise _GraphFailsError(text) from error
    if counted and len(expected) != len(found):
        return f"it gives {len(found)} outputs, not {len(expected)}"
    return _compare(expected, found)


def _other_batches(inputs: tuple[Any, ...]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """One image, two, three, as far as the example has another number.

    Of all inputs with as many rows as the first tensor; others stay as they are.
    """
    count = rows_of(inputs)
    for wanted in (1, 2, 3) if count else ():
        if wanted != count:
            yield wanted, tuple(_repeated(x, wanted) if has_rows(x, count) else x for x in inputs)


def rows_of(inputs: tuple[Any, ...]) -> int:
    """The first dim of the first tensor, in most networks the batch; 0 where there is none."""
    return next((len(x) for x in inputs if isinstance(x, torch.Tensor) and x.ndim), 0)


def has_rows(value: Any, rows: int) -> bool:
    """Whether it is a tensor with so many."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows


def _repeated(value: torch.Tensor, wanted: int) -> torch.Tensor:
    count = len(value)
    rows = value.index_select(0, (torch.arange(wanted) % count).to(value.device))
    for i in range(count, wanted if value.ndim > 1 else 0):
        rows[i] = rows[i].roll(i, -1)  # images that are all the same would hide what is shared
    return rows


def _other_sizes(inputs: tuple[Any, ...]) -> Iterator[tuple[tuple[int, ...], tuple[Any, ...]]]:
    """A few images that are a little larger, and larger by a round number of pixels.

    Not on a GPU, where an index out of range, as of a position, ends all work of the process.
    """
    count = rows_of(inputs)
    images = [x for x in inputs if has_rows(x, count) and x.ndim > 3]
    if not images or any(x.is_cuda for x in tensors_in(list(inputs))):
        return
    size = tuple(images[0].shape[2:])

    def changed(x: Any, wanted: tuple[int, ...]) -> Any:
        if not has_rows(x, count):
            return x
        few = x[:_BATCH]
        return _resized(few, wanted) if x.ndim > 3 and x.shape[2:] == size else few

    for wanted in other_sizes(size):
        yield wanted, tuple(changed(x, wanted) for x in inputs)


def other_sizes(size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A little larger, and larger by a round number; no two dims by as much."""
    return (
        tuple(n + n // 8 + 1 + i for i, n in enumerate(size)),
        tuple(n + 32 * (i + 1) for i, n in enumerate(size)),
    )


def _resized(image: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Tiles of an image."""
    for dim, wanted in enumerate(size, start=2):
        index = torch.arange(wanted, device=image.device) % image.shape[dim]
        image = image.index_select(dim, index)
    return image


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


def _compare(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> str | None:
    if not wanted or len(wanted) != len(found):  # an output of a class of its own: not compared
        return None
    for k, (one, other) in enumerate(zip(wanted, found, strict=True)):
        if one.shape != other.shape:
            return f"output {k} has the shape {tuple(other.shape)}, not {tuple(one.shape)}"
        if one.dtype != other.dtype:
            return f"output {k} is {other.dtype}, not {one.dtype}"
        if not one.is_floating_point() or one.numel() == 0:
            continue
        scale = max(float(one.abs().nan_to_num(0.0, 0.0, 0.0).max()), 1e-6)
        limit = _TOLERANCES.get(one.dtype, 0.1) * scale
        if not torch.allclose(one, other, rtol=0.0, atol=limit, equal_nan=True):
            return f"output {k} differs by {float((one - other).abs().max()) / scale:.2g}, relative"
    return None
