"""From feature maps to linear layers and back, pooling, and channels-last layouts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, image, pattern, tokens

__all__: list[str] = []


@pattern("flatten_1d", image(3, 12), free=(("a.weight", 0), ("b.weight", 0)))
class Flatten1d(nn.Module):
    """(N, C, L) to a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 16, 3), nn.Linear(160, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.b(torch.flatten(F.relu(self.a(x)), 1))))


@pattern("flatten_2d", free=(("a.0.weight", 0), ("b.weight", 0)))
class Flatten2d(nn.Module):
    """(N, C, H, W) to a linear layer, VGG's head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool = cbr(3, 16), nn.MaxPool2d(2)
        self.b, self.drop, self.c = nn.Linear(256, 32), nn.Dropout(), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.pool(self.a(x))
        y = y.view(y.size(0), -1)
        return self.c(self.drop(F.relu(self.b(y))))


@pattern("flatten_3d", image(2, 3, 6, 6), free=(("a.weight", 0), ("b.weight", 0)))
class Flatten3d(nn.Module):
    """(N, C, D, H, W) to a linear layer with a batch norm on it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(2, 16, 3), nn.Linear(256, 24)
        self.norm, self.c = nn.BatchNorm1d(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x)).reshape(x.shape[0], -1)
        return self.c(F.relu(self.norm(self.b(y))))


@pattern("flatten_channels_last", free=(("a.0.weight", 0), ("b.weight", 0)))
class FlattenChannelsLast(nn.Module):
    """Flattened as (H, W, C): a channel owns strided columns of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16, stride=2), nn.Linear(256, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).permute(0, 2, 3, 1).flatten(1)
        return self.c(F.relu(self.b(y)))


@pattern("flatten_concat", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class FlattenConcat(nn.Module):
    """Two flattened maps and a vector side by side in one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 8, stride=2), cbr(3, 16, stride=2)
        self.c, self.out = nn.Linear(128 + 64 + 16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        a, b = self.a(x), self.b(x)
        y = torch.cat([a.flatten(1), b[:, :, :2, :2].flatten(1), b.mean((2, 3))], dim=1)
        return self.out(F.relu(self.c(y)))


@pattern("linear_to_map", image(16), free=(("a.weight", 0), ("up.weight", 1)))
class LinearToMap(nn.Module):
    """A generator: linear, view as (C, 4, 4), transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 32)
        self.b = nn.Linear(32, 16 * 4 * 4)
        self.up = nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1)
        self.norm, self.out = nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.b(F.relu(self.a(x)))).view(-1, 16, 4, 4)
        return torch.tanh(self.out(F.relu(self.norm(self.up(y)))))


@pattern("channels_last_mlp", image(8, 8, 12), free=(("a.weight", 0), ("b.weight", 0)))
class ChannelsLastMLP(nn.Module):
    """Linears on (N, H, W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        return self.c(F.gelu(self.b(F.gelu(self.a(x)))))


@pattern("mlp_mixer", norm_stats=True, free=(("token_up.weight", 0), ("channel_up.weight", 0)))
class MLPMixer(nn.Module):
    """Linears over tokens and over channels by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, stride=2)
        self.norm_a, self.norm_b = nn.LayerNorm(16), nn.LayerNorm(16)
        self.token_up, self.token_down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.channel_up, self.channel_down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.patch(x).flatten(2).transpose(1, 2)
        z = self.norm_a(y).transpose(1, 2)
        y = y + self.token_down(F.gelu(self.token_up(z))).transpose(1, 2)
        y = y + self.channel_down(F.gelu(self.channel_up(self.norm_b(y))))
        return self.out(y.mean(1))


@pattern("global_pools", free=(("a.0.weight", 0), ("b.weight", 0)))
class GlobalPools(nn.Module):
    """Average, max and mean by hand, added and concatenated; amax, logsumexp."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.max = cbr(3, 16), nn.AdaptiveMaxPool2d(1)
        self.b, self.out = nn.Linear(48, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        average = F.avg_pool2d(y, y.shape[2:]).squeeze(-1).squeeze(-1)
        highest = self.max(y).flatten(1) + y.amax((2, 3)) + y.flatten(2).max(-1)[0]
        by_hand = y.sum(dim=(2, 3)) / (y.shape[2] * y.shape[3])
        smooth = torch.logsumexp(y, (2, 3)) + y.std((2, 3))
        return self.out(F.relu(self.b(torch.cat([average + smooth, highest, by_hand], 1))))


@pattern("max_over_space", free=(("a.0.weight", 0), ("b.weight", 0)))
class MaxOverSpace(nn.Module):
    """torch.max with values and indices over one dim at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        y = torch.max(self.a(x), dim=3).values
        y, _ = torch.max(y, dim=2)
        return self.out(F.relu(self.b(y)))


@pattern("pools", image(3, 12, 12), free=(("a.0.weight", 0), ("b.0.weight", 0)))
class Pools(nn.Module):
    """Max, average, Lp and adaptive pools in a row, ceil mode, without padding counted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 16), cbr(16, 16)
        self.one = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        self.two = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.three, self.four = nn.AdaptiveAvgPool2d((2, 3)), nn.LPPool2d(2, 2, 1)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.two(self.b(self.one(self.a(x))))
        return self.out(self.four(self.three(y)).flatten(1))


@pattern("max_unpool", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class MaxUnpool(nn.Module):
    """SegNet: indices of a max pool place the values again; channels stay in step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = cbr(3, 16), cbr(16, 16)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.b, self.out = cbr(16, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        y, indices = self.pool(self.a(self.stem(x)))
        return self.out(self.b(self.unpool(y, indices)))


@pattern("mean_by_hand", whole=(("b.0.weight", 0),), free=(("a.0.weight", 0),))
class MeanByHand(nn.Module):
    """A sum over channels divided by their number: both change, so all stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = cbr(3, 32), cbr(32, 8), cbr(8, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        gate = torch.sigmoid(y.sum(1, keepdim=True) / y.shape[1])
        return self.out(self.c(y) * gate)


@pattern("scale_by_width", tokens(), free=(("b.weight", 0),))
class ScaleByWidth(nn.Module):
    """A factor computed from the number of channels must stay that of the dense network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y = y * y.shape[-1] ** -0.5
        z = F.relu(self.b(y))
        return self.out(z / z.size(2))


@pattern("embedding", lambda: (torch.randint(0, 20, (2, 7)),), free=(("a.weight", 0),))
class Embedding(nn.Module):
    """Rows of a table; its width is a channel dim like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.out = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.a(self.table(x))).mean(1))
