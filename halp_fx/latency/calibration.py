"""Calibration: from the sum of a network's kernels to what the whole network takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import LatencyError

__all__ = ["Calibration", "fit_calibration"]


@dataclass(frozen=True)
class Calibration:
    """`whole = offset + scale * sum of kernels`, and how well that holds.

    The errors are relative, on networks that were held out of the fit.

    Raises:
        LatencyError: a figure is not finite, or the scale is not above 0.
    """

    offset_ms: float
    scale: float
    networks: int  # that it was fitted on
    held_out: int  # that it was checked on
    median_error: float  # relative
    worst_error: float  # relative
    rank_correlation: float  # Spearman's, of predicted with measured

    def __post_init__(self) -> None:
        figures = (self.offset_ms, self.scale, self.median_error, self.worst_error)
        if not np.all(np.isfinite(figures)) or not self.scale > 0:
            raise LatencyError(f"{self} can't be used: measure the network again")

    def whole_ms(self, kernels_ms: float) -> float:
        """What the whole network takes when its kernels take `kernels_ms` together."""
        return self.offset_ms + self.scale * kernels_ms


def fit_calibration(
    sums_ms: Sequence[float], measured_ms: Sequence[float], *, held_out: int
) -> Calibration:
    """Fit offset and scale, such that relative errors are small.

    Args:
        sums_ms: sum of the kernels of each network.
        measured_ms: what each network takes.
        held_out: how many of them, the last ones, only check the fit.

    Raises:
        LatencyError: there are fewer than two networks to fit, none to check, or a time that is
            not above 0.

    Example:
        >>> found = fit_calibration([1, 2, 4, 3], [2.1, 3.1, 5.1, 4.1], held_out=1)
        >>> round(found.offset_ms, 6), round(found.scale, 6), round(found.worst_error, 6)
        (1.1, 1.0, 0.0)
    """
    sums = np.asarray(sums_ms, dtype=np.float64)
    measured = np.asarray(measured_ms, dtype=np.float64)
    if sums.shape != measured.shape or len(sums) - held_out < 2 or held_out < 1:
        raise LatencyError(
            f"{len(sums)} networks with {held_out} held out: a calibration takes at least two to "
            "fit and one to check"
        )
    if not (np.all(sums > 0) and np.all(measured > 0)):
        raise LatencyError("a network takes no time: measure it again")
    fitted = len(sums) - held_out
    offset, scale = _fit(sums[:fitted], measured[:fitted])
    predicted = offset + scale * sums[fitted:]
    errors = np.abs(predicted / measured[fitted:] - 1)
    return Calibration(
        offset_ms=offset,
        scale=scale,
        networks=fitted,
        held_out=held_out,
        median_error=float(np.median(errors)),
        worst_error=float(errors.max()),
        rank_correlation=_spearman(predicted, measured[fitted:]),
    )


def _fit(sums: npt.NDArray[np.float64], measured: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Least squares of relative errors; a proportion where a line makes no sense."""
    proportion = float(np.median(measured / sums))
    design = np.stack([1 / measured, sums / measured], axis=1)
    (offset, scale), *_ = np.linalg.lstsq(design, np.ones(len(sums)), rcond=None)
    narrow = sums.max() < 1.2 * sums.min()  # the line would be told by the noise
    if narrow or not scale > 0 or offset + scale * sums.min() <= 0:
        return 0.0, proportion
    return float(offset), float(scale)


def _spearman(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Rank correlation; 1 where there are too few to rank."""
    if len(one) < 2:
        return 1.0
    ranks = [np.argsort(np.argsort(x)).astype(np.float64) for x in (one, other)]
    first, second = (rank - rank.mean() for rank in ranks)
    return float(first @ second / math.sqrt((first @ first) * (second @ second)))
