"""Rules: what each ATen operator does with labels, one file a family."""

from __future__ import annotations

from halp_fx.passes.rules import contraction, movement, norm, pointwise, reduction
from halp_fx.passes.rules.core import LabelRun, OpCall, labels_of, register, set_labels

__all__ = [
    "LabelRun",
    "OpCall",
    "contraction",
    "labels_of",
    "movement",
    "norm",
    "pointwise",
    "reduction",
    "register",
    "set_labels",
]
