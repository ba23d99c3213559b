"""Samples kept for checking, and whether a fitted network is nearer to the dense one on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx

from halp_fx.errors import InputError
from halp_fx.minibatches import device_of, float_tensors, inputs_of
from halp_fx.recalibrate import recalibrate

__all__ = ["State", "held_rows", "keep_nearer", "restore"]

_CHECKED = 4  # one sample in so many is kept for checking

State = dict[int, tuple[torch.Tensor, torch.Tensor]]  # tensors by id, and what was in them


def held_rows(rows: torch.Tensor, sizes: Sequence[int], number: int) -> torch.Tensor:
    """Which rows are kept for checking: whole minibatches, or samples where those are few.

    Minibatches of less than half the size of the largest, as the last of an epoch may be, say too
    little to check by.

    Args:
        rows: the sample of each row.
        sizes: samples of each minibatch.
        number: of the minibatch.
    """
    large = [i for i, size in enumerate(sizes) if 2 * size >= max(sizes)]
    # Positions of one sample are too much alike to check what was learnt from others of it.
    if len(large) < _CHECKED and max(sizes) > 1:
        kept = max(sizes[number] // _CHECKED, 1) if number in large else 0
        return rows >= sizes[number] - kept
    if len(sizes) > 1:
        held = number in (large[_CHECKED - 1 :: _CHECKED] or large[-1:])
        return torch.full_like(rows, held, dtype=torch.bool)
    positions = torch.arange(len(rows), device=rows.device)
    return positions < len(positions) // _CHECKED


def restore(saved: State) -> None:
    """Put back what was in the tensors. To be called under `no_grad`."""
    for tensor, before in saved.values():
        tensor.copy_(before)


def keep_nearer(
    network: fx.GraphModule,
    dense: fx.GraphModule,
    given: Sequence[tuple[Any, ...]],
    batches: Sequence[tuple[Any, ...]],
    saved: State,
) -> bool:
    """Keep the fitted weights if they bring the outputs nearer to the dense ones than those before.

    Else the network has those again, and recalibrated batch norms. To be called under `no_grad`.

    Args:
        given: what the network is called with.
        batches: what its graph gets then.
        saved: the weights before.

    Returns:
        Whether they were kept.
    """
    fitted = {key: (tensor, tensor.clone()) for key, (tensor, _) in saved.items()}
    off = _distance(network, dense, batches)
    restore(saved)
    with suppress(InputError):  # where what it computes is not finite, its statistics stay
        recalibrate(network, [(inputs, None) for inputs in given])
    before = _distance(network, dense, batches)
    if off is None or before is None or off < before:
        restore(fitted)
        return True
    return False


def _distance(
    network: fx.GraphModule, dense: fx.GraphModule, batches: Sequence[tuple[Any, ...]]
) -> float | None:
    """Squared difference of the outputs as a share of the dense ones' squares.

    Of the samples kept for checking, and where the dense ones are finite; infinite where the
    others are not, None where nothing is left to compare.
    """
    off = size = 0.0
    firsts = [
        next((t for t in inputs if isinstance(t, torch.Tensor) and t.ndim), None)
        for inputs in batches
    ]
    sizes = [0 if first is None else len(first) for first in firsts]
    for i, (inputs, samples) in enumerate(zip(batches, sizes, strict=True)):
        held = torch.ones(samples, dtype=torch.bool)
        if samples > 1 or len(batches) > 1:
            held = held_rows(torch.arange(samples), sizes, i)
        if samples and not bool(held.any()):
            continue
        theirs = float_tensors(dense.forward(*inputs_of((inputs, None), device_of(dense))))
        for own, other in zip(float_tensors(network.forward(*inputs)), theirs, strict=True):
            pair = [own.detach().double().cpu(), other.detach().double().cpu()]
            if own.ndim and len(own) == samples:
                pair = [values[held] for values in pair]
            known = pair[1].isfinite()
            error = float((pair[0] - pair[1])[known].square().sum())
            off += error if math.isfinite(error) else math.inf
            size += float(pair[1][known].square().sum())
    return off / size if size > 0 else None
