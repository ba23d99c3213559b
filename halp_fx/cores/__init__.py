"""Networks with untraceable Python around a traceable core: the core is cut out and put back."""

from __future__ import annotations

from halp_fx.cores.assembly import Flow, assemble, side_by_side
from halp_fx.cores.calls import Call, capture
from halp_fx.cores.outside import split_ms
from halp_fx.cores.pipeline import Compile, prune_parts, with_outside
from halp_fx.cores.put_back import core_of, put_back
from halp_fx.cores.whole import scores_of_whole

__all__ = [
    "Call",
    "Compile",
    "Flow",
    "assemble",
    "capture",
    "core_of",
    "prune_parts",
    "put_back",
    "scores_of_whole",
    "side_by_side",
    "split_ms",
    "with_outside",
]
