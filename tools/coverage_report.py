"""The records of a coverage sweep as a table, a CSV file and a Markdown page."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from halp_fx.tools.coverage_models import Family
from halp_fx.tools.coverage_worker import Record

__all__ = ["coverage_table", "short_source", "summary", "to_markdown", "write_csv"]

_COLUMNS = (
    "model", "status", "error", "signal", "groups", "prunable", "inexact_groups",
    "parameters", "parameters_kept", "latency_kept", "trace_s", "groups_s", "rewrite_s",
    "total_s", "memory_gb", "inputs", "traced", "pinned", "stage", "message",
)  # fmt: skip
_HEADERS = (
    "model", "status", "error", "groups", "prunable", "parameters", "latency", "passes s",
    "total s", "GB", "traced by", "remark",
)  # fmt: skip
_STYLES = {"exact": "green", "inexact": "bold red", "error": "red"}


def coverage_table(records: Sequence[Record]) -> Table:
    """One row a model."""
    table = Table(title=summary(records))
    table.add_column("model", overflow="fold")
    table.add_column("status")
    for header in _HEADERS[2:-2]:
        table.add_column(header, justify="right")
    table.add_column("pinned by, or what went wrong", overflow="fold")
    for record in records:
        style = _STYLES.get(record.status, "yellow")
        table.add_row(
            escape(record.model.partition(":")[2]),
            f"[{style}]{record.status}[/]",
            *_numbers(record),
            escape(_remark(record)),
        )
    return table


def summary(records: Sequence[Record]) -> str:
    """How many models came out how, in a line."""
    counts = Counter(record.status for record in records)
    parts = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    return f"{len(records)} models: {parts}" if records else "no models"


def write_csv(records: Iterable[Record], path: Path) -> None:
    """One line a model, with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for record in records:
            writer.writerow([_cell(record, column) for column in _COLUMNS])


def to_markdown(records: Sequence[Record], family: Family) -> str:
    """A page with the results, and what stands in the way most often."""
    lines = [
        f"# Coverage: {family.value}",
        "",
        f"{summary(records)}. Random weights and norm statistics, budget by the analytic latency.",
        "",
        "- prunable: share of the output channels of convolutions and linear layers that can go;",
        "  those of the network's outputs can't",
        "- error: largest difference between the pruned network and the dense one with the removed",
        "  channels masked, relative to the output's magnitude, in float64 at two batch sizes; the",
        "  worse of the network within the budget and of one with a random half of each group",
        "- passes: seconds for trace, groups and rewrite",
        "",
        f"| {' | '.join(_HEADERS)} |",
        f"| --- | --- {'| ---: ' * 8}| --- | --- |",
    ]
    for record in records:
        cells = (
            record.model.partition(":")[2],
            record.status,
            *_numbers(record),
            _traced(record),
            _remark(record),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "## What pins channels", ""]
    lines += ["| models | channels | reason | source | e.g. |", "| ---: | ---: | --- | --- | --- |"]
    for (reason, source), found in _obstacles(records)[:40]:
        models = sorted({model.partition(":")[2] for model, _ in found})
        cells = (
            str(len(models)),
            str(sum(channels for _, channels in found)),
            reason,
            f"`{source}`" if source else "",
            ", ".join(models[:3]),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _obstacles(
    records: Iterable[Record],
) -> list[tuple[tuple[str, str], list[tuple[str, int]]]]:
    """(reason, source line) -> (model, channels) each; those of most models first."""
    found: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    for record in records:
        for cause in record.pinned:
            if cause.reason != "output of the network":
                key = (cause.reason, short_source(cause.source))
                found[key].append((record.model, cause.channels))
    return sorted(
        found.items(),
        key=lambda item: (-len({m for m, _ in item[1]}), -sum(c for _, c in item[1]), item[0]),
    )


def short_source(source: str) -> str:
    """The source line with the path from the package on, as it is on any machine."""
    return source.rpartition("site-packages/")[2]


def _numbers(record: Record) -> tuple[str, ...]:
    return (
        "" if record.error is None else f"{record.error:.0e}",
        "" if record.groups is None else str(record.groups),
        _percent(record.prunable),
        _percent(record.parameters_kept),
        _percent(record.latency_kept),
        "" if record.passes_s is None else f"{record.passes_s:.1f}",
        "" if record.total_s is None else f"{record.total_s:.0f}",
        "" if record.memory_gb is None else f"{record.memory_gb:.1f}",
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _traced(record: Record) -> str:
    if record.trace_s is None:
        return ""
    names = ", ".join(entry.partition(":")[0] for entry in record.opaque)
    return f"fx, held whole: {names}" if names else "fx"


def _remark(record: Record) -> str:
    """What went wrong, and the causes of pins that are not just the network's outputs."""
    parts = [record.message] if record.message else []
    if record.opaque:
        parts.append(f"held whole: {'; '.join(record.opaque[:3])}")
    causes = [c for c in record.pinned if c.reason != "output of the network"]
    parts.extend(f"{c.channels} x {c.reason} ({c.node})" for c in causes[:3])
    return "; ".join(parts)


def _cell(record: Record, column: str) -> Any:
    if column == "traced":
        return _traced(record)
    if column == "pinned":
        return "; ".join(
            f"{c.channels} x {c.reason} [{c.node} {short_source(c.source)}]" for c in record.pinned
        )
    value = getattr(record, column)
    return f"{value:.4g}" if isinstance(value, float) else value
