"""Building blocks of the random networks: feature maps (N, C, H, W) in, a tuple of them out."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BLOCKS", "Block"]

_WIDTHS = (8, 16, 24, 32, 12)
_ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Identity, nn.GELU, nn.Hardswish, nn.Tanh)


class Block(nn.Module):
    """One step of a network; `arity` maps in, a tuple of maps out.

    Built from the shapes (C, H, W) of its inputs and three small numbers that choose its options.
    """

    arity = 1
    products = False  # multiplies activations: no consumer's weights to mask
    norm_stats = False  # statistics over channels

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__()


def _width(choice: int) -> int:
    return _WIDTHS[choice % len(_WIDTHS)]


def _act(choice: int) -> nn.Module:
    return _ACTIVATIONS[choice % len(_ACTIVATIONS)]()


class Convolution(Block):
    """Convolution, batch norm or bias, activation; groups and stride by choice."""

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        channels, height, _ = shapes[0]
        width = _width(a)
        kernel, groups, stride = (3, 1)[b % 2], (1, 1, 2, 4)[b // 2 % 4], 2 if c % 4 == 3 else 1
        groups = math.gcd(math.gcd(groups, channels), width)
        norm = c % 2 == 0
        self.conv = nn.Conv2d(
            channels,
            width,
            kernel,
            stride if height > 4 else 1,
            kernel // 2,
            groups=groups,
            bias=not norm,
        )
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.act = _act(a + b + c)

    def forward(self, x: Tensor) -> Any:
        return (self.act(self.norm(self.conv(x))),)


class DepthwiseConvolution(Block):
    """Depthwise, with a multiplier of 1 or 2, or transposed."""

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        channels = shapes[0][0]
        width = channels * (1 + (a % 2 if channels <= 24 else 0))
        kind = nn.ConvTranspose2d if b % 4 == 3 else nn.Conv2d
        self.conv = kind(channels, width, 3, padding=1, groups=channels, bias=b % 2 == 0)
        self.act = _act(c)

    def forward(self, x: Tensor) -> Any:
        return (self.act(self.conv(x)),)


class ResidualBlock(Block):
    """Basic block, inverted residual with a gate, or a pre-activated one."""

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        channels, middle = shapes[0][0], _width(a)
        layers: list[nn.Module] = []
        if b % 3 == 0:
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.Conv2d(channels, middle, 1), nn.BatchNorm2d(middle), _act(c)]
        if b % 3 == 1:
            layers += [nn.Conv2d(middle, middle, 3, padding=1, groups=middle), Gate(middle)]
        layers += [nn.Conv2d(middle, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        self.branch = nn.Sequential(*layers)
        self.act = _act(c + 3)

    def forward(self, x: Tensor) -> Any:
        return (self.act(x + self.branch(x)),)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, linear: bool = False) -> None:
        super().__init__()
        self.linear = linear
        self.down: nn.Module = nn.Linear(channels, 8) if linear else nn.Conv2d(channels, 8, 1)
        self.up: nn.Module = nn.Linear(8, channels) if linear else nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Any:
        pooled = x.mean((2, 3), keepdim=not self.linear)
        gate = torch.sigmoid(self.up(F.relu(self.down(pooled))))
        return x * (gate[:, :, None, None] if self.linear else gate)


class GateBlock(Block):
    """Squeeze and excitation by linear layers or convolutions."""

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        self.gate = Gate(shapes[0][0], linear=a % 2 == 0)

    def forward(self, x: Tensor) -> Any:
        return (self.gate(x),)


class Merge(Block):
    """Two maps: added, multiplied, compared or next to each other; resized to the first's size."""

    arity = 2

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        first, second = shapes
        self.how = ("add", "cat", "mul", "max", "sub", "cat")[a % 6]
        self.resize = first[1:] != second[1:]
        project = self.how != "cat" and first[0] != second[0]
        self.project = nn.Conv2d(second[0], first[0], 1) if project else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        if self.resize:
            y = F.interpolate(y, size=x.shape[2:], mode="nearest")
        y = self.project(y)
        if self.how == "cat":
            return (torch.cat([x, y], dim=1),)
        if self.how == "mul":
            return (x * torch.sigmoid(y),)
        if self.how == "max":
            return (torch.maximum(x, y),)
        return (x + y if self.how == "add" else x - y,)


