"""Networks that lose by pruning what their weights can make up for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import halp_fx
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.trace import trace
from tests import oracle
from tests.pruning import plan_by_hand

__all__ = ["Chain", "Stream", "doubled", "far", "planned", "stream"]


def planned(model: nn.Module, x: Tensor, units: dict[str, Sequence[int]]) -> fx.GraphModule:
    """The network with these units of some groups, and all of the others."""
    groups = find_groups(trace(model, x))
    assert set(units) <= {group.name for group in groups.groups}
    kept = [units.get(g.name, range(g.units)) for g in groups.groups]
    return rewrite(plan_by_hand(groups, kept))


def far(pruned: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Squared difference of the outputs as a share of the dense ones' variance."""
    with torch.no_grad():
        own, other = (copy.deepcopy(net).eval()(x) for net in (pruned, dense))
    return float((own - other).square().sum() / (other - other.mean(0)).square().sum())


def doubled(layer: nn.Module) -> None:
    """Of the output channels of a layer the second half repeats the first."""
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.ndim:
                half = len(tensor) // 2
                tensor[half:] = tensor[:half]


class Chain(nn.Module):
    """Two layers, the first one's channels doubled, with a norm in between where given."""

    def __init__(
        self, first: nn.Module, second: nn.Module, norm: nn.Module | None = None, flat: bool = False
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.norm = nn.Identity() if norm is None else norm
        self.flat = flat
        doubled(first)
        doubled(self.norm)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.first(x)))
        return self.second(x.flatten(1) if self.flat else x)


class Stream(nn.Module):
    """A residual stream of two blocks, the second wide enough to do what the first does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.snorm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.one, self.onorm = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.back, self.bnorm = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.two, self.tnorm = nn.Conv2d(6, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.last, self.lnorm = nn.Conv2d(24, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.snorm(self.stem(x)))
        x = x + self.bnorm(self.back(F.relu(self.onorm(self.one(x)))))
        x = x + self.lnorm(self.last(F.relu(self.tnorm(self.two(x)))))
        return self.fc(x.mean((2, 3)))


def stream() -> tuple[nn.Module, list[Tensor]]:
    model = oracle.randomize(Stream()).eval()
    data = [torch.randn(32, 3, 10, 10) for _ in range(4)]
    halp_fx.recalibrate(model, data)
    return model, data
