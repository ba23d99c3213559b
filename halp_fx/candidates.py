"""Several near-optimal plans, tried on data: additive saliency is only a model of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from halp_fx.errors import HalpError, InputError
from halp_fx.passes.rewrite import rewrite
from halp_fx.recalibrate import recalibrate
from halp_fx.types import ChannelGroups, LatencyModel, Plan, Saliency

__all__ = ["best_of"]

_BATCHES = 8  # minibatches to recalibrate and score on
_SPREAD = 0.3  # standard deviation of the logarithm by which a group's saliency is scaled

Choose = Callable[[ChannelGroups, Saliency, LatencyModel, float], Plan]


def best_of(
    count: int,
    plan: Plan,
    scores: Saliency,
    costs: LatencyModel,
    choose: Choose,
    data: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The plan with the least loss on data among `count`, after batch norm recalibration.

    The first is `plan`; the others weigh the groups' saliencies a little differently against each
    other, since that is what a sum of saliencies knows least about. Values, and the certified
    gap, are by the saliency as it was given.
    """
    batches = list(itertools.islice(data, _BATCHES))
    if not batches:
        raise InputError("data has no batches left to try candidates on: pass a list or a loader")
    bound = plan.value / max(1.0 - plan.gap, 1e-12)
    generator = np.random.default_rng(0)
    plans = [plan]
    for _ in range(count - 1):
        factors = np.exp(generator.normal(0.0, _SPREAD, len(scores.scores)))
        scaled = replace(
            scores, scores=tuple(s * f for s, f in zip(scores.scores, factors, strict=True))
        )
        try:
            other = choose(plan.groups, scaled, costs, plan.budget_ms)
        except HalpError:
            continue
        value = sum(
            float(s[kept].sum()) for s, kept in zip(scores.scores, other.units, strict=True)
        )
        gap = max(0.0, (bound - value) / max(bound, 1e-300))
        plans.append(replace(other, value=value, dense_value=plan.dense_value, gap=gap))
    losses = []
    for tried, candidate in enumerate(plans, start=1):
        losses.append(_loss_of(candidate, batches, loss))
        if progress is not None:
            progress(tried, len(plans))
    best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
    facts = {"candidate": best, "candidate_losses": [float(x) for x in losses]}
    return replace(plans[best], report={**plans[best].report, **facts})


def _loss_of(plan: Plan, batches: list[Any], loss: Callable[[Any, Any], torch.Tensor]) -> float:
    network = rewrite(plan).eval()
    recalibrate(network, batches)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    total = 0.0
    with torch.no_grad():
        for inputs, target in batches:
            given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
            moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in given]
            aim = target.to(device) if isinstance(target, torch.Tensor) else target
            total += float(loss(network(*moved), aim))
    return total / len(batches)
