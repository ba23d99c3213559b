"""The errors of halp_fx, and its warnings.

HalpError
├── InputError (ValueError)     an argument is wrong: the message names it and what to pass
│   ├── BudgetError             the budget can't be parsed or is out of range
│   ├── DependencyError         an optional package is missing: the message has the command
│   └── DivergedError           training came to a loss that is not finite
├── InfeasibleError             no network within the budget; `.least` is the least cost
├── TraceError                  the model can't be turned into a graph
├── NothingToPruneError         every channel is pinned; the message says by what
├── SaliencyError               scores that are not finite, or all zero
├── LatencyError                a table or a measurement can't be used
│   └── DeviceMismatchError     a table was made on another device or with other settings
├── RewriteError                the shrunk network is not what the plan says
├── ExportError                 the exported file differs from the network
└── RecipeError                 a file of `halp_fx.save` can't be written or read
"""

from __future__ import annotations

import sys
import warnings

__all__ = [
    "BudgetError",
    "DependencyError",
    "DeviceMismatchError",
    "DivergedError",
    "ExportError",
    "HalpError",
    "InfeasibleError",
    "InputError",
    "LatencyError",
    "NothingToPruneError",
    "RecipeError",
    "RewriteError",
    "SaliencyError",
    "TraceError",
    "warn_caller",
]


class HalpError(Exception):
    """Root of every error that halp_fx raises on purpose."""


class InputError(HalpError, ValueError):
    """An argument is wrong; the message names it and says what to pass."""


class BudgetError(InputError):
    """A budget that can't be parsed or is out of range."""


class DependencyError(InputError):
    """An optional package is missing; the message has the command that installs it."""


class DivergedError(InputError):
    """Training came to a loss that is not finite: the data are at fault, or the learning rate."""


class InfeasibleError(HalpError):
    """No choice of levels meets the budget; `least` is the least cost that can be reached."""

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


class TraceError(HalpError):
    """The model can't be turned into a graph."""


class NothingToPruneError(HalpError):
    """Every channel of the network is pinned; the message says by what."""


class SaliencyError(HalpError):
    """Scores that are not finite, or all zero in a group that the message names."""


class LatencyError(HalpError):
    """A latency table or a measurement can't be used."""


class DeviceMismatchError(LatencyError):
    """A latency table was made on another device or with other settings."""


class RewriteError(HalpError):
    """The shrunk network is not what the plan says."""


class ExportError(HalpError):
    """An exported file is invalid, or computes something else than the network."""


class RecipeError(HalpError):
    """A file of `halp_fx.save` can't be written or read."""


def warn_caller(text: str) -> None:
    """A `UserWarning` at the line outside of this package that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith("halp_fx."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
