"""Measuring what kernels and networks take on a device, and keeping it in a table."""

from __future__ import annotations

from .analytic import Analytic
from .backend import Backend, BlockTimer, Job, Timing
from .bundle import import_results, write_bundle
from .calibration import Calibration, fit_calibration
from .interpolate import GridCost
from .onnxruntime_backend import OnnxRuntime
from .source import Source, Stored, resolve_backend, tell_foreign
from .steps import Step, SteppedCost, find_step, probe_sizes
from .table import Entry, LatencyTable, default_table_path
from .timing import measure_jobs, measure_network, measure_paired
from .torch_backend import Torch
from .torch_compile import TorchCompile

__all__ = [
    "Analytic",
    "Backend",
    "BlockTimer",
    "Calibration",
    "Entry",
    "GridCost",
    "Job",
    "LatencyTable",
    "OnnxRuntime",
    "Source",
    "Step",
    "SteppedCost",
    "Stored",
    "Timing",
    "Torch",
    "TorchCompile",
    "default_table_path",
    "find_step",
    "fit_calibration",
    "import_results",
    "measure_jobs",
    "measure_network",
    "measure_paired",
    "probe_sizes",
    "resolve_backend",
    "tell_foreign",
    "write_bundle",
]
