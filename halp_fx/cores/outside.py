"""How long a model takes outside of its core."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from halp_fx.minibatches import device_of
from halp_fx.modes import in_eval

__all__ = ["split_ms"]

_ROUNDS = 7


def split_ms(
    model: nn.Module, parts: Sequence[str], inputs: tuple[Any, ...], threads: int | None = None
) -> tuple[float, dict[str, float]]:
    """Milliseconds that one call of `model` takes, and how many of them each part takes.

    In evaluation mode, in eager PyTorch: medians of some calls after one to warm up.

    Args:
        parts: names of submodules.
        inputs: positional arguments of `model`.
        threads: of the CPU; None: as they are set.
    """
    spent: dict[str, float] = {}
    rows: list[list[float]] = []
    clock = _clock(model)
    with torch.no_grad(), in_eval(model), _threads(threads), _timed(model, parts, spent, clock):
        for _ in range(_ROUNDS + 1):
            spent.update(dict.fromkeys(parts, 0.0))
            start = clock()
            model(*inputs)
            rows.append([clock() - start, *(spent[name] for name in parts)])
    medians = np.median(np.array(rows[1:]), axis=0)
    return float(medians[0]), dict(zip(parts, map(float, medians[1:]), strict=True))


def _clock(model: nn.Module) -> Callable[[], float]:
    """Milliseconds now, after the device has done what it was given."""
    device = device_of(model)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter_ns() / 1e6

    return now


@contextmanager
def _timed(
    model: nn.Module, parts: Sequence[str], spent: dict[str, float], clock: Callable[[], float]
) -> Iterator[None]:
    handles = []
    for name in parts:
        begun: list[float] = []

        def begin(_module: nn.Module, _args: Any, begun: list[float] = begun) -> None:
            begun.append(clock())

        def end(
            _module: nn.Module, _args: Any, _output: Any, name: str = name,
            begun: list[float] = begun,
        ) -> None:  # fmt: skip
            spent[name] += clock() - begun.pop()

        part = model.get_submodule(name)
        handles.append(part.register_forward_pre_hook(begin))
        handles.append(part.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
