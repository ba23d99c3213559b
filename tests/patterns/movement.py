"""Data movement along channels: concat, split, slices, shuffles."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, pattern

__all__: list[str] = []


@pattern("concat_self", free=(("stem.0.weight", 0),))
class ConcatSelf(nn.Module):
    """A tensor next to itself: one channel sits at two positions of the consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = cbr(3, 16), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return self.out(torch.cat([y, y], dim=1))


@pattern("concat_then_add", free=(("a.0.weight", 0), ("c.0.weight", 0)))
class ConcatThenAdd(nn.Module):
    """Two halves are added to one whole: the groups tie across the concat's border."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 12), cbr(3, 20), cbr(3, 32)
        self.out = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.cat([self.a(x), self.b(x)], 1) + self.c(x))


@pattern("concat_three", free=(("a.0.weight", 0), ("b.0.weight", 0), ("c.0.weight", 0)))
class ConcatThree(nn.Module):
    """Negative dim, three sources, batch norm after the concat."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 8), cbr(3, 16), cbr(3, 24)
        self.norm, self.out = nn.BatchNorm2d(48), nn.Conv2d(48, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = torch.cat((self.a(x), self.b(x), self.c(x)), dim=-3)
        return self.out(F.relu(self.norm(y)))


@pattern("concat_with_image", free=(("stem.0.weight", 0),))
class ConcatWithImage(nn.Module):
    """Features next to the input image, whose channels are fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = cbr(3, 16), Head(16)
        self.mix = cbr(19, 16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.mix(torch.cat([x, self.stem(x)], 1)))


@pattern("chunk_product", free=(("stem.0.weight", 0),))
class ChunkProduct(nn.Module):
    """Two chunks multiplied: channel i and i + 8 stand and fall together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = cbr(3, 32), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        a, b = self.stem(x).chunk(2, dim=1)
        return self.out(a * torch.sigmoid(b))


@pattern("split_even", free=(("stem.0.weight", 0),))
class SplitEven(nn.Module):
    """Equal parts go to separate convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 32)
        self.a, self.b = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.out = Head(8)

    def forward(self, x: Tensor) -> Any:
        a, b = torch.split(self.stem(x), 16, dim=1)
        return self.out(F.relu(self.a(a)) + F.relu(self.b(b)))


@pattern("split_uneven", free=(("stem.0.weight", 0), ("a.weight", 0)))
class SplitUneven(nn.Module):
    """Parts of 6, 10 and 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 32)
        self.a, self.b, self.c = nn.Conv2d(6, 8, 1), nn.Conv2d(10, 8, 1), nn.Conv2d(16, 8, 1)
        self.out = Head(8)

    def forward(self, x: Tensor) -> Any:
        a, b, c = self.stem(x).split([6, 10, 16], dim=1)
        return self.out(F.relu(self.a(a) + self.b(b) + self.c(c)))


@pattern("slices", free=(("stem.0.weight", 0),))
class Slices(nn.Module):
    """Slices with a start, a negative end, and all the channels besides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 24)
        self.a, self.b = nn.Conv2d(20, 12, 1), nn.Conv2d(24, 12, 3, padding=1)
        self.out = Head(12)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return self.out(F.relu(self.a(y[:, 2:-2])) + self.b(y))


@pattern("slices_strided", free=(("stem.0.weight", 0),))
class SlicesStrided(nn.Module):
    """Even and odd channels apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 32)
        self.a, self.b = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.out = Head(8)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return self.out(F.relu(self.a(y[:, ::2]) * self.b(y[:, 1::2])))


@pattern("slices_overlapping", free=(("stem.0.weight", 0),))
class SlicesOverlapping(nn.Module):
    """Overlapping windows that are added: ties run through all the channels but the step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = cbr(3, 24), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return self.out(y[:, :16] + y[:, 8:])


@pattern("half_processed", free=(("one.0.weight", 0), ("blocks.0.0.0.weight", 0)))
class HalfProcessed(nn.Module):
    """C2f of YOLOv8: a chunk goes on through residual blocks, everything is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one = cbr(3, 32, 1)
        self.blocks = nn.ModuleList(nn.Sequential(cbr(16, 8), cbr(8, 16)) for _ in range(2))
        self.two, self.out = cbr(64, 16, 1), Head(16)

    def forward(self, x: Tensor) -> Any:
        first, second = self.one(x).chunk(2, 1)
        parts = [first, second]
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.out(self.two(torch.cat(parts, 1)))


@pattern("half_processed_list", traceable=False, free=(("one.0.weight", 0),))
class HalfProcessedList(HalfProcessed):
    """The same as YOLOv8 writes it: a list is made of the chunks, however many there are."""

    def forward(self, x: Tensor) -> Any:
        parts = list(self.one(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.out(self.two(torch.cat(parts, 1)))


@pattern("shuffle_by_view", free=(("a.0.weight", 0),))
class ShuffleByView(nn.Module):
    """ShuffleNet's shuffle by view and transpose, sizes taken from the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        n, c, h, w = y.size()
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.c(self.b(y))


@pattern("shuffle_after_concat", free=(("right.0.weight", 0),))
class ShuffleAfterConcat(nn.Module):
    """A unit of ShuffleNetV2: half goes through a branch, then concat and shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = cbr(3, 32)
        self.right = cbr(16, 16)
        self.deep, self.out = cbr(32, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        left, right = self.stem(x).chunk(2, dim=1)
        y = torch.cat((left, self.right(right)), dim=1)
        n, c, h, w = y.shape
        y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.out(self.deep(y))


@pattern("channel_shuffle", free=(("c.0.weight", 0),))
class ChannelShuffle(nn.Module):
    """nn.ChannelShuffle between grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 24), cbr(24, 24, groups=4)
        self.shuffle, self.c, self.out = nn.ChannelShuffle(4), cbr(24, 24), Head(24)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.c(self.shuffle(self.b(self.a(x)))))


@pattern("pixel_shuffle", free=(("a.0.weight", 0), ("b.weight", 0)))
class PixelShuffle(nn.Module):
    """Four channels become one of twice the size: they stand and fall together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 16), nn.Conv2d(16, 32, 1)
        self.up, self.out = nn.PixelShuffle(2), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.up(self.b(self.a(x))))


@pattern("pixel_unshuffle", free=(("a.0.weight", 0),))
class PixelUnshuffle(nn.Module):
    """One channel becomes four."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 8), cbr(32, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.c(self.b(F.pixel_unshuffle(self.a(x), 2)))


@pattern("depth_to_space", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class DepthToSpace(nn.Module):
    """Pixel shuffle by hand, block index first (DCR), by view and permute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), cbr(16, 32, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        n, c, h, w = y.shape
        y = y.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
        return self.out(y.reshape(n, c // 4, h * 2, w * 2))


@pattern("space_to_depth", free=(("a.0.weight", 0),))
class SpaceToDepth(nn.Module):
    """YOLOv5's focus: four strided views of the features next to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 12), cbr(48, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        parts = [y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]]
        return self.c(self.b(torch.cat(parts, 1)))
