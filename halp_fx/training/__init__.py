"""Prune while training, and recover: gradual pruning, distillation, fine-tuning."""

from halp_fx.training.distillation import Distillation, distillation_loss
from halp_fx.training.loop import fine_tune
from halp_fx.training.pruner import GradualPruner
from halp_fx.training.schedule import Schedule, limit_at

__all__ = [
    "Distillation",
    "GradualPruner",
    "Schedule",
    "distillation_loss",
    "fine_tune",
    "limit_at",
]
