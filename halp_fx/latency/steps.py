"""Steps: widths between which a kernel's time hardly changes, found in measured times.

Back-ends compute channels in blocks. A kernel with 50 channels may take as long as one with 64,
and one whose width is no multiple of the block may fall back to much slower code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError

__all__ = ["Step", "SteppedCost", "find_step", "probe_sizes"]

_STEPS = (64, 32, 16, 8, 4, 2)
_OFFSETS = (*range(9), 10, 12, 14, 15, 16, 17, 20, 24, 28, 31, 32)
_STARTS = ((96, 64), (64, 32), (12, 0))  # (least dense size, where its probes begin)
_TOLERANCE = 0.05  # by which a narrower kernel may be faster and still count as no faster
_AGREEMENT = 0.75  # share of the narrower kernels that must be no faster
_PENALTY = 1.05  # below this a kernel between two steps is just as fast as at the step


@dataclass(frozen=True)
class Step:
    """How the time of a kernel depends on one width, besides growing with it.

    Raises:
        InputError: `size` is no power of two, or there is not one penalty of at least 1 for each
            smaller power of two.
    """

    size: int = 1  # a width that is no multiple of it is no faster than the next multiple
    # How many times slower than the next multiple a width is: for odd widths, for those that
    # 2 divides and 4 does not, and so on.
    penalties: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1 or self.size & (self.size - 1):
            raise InputError(f"{self}: a step is a power of two")
        if len(self.penalties) != self.size.bit_length() - 1 or not all(
            p >= 1 for p in self.penalties
        ):
            raise InputError(f"{self}: it takes one penalty of at least 1 for each smaller power")


def probe_sizes(dense: int) -> tuple[int, ...]:
    """Widths at which to measure a kernel to find its step; empty where it is too narrow.

    Example:
        >>> probe_sizes(128)[:4], probe_sizes(8)
        ((64, 65, 66, 67), ())
    """
    for least, start in _STARTS:
        if dense >= least:
            return tuple(n for n in (start + o for o in _OFFSETS) if 1 <= n <= dense)
    return ()


def find_step(times_ms: Mapping[int, float]) -> Step:
    """The largest step that the times show.

    `s` is a step if going up to the next multiple of `s` costs nothing: odd widths, those that 2
    divides and 4 does not, and so on up to `s`, mostly take at least as long as the next multiple.

    Args:
        times_ms: measured milliseconds by width.

    Example:
        >>> find_step({n: math.ceil(n / 4) + (10 if n % 2 else 0) for n in range(8, 25)})
        Step(size=4, penalties=(3.25, 1.0))
    """
    for size in _STEPS:
        classes: list[list[float]] = [[] for _ in range(size.bit_length() - 1)]
        for n, ms in times_ms.items():
            full = times_ms.get(-(-n // size) * size, 0.0)
            if n % size and full > 0:
                classes[_power(n)].append(ms / full)
        if all(_no_faster(ratios) for ratios in classes):
            medians = [round(float(np.median(ratios)), 3) for ratios in classes]
            return Step(size, tuple(m if m >= _PENALTY else 1.0 for m in medians))
    return Step()


def _no_faster(ratios: list[float]) -> bool:
    return bool(ratios) and float(np.mean(np.array(ratios) >= 1 - _TOLERANCE)) >= _AGREEMENT


def _power(n: int) -> int:
    """How often 2 divides n."""
    return (n & -n).bit_length() - 1


class SteppedCost:
    """A cost that is known at full steps, at every width.

    A width that is no multiple of the step costs what the next multiple does, times its penalty.
    The dense width is measured as it is. Below the least width that was measured, the cost is
    that of the least.

    Args:
        cost: milliseconds at one size an axis, from `least` to `dense`.
        steps: one an axis.
        least: the least size measured, one an axis.
        dense: the largest.
        known: milliseconds measured at sizes that are no full steps.
    """

    def __init__(
        self,
        cost: Callable[..., Any],
        steps: Sequence[Step],
        least: Sequence[int],
        dense: Sequence[int],
        known: Mapping[tuple[int, ...], float] | None = None,
    ) -> None:
        self.cost, self.known = cost, dict(known or {})
        self.steps, self.least, self.dense = tuple(steps), tuple(least), tuple(dense)

    def __call__(self, *sizes: Any) -> Any:
        """Milliseconds at one size (number or array, which broadcast) an axis."""
        factor: Any = 1.0
        full = []
        for size, step, low, high in zip(sizes, self.steps, self.least, self.dense, strict=True):
            n = np.asarray(size, dtype=np.int64)
            between = (n % step.size != 0) & (n < high)
            up = np.where(between, -(-n // step.size) * step.size, n)
            full.append(np.clip(up, low, max(low, high)))
            for power, penalty in enumerate(step.penalties):
                if penalty > 1:
                    applies = between & ((n & -n) == 1 << power)
                    factor = factor * np.where(applies, penalty, 1.0)
        cost = self.cost(*full) * factor
        for point, ms in self.known.items():
            at: Any = True
            for size, measured in zip(sizes, point, strict=True):
                at = at & (np.asarray(size) == measured)
            cost = np.where(at, ms, cost)
        return float(cost) if np.ndim(cost) == 0 else cost

    def with_point(self, sizes: Sequence[int], ms: float) -> SteppedCost:
        """The same cost with one more measurement.

        At full steps the cost between the steps follows it; elsewhere it holds for itself alone.
        """
        aligned = all(
            size % step.size == 0 or size == high
            for size, step, high in zip(sizes, self.steps, self.dense, strict=True)
        )
        inside = all(low <= n for n, low in zip(sizes, self.least, strict=True))
        if not math.isfinite(ms):
            return self
        if not (aligned and inside):
            known = {**self.known, tuple(int(n) for n in sizes): ms}
            return SteppedCost(self.cost, self.steps, self.least, self.dense, known)
        refined = self.cost.with_point(sizes, ms)  # type: ignore[attr-defined]
        return SteppedCost(refined, self.steps, self.least, self.dense, self.known)
