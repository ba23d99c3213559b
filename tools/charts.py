"""Charts, for which matplotlib is needed."""

from __future__ import annotations

from typing import Any

from halp_fx.errors import DependencyError

__all__ = ["matplotlib_figure"]


def matplotlib_figure() -> Any:
    """The class `matplotlib.figure.Figure`.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise DependencyError(
            'charts need the package matplotlib: run pip install "halp_fx[plot]"'
        ) from e
    return Figure
