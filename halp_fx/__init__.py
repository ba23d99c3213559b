"""Prune trained vision networks to a latency budget on a device.

pruned = halp_fx.compile(model, 0.5, example_inputs, data=loader, loss=criterion)
...fine-tune `pruned` in your own loop...
halp_fx.export_onnx(pruned, "net.onnx")
"""

from __future__ import annotations

from halp_fx import errors, latency, training
from halp_fx._version import __version__
from halp_fx.api import compile, plan_of, reconstruct, sweep
from halp_fx.budget import Budget
from halp_fx.core import compile_core, core_of, restore_core
from halp_fx.knapsack import Solution, Sum, SumTerm, solve
from halp_fx.latency import LatencyTable
from halp_fx.passes.export import export_onnx
from halp_fx.recalibrate import recalibrate
from halp_fx.recipe import load, save
from halp_fx.training import GradualPruner
from halp_fx.types import ChannelGroups, Plan

__all__ = [
    "Budget",
    "ChannelGroups",
    "GradualPruner",
    "LatencyTable",
    "Plan",
    "Solution",
    "Sum",
    "SumTerm",
    "__version__",
    "compile",
    "compile_core",
    "core_of",
    "errors",
    "export_onnx",
    "latency",
    "load",
    "plan_of",
    "recalibrate",
    "reconstruct",
    "restore_core",
    "save",
    "solve",
    "sweep",
    "training",
]
