"""Convolutions of all kinds: grouped, depthwise, transposed, 1-D and 3-D, computed weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, image, pattern, tokens

__all__: list[str] = []


@pattern("plain", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class Plain(nn.Module):
    """Convolution, batch norm, ReLU, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), cbr(16, 32), Head(32)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(self.a(x)))


@pattern("bias_free", free=(("0.weight", 0), ("2.weight", 0)))
def bias_free() -> nn.Module:
    """No bias, no norm anywhere."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5, bias=False),
    )


@pattern("sigmoid_bias", free=(("a.weight", 0),))
class SigmoidBias(nn.Module):
    """Activations that are not zero at zero: only consumers may be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        y = torch.cos(self.b(torch.sigmoid(self.a(x))) + 0.5)
        return self.out(y.exp())


@pattern("depthwise", free=(("a.0.weight", 0), ("dw.0.weight", 0)))
class Depthwise(nn.Module):
    """Inverted residual: expand, depthwise, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.dw = cbr(3, 8), cbr(8, 32, 1), cbr(32, 32, groups=32)
        self.project = nn.Sequential(nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.out = Head(8)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return self.out(y + self.project(self.dw(self.a(y))))


@pattern("depthwise_multiplier", free=(("a.0.weight", 0), ("dw.0.weight", 0)))
class DepthwiseMultiplier(nn.Module):
    """Two output channels for each input channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.dw, self.b = cbr(3, 16), cbr(16, 32, groups=16), cbr(32, 16, 1)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(self.dw(self.a(x))))


@pattern("grouped", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class Grouped(nn.Module):
    """ResNeXt: whole convolution groups go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 32, 1), cbr(32, 32, groups=8), cbr(32, 16, 1)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.c(self.b(self.a(x))))


@pattern("grouped_two_counts", free=(("a.0.weight", 0), ("d.0.weight", 0)))
class GroupedTwoCounts(nn.Module):
    """Two convolutions with 4 and 8 groups read one tensor: the coarser partition holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 32), cbr(32, 32, groups=4), cbr(32, 16, groups=8)
        self.d, self.out = cbr(48, 16, 1), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.out(self.d(torch.cat([self.b(y), self.c(y)], 1)))


@pattern("grouped_over_concat", free=(("a.0.weight", 0), ("d.0.weight", 0)))
class GroupedOverConcat(nn.Module):
    """The border of the concat runs through a convolution group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 12), cbr(3, 20), cbr(32, 32, groups=4)
        self.d, self.out = cbr(32, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.d(self.c(torch.cat([self.a(x), self.b(x)], 1))))


@pattern("grouped_twice", free=(("a.0.weight", 0), ("d.0.weight", 0)))
class GroupedTwice(nn.Module):
    """Convolution groups of 4 and of 8 channels in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 32), cbr(32, 32, groups=8), cbr(32, 32, groups=4)
        self.d, self.out = cbr(32, 16, 1), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.d(self.c(self.b(self.a(x)))))


@pattern("transposed", free=(("a.0.weight", 0), ("up.weight", 1)))
class Transposed(nn.Module):
    """A transposed convolution, whose weight is (in, out, k, k)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = cbr(3, 16), nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.norm, self.out = nn.BatchNorm2d(16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.norm(self.up(self.a(x)))))


@pattern("transposed_grouped", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class TransposedGrouped(nn.Module):
    """A grouped and a depthwise transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = cbr(3, 16)
        self.up = nn.ConvTranspose2d(16, 32, 4, stride=2, padding=1, groups=4)
        self.b = cbr(32, 16, 1)
        self.dw = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16, bias=False)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.dw(self.b(F.relu(self.up(self.a(x))))))


@pattern("transposed_output_padding", image(3, 7, 7), free=(("a.0.weight", 0),))
class TransposedOutputSize(nn.Module):
    """Stride and output padding; odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = cbr(3, 16, stride=2)
        self.up = nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.silu(self.up(self.a(x))))


@pattern("conv1d", image(4, 16), free=(("0.weight", 0),))
def conv1d() -> nn.Module:
    """A 1-D network with dilation."""
    return nn.Sequential(
        nn.Conv1d(4, 16, 3, padding=1),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 32, 3, padding=2, dilation=2),
        nn.GELU(),
        nn.AvgPool1d(2),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


@pattern("conv1d_over_tokens", tokens(), free=(("a.weight", 0), ("mix.weight", 0)))
class Conv1dOverTokens(nn.Module):
    """A 1-D convolution of kernel 1 mixes tokens: the channels are its space, and can go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix = nn.Linear(16, 32), nn.Conv1d(6, 24, 1)
        self.back, self.out = nn.Conv1d(24, 6, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.back(F.silu(self.mix(self.a(x))))))


