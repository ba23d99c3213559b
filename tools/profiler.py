"""`halp-fx profile`: measures what each width costs, and keeps it in a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from halp_fx.calibrate import calibrate
from halp_fx.errors import InputError
from halp_fx.latency import (
    Analytic,
    Backend,
    LatencyTable,
    OnnxRuntime,
    Source,
    Stored,
    Torch,
    TorchCompile,
    default_table_path,
    write_bundle,
)
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import copies_views, measurements, price
from halp_fx.passes.trace import trace
from halp_fx.types import ChannelGroups, LatencyModel

__all__ = ["dtype_of", "groups_of", "kernel_table", "profile", "source_of", "write_bundle_of"]

_NOTABLE = 1.05  # a penalty below this is noise, or hardly matters


def source_of(
    backend: str,
    table: Path | None = None,
    *,
    threads: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    channels_last: bool = False,
    cuda_graphs: bool = False,
    provider: str | None = None,
) -> Source:
    """The back-end of that name, and the table that takes its measurements.

    Args:
        backend: "onnxruntime", "torch", "torch.compile" or "analytic".
        table: file of the table, made if needed; None: the user's own.
        threads: CPU threads; None: the back-end's default.
        device: torch device; None: the CPU.
        dtype: type that torch runs in, as "bfloat16"; None: the network's own.
        channels_last: torch keeps images with the channels last.
        cuda_graphs: torch replays a CUDA graph.
        provider: execution provider of ONNX Runtime; None: the CPU's.

    Raises:
        InputError: the name is unknown, or an option has no meaning for the back-end.
        DependencyError: ONNX Runtime is not installed.
        LatencyError: the table can't be used.
    """
    of_torch = {
        "--device": device,
        "--dtype": dtype,
        "--channels-last": channels_last or None,
        "--cuda-graphs": cuda_graphs or None,
    }
    for option, value in of_torch.items():
        if value is not None and backend not in ("torch", "torch.compile"):
            raise InputError(f"{option} is for --backend torch; {backend} takes none")
    if provider is not None and backend != "onnxruntime":
        raise InputError(f"--provider is for --backend onnxruntime; {backend} takes none")
    if backend == "analytic":
        if table is not None or threads is not None:
            raise InputError(
                "the analytic back-end computes costs: it takes no --threads and leaves no table"
            )
        return Source(Analytic(), None)
    made: Backend
    if backend in ("torch", "torch.compile"):
        kind = Torch if backend == "torch" else TorchCompile
        made = kind(
            device or "cpu",
            threads=threads,
            dtype=None if dtype is None else dtype_of(dtype),
            channels_last=channels_last,
            cuda_graphs=cuda_graphs,
        )
    elif backend == "onnxruntime":
        made = OnnxRuntime(threads=threads or 1, provider=provider or OnnxRuntime.provider)
    else:
        raise InputError(
            f"there is no back-end {backend!r}; use onnxruntime, torch, torch.compile or analytic"
        )
    made.fingerprint()  # a device or package that is missing is better told now
    return Source(made, LatencyTable.open(table or default_table_path()))


def dtype_of(name: str) -> torch.dtype:
    """The floating point type of that name, as "bfloat16".

    Raises:
        InputError: torch has no such type.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"--dtype {name}: there is no such type; use float32, bfloat16 or float16")
    return found


def groups_of(model: nn.Module, example_inputs: tuple[Any, ...] | None) -> ChannelGroups:
    """Trace and groups of a network.

    Raises:
        HalpError: the network can't be traced.
    """
    return find_groups(trace(model, example_inputs))


