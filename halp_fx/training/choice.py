"""Which units go at a milestone: the knapsack over those that are left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halp_fx.budget import Budget
from halp_fx.latency import Source
from halp_fx.passes.rules.limits import dense_counts
from halp_fx.passes.rules.plan import kept_indices
from halp_fx.passes.rules.widths import GroupWidths, Widths
from halp_fx.passes.select import select
from halp_fx.training.schedule import Schedule, limit_at
from halp_fx.types import ChannelGroups, IntArray, LatencyModel, Plan, Saliency
from halp_fx.verification import Check, can_measure, verified

__all__ = ["Chooser", "plan_from_text", "plan_to_text"]

_NUMBERS = ("dense_ms", "predicted_ms", "budget_ms", "gap", "value", "dense_value")


@dataclass(frozen=True)
class _Resolved(Widths):
    """Widths that were settled for each group before."""

    own: tuple[GroupWidths, ...] = ()

    def resolve(self, groups: ChannelGroups) -> tuple[GroupWidths, ...]:  # noqa: ARG002
        return self.own


@dataclass(frozen=True)
class Chooser:
    """Chooses the units to keep at each milestone, by one latency model of the dense network."""

    groups: ChannelGroups  # of the dense network
    costs: LatencyModel
    source: Source
    budget: Budget
    schedule: Schedule
    steps: int
    widths: tuple[GroupWidths, ...]  # what each group may keep, by its dense width
    solver: str
    drop_blocks: bool
    verify: bool

    def check(self) -> None:
        """Whether the final budget can be met at all, whatever the scores will be.

        That a milestone leaves units with which it can still be met is not sure where a narrower
        kernel takes longer than a wider one.

        Raises:
            InfeasibleError: it can't; better told now than after the training.
        """
        dense = tuple(np.arange(n, dtype=np.int64) for n in self.groups.dense_units)
        alike = Saliency(tuple(np.ones(len(units)) for units in dense), "alike", True)
        self._within(self.steps, dense, alike, self._target_ms(self.steps))

    def choose(self, milestone: int, alive: Sequence[IntArray], saliency: Saliency) -> Plan:
        """The plan for a milestone: units of the dense network, a part of those `alive`.

        Args:
            alive: the units of each group to choose from.
            saliency: their scores.

        Raises:
            InfeasibleError: they can't be brought within the limits of the milestone.
        """
        plan = self._within(milestone, alive, saliency, self._target_ms(milestone))
        if milestone < self.steps or not self.verify or not can_measure(self.source):
            return plan
        network = verified(
            plan,
            [Check(self.source, self.budget, plan.budget_ms)],
            lambda asked_ms: self._within(milestone, alive, saliency, asked_ms[0]),
            lambda done, total: None,
        )
        found: Plan = network.meta["halp_fx"]
        return found

    def keep(self, milestone: int, plan: Plan) -> Plan:
        """The plan for a milestone at which all is gone that can go: the one before."""
        report = {**plan.report, "milestone": milestone}
        return replace(plan, budget_ms=self._target_ms(milestone), report=report)

    def _target_ms(self, milestone: int) -> float:
        dense = self.costs.dense_ms
        return limit_at(
            self.schedule, milestone, self.steps, dense=dense, target=self.budget.in_ms(dense)
        )

    def _within(
        self, milestone: int, alive: Sequence[IntArray], saliency: Saliency, budget_ms: float
    ) -> Plan:
        limits = {
            name: limit_at(self.schedule, milestone, self.steps, dense=dense, target=target)
            for name, dense, target in self._further()
        }
        plan = select(
            self.groups, _of_all(self.groups, alive, saliency), self.costs, budget_ms,
            solver=self.solver, limits=limits, drop_blocks=self.drop_blocks,
            allowed=_Resolved(own=self.widths), among=alive,
        )  # fmt: skip
        report = {
            **plan.report,
            "model": self.groups.traced.model_name,
            "saliency": saliency.method,
            "data_free": saliency.data_free,
            "backend": self.costs.backend,
            "device": self.costs.device,
            "milestone": milestone,
            "milestones": self.steps,
        }
        return replace(plan, report=report)

    def _further(self) -> list[tuple[str, float, float]]:
        """(name, dense count, limit) of what is limited besides the latency."""
        if not self.budget.further:
            return []
        counts = dense_counts(self.groups)
        limits = self.budget.counts(*counts.values())
        return [(name, counts[name], limit) for name, limit in limits.items()]


def _of_all(groups: ChannelGroups, alive: Sequence[IntArray], saliency: Saliency) -> Saliency:
    """Scores of the units alive as scores of all units."""
    scores = tuple(np.zeros(n) for n in groups.dense_units)
    for full, own, score in zip(scores, alive, saliency.scores, strict=True):
        full[own] = score
    return replace(saliency, scores=scores)


def plan_to_text(plan: Plan) -> str:
    """A plan as JSON, without its groups."""
    data: dict[str, Any] = {name: float(getattr(plan, name)) for name in _NUMBERS}
    data["units"] = [u.tolist() for u in plan.units]
    data["solver"] = plan.solver
    data["report"] = dict(plan.report)
    return json.dumps(data, default=float)


def plan_from_text(text: str, groups: ChannelGroups) -> Plan:
    """The plan that `plan_to_text` was given, of these groups."""
    data = json.loads(text)
    units = tuple(np.array(u, dtype=np.int64) for u in data["units"])
    return Plan(
        kept=kept_indices(groups, units),
        units=units,
        solver=str(data["solver"]),
        groups=groups,
        report=data["report"],
        **{name: float(data[name]) for name in _NUMBERS},
    )