@pattern("batch_norm_of_tokens", tokens(), free=(("a.weight", 0), ("b.weight", 0)))
class BatchNormOfTokens(nn.Module):
    """A batch norm whose channels are the tokens, with running statistics of each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.b(self.norm(self.a(x)))))


@pattern("conv3d", image(2, 4, 6, 6), free=(("0.weight", 0),))
def conv3d() -> nn.Module:
    """A 3-D network."""
    return nn.Sequential(
        nn.Conv3d(2, 16, 3, padding=1, bias=False),
        nn.BatchNorm3d(16),
        nn.ReLU(inplace=True),
        nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1), groups=4),
        nn.MaxPool3d(2),
        nn.Conv3d(16, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


@pattern("conv_subclass", image(2, 4, 6, 6), free=(("a.weight", 0), ("b.weight", 0)))
class ConvSubclass(nn.Module):
    """Subclasses of Conv3d, as in torchvision's R(2+1)D."""

    class Spatial(nn.Conv3d):
        def __init__(self, channels_in: int, channels: int) -> None:
            super().__init__(channels_in, channels, (1, 3, 3), padding=(0, 1, 1), bias=False)

    class Temporal(nn.Conv3d):
        def __init__(self, channels_in: int, channels: int) -> None:
            super().__init__(channels_in, channels, (3, 1, 1), padding=(1, 0, 0))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = self.Spatial(2, 16), self.Temporal(16, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3, 4)))


@pattern("padding_reflect", free=(("2.weight", 0),))
def padding_reflect() -> nn.Module:
    """Padding modes other than zeros, and padding="same"."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.ReplicationPad2d(1),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.ZeroPad2d(1),
        nn.Conv2d(16, 4, 3),
    )


@pattern("dilated_aspp", image(3, 12, 12), free=(("a.0.weight", 0), ("mix.0.weight", 0)))
class DilatedASPP(nn.Module):
    """Dilated branches and an image-level branch that is expanded back."""

    def __init__(self) -> None:
        super().__init__()
        self.a = cbr(3, 16)
        self.b = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=d, dilation=d) for d in (1, 2, 3))
        self.pooled, self.mix = cbr(16, 8, 1), cbr(32, 16, 1)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        parts = [F.relu(conv(y)) for conv in self.b]
        level = self.pooled(F.adaptive_avg_pool2d(y, 1))
        parts.append(F.interpolate(level, size=y.shape[-2:], mode="bilinear"))
        return self.out(self.mix(torch.cat(parts, 1)))


@pattern("weight_standardised", free=(("a.0.weight", 0), ("b.weight", 0)))
class WeightStandardised(nn.Module):
    """The weight is standardised over its inputs before each use."""

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Any:
            mean = self.weight.mean((1, 2, 3), keepdim=True)
            weight = self.weight - mean
            std = weight.var((1, 2, 3), keepdim=True, unbiased=False).add(1e-5).sqrt()
            return F.conv2d(x, weight / std, self.bias, self.stride, self.padding)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 8), self.Conv(8, 16, 3, padding=1), cbr(16, 16)
        self.a2 = cbr(8, 8)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.c(F.relu(self.b(self.a2(self.a(x))))))


@pattern("functional_parameters", free=(("weight_a", 0), ("inner.kernel", 0)))
class FunctionalParameters(nn.Module):
    """Bare parameters in functional calls, some in a nested module."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(16, 16, 3, 3) * 0.1)
            self.offset = nn.Parameter(torch.randn(16))
            self.gain = nn.Parameter(torch.randn(1, 16, 1, 1))

        def forward(self, x: Tensor) -> Any:
            return F.relu(F.conv2d(x, self.kernel, self.offset, padding=1)) * self.gain

    def __init__(self) -> None:
        super().__init__()
        self.weight_a = nn.Parameter(torch.randn(16, 3, 3, 3) * 0.2)
        self.inner = self.Inner()
        self.weight_out = nn.Parameter(torch.randn(5, 16))

    def forward(self, x: Tensor) -> Any:
        y = self.inner(F.relu(F.conv2d(x, self.weight_a, stride=2)))
        return F.linear(y.mean((-2, -1)), self.weight_out)


@pattern("pooled_conv1x1", free=(("a.0.weight", 0), ("b.weight", 0)))
class PooledConv1x1(nn.Module):
    """A convolution on pooled features as classifier, on (N, C, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Any:
        y = F.adaptive_avg_pool2d(self.a(x), (1, 1))
        return self.out(F.hardswish(self.b(y)))[:, :, 0, 0]


@pattern("unfold_fold")
class UnfoldFold(nn.Module):
    """Patches by unfold, weights by hand, and fold; may be pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 16), cbr(16, 8)
        self.mix = nn.Linear(8 * 9, 8 * 4)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        patches = F.unfold(y, 3, padding=1, stride=2)
        mixed = self.mix(patches.transpose(1, 2)).transpose(1, 2)
        return self.out(F.fold(mixed, (8, 8), 2, stride=2))
