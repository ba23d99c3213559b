"""Several near-optimal plans, tried on data: additive saliency is only a model of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from halp_fx.errors import HalpError, InputError
from halp_fx.passes.rewrite import rewrite
from halp_fx.recalibrate import recalibrate
from halp_fx.types import LatencyModel, Plan, Saliency

__all__ = ["Best", "best_of"]

_BATCHES = 8  # minibatches to recalibrate and score on
_SPREAD = 0.3  # standard deviation of the logarithm by which a group's saliency is scaled

# Chooses, and makes the costs exact at the widths that were chosen.
Choose = Callable[[Saliency, LatencyModel], tuple[LatencyModel, Plan]]


@dataclass(frozen=True)
class Best:
    """The candidate that was kept."""

    plan: Plan
    scores: Saliency  # it was chosen by; its value and gap are of these
    costs: LatencyModel  # exact at the widths of all candidates
    facts: Mapping[str, Any]  # for the report


def best_of(
    count: int,
    plan: Plan,
    scores: Saliency,
    costs: LatencyModel,
    choose: Choose,
    data: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> Best:
    """The plan with the least loss on data among `count`, after batch norm recalibration.

    How much a group counts against another is what a sum of saliencies knows least about. The
    first is `plan`; the next are by the other powers of the first-order change, where scores are
    by data; the rest weigh the groups' saliencies a little differently against each other.

    Raises:
        InputError: there are no batches to try them on.
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
        varied.append(replace(scores, scores=scaled, method=f"{scores.method}, groups perturbed"))
    tried = [(plan, scores)]
    for variant in varied[: count - 1]:
        try:
            costs, other_plan = choose(variant, costs)
        except HalpError:
            continue
        tried.append((other_plan, variant))
    losses = []
    for done, (candidate, _) in enumerate(tried, start=1):
        losses.append(_loss_of(candidate, batches, loss))
        if progress is not None:
            progress(done, len(tried))
    best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
    chosen, by = tried[best]
    facts = {"candidate": best, "candidate_losses": [float(x) for x in losses]}
    return Best(chosen, by, costs, facts)


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
