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
) -> tuple[Plan, Saliency]:
    """The plan with the least loss on data among `count`, after batch norm recalibration.

    How much a group counts against another is what a sum of saliencies knows least about. The
    first is `plan`; the next are by the other powers of the first-order change, where scores are
    by data; the rest weigh the groups' saliencies a little differently against each other.

    Returns:
        The plan, and the saliency that it was chosen by, which its value and gap are of.
    """
    batches = list(itertools.islice(data, _BATCHES))
    if not batches:
        raise InputError("data has no batches left to try candidates on: pass a list or a loader")
    generator = np.random.default_rng(0)
    varied = [
        replace(scores, scores=other, method=method) for method, other in scores.others.items()
    ]
    while len(varied) < count - 1:
        factors = np.exp(generator.normal(0.0, _SPREAD, len(scores.scores)))
        scaled = tuple(s * f for s, f in zip(scores.scores, factors, strict=True))
        varied.append(replace(scores, scores=scaled))
    tried = [(plan, scores)]
    for variant in varied[: count - 1]:
        try:
            tried.append((choose(plan.groups, variant, costs, plan.budget_ms), variant))
        except HalpError:
            continue
    losses = []
    for done, (candidate, _) in enumerate(tried, start=1):
        losses.append(_loss_of(candidate, batches, loss))
        if progress is not None:
            progress(done, len(tried))
    best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
    facts = {"candidate": best, "candidate_losses": [float(x) for x in losses]}
    chosen, by = tried[best]
    return replace(chosen, report={**chosen.report, **facts}), by


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
