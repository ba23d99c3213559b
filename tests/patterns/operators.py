"""Operators that read all channels at once, or that no pruner has a rule for.

Each network has plain convolutions before and after: those must still be pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, pattern

__all__: list[str] = []


class _Between(nn.Module):
    """Convolutions with 32 channels before, 8 at, and 16 after an operation on 8 channels."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.at = cbr(3, 32), cbr(32, 8)
        self.after, self.out = cbr(8, 16), Head(16)
        self.operation = operation

    def forward(self, x: Tensor) -> Any:
        return self.out(self.after(self.operation(self.at(self.stem(x)))))


_FREE = (("stem.0.weight", 0), ("after.0.weight", 0))
_READS_ALL: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "softmax_channels": (lambda x: F.softmax(x, dim=1), "normalised over channels"),
    "log_softmax_channels": (lambda x: x.log_softmax(-3), "normalised over channels"),
    "cumsum_channels": (lambda x: torch.cumsum(x, dim=1), "running sum over channels"),
    "max_channels": (lambda x: x - x.amax(1, keepdim=True), "highest channel"),
    "mean_channels": (lambda x: x - x.mean(1, keepdim=True), "mean of channels"),
    "sum_channels": (lambda x: x * torch.tanh(x.sum(1, keepdim=True)), "sum of channels"),
    "std_channels": (lambda x: x / (x.std(1, keepdim=True) + 1.0), "spread of channels"),
    "norm_channels": (
        lambda x: x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1.0),
        "norm over channels",
    ),
    "sort_channels": (lambda x: torch.sort(x, dim=1).values, "order of channels"),
    "topk_channels": (lambda x: x * x.topk(3, dim=1).values.sum(1, keepdim=True), "best three"),
    "argmax_channels": (
        lambda x: x + x.argmax(1, keepdim=True).to(x.dtype),
        "index of the highest channel",
    ),
    "fft_channels": (lambda x: torch.fft.fft(x, dim=1).real, "spectrum over channels"),
    "cdist_pixels": (
        lambda x: x * torch.cdist(x.flatten(2).mT, x.flatten(2).mT).mean(-1).view(-1, 1, 8, 8),
        "distances between pixels",
    ),
    "cosine_similarity": (
        lambda x: x * F.cosine_similarity(x, x.flip(3), dim=1).unsqueeze(1),
        "angle between pixels",
    ),
    "gather_channels": (
        lambda x: x.gather(1, torch.full_like(x, 2, dtype=torch.long)),
        "channels by index",
    ),
    "diff_channels": (
        lambda x: F.pad(torch.diff(x, dim=1), (0, 0, 0, 0, 1, 0)),
        "differences of neighbours",
    ),
    "avg_pool_channels": (
        lambda x: F.avg_pool3d(x.unsqueeze(1), (3, 1, 1), 1, (1, 0, 0)).squeeze(1),
        "a pool that runs over channels",
    ),
    "conv_over_channels": (
        lambda x: F.conv3d(
            x.unsqueeze(1),
            torch.ones_like(x[:1, :1, :1, :1]).view(1, 1, 1, 1, 1).expand(1, 1, 3, 1, 1),
            padding=(1, 0, 0),
        ).squeeze(1),
        "a convolution whose space is the channels",
    ),
    "linear_algebra": (
        lambda x: (
            x
            * torch.linalg.det(x.flatten(2) @ x.flatten(2).mT * 0.05 + torch.eye(8, dtype=x.dtype))
            .tanh()
            .view(-1, 1, 1, 1)
        ),
        "a determinant over channels",
    ),
    "tril_channels": (lambda x: x.permute(0, 2, 3, 1).tril().permute(0, 3, 1, 2), "a triangle"),
    "pad_value": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 2), value=0.5)[:, 2:-2] + 1, "padded"),
    "view_dtype": (lambda x: x.double().cumsum(1).to(x.dtype), "another dtype on the way"),
}


def _add(name: str, operation: Callable[[Tensor], Any], note: str) -> None:
    whole = () if name == "pad_value" else (("at.0.weight", 0),)
    pattern(name, free=_FREE, whole=whole, note=note)(lambda: _Between(operation))


for _name, (_operation, _note) in _READS_ALL.items():
    _add(_name, _operation, _note)


@pattern("spatial_softmax", free=(*_FREE, ("at.0.weight", 0)))
def spatial_softmax() -> nn.Module:
    """A softmax over space leaves channels alone."""
    return _Between(lambda x: x.flatten(2).softmax(-1).view_as(x) * 8.0)


@pattern("spatial_fft", free=_FREE)
def spatial_fft() -> nn.Module:
    """A filter in the spectrum over space; complex numbers on the way."""
    return _Between(lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=(8, 8)))


@pattern("spatial_cumsum", free=_FREE)
def spatial_cumsum() -> nn.Module:
    """A running sum over columns leaves channels alone."""
    return _Between(lambda x: x.cumsum(3) * 0.1)


@pattern("grid_sample", free=_FREE)
class GridSample(nn.Module):
    """A spatial transformer: the grid is the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.at = cbr(3, 32), cbr(32, 16)
        self.theta, self.after, self.out = nn.Linear(16, 6), cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.at(self.stem(x))
        theta = torch.tanh(self.theta(y.mean((2, 3)))).view(-1, 2, 3)
        grid = F.affine_grid(theta, [y.shape[0], 3, 8, 8], align_corners=False)
        return self.out(self.after(F.grid_sample(y, grid, align_corners=False)))


@pattern("scatter_space", free=_FREE)
def scatter_space() -> nn.Module:
    """index_add over rows: a scatter that leaves channels alone, if one knows."""
    return _Between(lambda x: x.index_add(2, torch.tensor([1, 0]), x[:, :, 2:4]))


@pattern("pointwise_zoo", free=_FREE)
def pointwise_zoo() -> nn.Module:
    """Pointwise functions of all kinds, some with f(0) != 0."""

    def operation(x: Tensor) -> Tensor:
        y = F.mish(x) + F.elu(x) * F.softplus(x) - F.logsigmoid(x) + F.hardtanh(x)
        y = y + F.softsign(x) * torch.erf(x) + torch.exp(-x.square()) + F.threshold(x, 0.1, 0.2)
        return F.selu(y) + F.celu(x).pow(3) + x.sign() * x.abs().sqrt() + torch.atan2(x, y)

    return _Between(operation)
