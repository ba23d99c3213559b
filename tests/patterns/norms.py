"""Norms and per-channel parameters: statistics over channels, scales, slopes, buffers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, image, pattern, tokens

__all__: list[str] = []


@pattern("group_norm", norm_stats=True, free=(("a.weight", 0), ("c.0.weight", 0)))
class GroupNorm(nn.Module):
    """4 groups of 8 channels: a channel of each group, or whole groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), cbr(32, 16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.c(F.relu(self.norm(self.a(x)))))


@pattern("group_norm_single", norm_stats=True, free=(("a.weight", 0),))
class GroupNormSingle(nn.Module):
    """One group over all channels, and one channel in each group, in a residual trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.one, self.each = nn.GroupNorm(1, 16), nn.GroupNorm(16, 16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.one(self.a(x)))
        return self.out(F.relu(self.each(self.b(y)) + y))


@pattern("group_norm_plain", norm_stats=True, norm_channels={"norm": ("a.weight", 0)})
class GroupNormPlain(nn.Module):
    """A group norm without affine parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32, affine=False)
        self.c, self.out = cbr(32, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.c(F.relu(self.norm(self.a(x)))))


@pattern("layer_norm_channels_last", norm_stats=True, free=(("up.weight", 0),))
class LayerNormChannelsLast(nn.Module):
    """ConvNeXt's block: depthwise, permute, layer norm, two linears, layer scale, permute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, stride=2)
        self.dw, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.gamma = nn.Parameter(torch.full((16,), 0.5))
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.out(x + y.permute(0, 3, 1, 2))


@pattern("layer_norm_2d", norm_stats=True, free=(("a.weight", 0),))
class LayerNorm2d(nn.Module):
    """A subclass of LayerNorm that norms the channels of (N, C, H, W)."""

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Any:
            x = x.permute(0, 2, 3, 1)
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
            return x.permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 24, 3, padding=1), self.Norm(24)
        self.b, self.out = cbr(24, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(self.norm(self.a(x))))


@pattern("layer_norm_chw", image(3, 6, 6), norm_stats=True)
class LayerNormCHW(nn.Module):
    """Statistics and parameters over (C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.LayerNorm([16, 6, 6])
        self.b, self.out = cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(F.relu(self.norm(self.a(x)))))


@pattern("layer_norm_plain", tokens(), norm_stats=True, norm_channels={"norm": ("a.weight", 0)})
class LayerNormPlain(nn.Module):
    """No affine parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(16, 32), nn.LayerNorm(32, elementwise_affine=False)
        self.b, self.out = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.b(self.norm(self.a(x)))))


@pattern("rms_norm", tokens(), norm_stats=True, free=(("a.weight", 0), ("b.weight", 0)))
class RMSNorm(nn.Module):
    """nn.RMSNorm between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 32), nn.RMSNorm(32, eps=1e-6), nn.Linear(32, 32)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.silu(self.b(self.norm(self.a(x)))))


@pattern("rms_norm_by_hand", tokens(), free=(("b.weight", 0),), whole=(("a.weight", 0),))
class RMSNormByHand(nn.Module):
    """The mean of squares over channels reads them all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 64)
        self.gain, self.out = nn.Parameter(torch.ones(16)), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        return self.out(F.relu(self.b(y)))


@pattern("instance_norm", free=(("a.weight", 0), ("b.weight", 0)))
class InstanceNorm(nn.Module):
    """With and without affine parameters, and with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one = nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True)
        self.b, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.InstanceNorm2d(16)
        self.c = nn.Conv2d(16, 16, 1)
        self.three = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)
        self.out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.two(self.b(F.relu(self.one(self.a(x))))))
        return self.out(F.relu(self.three(self.c(y))))


@pattern("frozen_batch_norm", free=(("a.weight", 0), ("b.weight", 0)))
class FrozenBatchNorm(nn.Module):
    """torchvision's FrozenBatchNorm2d: everything is a buffer, reshaped at each call."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import FrozenBatchNorm2d

        self.a, self.one = nn.Conv2d(3, 16, 3, padding=1, bias=False), FrozenBatchNorm2d(16)
        self.b, self.two = nn.Conv2d(16, 16, 3, padding=1, bias=False), FrozenBatchNorm2d(16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.one(self.a(x)))
        return self.out(F.relu(self.two(self.b(y))))


@pattern("batch_norm_plain", free=(("a.weight", 0), ("b.weight", 0)))
class BatchNormPlain(nn.Module):
    """Batch norm without affine parameters, and without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, affine=False)
        self.b, self.two = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16, track_running_stats=False)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.two(self.b(F.relu(self.one(self.a(x)))))))


@pattern("pre_activation", free=(("b.weight", 0),))
class PreActivation(nn.Module):
    """Norm and activation come before the convolution, the trunk is bare."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.b = nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3, padding=1)
        self.two, self.c = nn.BatchNorm2d(32), nn.Conv2d(32, 16, 3, padding=1)
        self.last, self.out = nn.BatchNorm2d(16), Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        y = x + self.c(F.relu(self.two(self.b(F.relu(self.one(x))))))
        return self.out(F.relu(self.last(y)))


@pattern("layer_scale", free=(("a.0.weight", 0), ("b.0.weight", 0), ("c.0.weight", 0)))
class LayerScale(nn.Module):
    """Per-channel parameters of shape (C,), (C, 1, 1) and (1, C, 1, 1), by several views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(16, 16), cbr(16, 16)
        self.flat = nn.Parameter(torch.ones(16))
        self.column = nn.Parameter(torch.ones(16, 1, 1))
        self.full = nn.Parameter(torch.ones(1, 16, 1, 1))
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x) * self.flat.view(1, -1, 1, 1)
        y = self.b(y) * self.column + self.flat[None, :, None, None]
        return self.out(self.c(y).mul(self.full.expand_as(y)))


@pattern("channel_buffer", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class ChannelBuffer(nn.Module):
    """A per-channel buffer and one that isn't part of the state dict."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), cbr(16, 16), Head(16)
        self.register_buffer("scale", torch.rand(1, 16, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(16, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(self.a(x) * self.scale + self.shift))


@pattern("prelu", free=(("a.weight", 0), ("b.weight", 0)))
class PReLU(nn.Module):
    """One slope for all channels, and one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU()
        self.b, self.each = nn.Conv2d(16, 16, 3, padding=1), nn.PReLU(16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.each(self.b(self.one(self.a(x)))))


@pattern("normalise_channels", free=(("stem.0.weight", 0),), whole=(("a.0.weight", 0),))
class NormaliseChannels(nn.Module):
    """L2 norm over channels reads them all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.out = cbr(3, 32), cbr(32, 8), cbr(8, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(F.normalize(self.a(self.stem(x)), dim=1)))


@pattern("local_response_norm", free=(("stem.0.weight", 0),))
class LocalResponseNorm(nn.Module):
    """AlexNet's norm over neighbouring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = cbr(3, 32), cbr(32, 8), cbr(8, 16)
        self.norm, self.out = nn.LocalResponseNorm(3), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(self.norm(self.a(self.stem(x)))))
