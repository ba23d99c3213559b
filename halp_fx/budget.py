"""How fast the network must be."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from halp_fx.errors import BudgetError

__all__ = ["Budget", "parse_budget"]

_TIME = re.compile(r"\s*(?P<number>[0-9.eE+-]+)\s*(?P<unit>ms|us|s|%)\s*")
_TO_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_ACCEPTED = 'pass a share of the dense latency (0.5), a time ("4ms") or halp_fx.Budget(...)'


@dataclass(frozen=True)
class Budget:
    """A limit on latency: exactly one of a time and a share of the dense network's.

    Raises:
        BudgetError: both or none are given, or one is out of range.

    Example:
        >>> Budget(share=0.5).in_ms(dense_ms=8.0)
        4.0
    """

    latency_ms: float | None = None  # milliseconds
    share: float | None = None  # of the dense latency, above 0 and at most 1

    def __post_init__(self) -> None:
        if (self.latency_ms is None) == (self.share is None):
            raise BudgetError("Budget takes exactly one of latency_ms and share")
        if self.share is not None:
            _check(self.share, "the share")
            if self.share > 1:
                raise BudgetError(
                    f"the budget {self.share!r} is above 1: as a share of the dense latency it "
                    f'must be at most 1; for a time write the unit, "{self.share!r}ms"'
                )
        if self.latency_ms is not None:
            _check(self.latency_ms, "latency_ms")

    def in_ms(self, dense_ms: float) -> float:
        """The budget in milliseconds, for a dense network that takes `dense_ms`."""
        if self.latency_ms is not None:
            return float(self.latency_ms)
        assert self.share is not None
        return float(self.share) * dense_ms


def _check(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BudgetError(f"{what} of the budget is {value!r}, not a number: {_ACCEPTED}")
    if not math.isfinite(value) or value <= 0:
        raise BudgetError(f"{what} of the budget is {value!r}, it must be above 0: {_ACCEPTED}")


def parse_budget(budget: Any) -> Budget:
    """A share (0.5), a time ("4ms", "800us", "0.1s"), a percentage ("50%") or a `Budget`.

    Raises:
        BudgetError: it can't be parsed, or is out of range.
    """
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, str):
        return _parse_text(budget)
    _check(budget, "the share")
    return Budget(share=float(budget))


def _parse_text(text: str) -> Budget:
    match = _TIME.fullmatch(text)
    try:
        number = float(match["number"] if match else text)
    except ValueError:
        raise BudgetError(f"the budget {text!r} can't be parsed: {_ACCEPTED}") from None
    if match is None:
        return Budget(share=number)
    if match["unit"] == "%":
        return Budget(share=number / 100)
    return Budget(latency_ms=number * _TO_MS[match["unit"]])
