"""`halp-fx profile --advise`: whether pruning can help, before any of it is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from halp_fx.errors import InfeasibleError
from halp_fx.latency import Source, Stored, measure_network
from halp_fx.passes.rules.widths import MIN_SHARE, Widths
from halp_fx.passes.saliency import score
from halp_fx.passes.select import select
from halp_fx.types import ChannelGroups, LatencyModel

__all__ = ["Advice", "advice_of", "advice_text"]

_NEARLY_NOTHING = 1e-6  # share of the dense latency that no plan can reach
_LITTLE = 0.05  # a share below this hardly matters


@dataclass(frozen=True)
class Advice:
    """Where the time of a dense network goes."""

    dense_ms: float
    prunable: float  # share of the time in kernels with a width that can change
    overhead: float | None  # share of the time that starting kernels takes; None: not measured
    overhead_ms: float | None  # what one kernel takes that does nothing
    kernels: int
    least_ms: float  # least latency that can be reached


def advice_of(groups: ChannelGroups, model: LatencyModel, source: Source) -> Advice:
    """Where the time goes, and how little it can be.

    Raises:
        HalpError: the kernel that does nothing can't be measured.
    """
    dense = groups.dense_units
    times = [float(k.cost(*(a.size(dense) for a in k.axes))) for k in model.kernels]
    # Those without nodes are what a calibration adds: time, but nothing that is started.
    started = [ms for k, ms in zip(model.kernels, times, strict=True) if k.nodes]
    movable = sum(ms for k, ms in zip(model.kernels, times, strict=True) if k.axes)
    overhead_ms = None
    if source.backend.measured and not isinstance(source.backend, Stored):
        nothing = (torch.zeros(1, 1, 1, 1),)
        overhead_ms = measure_network(nn.ReLU().eval(), nothing, source.backend).median_ms
    overhead = None
    if overhead_ms is not None:
        overhead = sum(min(ms, overhead_ms) for ms in started) / model.dense_ms
    return Advice(
        dense_ms=model.dense_ms,
        prunable=movable / model.dense_ms,
        overhead=overhead,
        overhead_ms=overhead_ms,
        kernels=len(started),
        least_ms=_least_ms(groups, model),
    )


def _least_ms(groups: ChannelGroups, model: LatencyModel) -> float:
    if not groups.groups:
        return model.dense_ms
    try:
        plan = select(
            groups,
            score(groups, None, None, "magnitude"),
            model,
            _NEARLY_NOTHING * model.dense_ms,
            allowed=Widths(min_share=MIN_SHARE),
        )
    except InfeasibleError as error:
        return error.least
    return plan.predicted_ms


def advice_text(found: Advice) -> Group:
    """The figures as a table, and what to make of them in a sentence or two."""
    table = Table(title="Can pruning help?", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("dense latency", f"{found.dense_ms:.3f} ms in {found.kernels} kernels")
    table.add_row("in kernels whose width can change", f"{found.prunable:.1%}")
    if found.overhead is not None and found.overhead_ms is not None:
        each = f"{1e3 * found.overhead_ms:.3g} us each"
        table.add_row("starting kernels", f"{found.overhead:.1%} ({each})")
    least = f"{found.least_ms:.3f} ms ({found.least_ms / found.dense_ms:.1%})"
    table.add_row("least latency that can be reached", least)
    return Group(table, *(Text(line) for line in _lines(found)))


def _lines(found: Advice) -> list[str]:
    lines = []
    least = found.least_ms / found.dense_ms
    if found.overhead is not None and found.overhead > 0.5:
        lines.append(
            "More than half of the time starts kernels, which narrower ones don't save: larger "
            "batches, a back-end that fuses more, CUDA graphs (--cuda-graphs, on a GPU), or "
            "dropping whole blocks help more."
        )
    if found.prunable < 0.5:
        lines.append(
            "Less than half of the time depends on widths: see halp-fx groups for what pins them."
        )
    if least > 1 - _LITTLE:
        lines.append("Pruning can hardly make this network faster on this device.")
    elif not lines:
        lines.append(f"Budgets down to about {min(1.0, 1.2 * least):.2f} are within reach.")
    return lines
