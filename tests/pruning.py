"""Compiles a network within a budget, or within the least one where that can't be met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from halp_fx.errors import InfeasibleError

__all__ = ["compile_within"]


def compile_within(model: nn.Module, budget: float, inputs: Sequence[Any]) -> fx.GraphModule:
    """`halp_fx.compile` with the analytic latency; a budget below the least becomes the least.

    Args:
        model: the dense network.
        budget: share of the dense latency.
        inputs: positional inputs of `model`.
    """
    import halp_fx

    try:
        return halp_fx.compile(model, budget, tuple(inputs), latency="analytic")
    except InfeasibleError as error:
        least_ms = error.least
    return halp_fx.compile(model, f"{least_ms * 1.02:.12f}ms", tuple(inputs), latency="analytic")
