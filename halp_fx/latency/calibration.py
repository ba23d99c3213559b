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
    """`whole = offset + scale * sum of kernels + rate * weights`, and how well that holds.

    A kernel that is measured alone finds its weights in the cache; in a network they come from
    memory, which is what the last term is for. The errors are relative, on networks that were
    held out of the fit.

    Raises:
        LatencyError: a figure is not finite, or the scale is not above 0.
    """

    offset_ms: float
    scale: float
    weights_ms_per_mb: float  # milliseconds for each 10^6 bytes of weights
    networks: int  # that it was fitted on
    held_out: int  # that it was checked on
    median_error: float  # relative
    worst_error: float  # relative
    rank_correlation: float  # Spearman's, of predicted with measured

    def __post_init__(self) -> None:
        figures = (
            self.offset_ms, self.scale, self.weights_ms_per_mb, self.median_error, self.worst_error
        )  # fmt: skip
        if not np.all(np.isfinite(figures)) or not self.scale > 0 or self.weights_ms_per_mb < 0:
            raise LatencyError(f"{self} can't be used: measure the network again")

    def whole_ms(self, kernels_ms: float, weights_mb: float = 0.0) -> float:
        """What the whole network takes when its kernels take `kernels_ms` together."""
        return self.offset_ms + self.scale * kernels_ms + self.weights_ms_per_mb * weights_mb


def fit_calibration(
    sums_ms: Sequence[float],
    measured_ms: Sequence[float],
    weights_mb: Sequence[float] | None = None,
    *,
    held_out: int,
) -> Calibration:
    """Fit offset, scale and rate, such that relative errors are small.

    Args:
        sums_ms: sum of the kernels of each network.
        measured_ms: what each network takes.
        weights_mb: its weights, in 10^6 bytes; None: they are left out.
        held_out: how many of the networks, the last ones, only check the fit.

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
    weights = np.zeros_like(sums) if weights_mb is None else np.asarray(weights_mb, np.float64)
    if not len(sums) == len(measured) == len(weights) or len(sums) - held_out < 2 or held_out < 1:
        raise LatencyError(
            f"{len(sums)} networks with {held_out} held out: a calibration takes at least two to "
            "fit and one to check"
        )
    if not (np.all(sums > 0) and np.all(measured > 0)):
        raise LatencyError("a network takes no time: measure it again")
    columns = np.stack([np.ones_like(sums), sums, weights], axis=1)
    fitted = len(sums) - held_out
    factors = _fit(columns[:fitted], measured[:fitted])
    predicted = columns[fitted:] @ factors
    errors = np.abs(predicted / measured[fitted:] - 1)
    offset, scale, rate = (float(f) for f in factors)
    return Calibration(
        offset_ms=offset,
        scale=scale,
        weights_ms_per_mb=rate,
        networks=fitted,
        held_out=held_out,
        median_error=float(np.median(errors)),
        worst_error=float(errors.max()),
        rank_correlation=_spearman(predicted, measured[fitted:]),
    )


_COLUMNS = ((0, 1, 2), (1, 2), (0, 1))  # of offset, sum, weights: what may explain a time
_NETWORKS = 3  # networks a column at least where weights are one; fewer would tell noise
_COLLINEAR = 25.0  # condition of the columns above which noise would tell them apart
# A kernel is not so much cheaper or dearer within a network than alone: noise says so.
_SCALES = (0.25, 4.0)


def _fit(
    columns: npt.NDArray[np.float64], measured: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Least squares of relative errors by the columns that explain most; else a proportion."""
    sums = columns[:, 1]
    best = np.array([0.0, float(np.median(measured / sums)), 0.0])
    least = np.inf
    for chosen in _COLUMNS:
        used = list(chosen)
        design = columns[:, used] / measured[:, None]
        lengths = np.linalg.norm(design, axis=0)
        few = 2 in used and len(measured) < _NETWORKS * len(used)
        if few or not np.all(lengths > 0) or np.linalg.cond(design / lengths) > _COLLINEAR:
            continue
        factors = np.zeros(3)
        factors[used] = np.linalg.lstsq(design, np.ones(len(measured)), rcond=None)[0]
        error = float(np.square(columns @ factors / measured - 1).sum())
        falls = factors[0] + factors[1] * sums.min() <= 0
        likely = _SCALES[0] <= factors[1] <= _SCALES[1]
        if likely and factors[2] >= 0 and not falls and error < least:
            best, least = factors, error
    return best


def _spearman(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Rank correlation; 1 where there are too few to rank."""
    if len(one) < 2:
        return 1.0
    ranks = [np.argsort(np.argsort(x)).astype(np.float64) for x in (one, other)]
    first, second = (rank - rank.mean() for rank in ranks)
    return float(first @ second / math.sqrt((first @ first) * (second @ second)))
