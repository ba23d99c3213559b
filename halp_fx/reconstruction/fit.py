"""Least squares for the weights of a layer, from second moments of its inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halp_fx.reconstruction.dropout import Dropout

__all__ = ["Fit", "Moments", "error", "solve"]


@dataclass(frozen=True)
class Fit:
    """How well a layer gives what the dense one gives, on samples kept for checking.

    Mean squared error as a share of the variance of what it is to give. Where a batch norm
    follows, the mean is its matter and does not count.
    """

    before: float
    after: float


class Moments:
    """Sums over rows `x` (rows, groups, d) and `y` (rows, groups, o), in float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self._known: dict[bool, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """More rows; products are taken about a point near the means, where they lose little."""
        if not len(x):
            return
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        if not self.count:
            self._x0, self._y0 = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._x0, y - self._y0
        parts = [x.mT @ x, x.mT @ y, y.square().sum(1), x.sum(1), y.sum(1)]
        found = [part.double().cpu() for part in parts]
        if not self.count:
            self._sums = found
        else:
            self._sums = [a + b for a, b in zip(self._sums, found, strict=True)]
        self.count += x.shape[1]
        self._known.clear()

    def finite(self) -> bool:
        """Whether there are rows, and no NaN and no infinity among them."""
        return self.count > 0 and all(bool(part.isfinite().all()) for part in self._sums)

    @property
    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x (groups, d) and of y (groups, o)."""
        *_, x, y = self._sums
        x0, y0 = self._x0[:, 0].double().cpu(), self._y0[:, 0].double().cpu()
        return x0 + x / self.count, y0 + y / self.count

    def about(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """E[x x'] (groups, d, d), E[x y'] (groups, d, o), E[y**2] (groups, o).

        About the means, or about 0.
        """
        if centred not in self._known:
            self._known[centred] = self._about(centred)
        return self._known[centred]

    def _about(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        xx, xy, yy, x, y = (part / self.count for part in self._sums)
        xx = xx - x[:, :, None] * x[:, None]
        xy = xy - x[:, :, None] * y[:, None]
        yy = yy - y.square()
        if not centred:
            x, y = self.means
            xx = xx + x[:, :, None] * x[:, None]
            xy = xy + x[:, :, None] * y[:, None]
            yy = yy + y.square()
        return xx, xy, yy


def solve(
    moments: Moments,
    weight: torch.Tensor,
    *,
    centred: bool,
    ridge: float,
    dropout: Dropout | None = None,
    window: int = 1,
) -> torch.Tensor | None:
    """`argmin E|y - W x|**2 + ridge * s * |W - weight|**2`, s the mean square of an input.

    Behind a dropout also `+ E|(W - weight) n|**2`, n its noise in x: what the layer computes under
    dropout is to move no further than what it computes without (Srivastava et al., Dropout: A
    Simple Way to Prevent Neural Networks from Overfitting, 2014, section 9.1, have the same for
    weights from 0). Weights that cancel each other are a fit too, but of no use in training.

    Args:
        weight: (groups, o, d).
        centred: about the means: a bias takes up the difference.
        ridge: above 0; what no data say anything of stays as it is.
        dropout: in front of the layer.
        window: how many neighbours in x are of one channel.

    Returns:
        (groups, o, d), for groups whose inputs are all 0 the weight as it was; None where there
        is no solution in floating point.
    """
    xx, xy, _ = moments.about(centred)
    size = xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damp = ridge * torch.where(size > 0, size, torch.ones_like(size))
    damp = damp * torch.eye(xx.shape[1], dtype=xx.dtype)
    if dropout is not None:
        together = torch.arange(xx.shape[1]) // (window if dropout.channels else 1)
        noise = moments.about(False)[0] * (together[:, None] == together)
        damp = damp + dropout.variance * noise
    factor, failed = torch.linalg.cholesky_ex(xx + damp)
    if bool(failed.any()):
        return None
    return torch.cholesky_solve(xy + damp @ weight.mT, factor).mT


def error(
    moments: Moments, weight: torch.Tensor, bias: torch.Tensor, *, centred: bool = False
) -> float:
    """Mean squared error of `weight` x + `bias` as a share of the variance of y.

    Args:
        weight: (groups, o, d).
        bias: (groups, o).
        centred: with the best bias instead.
    """
    xx, xy, yy = moments.about(True)
    square = yy - 2 * (weight.mT * xy).sum(1) + ((weight @ xx) * weight).sum(2)
    if not centred:
        x, y = moments.means
        square = square + (y - (weight @ x[..., None])[..., 0] - bias).square()
    return float(square.sum().clamp_min(0) / yy.sum().clamp_min(1e-300))
