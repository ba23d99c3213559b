"""`halp-fx profile`: measures what each width costs, and keeps it in a table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import nn

from halp_fx.errors import InputError
from halp_fx.latency import (
    Analytic,
    Backend,
    LatencyTable,
    OnnxRuntime,
    Source,
    Torch,
    default_table_path,
)
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price
from halp_fx.passes.trace import trace
from halp_fx.types import LatencyModel

__all__ = ["kernel_table", "profile", "source_of"]


def source_of(
    backend: str,
    table: Path | None = None,
    *,
    threads: int | None = None,
    device: str | None = None,
) -> Source:
    """The back-end of that name, and the table that takes its measurements.

    Args:
        backend: "onnxruntime", "torch" or "analytic".
        table: file of the table, made if needed; None: the user's own.
        threads: CPU threads; None: the back-end's default.
        device: torch device; None: the CPU.

    Raises:
        InputError: the name is unknown, or an option has no meaning for the back-end.
        DependencyError: ONNX Runtime is not installed.
        LatencyError: the table can't be used.
    """
    if device is not None and backend != "torch":
        raise InputError(f"--device is for --backend torch; {backend} takes none")
    if backend == "analytic":
        if table is not None or threads is not None:
            raise InputError(
                "the analytic back-end computes costs: it takes no --threads and leaves no table"
            )
        return Source(Analytic(), None)
    made: Backend
    if backend == "torch":
        made = Torch(device or "cpu", threads=threads)
    elif backend == "onnxruntime":
        made = OnnxRuntime() if threads is None else OnnxRuntime(threads=threads)
    else:
        raise InputError(f"there is no back-end {backend!r}; use onnxruntime, torch or analytic")
    made.fingerprint()  # a device or package that is missing is better told now
    return Source(made, LatencyTable.open(table or default_table_path()))


def profile(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None,
    source: Source,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> LatencyModel:
    """Prices every kernel of the network at its widths; measurements land in the source's table.

    Raises:
        HalpError: the network can't be traced, or a kernel can't be measured.
    """
    groups = find_groups(trace(model, example_inputs))
    if progress is None:
        return price(groups, source)
    return price(groups, source, progress=partial(progress, "latency"))


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
    for cost, kernel in costs[:shown]:
        sizes = " x ".join(str(axis.dense) for axis in kernel.axes)
        share = f"{cost / model.dense_ms:.1%}" if model.dense_ms else ""
        table.add_row(escape(kernel.name), escape(kernel.op), sizes, f"{cost:.4f}", share)
    rest = costs[shown:]
    if rest:
        total = sum(cost for cost, _ in rest)
        table.add_row(f"{len(rest)} more", "", "", f"{total:.4f}", f"{total / model.dense_ms:.1%}")
    table.caption = escape(model.device)
    return table
