"""Random networks built from a JSON-able spec, so that a failure can be written down.

    spec = {
        "seed": 3,                                  # of the weights and the inputs
        "image": [3, 8],                            # channels and size of the square input
        "steps": [["conv", 0, 0, 1, 2, 3], ...],    # block, two sources, three options
        "output": "dict",                           # "tensor", "tuple" or "dict"
        "head": "pool",                             # "pool", "flatten" or "map"
    }
    model, inputs = build(spec)

The block "again" uses the last convolution once more, behind a projection where widths differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.blocks import BLOCKS, Block
from tests.oracle import randomize

__all__ = ["KINDS", "SpecNet", "build", "has_norm_stats", "has_products"]

KINDS = (*BLOCKS, "again")
Shape = tuple[int, int, int]


class _Again(nn.Module):
    """A convolution that the network has used before, on another tensor."""

    def __init__(self, shared: nn.Conv2d, channels: int) -> None:
        super().__init__()
        width = shared.in_channels
        self.project = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()
        self.shared = shared

    def forward(self, x: Tensor) -> Any:
        return (torch.relu(self.shared(self.project(x))),)


class _Head(nn.Module):
    """From a feature map to an output."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.out: nn.Module
        if kind == "map":
            self.out = nn.Conv2d(channels, 3, 3, padding=1)
        else:
            self.out = nn.Linear(channels * (4 if kind == "flatten" else 1), 5)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "map":
            return self.out(x)
        size = 2 if self.kind == "flatten" else 1
        return self.out(torch.flatten(F.adaptive_avg_pool2d(x, size), 1))


class SpecNet(nn.Module):
    """The network of a spec; every map that no block consumes gets a head."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        channels, size = spec["image"]
        values = [torch.zeros(2, channels, size, size)]
        self.sources: list[tuple[int, ...]] = []
        self.blocks = nn.ModuleList()
        self.output: str = spec["output"]
        used: set[int] = set()
        last: nn.Conv2d | None = None
        stem: Sequence[Any] = ("conv", 0, 0, 1, 0, 0)
        for kind, first, second, *options in (stem, *spec["steps"]):
            sources = [len(values) - 1 - first % len(values), second % len(values)]
            block: nn.Module
            if kind == "again" and last is not None:
                sources = sources[:1]
                block = _Again(last, values[sources[0]].shape[1])
            else:
                sources = sources[: BLOCKS.get(kind, BLOCKS["conv"]).arity]
                shapes: list[Shape] = [_shape(values[i]) for i in sources]
                block = BLOCKS.get(kind, BLOCKS["conv"])(shapes, *options)
            conv = getattr(block, "conv", None)
            if isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.stride == (1, 1):
                last = conv
            with torch.no_grad():
                values.extend(block.eval()(*(values[i] for i in sources)))
            self.blocks.append(block)
            self.sources.append(tuple(sources))
            used.update(sources)
        self.leaves = [i for i in range(1, len(values)) if i not in used]
        self.heads = nn.ModuleList(_Head(spec["head"], values[i].shape[1]) for i in self.leaves)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for block, sources in zip(self.blocks, self.sources, strict=True):
            values.extend(block(*(values[i] for i in sources)))
        outputs = [head(values[i]) for head, i in zip(self.heads, self.leaves, strict=True)]
        if self.output == "dict":
            return {f"leaf{i}": output for i, output in zip(self.leaves, outputs, strict=True)}
        if self.output == "tuple" or len(outputs) > 1:
            return tuple(outputs)
        return outputs[0]


def _shape(value: Tensor) -> Shape:
    _, channels, height, width = value.shape
    return channels, height, width


def build(spec: Mapping[str, Any]) -> tuple[SpecNet, tuple[Tensor]]:
    """The network of `spec` with random weights, in eval mode, and an input with a batch of 2."""
    channels, size = spec["image"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["seed"])
        model = SpecNet(spec)
        randomize(model, spec["seed"])
        inputs = (torch.randn(2, channels, size, size),)
    return model.eval(), inputs


def has_products(model: nn.Module) -> bool:
    """Whether activations are multiplied with each other over channels (attention)."""
    return any(isinstance(block, Block) and block.products for block in model.modules())


def has_norm_stats(model: nn.Module) -> bool:
    """Whether norms compute statistics over channels."""
    return any(isinstance(block, Block) and block.norm_stats for block in model.modules())
