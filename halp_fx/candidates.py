"""Several near-optimal plans, tried on data: additive saliency is only a model of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from halp_fx.errors import HalpError, InputError
from halp_fx.minibatches import device_of, float_tensors, inputs_of, target_of
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.rules.structure import named_tensors, substitute_copy
from halp_fx.recalibrate import recalibrate
from halp_fx.reconstruction import refit
from halp_fx.types import IntArray, LatencyModel, Plan, Saliency

__all__ = ["Best", "Draft", "Evaluate", "Maker", "best_of", "variants"]

_BATCHES = 8  # minibatches to recalibrate and score on
_SPREAD = 0.3  # standard deviation of the logarithm by which a group's saliency is scaled

Evaluate = Callable[[fx.GraphModule], float]  # of a pruned network: the higher the better


@dataclass(frozen=True)
class Draft:
    """A plan that may be the result, and what it takes to choose again."""

    plan: Plan
    scores: Saliency  # it was chosen by; its value and gap are of these
    among: Sequence[IntArray] | None = None  # the units that steps before left; None: all
    steps: int = 1


# Makes a draft, and measures the costs at the widths that were chosen.
Maker = Callable[[LatencyModel], tuple[LatencyModel, Draft]]


@dataclass(frozen=True)
class Best:
    """The candidate that was kept."""

    draft: Draft
    costs: LatencyModel  # measured near the widths of all candidates
    facts: Mapping[str, Any]  # for the report


def best_of(
    first: Draft,
    makers: Iterable[Maker],
    costs: LatencyModel,
    data: Iterable[Any] | None,
    loss: Callable[[Any, Any], torch.Tensor] | None,
    progress: Callable[[int, int], None] | None = None,
    evaluate: Evaluate | None = None,
    *,
    reconstruct: bool = False,
) -> Best:
    """The draft with the least loss on data, after batch norm recalibration or reconstruction.

    Without a loss, that whose outputs are nearest to the dense network's: the squared difference
    relative to the squared outputs, the mean over all outputs. With `evaluate`, that whose network
    it gives the highest value.

    Raises:
        InputError: there are no batches to try them on, or `evaluate` gives no number.
    """
    batches = list(itertools.islice(data, _BATCHES)) if data is not None else []
    if not batches and evaluate is None:
        raise InputError("data has no batches left to try candidates on: pass a list or a loader")
    drafts = [first]
    for make in makers:
        try:
            costs, draft = make(costs)
        except HalpError:
            continue
        drafts.append(draft)
    value = _by_loss(first.plan, batches, loss) if evaluate is None else _by_user(evaluate)
    values: list[float] = []
    known: dict[tuple[bytes, ...], float] = {}  # several drafts may have one plan
    for done, draft in enumerate(drafts, start=1):
        key = tuple(units.tobytes() for units in draft.plan.units)
        if key not in known:
            network = rewrite(draft.plan)
            if reconstruct:
                refit(network, draft.plan.groups.traced.module, draft.plan.kept, batches)
            elif batches:
                recalibrate(network, batches)
            known[key] = value(network)
        values.append(known[key])
        if progress is not None:
            progress(done, len(drafts))
    best = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
    facts: dict[str, Any] = {"candidate": best}
    if evaluate is None:
        facts["candidate_losses"] = [-v for v in values]
    else:
        facts["candidate_values"] = values
    return Best(drafts[best], costs, facts)


def variants(scores: Saliency, count: int) -> list[Saliency]:
    """Other scores to choose by, so many.

    How much a group counts against another is what a sum of saliencies knows least about. First
    come `scores.others`; the rest weigh the groups a little differently against each other.
    """
    generator = np.random.default_rng(0)
    found = [
        replace(scores, scores=other, method=method) for method, other in scores.others.items()
    ]
    while len(found) < count:
        factors = np.exp(generator.normal(0.0, _SPREAD, len(scores.scores)))
        scaled = tuple(s * f for s, f in zip(scores.scores, factors, strict=True))
        found.append(replace(scores, scores=scaled, method=f"{scores.method}, groups perturbed"))
    return found[:count]


def _by_user(evaluate: Evaluate) -> Evaluate:
    def value(network: fx.GraphModule) -> float:
        with torch.enable_grad():
            given: Any = evaluate(network)
        try:
            return float(given)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"evaluate gave {type(given).__name__}: return a number, the higher the better"
            ) from error

    return value


def _by_loss(
    plan: Plan, batches: Sequence[Any], loss: Callable[[Any, Any], torch.Tensor] | None
) -> Evaluate:
    """Minus the loss on data."""
    module = plan.groups.traced.module
    aims, measure = [target_of(batch, device_of(module)) for batch in batches], loss
    if measure is None:
        # Shares the tensors, not the modes.
        dense = substitute_copy(module, {id(t): t for _, t in named_tensors(module)}).eval()
        aims, measure = [_output(dense, batch) for batch in batches], _difference

    @torch.no_grad()
    def value(network: fx.GraphModule) -> float:
        network.eval()
        total = 0.0
        for batch, aim in zip(batches, aims, strict=True):
            total += float(measure(_output(network, batch), aim))
        return -total / len(batches)

    return value


def _output(network: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return network(*inputs_of(batch, device_of(network)))


def _difference(output: Any, dense: Any) -> torch.Tensor:
    """Squared difference of the outputs relative to the dense one's squares, mean over outputs."""
    pairs = zip(float_tensors(output), float_tensors(dense), strict=True)
    parts = [
        (own.double() - other.double()).square().sum().cpu()
        / other.double().square().sum().cpu().clamp_min(1e-300)
        for own, other in pairs
    ]
    return torch.stack(parts).mean() if parts else torch.zeros(())
