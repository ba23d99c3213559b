"""Costs between the sizes that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, LatencyError

__all__ = ["GridCost"]


@dataclass(frozen=True, eq=False)
class GridCost:
    """Piecewise multilinear interpolation on a grid of measured sizes; never extrapolates.

    Args:
        axes: for each dim that can change, the sizes measured, ascending.
        values: milliseconds, of shape `(len(axes[0]), len(axes[1]), ...)`; with no axes, one
            number.

    Raises:
        InputError: the axes are not ascending, or the shape of the values is another.

    Example:
        >>> cost = GridCost((np.array([8, 16]),), np.array([1.0, 3.0]))
        >>> cost(12)
        2.0
    """

    axes: tuple[npt.NDArray[np.int64], ...]
    values: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        axes = tuple(_frozen(axis, np.int64) for axis in self.axes)
        values = _frozen(self.values, np.float64)
        for position, axis in enumerate(axes):
            if axis.ndim != 1 or axis.size == 0 or np.any(np.diff(axis) <= 0):
                raise InputError(
                    f"axis {position} is {axis.tolist()}: pass at least one size, ascending, "
                    "each once"
                )
        shape = tuple(axis.size for axis in axes)
        if values.shape != shape:
            raise InputError(f"values have shape {values.shape}: the axes ask for {shape}")
        if not np.all(np.isfinite(values)):
            raise InputError("values hold numbers that are not finite: measure those sizes again")
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "values", values)

    def __call__(self, *sizes: Any) -> Any:
        """Cost in milliseconds at one size an axis.

        Args:
            sizes: a number or an array each; arrays broadcast with each other.

        Returns:
            A float where all sizes are numbers, else a float64 array of the broadcast shape.

        Raises:
            LatencyError: a size is outside of what was measured.
            InputError: there are more or fewer sizes than axes.
        """
        if len(sizes) != len(self.axes):
            raise InputError(f"{len(sizes)} sizes given: this cost has {len(self.axes)} axes")
        cells = [
            _locate(axis, size, position)
            for position, (axis, size) in enumerate(zip(self.axes, sizes, strict=True))
        ]
        cost = self._blend(cells, ())
        return float(cost) if np.ndim(cost) == 0 else cost

    def with_point(self, sizes: Sequence[int], ms: float) -> GridCost:
        """The same cost with one more measured point, which changes the cells around it alone.

        The grid is refined by the lines through the point; on them, what was interpolated
        before stays.

        Args:
            sizes: one an axis.
            ms: milliseconds measured there.

        Raises:
            LatencyError: a size is outside of what was measured.
        """
        axes = tuple(
            np.union1d(axis, np.array([size], dtype=np.int64))
            for axis, size in zip(self.axes, sizes, strict=True)
        )
        self(*sizes)  # refuses sizes outside
        values = np.array(self(*np.meshgrid(*axes, indexing="ij")), dtype=np.float64)
        at = tuple(int(np.searchsorted(a, n)) for a, n in zip(axes, sizes, strict=True))
        values[at] = ms
        return GridCost(axes, values)

    def _blend(self, cells: list[tuple[Any, Any, Any]], index: tuple[Any, ...]) -> Any:
        """The cost within the cells of the axes after those that `index` fixes."""
        if len(index) == len(cells):
            return self.values[index]
        lower, upper, fraction = cells[len(index)]
        low, high = self._blend(cells, (*index, lower)), self._blend(cells, (*index, upper))
        # Exact at measured sizes and between equal costs, so that a stair stays level.
        return np.where(fraction == 1.0, high, low + fraction * (high - low))


def _frozen(values: Any, dtype: Any) -> npt.NDArray[Any]:
    """A read-only copy, so that the cost can't change behind the caller's back."""
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array


def _locate(axis: npt.NDArray[np.int64], size: Any, position: int) -> tuple[Any, Any, Any]:
    """Indices of the measured sizes on both sides of `size`, and where it is between them."""
    wanted = np.asarray(size, dtype=np.float64)
    # Written so that nan counts as outside.
    outside = ~((wanted >= axis[0]) & (wanted <= axis[-1]))
    if np.any(outside):
        worst = float(wanted[outside].flat[0])
        raise LatencyError(
            f"size {worst:g} on axis {position} was not measured: the table covers "
            f"{axis[0]} to {axis[-1]}. Measure the kernel at this size."
        )
    last = max(axis.size - 2, 0)
    lower = np.clip(np.searchsorted(axis, wanted, side="right") - 1, 0, last)
    upper = np.minimum(lower + 1, axis.size - 1)
    width = np.maximum(axis[upper] - axis[lower], 1)
    return lower, upper, (wanted - axis[lower]) / width
