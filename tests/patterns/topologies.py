"""How blocks are wired: residuals, dense blocks, inception, pyramids, necks, U-Nets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, image, pattern

__all__: list[str] = []


@pattern("residual", free=(("stem.0.weight", 0), ("a.0.weight", 0)))
class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = cbr(3, 16), cbr(16, 32)
        self.b = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.out(F.relu(x + self.b(self.a(x))))


@pattern("residual_downsample", free=(("a.0.weight", 0), ("short.0.weight", 0)))
class ResidualDownsample(nn.Module):
    """A bottleneck with stride and a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 16)
        self.a, self.b = cbr(16, 16, 1), cbr(16, 16, stride=2)
        self.c = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.short = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.out = Head(32)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.out(F.relu(self.c(self.b(self.a(x))) + self.short(x)))


@pattern("residual_strided_identity", free=(("stem.0.weight", 0), ("a.0.weight", 0)))
class ResidualStridedIdentity(nn.Module):
    """The shortcut is a strided view or a pool, without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = cbr(3, 16), cbr(16, 24, stride=2), cbr(24, 16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.b(self.a(x))
        return self.out(y + x[:, :, ::2, ::2] + F.avg_pool2d(x, 2))


@pattern("residual_option_a", free=(("b.0.weight", 0),))
class ResidualOptionA(nn.Module):
    """Zero channels are padded on to the shortcut (ResNet's option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b = cbr(3, 8), cbr(8, 32, stride=2)
        self.c = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0.0)
        return self.out(F.relu(short + self.c(self.b(x))))


@pattern("residual_chain", free=(("stem.0.weight", 0), ("blocks.0.0.0.weight", 0)))
class ResidualChain(nn.Module):
    """Four blocks on one trunk; whole blocks may be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(cbr(16, 16), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
            for _ in range(4)
        )
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.out(x)


@pattern("input_added", free=(("a.0.weight", 0),))
class InputAdded(nn.Module):
    """The network's input is added to its last features (super-resolution)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 32), cbr(32, 16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return x + self.c(self.b(self.a(x)))


@pattern("input_broadcast", image(1, 8, 8), free=(("a.0.weight", 0),))
class InputBroadcast(nn.Module):
    """An input with one channel is broadcast over all the features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(1, 32), cbr(32, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(self.a(x) + x))


@pattern("dense_block", free=(("stem.0.weight", 0), ("layers.0.2.weight", 0)))
class DenseBlock(nn.Module):
    """DenseNet: norm, activation, convolution on everything so far."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(16 + 8 * i), nn.ReLU(), nn.Conv2d(16 + 8 * i, 8, 3, padding=1)
            )
            for i in range(3)
        )
        self.norm, self.transition = nn.BatchNorm2d(40), nn.Conv2d(40, 20, 1)
        self.out = Head(20)

    def forward(self, x: Tensor) -> Any:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        y = F.relu(self.norm(torch.cat(features, 1)))
        return self.out(F.avg_pool2d(self.transition(y), 2))


