"""Pruned networks for tests: within a budget, or by the units that are to stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx, nn

from halp_fx.errors import InfeasibleError
from halp_fx.passes.rules.plan import kept_indices
from halp_fx.types import ChannelGroups, Plan

__all__ = ["compile_within", "plan_by_hand"]


def plan_by_hand(groups: ChannelGroups, units: Sequence[Any]) -> Plan:
    """A plan that keeps these units of each group; its latencies and values mean nothing."""
    kept = tuple(np.array(found, dtype=np.int64) for found in units)
    return Plan(
        kept=kept_indices(groups, kept),
        units=kept,
        dense_ms=1.0,
        predicted_ms=0.5,
        budget_ms=0.5,
        gap=0.0,
        value=1.0,
        dense_value=2.0,
        solver="by hand",
        groups=groups,
    )


def compile_within(
    model: nn.Module, budget: float, inputs: Sequence[Any], **options: Any
) -> fx.GraphModule:
    """`halp_fx.compile` with the analytic latency; a budget below the least becomes the least.

    Args:
        model: the dense network.
        budget: share of the dense latency.
        inputs: positional inputs of `model`.
        options: further ones of `halp_fx.compile`.
    """
    import halp_fx

    try:
        return halp_fx.compile(model, budget, tuple(inputs), latency="analytic", **options)
    except InfeasibleError as error:
        least_ms = error.least
    return halp_fx.compile(
        model, f"{least_ms * 1.02:.12f}ms", tuple(inputs), latency="analytic", **options
    )
