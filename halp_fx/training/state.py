"""States of a run to go on from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from halp_fx.errors import InputError
from halp_fx.latency.device import differences
from halp_fx.types import Plan

__all__ = ["check_state", "one_or_all", "same_widths"]

_REPEATED = 0.1  # how much two measurements of a network may differ


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
    saved = state["settings"]
    for name, value in settings.items():
        if name in saved and not _alike(name, saved[name], value):  # older states lack some
            raise InputError(_difference(name, saved[name], value))


def one_or_all(values: Sequence[Any]) -> Any:
    """What all groups have, or what each of them has."""
    return values[0] if all(value == values[0] for value in values) else list(values)


def _alike(name: str, saved: Any, value: Any) -> bool:
    if name == "schedule" and saved == "own":  # how older states have a callable
        return isinstance(value, list)
    if name == "dense_ms":
        return math.isclose(saved, value, rel_tol=_REPEATED)
    return bool(saved == value)


def _difference(name: str, saved: Any, value: Any) -> str:
    again = "build it with the same arguments to go on"
    if name == "latency":
        return (
            f"the state was saved with latencies of another device or other settings "
            f"({'; '.join(differences(saved, value))}): {again}, on another device with the "
            "latency table of that one as latency="
        )
    if name == "dense_ms":
        return (
            f"the dense network takes {value:.4g} ms here, and took {saved:.4g} ms where the state "
            "was saved: pass the same example_inputs and latency to go on"
        )
    if isinstance(saved, list) and isinstance(value, list) and len(saved) == len(value):
        k = next(i for i, (one, other) in enumerate(zip(saved, value, strict=True)) if one != other)
        what = "milestone" if name == "schedule" else "group"
        return (
            f"the state was saved with {name} {saved[k]!r} for {what} {k + 1} of {len(saved)}, "
            f"this pruner has {value[k]!r}: {again}"
        )
    return f"the state was saved with {name}={saved!r}, this pruner has {name}={value!r}: {again}"


def same_widths(
    plan: Plan, other: Plan, network: nn.Module, weights: Mapping[str, torch.Tensor]
) -> bool:
    """Whether weights of the other plan's network fit into the network of `plan` as it is."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    alike = all(np.array_equal(a, b) for a, b in zip(plan.units, other.units, strict=True))
    return alike and {name: tensor.shape for name, tensor in weights.items()} == shapes
