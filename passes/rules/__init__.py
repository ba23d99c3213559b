"""Rules: what each ATen operator, or a whole module, does with labels; one file a family."""

from __future__ import annotations

from halp_fx.passes.rules import contraction, movement, norm, pointwise, reduction
from halp_fx.passes.rules.core import LabelRun, OpCall, labels_of, register, set_labels
from halp_fx.passes.rules.leaves import ModuleCall, register_module

__all__ = [
    "LabelRun",
    "ModuleCall",
    "OpCall",
    "contraction",
    "labels_of",
    "movement",
    "norm",
    "pointwise",
    "reduction",
    "register",
    "register_module",
    "set_labels",
]
