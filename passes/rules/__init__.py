"""Rules: what each ATen operator does with labels, one file a family."""

from __future__ import annotations

from halp_fx.passes.rules import contraction, movement, norm, pointwise, reduction

__all__ = ["contraction", "movement", "norm", "pointwise", "reduction"]
