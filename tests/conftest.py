"""What the tests share: one thread, the data folder, networks that were pruned once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import halp_fx

__all__ = ["PrunedCache"]

# A builder of (network, inputs); it is called once for each name.
Build = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small networks gain nothing from threads, and several test runs share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seeded() -> Iterator[None]:
    """Random numbers from seed 0 on; those of other tests go on as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _data_folders() -> list[Path]:
    named = os.environ.get("HALP_FX_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return [Path(named)] if named else [beside]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of trained weights and images: `$HALP_FX_DATA`, or `shared/data` by the repository."""
    folder = next((f for f in _data_folders() if f.is_dir()), None)
    if folder is None:
        pytest.skip("no data folder: set HALP_FX_DATA to one")
    return folder


class PrunedCache:
    """Dense networks, their inputs and what `halp_fx.compile` makes of them, by name."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, float], tuple[nn.Module, tuple[Any, ...], fx.GraphModule]] = {}

    def __call__(
        self, name: str, build: Build, budget: float = 0.5
    ) -> tuple[nn.Module, tuple[Any, ...], fx.GraphModule]:
        """(dense, inputs, pruned) of the network `name` at a share of its analytic latency."""
        key = name, budget
        if key not in self._kept:
            model, inputs = build()
            pruned = halp_fx.compile(model, budget, inputs, latency="analytic")
            self._kept[key] = model, inputs, pruned
        return self._kept[key]


@pytest.fixture(scope="module")
def pruned_cache() -> PrunedCache:
    """Compiles each network of a test module once."""
    return PrunedCache()