@pattern("inception", free=(("one.0.weight", 0), ("three.0.0.weight", 0)))
class Inception(nn.Module):
    """Four branches, one of them a pool, factorised kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = cbr(3, 16), cbr(16, 8, 1)
        self.three = nn.Sequential(cbr(16, 8, 1), cbr(8, 12))
        self.seven = nn.Sequential(
            nn.Conv2d(16, 8, (1, 7), padding=(0, 3)), nn.Conv2d(8, 12, (7, 1), padding=(3, 0))
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), cbr(16, 8, 1))
        self.mix, self.out = cbr(40, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.out(
            self.mix(torch.cat([self.one(x), self.three(x), self.seven(x), self.pool(x)], 1))
        )


@pattern("unet", image(3, 12, 12), free=(("down.0.weight", 0), ("middle.0.weight", 0)))
class UNet(nn.Module):
    """Upsampled features next to the skipped ones; resized to the skip's size."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = cbr(3, 8), cbr(8, 16)
        self.low, self.up = cbr(16, 16), nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.one, self.two = cbr(32, 16), cbr(24, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.down(x)
        b = self.middle(F.max_pool2d(a, 2))
        c = self.low(F.max_pool2d(b, 2))
        y = self.one(torch.cat([b, self.up(c)], 1))
        y = F.interpolate(y, size=a.shape[2:], mode="bilinear", align_corners=False)
        return self.out(self.two(torch.cat([a, y], 1)))


@pattern("fpn", free=(("c2.0.weight", 0), ("lateral3.weight", 0)))
class FPN(nn.Module):
    """Top-down sums; several outputs with fixed channels; one head shared by all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.c2, self.c3, self.c4 = cbr(3, 16), cbr(16, 16, stride=2), cbr(16, 32, stride=2)
        self.lateral2, self.lateral3 = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.lateral4 = nn.Conv2d(32, 16, 1)
        self.smooth = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        c2 = self.c2(x)
        c3 = self.c3(c2)
        p4 = self.lateral4(self.c4(c3))
        p3 = self.lateral3(c3) + F.interpolate(p4, scale_factor=2.0, mode="nearest")
        p2 = self.lateral2(c2) + F.interpolate(p3, size=c2.shape[-2:], mode="nearest")
        return [self.head(F.relu(self.smooth(p))) for p in (p2, p3, p4)]


@pattern("sppf", free=(("one.0.weight", 0),))
class SPPF(nn.Module):
    """YOLO's pyramid: pools in a row, all of them concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.pool = cbr(3, 12, 1), nn.MaxPool2d(5, 1, 2)
        self.two, self.out = cbr(48, 16, 1), Head(16)

    def forward(self, x: Tensor) -> Any:
        a = self.one(x)
        b = self.pool(a)
        c = self.pool(b)
        return self.out(self.two(torch.cat((a, b, c, self.pool(c)), 1)))


@pattern("pan", free=(("low.0.weight", 0), ("top.0.weight", 0)))
class PAN(nn.Module):
    """Top-down and bottom-up by concat, with nn.Upsample; boxes and scores flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = cbr(3, 16), cbr(16, 16, stride=2)
        self.up, self.top = nn.Upsample(scale_factor=2), cbr(32, 16)
        self.down, self.bottom = cbr(16, 8, stride=2), cbr(24, 16)
        self.heads = nn.ModuleList(nn.Conv2d(16, 3 * 7, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        low = self.low(x)
        high = self.high(low)
        top = self.top(torch.cat([self.up(high), low], 1))
        bottom = self.bottom(torch.cat([self.down(top), high], 1))
        outputs = []
        for head, y in zip(self.heads, (top, bottom), strict=True):
            z = head(y)
            n, _, h, w = z.shape
            outputs.append(z.view(n, 3, 7, h, w).permute(0, 1, 3, 4, 2).reshape(n, -1, 7))
        y = torch.cat(outputs, 1)
        return y[..., :4].sigmoid() * 8.0, y[..., 4:]


@pattern("hrnet", free=(("high.0.weight", 0), ("down.0.weight", 0)))
class HRNet(nn.Module):
    """Two resolutions exchange their features by sums."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.down = cbr(3, 8), cbr(8, 16, stride=2)
        self.to_high, self.to_low = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.low, self.out = cbr(16, 16), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Any:
        high = self.high(x)
        low = self.low(self.down(high))
        fused = F.relu(high + F.interpolate(self.to_high(low), size=high.shape[-2:]))
        low = F.relu(low + self.to_low(high))
        return self.out(torch.cat([fused, F.interpolate(low, scale_factor=2)], 1))


@pattern("csp", free=(("short.0.weight", 0), ("main.0.weight", 0)))
class CSP(nn.Module):
    """Cross-stage partial block: two entries, residual blocks on one of them, concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.short, self.main = cbr(3, 16), cbr(16, 12, 1), cbr(16, 12, 1)
        self.blocks = nn.Sequential(cbr(12, 12), cbr(12, 12))
        self.mix, self.out = cbr(24, 16, 1), Head(16)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        main = self.main(x)
        return self.out(self.mix(torch.cat([main + self.blocks(main), self.short(x)], 1)))


@pattern("weighted_sum", free=(("a.0.weight", 0),), whole=(("weights", 0),))
class WeightedSum(nn.Module):
    """BiFPN: branches summed with normalised scalar weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = cbr(3, 16), cbr(3, 16), cbr(16, 16)
        self.weights, self.out = nn.Parameter(torch.ones(2)), Head(16)

    def forward(self, x: Tensor) -> Any:
        w = F.relu(self.weights)
        w = w / (w.sum() + 1e-4)
        return self.out(self.mix(w[0] * self.a(x) + w[1] * self.b(x)))
