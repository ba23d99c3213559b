"""`halp-fx sweep`: one network at several budgets, as a table and a chart."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import fx, nn

import halp_fx
from halp_fx.errors import HalpError, InputError
from halp_fx.passes.select import check_solver
from halp_fx.pipeline import Progress, prepare
from halp_fx.tools.charts import matplotlib_figure
from halp_fx.tools.prune import budget_of, further_latencies
from halp_fx.types import Plan

__all__ = ["Point", "parse_budgets", "point_table", "sweep", "write_points"]


@dataclass(frozen=True)
class Point:
    """What came out at one budget."""

    budget: str  # as it was given
    budget_ms: float | None = None  # None, as all that follows: there is no network
    predicted_ms: float | None = None
    measured_ms: float | None = None  # None: not measured
    spread_ms: float | None = None  # half the interquartile range of the samples
    dense_ms: float | None = None  # measured where measured_ms is, else by the table
    met: bool = False  # the latencies that are limited besides too
    value_kept: float | None = None  # share of the saliency
    gap: float | None = None  # certified
    params: int | None = None
    macs: int | None = None
    remark: str = ""  # what went wrong


def parse_budgets(text: str, limits: Mapping[str, float | None] | None = None) -> list[str]:
    """Comma-separated budgets.

    Args:
        limits: what is to hold besides, as `sweep` takes it.

    Raises:
        InputError: there are none.
        BudgetError: one can't be parsed, or a limit is out of range.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise InputError("--budgets is empty: give some, as 0.9,0.7,0.5,0.3")
    for part in found:
        budget_of(part, **(limits or {}))
    return found


def sweep(
    model: nn.Module,
    budgets: Sequence[str],
    example_inputs: tuple[Any, ...] | None,
    directory: Path,
    *,
    limits: Mapping[str, float | None] | None = None,
    save: bool = False,
    progress: Progress | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Point]:
    """Prunes to each budget with one trace, one saliency and one latency table.

    Args:
        directory: where the networks go with `save`, each as BUDGET.safetensors.
        limits: limits on "params", "macs" and "memory" that hold at each budget.
        options: arguments of `halp_fx.compile`.

    Raises:
        HalpError: a stage before the budgets failed. What fails at one budget, as one that can't
            be met, is a point with a remark.
    """
    options = dict(options or {})
    asked = [budget_of(text, **(limits or {})) for text in budgets]
    for budget in asked:
        check_solver(options.get("solver", "joint"), budget.further)
    prepared = prepare(model, example_inputs, progress=progress, **options)
    points = []
    for text, budget in zip(budgets, asked, strict=True):
        point = Point(text)
        try:
            pruned = prepared.prune(budget)
            point = _point(text, pruned)
            if save:
                directory.mkdir(parents=True, exist_ok=True)
                halp_fx.save(pruned, directory / f"{text}.safetensors")
        except HalpError as error:
            point = replace(point, remark=" ".join(str(error).split()))
        points.append(point)
    return points


def _point(text: str, pruned: fx.GraphModule) -> Point:
    plan: Plan = halp_fx.plan_of(pruned)
    facts = plan.report
    missed = [
        f"{name} takes {figures}" for name, figures, met in further_latencies(plan) if not met
    ]
    return Point(
        budget=text,
        budget_ms=facts.get("measured_budget_ms", plan.budget_ms),
        predicted_ms=plan.predicted_ms,
        measured_ms=facts.get("measured_ms"),
        spread_ms=facts.get("measured_spread_ms"),
        dense_ms=facts.get("measured_dense_ms", plan.dense_ms),
        met=bool(facts.get("met", plan.predicted_ms <= plan.budget_ms)) and not missed,
        value_kept=plan.value / plan.dense_value if plan.dense_value else None,
        gap=plan.gap,
        params=facts["params"]["pruned"],
        macs=facts["macs"]["pruned"],
        remark="; ".join(missed),
    )


def point_table(points: Sequence[Point]) -> Table:
    """One row a budget."""
    table = Table(title="latency against saliency kept")
    for header in _HEADERS:
        table.add_column(header, justify="left" if header == "budget" else "right")
    for point in points:
        table.add_row(*_cells(point))
    return table


_HEADERS = (
    "budget", "budget ms", "predicted ms", "measured ms", "spread", "dense ms", "met",
    "saliency kept", "gap", "parameters", "MACs",
)  # fmt: skip


def _cells(point: Point) -> list[str]:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    def percent(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}%}"

    return [
        point.budget,
        ms(point.budget_ms),
        ms(point.predicted_ms),
        ms(point.measured_ms),
        ms(point.spread_ms),
        ms(point.dense_ms),
        "yes" if point.met else "no",
        percent(point.value_kept, 1),
        percent(point.gap, 2),
        "-" if point.params is None else f"{point.params:,}",
        "-" if point.macs is None else f"{point.macs:,}",
    ]


def write_points(points: Sequence[Point], directory: Path, title: str) -> list[Path]:
    """Leaves sweep.csv, sweep.md, sweep.png and sweep.svg in `directory`, which is made if needed.

    Raises:
        DependencyError: matplotlib is not installed; the CSV and the Markdown file are written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    table, text = directory / "sweep.csv", directory / "sweep.md"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)
    rows = [_HEADERS, ["---"] * len(_HEADERS), *map(_cells, points)]
    lines = [f"# {title}", "", *("| " + " | ".join(row) + " |" for row in rows)]
    lines += ["", *(f"- {p.budget}: {p.remark}" for p in points if p.remark)]
    text.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    charts = [directory / "sweep.png", directory / "sweep.svg"]
    _draw(points, charts, title)
    return [table, text, *charts]


def _draw(points: Sequence[Point], paths: Sequence[Path], title: str) -> None:
    figure = matplotlib_figure()(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    done = [p for p in points if p.value_kept is not None and p.predicted_ms is not None]
    measured = [p for p in done if p.measured_ms is not None]
    kept = _numbers(done, "value_kept", 100)
    predicted = _numbers(done, "predicted_ms")
    axes.plot(predicted, kept, "o--", color="tab:gray", label="predicted")
    if measured:
        axes.errorbar(
            _numbers(measured, "measured_ms"),
            _numbers(measured, "value_kept", 100),
            xerr=_numbers(measured, "spread_ms"),
            fmt="o-", color="tab:blue", capsize=3, label="measured",
        )  # fmt: skip
    if done:
        axes.axvline(_numbers(done, "dense_ms")[0], color="black", lw=0.8, ls=":", label="dense")
    for point, value in zip(done, kept, strict=True):
        at = point.measured_ms if point.measured_ms is not None else point.predicted_ms
        axes.annotate(point.budget, (at, value), textcoords="offset points", xytext=(6, -10))
    axes.set(xlabel="latency, ms", ylabel="saliency kept, %", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    for path in paths:
        figure.savefig(path)


def _numbers(points: Sequence[Point], name: str, scale: float = 1.0) -> list[float]:
    return [scale * float(getattr(point, name) or 0.0) for point in points]
