"""The plan of a pruned network as data: one int64 tensor with all indices, and JSON."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from halp_fx.errors import RecipeError
from halp_fx.recipe.values import decode, encode
from halp_fx.types import ChannelGroups, Plan

__all__ = ["decode_plan", "encode_plan"]

_NUMBERS = ("dense_ms", "predicted_ms", "budget_ms", "gap", "value", "dense_value")


class _Indices:
    """Index arrays end to end, each found again by its start and length."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.length = 0

    def add(self, index: torch.Tensor) -> list[int]:
        start, self.length = self.length, self.length + index.numel()
        self.parts.append(index.detach().to("cpu", torch.int64).reshape(-1))
        return [start, index.numel()]

    def joined(self) -> torch.Tensor:
        return torch.cat([torch.empty(0, dtype=torch.int64), *self.parts])


def encode_plan(plan: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the plan as what `json.dumps` takes, and its indices in one (n,) int64 tensor.

    `plan.groups` is left out: it holds the dense network. What in `plan.report` isn't data is
    kept as its text.

    Raises:
        RecipeError: it isn't a plan.
    """
    if not isinstance(plan, Plan):
        raise RecipeError(
            f"meta['halp_fx'] is a {type(plan).__qualname__}, not a halp_fx.types.Plan; remove "
            "that key to save the network without a plan"
        )
    indices = _Indices()
    data: dict[str, Any] = {
        "kept": [
            [name, [None if index is None else indices.add(index) for index in dims]]
            for name, dims in plan.kept.items()
        ],
        "units": [indices.add(torch.from_numpy(np.asarray(units))) for units in plan.units],
        "solver": plan.solver,
        "report": encode(dict(plan.report), "plan.report", text=True),
    }
    for name in _NUMBERS:
        data[name] = encode(float(getattr(plan, name)), f"plan.{name}")
    return data, indices.joined()


def decode_plan(data: Any, indices: torch.Tensor) -> Plan:
    """Return the plan that `encode_plan` was given, with `groups=None`."""

    def part(place: Any) -> torch.Tensor:
        start, length = place
        if not 0 <= start <= start + length <= indices.numel():
            raise RecipeError("the plan's indices are damaged; save the network again")
        return indices[start : start + length].clone()

    return Plan(
        kept={
            name: tuple(None if place is None else part(place) for place in dims)
            for name, dims in data["kept"]
        },
        units=tuple(part(place).numpy() for place in data["units"]),
        solver=str(data["solver"]),
        # The groups describe the dense network, which the file doesn't hold.
        groups=cast(ChannelGroups, None),
        report=decode(data["report"], "plan.report"),
        **{name: float(decode(data[name], f"plan.{name}")) for name in _NUMBERS},
    )
