"""What a pattern is, the registry of all of them, and the blocks they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tests.oracle import randomize

__all__ = ["PATTERNS", "Head", "Inputs", "Pattern", "cbr", "image", "pattern", "tokens"]

Inputs = tuple[Any, ...]
Model = TypeVar("Model", bound=Callable[[], nn.Module])


@dataclass(frozen=True)
class Pattern:
    """A small network that shows one structure; call it for the network and its inputs."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    prunable: bool = True  # its parameters must get fewer
    norm_stats: bool = False  # norms over channels compute statistics over the survivors
    strict: bool = True  # only consumers' columns are masked; False: products of activations
    traceable: bool = True  # torch.fx traces it symbolically
    free: tuple[tuple[str, int], ...] = ()  # (parameter, dim) that a compiler should prune
    whole: tuple[tuple[str, int], ...] = ()  # (parameter, dim) that can't be pruned
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # see the oracle
    unmasked: tuple[str, ...] = ()  # see the oracle
    norm_channels: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # see the oracle
    note: str = ""

    def __call__(self) -> tuple[nn.Module, Inputs]:
        """The network in eval mode and positional inputs with a batch of 2, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = randomize(self.build()).eval()
            inputs = self.inputs()
        return model, inputs


PATTERNS: dict[str, Pattern] = {}


def image(*shape: int) -> Callable[[], Inputs]:
    """One random input of `shape` with a batch of 2; an RGB image of 8x8 without arguments."""
    return lambda: (torch.randn(2, *(shape or (3, 8, 8))),)


def tokens(length: int = 6, width: int = 16) -> Callable[[], Inputs]:
    """One random input (2, length, width)."""
    return lambda: (torch.randn(2, length, width),)


def pattern(
    name: str, inputs: Callable[[], Inputs] | None = None, **flags: Any
) -> Callable[[Model], Model]:
    """Registers a module class (or a function that builds one) under `name`."""

    def register(build: Model) -> Model:
        if name in PATTERNS:
            raise ValueError(f"pattern {name!r} is registered twice")
        PATTERNS[name] = Pattern(name, build, inputs or image(), **flags)
        return build

    return register


def cbr(
    channels_in: int, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, ReLU: `0.weight`, `1.weight` ..."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class Head(nn.Module):
    """Global average pool and a linear layer with 5 outputs."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x.mean((2, 3)))
