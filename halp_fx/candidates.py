"""Several near-optimal plans, tried on data: additive saliency is only a model of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from halp_fx.errors import HalpError, InputError
from halp_fx.minibatches import float_tensors, inputs_of
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.rules.structure import named_tensors, substitute_copy
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
    loss: Callable[[Any, Any], torch.Tensor] | None,
    progress: Callable[[int, int], None] | None = None,
) -> Best:
    """The plan with the least loss on data among `count`, after batch norm recalibration.

    Without a loss, that whose outputs are nearest to the dense network's: the squared difference
    relative to the squared outputs, the mean over all outputs.

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
    aims = [_target(plan.groups.traced.module, batch) for batch in batches]
    if loss is None:
        module = plan.groups.traced.module
        # Shares the tensors, not the modes.
        dense = substitute_copy(module, {id(t): t for _, t in named_tensors(module)}).eval()
        aims, loss = [_output(dense, batch) for batch in batches], _difference
    losses = []
    for done, (candidate, _) in enumerate(tried, start=1):
        losses.append(_loss_of(candidate, batches, aims, loss))
        if progress is not None:
            progress(done, len(tried))
    best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
    chosen, by = tried[best]
    facts = {"candidate": best, "candidate_losses": [float(x) for x in losses]}
    return Best(chosen, by, costs, facts)


def _loss_of(
    plan: Plan,
    batches: Sequence[Any],
    aims: Sequence[Any],
    loss: Callable[[Any, Any], torch.Tensor],
) -> float:
    network = rewrite(plan).eval()
    recalibrate(network, batches)
    total = 0.0
    for batch, aim in zip(batches, aims, strict=True):
        with torch.no_grad():
            total += float(loss(_output(network, batch), aim))
    return total / len(batches)


def _output(network: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return network(*inputs_of(batch, _device_of(network)))


def _target(network: nn.Module, batch: Any) -> Any:
    given = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return given.to(_device_of(network)) if isinstance(given, torch.Tensor) else given


def _device_of(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _difference(output: Any, dense: Any) -> torch.Tensor:
    """Squared difference of the outputs relative to the dense one's squares, mean over outputs."""
    pairs = zip(float_tensors(output), float_tensors(dense), strict=True)
    parts = [
        (own.double() - other.double()).square().sum().cpu()
        / other.double().square().sum().cpu().clamp_min(1e-300)
        for own, other in pairs
    ]
    return torch.stack(parts).mean() if parts else torch.zeros(())
