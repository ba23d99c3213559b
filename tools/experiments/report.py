"""Results of an experiment as a table, a CSV file and a chart."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from halp_fx.tools.charts import matplotlib_figure
from halp_fx.tools.experiments.comparison import Record

__all__ = ["results_table", "write_results"]

_STAGES = ("pruned", "tuned")


def results_table(records: Sequence[Record], metrics: Sequence[str], title: str) -> Table:
    """One row a method and speed-up: means over the seeds."""
    table = Table(title=title)
    for header in _headers(metrics):
        table.add_column(header, justify="left" if header == "method" else "right")
    for same in _by_method(records):
        table.add_row(*_cells(same, metrics))
    return table


def write_results(
    records: Sequence[Record], metrics: Sequence[str], folder: Path, title: str
) -> list[Path]:
    """Leaves results.csv (a row a record), results.md (means over seeds) and a chart in `folder`.

    Raises:
        DependencyError: matplotlib is not installed; the CSV and the Markdown file are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(record, metrics) for record in records]
    numbers, text = folder / "results.csv", folder / "results.md"
    with numbers.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    headers = _headers(metrics)
    aligned = ["---" if header == "method" else "---:" for header in headers]
    cells = [_cells(same, metrics) for same in _by_method(records)]
    lines = ["| " + " | ".join(line) + " |" for line in [headers, aligned, *cells]]
    text.write_text("\n".join([f"# {title}", "", *lines]) + "\n", encoding="utf-8")
    charts = [folder / "results.png", folder / "results.svg"]
    _draw(records, metrics[0], charts, title)
    return [numbers, text, *charts]


def _row(record: Record, metrics: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": record.method,
        "speedup_asked": record.speedup,
        "seed": record.seed,
        "dense_ms": record.dense_ms,
        "ms": record.ms,
        "spread_ms": record.spread_ms,
        "speedup": record.dense_ms / record.ms,
        "outside_ms": record.outside_ms,
        "params": record.params,
        "value_kept": record.value_kept,
        "gap": record.gap,
    }
    for stage in _STAGES:
        row |= {f"{stage}_{metric}": _of(record, stage)[metric] for metric in metrics}
    return {**row, **record.settings}


def _headers(metrics: Sequence[str]) -> list[str]:
    stages = [*metrics, *(f"{metric} tuned" for metric in metrics)]
    return ["method", "asked", "ms", "speed-up", "parameters", "saliency kept", "gap", *stages]


def _cells(same: Sequence[Record], metrics: Sequence[str]) -> list[str]:
    first = same[0]
    gaps = [record.gap for record in same if record.gap is not None]
    cells = [
        first.method if len(same) == 1 else f"{first.method} ({len(same)} seeds)",
        f"{first.speedup:g}x",
        _milliseconds(same),
        f"{statistics.mean(record.dense_ms / record.ms for record in same):.2f}x",
        f"{statistics.mean(record.params for record in same):,.0f}",
        f"{statistics.mean(record.value_kept for record in same):.1%}",
        f"{max(gaps):.2%}" if gaps else "-",
    ]
    for stage in _STAGES:
        for metric in metrics:
            values = [_of(record, stage)[metric] for record in same]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
    return cells


def _milliseconds(same: Sequence[Record]) -> str:
    spreads = [record.spread_ms for record in same if record.spread_ms is not None]
    spread = f" ± {max(spreads):.3f}" if spreads else ""
    return f"{statistics.mean(record.ms for record in same):.3f}{spread}"


def _of(record: Record, stage: str) -> Mapping[str, float]:
    return record.tuned if stage == "tuned" else record.pruned


def _by_method(records: Sequence[Record]) -> list[list[Record]]:
    grouped: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        grouped.setdefault((record.method, record.speedup), []).append(record)
    return list(grouped.values())


def _draw(records: Sequence[Record], metric: str, paths: Sequence[Path], title: str) -> None:
    figure = matplotlib_figure()(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(record.method for record in records if record.gap is not None))
    for i, method in enumerate(methods):
        points = [same for same in _by_method(records) if same[0].method == method]
        points.sort(key=lambda same: same[0].speedup)
        at = [statistics.mean(record.dense_ms / record.ms for record in same) for same in points]
        for stage, style in (("tuned", "o-"), ("pruned", "o--")):
            values = [statistics.mean(_of(r, stage)[metric] for r in same) for same in points]
            label = f"{method}, fine-tuned" if stage == "tuned" else f"{method}, pruned"
            axes.plot(at, values, style, color=f"C{i}", label=label)
    dense = [record for record in records if record.gap is None]
    if dense:
        for stage, style in (("tuned", "-"), ("pruned", ":")):
            value = statistics.mean(_of(record, stage)[metric] for record in dense)
            label = "dense, trained on" if stage == "tuned" else "dense"
            axes.axhline(value, color="black", lw=0.8, ls=style, label=label)
    axes.set(xlabel="speed-up", ylabel=metric, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    for path in paths:
        figure.savefig(path)
