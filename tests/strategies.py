"""Hypothesis strategies for random networks; see `tests.networks` for what a spec means."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.networks import KINDS

__all__ = ["budgets", "specs"]


def _steps() -> st.SearchStrategy[list[Any]]:
    option = st.integers(0, 11)
    return st.builds(
        lambda kind, first, second, a, b, c: [kind, first, second, a, b, c],
        st.sampled_from(KINDS),
        st.integers(0, 2),  # counted from the latest map
        st.integers(0, 6),  # counted from the input
        option,
        option,
        option,
    )


def specs(max_steps: int = 7) -> st.SearchStrategy[dict[str, Any]]:
    """Specs of networks with up to `max_steps` blocks."""
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 1000),
            "image": st.sampled_from([[3, 8], [1, 8], [3, 6], [4, 8]]),
            "steps": st.lists(_steps(), min_size=1, max_size=max_steps),
            "output": st.sampled_from(["tensor", "tuple", "dict"]),
            "head": st.sampled_from(["pool", "flatten", "map"]),
        }
    )


def budgets() -> st.SearchStrategy[float]:
    """Shares of the dense latency, some of them out of reach."""
    return st.sampled_from([0.6, 0.3, 0.85, 0.05])
