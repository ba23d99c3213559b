"""What the network must fit into: a latency, and where asked for size, work and memory."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass
from typing import Any

from halp_fx.errors import BudgetError

__all__ = ["Budget", "parse_budget"]

_TIME = re.compile(r"\s*(?P<number>[0-9.eE+-]+)\s*(?P<unit>ms|us|s|%)\s*")
_COUNTS = ("params", "macs", "memory")
_TO_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_ACCEPTED = 'pass a share of the dense latency (0.5), a time ("4ms") or halp_fx.Budget(...)'


@dataclass(frozen=True)
class Budget:
    """Limits that hold together, at least one: latency, parameters, multiply-adds, memory.

    Latency is given as a time or as a share of the dense network's, not both. Where it isn't
    given, the pruned network must be no slower than the dense one. `params`, `macs` and `memory`
    are counts where they are above 1 or an `int`, and shares of the dense network's as floats up
    to 1.

    Raises:
        BudgetError: none is given, or both a time and a share, or one is out of range.

    Example:
        >>> Budget(share=0.5).in_ms(dense_ms=8.0)
        4.0
        >>> Budget(share=0.5, params=1e6, macs=0.25).counts(dense_params=4_000_000, dense_macs=800)
        {'params': 1000000.0, 'macs': 200.0}
    """

    latency_ms: float | None = None  # milliseconds
    share: float | None = None  # of the dense latency, above 0 and at most 1
    params: float | None = None  # numbers in the parameters, or their share
    macs: float | None = None  # multiply-adds at the example's batch size, or their share
    # Most bytes that activations take at a time, at the example's batch size, or their share.
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.latency_ms is not None and self.share is not None:
            raise BudgetError("Budget takes a latency once, as exactly one of latency_ms and share")
        if self.latency_ms is None and self.share is None and not self.further:
            raise BudgetError(
                "Budget sets no limit: pass exactly one of latency_ms and share, or params, or "
                "macs, or memory, or several"
            )
        if self.share is not None:
            _check(self.share, "the share")
            if self.share > 1:
                raise BudgetError(
                    f"the budget {self.share!r} is above 1: as a share of the dense latency it "
                    f'must be at most 1; for a time write the unit, "{self.share!r}ms"'
                )
        if self.latency_ms is not None:
            _check(self.latency_ms, "latency_ms")
        for name in _COUNTS:
            limit = getattr(self, name)
            if limit is not None:
                _check(limit, name, f"pass a count ({name}=1e6) or a share ({name}=0.5)")

    @property
    def further(self) -> tuple[str, ...]:
        """What is limited besides the latency: of "params", "macs" and "memory"."""
        return tuple(name for name in _COUNTS if getattr(self, name) is not None)

    def in_ms(self, dense_ms: float) -> float:
        """The latency budget in milliseconds, for a dense network that takes `dense_ms`."""
        if self.latency_ms is not None:
            return float(self.latency_ms)
        return float(self.share if self.share is not None else 1.0) * dense_ms

    def counts(self, dense_params: int, dense_macs: int, dense_memory: int = 0) -> dict[str, float]:
        """The limits on "params", "macs" and "memory" as counts; only those that were given."""
        found = {}
        for name, dense in zip(_COUNTS, (dense_params, dense_macs, dense_memory), strict=True):
            limit = getattr(self, name)
            if limit is not None:
                is_share = not isinstance(limit, numbers.Integral) and limit <= 1
                found[name] = float(limit) * dense if is_share else float(limit)
        return found


def _check(value: Any, what: str, accepted: str = _ACCEPTED) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BudgetError(f"{what} of the budget is {value!r}, not a number: {accepted}")
    if not math.isfinite(value) or value <= 0:
        raise BudgetError(f"{what} of the budget is {value!r}, it must be above 0: {accepted}")


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
