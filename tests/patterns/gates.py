"""Channel and spatial gates, gated units, products of branches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, pattern

__all__: list[str] = []


@pattern("se_conv", free=(("a.0.weight", 0), ("down.weight", 0)))
class SEConv(nn.Module):
    """Squeeze and excitation by 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = cbr(3, 32), nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.b, self.out = cbr(32, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        gate = self.up(F.silu(self.down(F.adaptive_avg_pool2d(y, 1))))
        return self.out(self.b(y * torch.sigmoid(gate)))


@pattern("se_linear", free=(("a.0.weight", 0), ("down.weight", 0)))
class SELinear(nn.Module):
    """Squeeze and excitation by linear layers, and a hard sigmoid on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = cbr(3, 32), nn.Linear(32, 8), nn.Linear(8, 32)
        self.b, self.out = cbr(32, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        n, c, _, _ = y.size()
        gate = self.up(F.relu(self.down(y.mean((2, 3))))).view(n, c, 1, 1)
        return self.out(self.b(y * F.hardsigmoid(gate).expand_as(y)))


@pattern("se_residual", free=(("expand.0.weight", 0), ("dw.0.weight", 0)))
class SEResidual(nn.Module):
    """MobileNetV3's block: expand, depthwise, gate, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.dw = cbr(3, 16), cbr(16, 32, 1), cbr(32, 32, groups=32)
        self.down, self.up = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project, self.norm = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.dw(self.expand(x))
        y = y * F.hardsigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return self.out(x + self.norm(self.project(y)))


@pattern("eca", free=(("stem.0.weight", 0),), whole=(("a.0.weight", 0),))
class ECA(nn.Module):
    """A 1-D convolution runs over the channels: they are its space, so all stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = cbr(3, 32), cbr(32, 16), cbr(16, 16)
        self.over = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(self.stem(x))
        gate = self.over(y.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.out(self.b(y * torch.sigmoid(gate)[:, :, None, None]))


@pattern("sk", free=(("a.0.weight", 0), ("down.weight", 0)))
class SK(nn.Module):
    """Selective kernels: a softmax over two branches, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 16)
        self.a, self.b = cbr(16, 16, 3), cbr(16, 16, 5)
        self.down, self.up = nn.Linear(16, 8), nn.Linear(8, 32)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        branches = torch.stack([self.a(x), self.b(x)], dim=1)
        gate = self.up(F.relu(self.down(branches.sum(1).mean((2, 3)))))
        gate = gate.view(x.shape[0], 2, 16, 1, 1).softmax(dim=1)
        return self.out((branches * gate).sum(dim=1))


@pattern("cbam", free=(("stem.0.weight", 0), ("b.0.weight", 0)))
class CBAM(nn.Module):
    """A spatial gate out of the mean and the max over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = cbr(3, 32), cbr(32, 8), cbr(8, 32)
        self.gate, self.out = nn.Conv2d(2, 1, 7, padding=3, bias=False), Head(32)

    def forward(self, x: Tensor) -> Any:
        y = self.a(self.stem(x))
        high, _ = torch.max(y, dim=1, keepdim=True)
        gate = self.gate(torch.cat([y.mean(dim=1, keepdim=True), high], dim=1))
        return self.out(self.b(y * torch.sigmoid(gate)))


@pattern("spatial_gate_conv", free=(("a.0.weight", 0), ("squeeze.weight", 0)))
class SpatialGateConv(nn.Module):
    """A gate with one channel is broadcast over all the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.squeeze = cbr(3, 24), nn.Conv2d(24, 8, 1)
        self.gate, self.b, self.out = nn.Conv2d(8, 1, 1), cbr(24, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.out(self.b(y * torch.sigmoid(self.gate(F.relu(self.squeeze(y))))))


@pattern("glu", free=(("a.weight", 0), ("c.weight", 0)))
class GLU(nn.Module):
    """F.glu over channels, and nn.GLU over the last dim."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), cbr(16, 16)
        self.c, self.glu, self.out = nn.Linear(16, 32), nn.GLU(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.b(F.glu(self.a(x), dim=1))
        return self.out(self.glu(self.c(y.mean((2, 3)))))


@pattern("glu_chunk", free=(("up.weight", 0),))
class GLUChunk(nn.Module):
    """SwiGLU: one linear layer makes gate and value, chunk takes them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = cbr(3, 16), nn.Linear(16, 48), nn.Linear(24, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x).mean((2, 3))
        gate, value = self.up(y).chunk(2, dim=-1)
        return self.out(y + self.down(F.silu(gate) * value))


@pattern("branch_product", free=(("a.0.weight", 0),))
class BranchProduct(nn.Module):
    """Two branches multiplied, divided and compared element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(3, 16, 1), cbr(3, 16)
        self.mix, self.out = cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        a, b, c = self.a(x), self.b(x), self.c(x)
        y = torch.maximum(a * b, c) - torch.addcmul(a, b, c, value=0.5) / (1.0 + c.abs())
        return self.out(self.mix(torch.lerp(y, a, 0.3)))


@pattern("where_mask", free=(("a.0.weight", 0),))
class WhereMask(nn.Module):
    """torch.where and masked_fill with masks of the features themselves and of space."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = cbr(3, 16), cbr(3, 16), cbr(16, 16)
        self.register_buffer("mask", torch.rand(1, 1, 8, 8) > 0.5)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        a, b = self.a(x), self.b(x)
        y = torch.where(a > b, a, -b)
        y = y.masked_fill(self.mask, 0.5) + torch.where(self.mask, b, 0.0)
        return self.out(self.mix(y.clamp(-2.0, 2.0)))


@pattern("bilinear", free=(("a.weight", 0), ("b.weight", 0), ("pair.weight", 0)))
class Bilinear(nn.Module):
    """nn.Bilinear of two vectors; either of its inputs can shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 16)
        self.a, self.b = nn.Linear(16, 12), nn.Linear(16, 16)
        self.pair, self.out = nn.Bilinear(12, 16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x).mean((2, 3))
        return self.out(F.relu(self.pair(torch.tanh(self.a(y)), torch.cos(self.b(y)))))


@pattern("film", free=(("a.0.weight", 0), ("hidden.weight", 0)))
class FiLM(nn.Module):
    """A linear layer predicts scale and shift of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = cbr(3, 16), cbr(16, 24)
        self.hidden, self.film = nn.Linear(16, 16), nn.Linear(16, 48)
        self.b, self.out = cbr(24, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        scale, shift = self.film(F.relu(self.hidden(x.mean((2, 3))))).split(24, dim=1)
        y = self.a(x) * (1 + scale[..., None, None]) + shift[..., None, None]
        return self.out(self.b(y))


@pattern("dynamic_kernel", columns={"experts": (2,)}, free=(("stem.0.weight", 0),))
class DynamicKernel(nn.Module):
    """Weights of a convolution that the network computes from an expert table; may be pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = cbr(3, 32), cbr(32, 8), cbr(8, 16)
        self.experts = nn.Parameter(torch.randn(4, 8, 8, 3, 3) * 0.1)
        self.mix = nn.Parameter(torch.randn(4))
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        share = self.mix.softmax(0).view(4, 1, 1, 1, 1)
        weight = (self.experts * share).sum(0)
        return self.out(self.b(F.relu(F.conv2d(self.a(self.stem(x)), weight, padding=1))))
