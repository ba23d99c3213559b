"""Channels in another order or more than once: flips, rolls, picks, repeats, stacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, pattern

__all__: list[str] = []


@pattern("flip_channels", free=(("a.0.weight", 0),))
class FlipChannels(nn.Module):
    """Channels in reverse are added to themselves: i and C - 1 - i are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 24), cbr(24, 16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.out(self.b(y + y.flip(1)))


@pattern("flip_only", free=(("a.0.weight", 0),))
class FlipOnly(nn.Module):
    """Channels in reverse go into a convolution; a spatial flip besides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 24), cbr(24, 16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(torch.flip(self.a(x), dims=[1, 3])))


@pattern("roll_channels", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class RollChannels(nn.Module):
    """Channels moved round by 3, rows by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = torch.roll(self.a(x), shifts=(3, 1), dims=(1, 2))
        return self.c(self.b(y))


@pattern("index_select_buffer", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class IndexSelect(nn.Module):
    """A fixed permutation held as a buffer of indices."""

    permutation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(16, 16), Head(16)
        self.register_buffer("permutation", torch.randperm(16))

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(torch.index_select(self.a(x), 1, self.permutation)))


@pattern("index_by_buffer", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class IndexByBuffer(nn.Module):
    """Channels picked by a buffer in brackets, some of them twice, some never."""

    picked: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(12, 16), Head(16)
        self.register_buffer("picked", torch.randint(0, 16, (12,)))

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(self.a(x)[:, self.picked]))


@pattern("index_written_to", free=(("b.0.weight", 0),), whole=(("a.0.weight", 0),))
class IndexWrittenTo(nn.Module):
    """Which channels the buffer picks changes while the network runs."""

    picked: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(16, 16), Head(16)
        self.register_buffer("picked", torch.randperm(16))

    def forward(self, x: Tensor) -> Any:
        picked = self.picked.clone()
        picked[:8] = 15 - picked[:8]
        return self.c(self.b(self.a(x)[:, picked]))


@pattern("index_by_list")
class IndexByList(nn.Module):
    """Channels picked by a list of constants, some of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(6, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(self.a(x)[:, [0, 5, 5, 9, 12, 2]]))


@pattern("repeat", free=(("a.0.weight", 0),))
class Repeat(nn.Module):
    """The channels three times over."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 12), cbr(36, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(self.a(x).repeat(1, 3, 1, 1)))


@pattern("repeat_interleave")
class RepeatInterleave(nn.Module):
    """Each channel twice in a row; freezing the first convolution is right, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 12), cbr(24, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(self.a(x).repeat_interleave(2, dim=1)))


@pattern("stack_flatten", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class StackFlatten(nn.Module):
    """Two tensors interleaved channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 12), cbr(3, 12)
        self.mix, self.out = cbr(24, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = torch.stack([self.a(x), self.b(x)], dim=2).flatten(1, 2)
        return self.out(self.mix(y))


@pattern("stack_sum", free=(("a.0.weight", 0),))
class StackSum(nn.Module):
    """Branches stacked along a new dim and summed: all are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = cbr(3, 16), cbr(3, 16, 1), cbr(16, 16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        y = torch.stack([self.a(x), self.b(x)]).sum(0)
        return self.out(self.mix(y))


@pattern("unbind_groups", free=(("a.0.weight", 0),))
class UnbindGroups(nn.Module):
    """Two groups of channels taken apart by unflatten and unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.out = cbr(3, 32), cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        one, two = self.a(x).unflatten(1, (2, 16)).unbind(1)
        return self.out(self.mix(one - two))


@pattern("axis_chains", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class AxisChains(nn.Module):
    """squeeze, unsqueeze, permute, movedim and transpose there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).unsqueeze(1).permute(0, 3, 4, 1, 2)
        y = y.squeeze(3).movedim(-1, 1).transpose(2, 3)
        return self.out(self.b(y.swapaxes(2, 3)))
