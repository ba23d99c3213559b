"""The dense network that a gradually shrinking one is cut from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from halp_fx.errors import NothingToPruneError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.rules.plan import alive_labels, kept_indices
from halp_fx.passes.rules.scope import Selection, scope_of
from halp_fx.passes.rules.structure import named_tensors, substitute_copy
from halp_fx.passes.trace import trace
from halp_fx.training.surgery import Cuts, Positions, cuts_between, fill, synchronise_like
from halp_fx.types import ChannelGroups, Plan

__all__ = ["Dense"]

_CONSTANTS = "_constants."


@dataclass(frozen=True)
class Dense:
    """A private copy of the model with its channel groups; the reference for every choice.

    Its tensors take the present weights in before each rewrite. Only their surviving slices are
    read, and the constants that dropped branches leave are computed from them.
    """

    groups: ChannelGroups

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example_inputs: Any,
        *,
        include: Selection | None,
        exclude: Selection | None,
        exact: bool,
    ) -> Dense:
        """Trace a copy of the model and find its groups.

        Raises:
            NothingToPruneError: there are none.
        """
        traced = trace(substitute_copy(model, {}), example_inputs)
        scope = scope_of(traced.root, include, exclude)
        groups = find_groups(traced, exact=exact, scope=scope)
        if not groups.groups:
            reasons = sorted({f"{pin.name}: {pin.reason}" for pin in groups.pins})[:10]
            raise NothingToPruneError(
                "\n  ".join([f"{traced.model_name} has no channel that can be removed:", *reasons])
            )
        return cls(groups)

    def whole(self) -> Plan:
        """The plan that keeps everything."""
        units = tuple(np.arange(n, dtype=np.int64) for n in self.groups.dense_units)
        return Plan(
            kept=kept_indices(self.groups, units), units=units, dense_ms=0.0, predicted_ms=0.0,
            budget_ms=0.0, gap=0.0, value=0.0, dense_value=0.0, solver="", groups=self.groups,
        )  # fmt: skip

    def build(self, plan: Plan) -> fx.GraphModule:
        """The network of a plan, cut from the dense tensors as they are."""
        network = rewrite(plan)
        network.meta["halp_fx"] = self.without_network(network.meta["halp_fx"])
        return network

    def without_network(self, plan: Plan) -> Plan:
        """The plan as a network carries it, which should not keep the dense one alive."""
        return replace(plan, groups=self.groups.without_network())

    @staticmethod
    def with_sizes(plan: Plan, network: fx.GraphModule) -> Plan:
        """The plan with how much the network that it is of holds, in its report."""
        sizes = network.meta["halp_fx"].report.get("state_size")
        return replace(plan, report={**plan.report, "state_size": sizes})

    def shrink(self, present: fx.GraphModule, before: Plan, after: Plan) -> fx.GraphModule:
        """The network of the plan `after` with the values of the present one, of `before`."""
        self._take_in(present, before)
        fresh = self.build(after)
        fill(fresh, present, self.cuts(present, before, after))
        synchronise_like(fresh, present)
        return fresh

    def cuts(self, present: fx.GraphModule, before: Plan, after: Plan) -> Cuts:
        """What to take of each tensor of the present network."""
        return cuts_between(self._positions(before, present), self._positions(after, present))

    def _take_in(self, present: fx.GraphModule, plan: Plan) -> None:
        """Copy the tensors of a network to where they come from in the dense one."""
        current = dict(named_tensors(present))
        with torch.no_grad():
            for name, dense in named_tensors(self.groups.traced.root):
                own = current.get(name)
                if own is None:
                    continue
                if all(kept is None for kept in plan.kept[name]):
                    dense.copy_(own)
                    continue
                index = [
                    (torch.arange(size) if kept is None else kept)
                    .to(dense.device)
                    .view([-1 if d == dim else 1 for d in range(dense.ndim)])
                    for dim, (kept, size) in enumerate(
                        zip(plan.kept[name], dense.shape, strict=True)
                    )
                ]
                dense[tuple(index)] = own.to(dense)

    def _positions(self, plan: Plan, network: fx.GraphModule) -> Positions:
        """`plan.kept`, and the same for the constants that dropped branches left in a network."""
        found = dict(plan.kept)
        alive = alive_labels(self.groups, plan.units)
        for name, constant in network.named_buffers():
            if name.startswith(_CONSTANTS):
                labels = self.groups.labelled.snapshots[name.removeprefix(_CONSTANTS)].labels
                found[name] = tuple(
                    torch.from_numpy(np.flatnonzero(alive[labels[dim]]))
                    if dim in labels and size > 1
                    else None
                    for dim, size in enumerate(constant.shape)
                )
        return found
