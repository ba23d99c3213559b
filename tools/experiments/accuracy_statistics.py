"""Two methods on the same test images: the difference, how sure it is, and whether it is chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InputError

__all__ = ["Paired", "paired", "sign_test"]

BoolArray: TypeAlias = npt.NDArray[np.bool_]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Paired:
    """One method against another; differences are shares of the images."""

    difference: float  # mean accuracy of the first less that of the second
    low: float  # 95 % interval, bootstrap over images
    high: float
    wins: int  # images that the first gets right in more seeds than the second
    losses: int
    p: float  # two-sided sign test over those; McNemar's exact test where there is one seed


def paired(one: Sequence[BoolArray], other: Sequence[BoolArray]) -> Paired:
    """Compares which images are right, seed by seed.

    The images are what is drawn at random: seeds are averaged first, so that the interval says
    what other test images would change, not what other seeds would.

    Args:
        one: an array (images,) for each seed.
        other: the same seeds in the same order.

    Raises:
        InputError: the numbers of seeds or images differ.

    Example:
        >>> right = np.array([True] * 9 + [False])
        >>> found = paired([right], [~right])
        >>> found.difference, found.wins, found.losses
        (0.8, 9, 1)
    """
    if len(one) != len(other) or not one or len({a.shape for a in (*one, *other)}) != 1:
        raise InputError("paired results need the same images and the same seeds")
    each = np.mean([a.astype(float) - b.astype(float) for a, b in zip(one, other, strict=True)], 0)
    count = len(each)
    # Resampling images is drawing how often each value of the difference occurs.
    values, occurs = np.unique(each, return_counts=True)
    draws = np.random.default_rng(0).multinomial(count, occurs / count, size=_RESAMPLES)
    low, high = np.percentile(draws @ values / count, [2.5, 97.5])
    wins, losses = int((each > 0).sum()), int((each < 0).sum())
    return Paired(
        float(round(each.mean(), 12)),
        float(low),
        float(high),
        wins,
        losses,
        sign_test(wins, losses),
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of so uneven a split, or more, of as many fair coins.

    Example:
        >>> sign_test(5, 0)
        0.0625
    """
    coins, fewer = wins + losses, min(wins, losses)
    # Logarithms: binomials of thousands of coins are beyond a float.
    logs = [
        math.lgamma(coins + 1) - math.lgamma(k + 1) - math.lgamma(coins - k + 1)
        for k in range(fewer + 1)
    ]
    tail = sum(math.exp(log - coins * math.log(2)) for log in logs)
    return min(1.0, round(2 * tail, 12))
