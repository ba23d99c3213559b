"""How a budget tightens from milestone to milestone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from halp_fx.errors import InputError
from halp_fx.stepwise import target_at

__all__ = ["Schedule", "check_schedule", "limit_at", "shares"]

Schedule: TypeAlias = str | Callable[[float], float]
_ACCEPTED = (
    'pass "exponential", "linear", or a callable from the share of milestones that are done '
    "(above 0, up to 1) to the share of the reduction that is done (0 to 1, never less than before)"
)


def check_schedule(schedule: Schedule, steps: int) -> None:
    """Whether the schedule gives a sensible limit at each milestone.

    Raises:
        InputError: it is unknown, or goes back, or does not end at the budget.
    """
    if schedule in ("exponential", "linear"):
        return
    if not callable(schedule):
        raise InputError(f"schedule is {schedule!r}: {_ACCEPTED}")
    before = 0.0
    for t in range(1, steps + 1):
        done = schedule(t / steps)
        if isinstance(done, bool) or not isinstance(done, (int, float)) or not math.isfinite(done):
            raise InputError(f"schedule({t / steps:.3g}) is {done!r}, not a number: {_ACCEPTED}")
        if not before <= done <= 1:
            raise InputError(
                f"schedule({t / steps:.3g}) is {done!r} after {before!r} at the milestone before: "
                f"{_ACCEPTED}"
            )
        before = done
    if before != 1:
        raise InputError(f"schedule(1.0) is {before!r}: it must end at 1, the whole reduction")


def limit_at(
    schedule: Schedule, milestone: int, steps: int, *, dense: float, target: float
) -> float:
    """The limit at a milestone, in the unit of `dense` and `target`.

    "exponential" is the paper's, `dense * (target / dense) ** (t / k)` (HALP, NeurIPS 2022,
    section 3.3): large cuts first, while much is left that can go. "linear" takes off the same
    amount each time. A target above the dense network's own holds from the start.

    Args:
        milestone: t, from 1 to `steps`.
        steps: k, the number of milestones.

    Example:
        >>> [limit_at("exponential", t, 2, dense=8.0, target=2.0) for t in (1, 2)]
        [4.0, 2.0]
        >>> [limit_at("linear", t, 2, dense=8.0, target=2.0) for t in (1, 2)]
        [5.0, 2.0]
    """
    if milestone >= steps or target >= dense:
        return target
    share = milestone / steps
    if callable(schedule):
        return dense + (target - dense) * float(schedule(share))
    if schedule == "linear":
        return dense + (target - dense) * share
    return target_at(dense, target, share)


def shares(schedule: Schedule, steps: int) -> str | list[float]:
    """A schedule as a plain value: its name, or the share of the reduction at each milestone."""
    if isinstance(schedule, str):
        return schedule
    return [float(schedule(t / steps)) for t in range(1, steps + 1)]
