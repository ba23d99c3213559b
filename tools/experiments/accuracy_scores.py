"""Scores to compare with the default: filter norms, and scores by data on other scales.

A sum of saliencies says which channel of a group matters more; how much a channel of one group
matters against one of another is what it knows least about. These scores differ in that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

import halp_fx
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.rules.plan import kept_indices
from halp_fx.passes.rules.structure import named_tensors
from halp_fx.passes.saliency import score
from halp_fx.types import ChannelGroups, IntArray, Plan

__all__ = ["filter_l1", "measured", "normalised"]

FloatArray: TypeAlias = npt.NDArray[np.float64]
Scores: TypeAlias = Callable[[ChannelGroups], list[FloatArray]]
Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]

_SHARES = (0.75, 0.5, 0.25)  # of a group's units, at which the loss is measured
_MINIBATCHES = 4  # that it is measured on: there are some hundred networks to try


def filter_l1(groups: ChannelGroups) -> list[FloatArray]:
    """L1 norms of the filters that make a channel (Li et al., Pruning Filters, ICLR 2017)."""
    tensors = dict(named_tensors(groups.traced.module))
    found = []
    for group in groups.groups:
        filters = [m for m in group.members if m.dim == 0 and tensors[m.name].ndim > 1]
        total = np.zeros(group.units)
        for member in filters or group.members:
            rows = tensors[member.name].detach().double().abs().movedim(member.dim, 0)
            sums = rows.reshape(rows.shape[0], -1).sum(1).cpu().numpy()
            total += sums[member.index].sum(axis=1)
        found.append(total)
    return found


def normalised(data: Iterable[Any], loss: Loss) -> Scores:
    """Scores by data relative to the mean of their group, so that all groups count alike."""

    def scores(groups: ChannelGroups) -> list[FloatArray]:
        raw = score(groups, data, loss).scores
        return [s / max(float(s.mean()), 1e-300) for s in raw]

    return scores


def measured(data: Sequence[Any], loss: Loss, shares: Sequence[float] = _SHARES) -> Scores:
    """Scores by data rank the units of a group; what they are worth together is measured.

    Each group in turn is cut to some shares of its units, the batch norms are recalibrated, and
    the rise of the loss is taken. Units between two shares divide the rise between them evenly;
    where the rise would be less steep further down, the steps are pooled, so that units which are
    ranked higher are never worth less.

    Args:
        data: minibatches to rank on; the loss is measured on the first four.
        loss: `loss(output, target)`.
        shares: of a group's units, falling, between 0 and 1.
    """

    def scores(groups: ChannelGroups) -> list[FloatArray]:
        ranking = score(groups, data, loss).scores
        few = data[:_MINIBATCHES]
        whole = [np.arange(n, dtype=np.int64) for n in groups.dense_units]
        dense = _loss_of(groups, whole, few, loss)
        alone = {branch.groups[0] for branch in groups.branches if len(branch.groups) == 1}
        found = []
        for g, (group, ranks) in enumerate(zip(groups.groups, ranking, strict=True)):
            order = np.argsort(ranks, kind="stable")  # the first go first
            least = 0 if g in alone else max(group.least, 1)
            wanted = {max(round(share * group.units), 1) for share in shares} | {least}
            counts = sorted({n for n in wanted if least <= n < group.units}, reverse=True)
            rises = []
            for kept in counts:
                units = list(whole)
                units[g] = np.sort(order[group.units - kept :]).astype(np.int64)
                rises.append(_loss_of(groups, units, few, loss) - dense)
            found.append(_spread(group.units, order, counts, rises, ranks))
        return found

    return scores


def _loss_of(
    groups: ChannelGroups, units: Sequence[IntArray], data: Sequence[Any], loss: Loss
) -> float:
    """Mean loss with these units, after batch norm recalibration on the same minibatches."""
    plan = Plan(
        kept=kept_indices(groups, units), units=tuple(units), dense_ms=0.0, predicted_ms=0.0,
        budget_ms=0.0, gap=0.0, value=0.0, dense_value=0.0, solver="", groups=groups,
    )  # fmt: skip
    network = rewrite(plan).eval()
    halp_fx.recalibrate(network, data)
    with torch.no_grad():
        return sum(float(loss(network(x), y)) for x, y in data) / len(data)


def _spread(
    units: int,
    order: npt.NDArray[Any],
    counts: Sequence[int],
    rises: Sequence[float],
    ranks: FloatArray,
) -> FloatArray:
    """Scores whose sum over the units that are gone is the measured rise, as near as can be."""
    edges = [0, *(units - n for n in counts), units]
    levels = [0.0, *rises]
    # Below the fewest that were tried: as steep again as just above.
    last = (levels[-1] - levels[-2]) / max(edges[-2] - edges[-3], 1) if counts else 0.0
    levels.append(levels[-1] + last * (edges[-1] - edges[-2]))
    widths = [b - a for a, b in itertools.pairwise(edges) if b > a]
    slopes = [
        (y1 - y0) / (b - a)
        for (a, b), (y0, y1) in zip(
            itertools.pairwise(edges), itertools.pairwise(levels), strict=True
        )
        if b > a
    ]
    rising = _pooled(slopes, widths)
    values = np.empty(units)
    values[order] = np.repeat(np.maximum(rising, 0.0), widths)
    # A little of the rank, so that no group is worth nothing and equal units keep their order.
    floor = 1e-3 * max(float(values.mean()), 1e-6)
    result: FloatArray = values + floor * ranks / max(float(ranks.max()), 1e-300)
    return result


def _pooled(values: Sequence[float], weights: Sequence[int]) -> list[float]:
    """The nearest sequence that never falls: neighbours that do are replaced by their mean."""
    blocks: list[tuple[float, int, int]] = []  # (mean, weight, length)
    for value, weight in zip(values, weights, strict=True):
        mean, total, length = float(value), weight, 1
        while blocks and blocks[-1][0] > mean:
            before, heavy, long = blocks.pop()
            mean = (before * heavy + mean * total) / (heavy + total)
            total, length = heavy + total, long + length
        blocks.append((mean, total, length))
    return [mean for mean, _, length in blocks for _ in range(length)]
