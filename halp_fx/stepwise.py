"""Pruning in several steps: what is left is scored anew on data, and chosen from again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from halp_fx.errors import InputError
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.saliency import BY_DATA, score_survivors
from halp_fx.recalibrate import recalibrate
from halp_fx.types import ChannelGroups, IntArray, LatencyModel, Plan, Saliency

__all__ = ["ChooseAmong", "check_steps", "narrowed", "target_at"]

_SCORED = 64  # minibatches at most that a step is scored on
_RECALIBRATED = 32  # and that batch norms are recalibrated on before


class ChooseAmong(Protocol):
    """Chooses the units to keep of those that are left."""

    def __call__(
        self, scores: Saliency, budget_ms: float, done: float, among: Sequence[IntArray] | None
    ) -> Plan:
        """`done` is the share of the steps that are done with this one, 1 for the last."""
        ...


def check_steps(steps: int, data: Any, saliency: Any) -> None:
    """Whether a network can be pruned in so many steps.

    Raises:
        InputError: it is no whole number from 1, or there is nothing to score anew by.
    """
    own = saliency is not None and saliency not in BY_DATA
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps!r}: pass a whole number of at least 1")
    if steps > 1 and (own or data is None):
        raise InputError(
            f"steps={steps}: between steps channels are scored anew by gradients; pass data and "
            "leave saliency out, or steps=1"
        )
    if steps > 1 and isinstance(data, Iterator):
        raise InputError(
            f"steps={steps}: the data are an iterator that is used up after one look; pass a list "
            "or a loader, or steps=1"
        )


def target_at(dense: float, target: float, done: float) -> float:
    """A limit on the way from the dense network to the target: `dense * (target / dense) ** done`.

    The exponential schedule of HALP (NeurIPS 2022).
    """
    return float(dense * (target / dense) ** done) if target < dense else target


def narrowed(
    steps: int,
    groups: ChannelGroups,
    scores: Saliency,
    costs: LatencyModel,
    budget_ms: float,
    choose: ChooseAmong,
    data: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor] | None,
    tell: Callable[[int, int], None],
) -> tuple[tuple[IntArray, ...], Saliency]:
    """All steps but the last.

    After each, batch norms are recalibrated and the survivors scored anew, in a copy of the pruned
    network that is thrown away: additive scores of the dense network say little about what
    matters once half of it is gone.

    Args:
        steps: at least 2.
        scores: of the dense network.
        choose: see `ChooseAmong`.

    Returns:
        The units left to choose from in the last step, and the scores of all units, 0 for those
        that are gone.

    Raises:
        InfeasibleError: a step's budget can't be met.
    """
    among: tuple[IntArray, ...] = tuple(np.arange(n, dtype=np.int64) for n in groups.dense_units)
    for step in range(1, steps):
        done = step / steps
        plan = choose(scores, target_at(costs.dense_ms, budget_ms, done), done, among)
        among = plan.units
        if not any(len(units) for units in among):
            break  # nothing is left to choose from
        network = rewrite(plan).eval()
        recalibrate(network, data, _RECALIBRATED)
        few = itertools.islice(data, _SCORED)
        scores = score_survivors(network, plan, few, loss, scores.method)
        tell(step, steps - 1)
    return among, scores
