"""The finished network is measured, and chosen again while it misses a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from halp_fx.budget import Budget
from halp_fx.errors import HalpError
from halp_fx.latency import Source, Stored, Timing, measure_paired
from halp_fx.passes.rewrite import rewrite
from halp_fx.types import Plan, Traced

__all__ = ["TOLERANCE", "Check", "can_measure", "verified"]

_CHOICES = 4  # how often a network is measured; after all but the last it is chosen again
_BOUTS = 2  # each network prepared first once
_NEAR = 0.04  # as a share of the budget: so near to it, another measurement says on which side
_BOUTS_NEAR = 6
_ROUNDS = 5  # samples of each network in a bout
_ROUNDS_OF_TIMES = 16  # the same for a budget in milliseconds: what slows all does not cancel
_BELOW = 0.995  # of the budget, that is aimed at once it was missed: timers repeat no better
# By how much a latency may pass the budget at last and count as met.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Check:
    """A latency that a network is held to."""

    source: Source
    budget: Budget
    target_ms: float  # the budget by the table


def can_measure(source: Source) -> bool:
    """Whether networks can be measured by it here and now."""
    return source.backend.measured and not isinstance(source.backend, Stored)


def verified(
    plan: Plan,
    checks: Sequence[Check],
    choose: Callable[[Sequence[float]], Plan],
    tell: Callable[[int, int], None],
) -> fx.GraphModule:
    """Measure dense and pruned network in turn; while the pruned one is too slow, ask for less.

    What can't be measured here counts as met.

    Args:
        plan: chosen for the targets of the checks.
        checks: the first is the budget's own, the others those of further latencies, in the order
            of `plan.report["also"]`.
        choose: milliseconds by the table, one a check -> the plan within them.

    Returns:
        The rewritten network. The report in its plan has "measured_ms" and what goes with it, of
        further latencies in the entries of "also". Where none meets its budgets it is the one
        that comes nearest.
    """
    traced = plan.groups.traced
    target_ms = plan.budget_ms
    asked_ms = [check.target_ms for check in checks]
    bound = plan.value / max(1.0 - plan.gap, 1e-12)  # proven for the budgets asked for at first
    best: tuple[float, fx.GraphModule] | None = None
    for attempt in range(1, _CHOICES + 1):
        pruned = rewrite(plan)
        excess = 0.0  # the largest of the latencies, as a share of what is allowed
        for i, check in enumerate(checks):
            if not can_measure(check.source):
                continue
            dense, small = _measured(check, traced, pruned)
            allowed_ms = check.budget.in_ms(dense.median_ms)
            facts = {
                "measured_dense_ms": dense.median_ms,
                "measured_ms": small.median_ms,
                "measured_spread_ms": small.spread_ms,
                "measured_budget_ms": allowed_ms,
                "measured_rounds": attempt,
                "met": small.median_ms <= allowed_ms * (1 + TOLERANCE),
            }
            plan = _noted(plan, i, facts)
            excess = max(excess, small.median_ms / allowed_ms)
            if small.median_ms > allowed_ms:
                over_ms = small.median_ms - _BELOW * allowed_ms
                asked_ms[i] = _less(asked_ms[i], _priced(plan, i), dense.median_ms, over_ms)
        noted = pruned.meta["halp_fx"].report
        pruned.meta["halp_fx"] = replace(plan, report={**noted, **plan.report})
        if best is None or excess < best[0] or excess <= 1:
            best = excess, pruned
        tell(attempt, _CHOICES)
        if excess <= 1 or attempt == _CHOICES:
            break
        try:
            tighter = choose(asked_ms)
        except HalpError:
            break  # nothing faster is left; the report says that the budget is missed
        gap = max(0.0, (bound - tighter.value) / max(bound, 1e-300))
        plan = replace(tighter, budget_ms=target_ms, gap=gap)
        for i, check in enumerate(checks[1:], 1):
            plan = _noted(plan, i, {"budget_ms": check.target_ms})
    assert best is not None
    return best[1]


def _measured(check: Check, traced: Traced, pruned: fx.GraphModule) -> tuple[Timing, Timing]:
    """Dense and pruned network, in turn.

    Near the budget they are measured once more with greater care, and that alone counts: of
    several networks near it, the first that happens to be measured below would be taken, which is
    often one above.
    """
    backend, inputs = check.source.backend, traced.example_inputs

    def paired(bouts: int) -> tuple[Timing, Timing]:
        return measure_paired(
            traced.module, pruned, backend, inputs, inputs,
            rounds=_ROUNDS if check.budget.latency_ms is None else _ROUNDS_OF_TIMES,
            bouts=bouts,
        )  # fmt: skip

    dense, small = paired(_BOUTS)
    off = small.median_ms / check.budget.in_ms(dense.median_ms) - 1
    if abs(off) > _NEAR or getattr(backend, "coarse", False):
        return dense, small
    return paired(_BOUTS_NEAR)


def _less(asked_ms: float, priced: tuple[float, float], dense_ms: float, over_ms: float) -> float:
    """What to ask for next: what was got by the table, less what it was too slow by.

    That is right for a constant that the table lacks, and for one that it is wrong by in all.
    """
    table_dense_ms, predicted_ms = priced
    wanted = predicted_ms - over_ms * table_dense_ms / dense_ms
    return min(max(wanted, 0.5 * asked_ms), 0.98 * asked_ms)


def _priced(plan: Plan, check: int) -> tuple[float, float]:
    """Dense and pruned network by the table of a check."""
    if check == 0:
        return plan.dense_ms, plan.predicted_ms
    entry = plan.report["also"][check - 1]
    return entry["dense_ms"], entry["predicted_ms"]


def _noted(plan: Plan, check: int, facts: dict[str, Any]) -> Plan:
    if check == 0:
        return replace(plan, report={**plan.report, **facts})
    also = [dict(entry) for entry in plan.report["also"]]
    also[check - 1] |= facts
    return replace(plan, report={**plan.report, "also": also})
