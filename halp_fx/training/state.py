"""States to go on from: a run's checkpoint, and torch's random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from halp_fx.errors import InputError
from halp_fx.types import Plan

__all__ = ["check_state", "same_random_state", "same_widths"]


def check_state(state: Any, settings: Mapping[str, Any], groups: str) -> None:
    """Whether a checkpoint is one of a pruner with these settings and groups.

    Raises:
        InputError: it is not.
    """
    if not isinstance(state, Mapping) or state.get("version") != 1:
        raise InputError("state is not what GradualPruner.state_dict() gave")
    if state["groups"] != groups:
        raise InputError(
            "the state is of another network, or one with other include and exclude: its "
            f"groups are {state['groups'][:200]!r}, here {groups[:200]!r}"
        )
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise InputError(
                f"the state was saved with {name}={state['settings'].get(name)!r}, this pruner "
                f"has {name}={value!r}: build it with the same arguments to go on"
            )


def same_widths(
    plan: Plan, other: Plan, network: nn.Module, weights: Mapping[str, torch.Tensor]
) -> bool:
    """Whether weights of the other plan's network fit into the network of `plan` as it is."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    alike = all(np.array_equal(a, b) for a, b in zip(plan.units, other.units, strict=True))
    return alike and {name: tensor.shape for name, tensor in weights.items()} == shapes


@contextmanager
def same_random_state() -> Iterator[None]:
    """Give torch's generators back as they were: a milestone does not change what follows it."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if cuda else []
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices):
        yield