def profile(
    groups: ChannelGroups,
    source: Source,
    *,
    calibrate_on: int = 0,
    coarse: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> LatencyModel:
    """Prices every kernel of the network at its widths; measurements land in the source's table.

    Args:
        calibrate_on: networks of random widths that are measured whole, a third of them to check
            the calibration on; 0: none. Nothing is measured where the table has a calibration
            on as many.
        coarse: measure at few widths and calibrate on none, which is soon done; what comes of it is
            not for pruning. Where the table has all widths already, they are used.

    Raises:
        HalpError: a kernel or a network can't be measured.
    """
    tell = progress or (lambda stage, done, total: None)
    few = True if coarse and not _is_profiled(groups, source) else None
    model = price(groups, source, coarse=few, progress=partial(tell, "latency"))
    if coarse:
        return model
    found = model.calibration
    # The dense network is fitted besides those of random widths.
    known = 0 if found is None else found.networks - 1 + found.held_out
    if known >= calibrate_on or source.table is None:
        return model
    held_out = max(calibrate_on // 3, 1)
    calibrate(
        groups,
        source,
        networks=calibrate_on - held_out,
        held_out=held_out,
        progress=partial(tell, "calibrate"),
    )
    return price(groups, source)


def _is_profiled(groups: ChannelGroups, source: Source) -> bool:
    """Whether all that `price` looks up is there, or can't be measured."""
    backend, table = source.backend, source.table
    if table is None or isinstance(backend, Stored):
        return True
    known = {entry.key for entry in table.entries(backend.fingerprint())}
    jobs = measurements(groups, backend.fuses, copies_views(backend))
    return all(job.key in known for job in jobs if not job.optional)


def write_bundle_of(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None,
    folder: Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Leaves what to measure on a device that has ONNX Runtime and no PyTorch.

    Returns:
        how many kernels the bundle has.

    Raises:
        HalpError: the network can't be traced, or a kernel can't be exported.
    """
    groups = groups_of(model, example_inputs)
    jobs = measurements(groups, OnnxRuntime.fuses, OnnxRuntime.copies)
    tell = progress or (lambda stage, done, total: None)
    network = (groups.traced.module, groups.traced.example_inputs)
    write_bundle(
        jobs, folder, network=network, progress=lambda done, total, _: tell("export", done, total)
    )
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return len(manifest["kernels"])


def _step_text(step: int, penalty: float) -> str:
    if not step:
        return "?"
    return str(step) if penalty < _NOTABLE else f"{step} (off it {penalty:.1f}x)"


def kernel_table(model: LatencyModel, shown: int = 20) -> Table:
    """The kernels that cost most in the dense network."""
    costs = [
        (float(kernel.cost(*(axis.dense for axis in kernel.axes))), kernel)
        for kernel in model.kernels
    ]
    # Ties in graph order: sorted() is stable.
    costs = sorted(costs, key=lambda pair: -pair[0])
    table = Table(title=f"dense network: {model.dense_ms:.3f} ms by {model.backend}")
    table.add_column("kernel", overflow="fold")
    table.add_column("operators")
    table.add_column("sizes", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    table.add_column("steps", justify="right")
    for cost, kernel in costs[:shown]:
        sizes = " x ".join(str(axis.dense) for axis in kernel.axes)
        slower = kernel.penalties or (1.0,) * len(kernel.steps)
        steps = " x ".join(map(_step_text, kernel.steps, slower))
        share = f"{cost / model.dense_ms:.1%}" if model.dense_ms else ""
        table.add_row(escape(kernel.name), escape(kernel.op), sizes, f"{cost:.4f}", share, steps)
    rest = costs[shown:]
    if rest:
        total = sum(cost for cost, _ in rest)
        share = f"{total / model.dense_ms:.1%}"
        table.add_row(f"{len(rest)} more", "", "", f"{total:.4f}", share, "")
    table.caption = escape(model.device)
    if model.calibration is not None:
        found = model.calibration
        table.caption += (
            f"\nwhole network = {found.offset_ms:.4g} ms + {found.scale:.4g} x sum of kernels "
            f"+ {found.weights_ms_per_mb:.3g} ms a MB of weights, "
            f"fitted on {found.networks} networks; on {found.held_out} others the error is "
            f"{found.median_error:.1%} (median), {found.worst_error:.1%} (worst), the rank "
            f"correlation {found.rank_correlation:.2f}"
        )
    return table