class Split(Block):
    """chunk, split, slices: two maps."""

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        self.channels = shapes[0][0]
        self.how = ("chunk", "split", "slice", "strided")[a % 4]
        if self.channels == 1:  # one channel has no two parts
            self.how = "slice"
        self.at = max(1, self.channels * (1 + b % 3) // 4)

    def forward(self, x: Tensor) -> Any:
        if self.how == "chunk":
            one, two = x.chunk(2, dim=1)
        elif self.how == "split":
            one, two = torch.split(x, [self.at, self.channels - self.at], dim=1)
        elif self.how == "slice":
            one, two = x[:, : self.at], x[:, self.at // 2 :]
        else:
            one, two = x[:, ::2], x[:, 1::2]
        return one, two


class Rearrange(Block):
    """Shuffle, flip, pixel shuffle and its inverse, repeat, transposed there and back."""

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        channels, height, _ = shapes[0]
        self.groups = math.gcd(channels, (2, 4, 3)[b % 3])
        self.how = ("shuffle", "flip", "depth_to_space", "space_to_depth", "repeat", "mirror")[
            a % 6
        ]
        too_wide = channels > 24 and self.how in ("space_to_depth", "repeat")
        impossible = self.how == "depth_to_space" and (channels % 4 or channels < 16 or height > 12)
        if too_wide or impossible or (self.how == "space_to_depth" and height % 2):
            self.how = "shuffle"

    def forward(self, x: Tensor) -> Any:
        if self.how == "shuffle":
            n, c, h, w = x.shape
            y = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2)
            return (y.reshape(n, c, h, w),)
        if self.how == "depth_to_space":
            return (F.pixel_shuffle(x, 2),)
        if self.how == "space_to_depth":
            return (F.pixel_unshuffle(x, 2),)
        if self.how == "repeat":
            return (x.repeat(1, 2, 1, 1),)
        return (x.flip(1) if self.how == "flip" else x + x.flip(1),)


class Normalise(Block):
    """Group, layer, instance and batch norm."""

    norm_stats = True

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        channels = shapes[0][0]
        self.last = a % 4 == 1
        self.norm: nn.Module
        if a % 4 == 0:
            self.norm = nn.GroupNorm(math.gcd(channels, (1, 2, 4)[b % 3]), channels)
        elif self.last:
            self.norm = nn.LayerNorm(channels)
        elif a % 4 == 2:
            self.norm = nn.InstanceNorm2d(channels, affine=b % 2 == 0)
        else:
            self.norm = nn.BatchNorm2d(channels, affine=b % 2 == 0)

    def forward(self, x: Tensor) -> Any:
        if self.last:
            return (self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),)
        return (self.norm(x),)


class Attention(Block):
    """Attention over space, added to its input: by hand, fused, or nn.MultiheadAttention."""

    products = True

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        channels = shapes[0][0]
        self.heads = math.gcd(channels, (2, 4, 1)[b % 3])
        self.how = ("hand", "fused", "module")[a % 3]
        if self.how == "module":
            self.attention = nn.MultiheadAttention(channels, self.heads, batch_first=True)
        else:
            self.qkv = nn.Linear(channels, 3 * channels, bias=c % 2 == 0)
            self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Any:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if self.how == "module":
            y = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        else:
            qkv = self.qkv(tokens).view(n, h * w, 3, self.heads, c // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            if self.how == "fused":
                y = F.scaled_dot_product_attention(q, k, v)
            else:
                y = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1) @ v
            y = self.proj(y.transpose(1, 2).reshape(n, h * w, c))
        return (x + y.transpose(1, 2).reshape(n, c, h, w),)


class ChannelsLastMLP(Block):
    """Two linears on (N, H, W, C), perhaps gated, with a layer scale and a residual."""

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        channels, hidden = shapes[0][0], _width(a)
        self.gated = b % 2 == 0
        self.up = nn.Linear(channels, hidden * (1 + self.gated))
        self.down = nn.Linear(hidden, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Any:
        y = self.up(x.permute(0, 2, 3, 1))
        y = F.glu(y, dim=-1) if self.gated else F.gelu(y)
        return (x + (self.gamma * self.down(y)).permute(0, 3, 1, 2),)


class Resize(Block):
    """Pools, interpolation and transposed convolutions."""

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        channels, height, _ = shapes[0]
        self.how = ("max", "avg", "nearest", "bilinear", "transposed", "same")[a % 6]
        if (height < 4 and a % 6 < 2) or (height > 8 and 2 <= a % 6 < 5):
            self.how = "same"
        groups = math.gcd(channels, (1, 2)[b % 2])
        self.up = (
            nn.ConvTranspose2d(channels, channels, 2, stride=2, groups=groups)
            if self.how == "transposed"
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Any:
        if self.how == "max":
            return (F.max_pool2d(x, 2),)
        if self.how == "avg":
            return (F.avg_pool2d(x, 2, ceil_mode=True),)
        if self.how in ("nearest", "bilinear"):
            return (F.interpolate(x, scale_factor=2.0, mode=self.how),)
        if self.how == "same":
            return (F.max_pool2d(x, 3, 1, 1),)
        return (self.up(x),)


class PerChannel(Block):
    """A scale, a slope, a buffer, a half of the channels only, or a reader of all channels."""

    def __init__(self, shapes: list[tuple[int, int, int]], a: int, b: int, c: int) -> None:
        super().__init__(shapes, a, b, c)
        channels = shapes[0][0]
        self.how = ("scale", "slope", "buffer", "softmax", "mean", "glu")[a % 6]
        if self.how == "glu" and channels % 2:
            self.how = "scale"
        if self.how == "scale":
            self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        if self.how == "buffer":
            self.register_buffer("shift", torch.rand(channels, 1, 1))
        self.slope = nn.PReLU(channels if b % 2 else 1)

    def forward(self, x: Tensor) -> Any:
        y = self.slope(x)
        if self.how == "scale":
            return (y * self.scale,)
        if self.how == "buffer":
            return (y + self.shift,)
        if self.how == "softmax":
            return (F.softmax(y, dim=1) * 4.0,)
        if self.how == "mean":
            return (y * torch.sigmoid(y.mean(1, keepdim=True)),)
        return (F.glu(y, dim=1) if self.how == "glu" else y,)


BLOCKS: dict[str, type[Block]] = {
    "conv": Convolution,
    "residual": ResidualBlock,
    "merge": Merge,
    "split": Split,
    "depthwise": DepthwiseConvolution,
    "rearrange": Rearrange,
    "gate": GateBlock,
    "normalise": Normalise,
    "attention": Attention,
    "mlp": ChannelsLastMLP,
    "resize": Resize,
    "per_channel": PerChannel,
}
