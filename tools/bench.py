"""`halp-fx bench discover`: how long it takes to find and apply what can be pruned."""

from __future__ import annotations

import csv
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from halp_fx.errors import HalpError
from halp_fx.latency import Analytic, Source
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.saliency import score
from halp_fx.passes.select import select
from halp_fx.passes.trace import trace
from halp_fx.tools.models import load_model

__all__ = ["DEFAULT_MODELS", "Discovery", "discover", "discovery_table", "write_csv"]

DEFAULT_MODELS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:densenet121",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf",
    "torchvision:convnext_tiny",
    "torchvision:vit_b_16",
)


_COLUMNS = (
    "model",
    "trace_s",
    "groups_s",
    "rewrite_s",
    "total_s",
    "torch_pruning_s",
    "groups",
    "parameters",
    "note",
)


@dataclass(frozen=True)
class Discovery:
    """Median seconds that each step took on one network."""

    model: str
    trace_s: float
    groups_s: float
    rewrite_s: float
    # Building its dependency graph, which does what trace and groups do; None: not installed, or
    # it failed.
    torch_pruning_s: float | None
    groups: int  # groups found
    parameters: int
    note: str = ""  # what failed, if something did

    @property
    def total_s(self) -> float:
        return self.trace_s + self.groups_s + self.rewrite_s


def discover(
    models: Sequence[str],
    runs: int = 3,
    *,
    input_shape: tuple[int, ...] = (1, 3, 224, 224),
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Discovery]:
    """Times trace, groups and rewrite on each network, next to Torch-Pruning where installed.

    The rewrite halves the analytic latency; choosing the widths is not part of the times.

    Args:
        models: names as the command line takes them.
        runs: how often each step runs; the median counts.
        input_shape: shape of the input, `(N, C, H, W)`.
        progress: called with the network's name, runs done and `runs`.
    """
    found = []
    for name in models:
        try:
            found.append(_discover(name, runs, input_shape, progress))
        except HalpError as error:
            nan = float("nan")
            note = " ".join(str(error).split())
            found.append(Discovery(name, nan, nan, nan, None, 0, 0, note))
    return found


def discovery_table(found: Sequence[Discovery]) -> Table:
    """The seconds as a table; networks that failed say why."""
    table = Table(title="seconds, median of the runs")
    table.add_column("network", overflow="fold")
    for header in ("trace", "groups", "rewrite", "all", "Torch-Pruning", "groups found"):
        table.add_column(header, justify="right")
    for row in found:
        if row.groups == 0 and row.note:
            table.add_row(row.model, f"[red]{row.note}[/]")
            continue
        peer = "-" if row.torch_pruning_s is None else f"{row.torch_pruning_s:.3f}"
        seconds = (row.trace_s, row.groups_s, row.rewrite_s, row.total_s)
        table.add_row(row.model, *(f"{s:.3f}" for s in seconds), peer, str(row.groups))
    if any(row.groups and row.note for row in found):
        table.caption = "; ".join(f"{r.model}: {r.note}" for r in found if r.groups and r.note)
    return table


def write_csv(found: Sequence[Discovery], path: Path) -> None:
    """One line a network, with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row in found:
            cells = (getattr(row, column) for column in _COLUMNS)
            writer.writerow([f"{c:.4f}" if isinstance(c, float) else c for c in cells])


def _discover(
    name: str,
    runs: int,
    input_shape: tuple[int, ...],
    progress: Callable[[str, int, int], None] | None,
) -> Discovery:
    model, inputs = load_model(name)
    if inputs is None:
        inputs = (torch.randn(input_shape, generator=torch.Generator().manual_seed(0)),)
    traced = trace(model, inputs)
    groups = find_groups(traced)
    latency = price(groups, Source(Analytic(), None))
    plan = select(groups, score(groups), latency, 0.5 * latency.dense_ms)
    steps: dict[str, list[float]] = {"trace": [], "groups": [], "rewrite": [], "peer": []}
    note = _time_peer([], model, inputs)  # warms it up, as the lines above do for our passes
    for run in range(runs):
        if progress is not None:
            progress(name, run, runs)
        _timed(steps["trace"], lambda: trace(model, inputs))
        _timed(steps["groups"], lambda: find_groups(traced))
        _timed(steps["rewrite"], lambda: rewrite(plan))
        note = note or _time_peer(steps["peer"], model, inputs)
    if progress is not None:
        progress(name, runs, runs)
    medians = {step: statistics.median(times) for step, times in steps.items() if times}
    return Discovery(
        model=name,
        trace_s=medians["trace"],
        groups_s=medians["groups"],
        rewrite_s=medians["rewrite"],
        torch_pruning_s=medians.get("peer"),
        groups=len(groups.groups),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        note=note,
    )


def _timed(times: list[float], work: Callable[[], Any]) -> None:
    start = time.perf_counter()
    work()
    times.append(time.perf_counter() - start)


def _time_peer(times: list[float], model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Times Torch-Pruning's dependency graph; returns what went wrong, or the empty string."""
    if importlib.util.find_spec("torch_pruning") is None:
        return ""
    import torch_pruning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _timed(
                times,
                lambda: torch_pruning.DependencyGraph().build_dependency(
                    model, example_inputs=inputs, verbose=False
                ),
            )
    except Exception as error:  # noqa: BLE001 (a peer's failure is a result, not ours)
        times.clear()
        return f"Torch-Pruning: {type(error).__name__}: {error}"
    return ""
