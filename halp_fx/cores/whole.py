"""Saliency of a core from the loss of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from halp_fx.passes.saliency import score
from halp_fx.types import ChannelGroups, FloatArray

__all__ = ["scores_of_whole"]


def scores_of_whole(
    model: nn.Module,
    data: Iterable[Any],
    loss: Callable[[Any, Any], Any],
    method: str | None = None,
) -> Callable[[ChannelGroups], list[FloatArray]]:
    """A saliency for `halp_fx.compile`: scores by gradients, the core being run within `model`.

    Args:
        data: minibatches `(inputs, target)` of the whole model.
        loss: `loss(output, target)` of the whole model's output.
        method: "fisher", "taylor1.5" or "taylor", as for `halp_fx.passes.saliency.score`; None:
            the first.
    """

    method = method or "fisher"

    def scores(groups: ChannelGroups) -> list[FloatArray]:
        return list(score(groups, data, loss, method, within=model).scores)

    scores.__name__ = method  # for the report
    return scores
