"""Accuracy against latency: CSV files, a Markdown page and a chart from the records."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from halp_fx.tools.charts import matplotlib_figure
from halp_fx.tools.experiments.accuracy_records import Record, unpacked
from halp_fx.tools.experiments.accuracy_statistics import Paired, paired

__all__ = ["Compared", "compared", "page", "write_report"]

_BITS = ("right_recalibrated", "right_tuned")
_STAGES = ("recalibrated", "tuned")
_STAGE_TITLES = {"recalibrated": "batch norm recalibrated", "tuned": "fine-tuned"}


@dataclass(frozen=True)
class Compared:
    """One method against another at one budget, on the same images."""

    network: str
    budget: float
    stage: str  # "recalibrated" or "tuned"
    method: str
    other: str
    seeds: int
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    p: float


def compared(records: Sequence[Record], method: str) -> list[Compared]:
    """One method against every other, over the seeds that both have."""
    found = []
    for network, budget in dict.fromkeys((r.network, r.budget) for r in records):
        here = [r for r in records if (r.network, r.budget) == (network, budget)]
        for other in dict.fromkeys(r.method for r in here if r.method != method):
            for stage in _STAGES:
                result = _paired(here, method, other, stage)
                if result is not None:
                    seeds, pair = result
                    found.append(
                        Compared(network, budget, stage, method, other, seeds, **asdict(pair))
                    )
    return found


def _paired(
    records: Sequence[Record], method: str, other: str, stage: str
) -> tuple[int, Paired] | None:
    def bits(name: str) -> dict[int, Any]:
        return {
            r.seed: unpacked(getattr(r, f"right_{stage}"), r.tested)
            for r in records
            if r.method == name and getattr(r, f"right_{stage}")
        }

    ours, theirs = bits(method), bits(other)
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    return len(seeds), paired([ours[s] for s in seeds], [theirs[s] for s in seeds])


def page(records: Sequence[Record], pairs: Sequence[Compared]) -> str:
    """Tables as Markdown: accuracy and latency of each method, then the pairs."""
    parts = []
    for network in dict.fromkeys(r.network for r in records):
        own = [r for r in records if r.network == network]
        budgets = sorted({r.budget for r in own if r.method != "dense"}, reverse=True)
        heads = ["method", *(f"{b:g}: {s}" for b in budgets for s in ("latency", *_STAGES))]
        rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
        for method in dict.fromkeys(r.method for r in own if r.method != "dense"):
            cells = []
            for budget in budgets:
                here = [r for r in own if (r.method, r.budget) == (method, budget)]
                cells += [_mean(here, "share", 3), *(_mean(here, s, percent=True) for s in _STAGES)]
            rows.append([_title(own, method), *cells])
        parts += [f"## {network}", "", _dense_line(own), "", *_markdown(rows), ""]
        remarks = [r for r in own if r.remark]
        parts += [f"- {r.method} at {r.budget:g}, seed {r.seed}: {r.remark}" for r in remarks]
        parts += [""] * bool(remarks)
        mine = [p for p in pairs if p.network == network]
        if mine:
            parts += [*_markdown(_pair_rows(mine)), ""]
    return "\n".join(parts).rstrip() + "\n"


def _dense_line(records: Sequence[Record]) -> str:
    dense = [r for r in records if r.method == "dense" and not r.remark]
    if not dense:
        return "The dense network was not tested."
    return (
        f"Dense: {_mean(dense, 'recalibrated', percent=True)} % of {dense[0].tested:,} "
        f"images, {_mean(dense, 'tuned', percent=True)} % after fine-tuning, with seed "
        f"{dense[0].seed} alone; {_mean(dense, 'dense_ms', 3)} ms. Of the pruned networks, means "
        "over seeds, ± half their range; latency is measured, as a share of the dense network's "
        f"(which against itself gives {_mean(dense, 'share', 3)}); accuracies in percent."
    )


def _title(records: Sequence[Record], method: str) -> str:
    return next((r.title for r in records if r.method == method and r.title), method)


def _mean(records: Sequence[Record], name: str, digits: int = 2, *, percent: bool = False) -> str:
    scale = 100.0 if percent else 1.0
    values = [scale * getattr(r, name) for r in records if getattr(r, name) is not None]
    if not values:
        return "-"
    half = (max(values) - min(values)) / 2
    spread = f" ± {half:.{digits}f}" if percent and len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _pair_rows(pairs: Sequence[Compared]) -> list[list[str]]:
    heads = ["budget", "stage", "against", "seeds", "difference, points", "95 %", "images", "p"]
    rows = [heads, ["---"] * 3 + ["---:"] * 5]
    for p in pairs:
        rows.append([
            f"{p.budget:g}", p.stage, p.other, str(p.seeds), f"{100 * p.difference:+.2f}",
            f"{100 * p.low:+.2f} to {100 * p.high:+.2f}", f"{p.wins} : {p.losses}", f"{p.p:.2g}",
        ])  # fmt: skip
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]


def write_report(records: Sequence[Record], directory: Path, title: str) -> list[Path]:
    """Leaves accuracy.csv, pairs.csv, accuracy.md and charts accuracy.png and .svg.

    The pairs are the first method of the records against each other one.

    Raises:
        DependencyError: matplotlib is not installed; the other files are written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    first = next((r.method for r in records if r.method != "dense"), "")
    pairs = compared([r for r in records if r.method != "dense"], first)
    files = [directory / name for name in ("accuracy.csv", "pairs.csv", "accuracy.md")]
    columns = [f.name for f in fields(Record) if f.name not in _BITS]
    _csv(files[0], columns, [asdict(r) for r in records])
    _csv(files[1], [f.name for f in fields(Compared)], [asdict(p) for p in pairs])
    files[2].write_text(f"# {title}\n\n{page(records, pairs)}", encoding="utf-8")
    charts = [directory / "accuracy.png", directory / "accuracy.svg"]
    _draw(records, charts, title)
    return [*files, *charts]


def _csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _draw(records: Sequence[Record], paths: Sequence[Path], title: str) -> None:
    networks = list(dict.fromkeys(r.network for r in records))
    figure = matplotlib_figure()(figsize=(11, 4.2 * max(len(networks), 1)), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(max(len(networks), 1), len(_STAGES), squeeze=False)
    for row, network in zip(grid, networks, strict=False):
        own = [r for r in records if r.network == network]
        for axes, stage in zip(row, _STAGES, strict=True):
            _panel(axes, own, stage)
            axes.set(
                title=f"{network}, {_STAGE_TITLES[stage]}",
                xlabel="measured latency, share of dense", ylabel="accuracy, %",
            )  # fmt: skip
        if row[0].get_legend_handles_labels()[0]:
            row[0].legend(fontsize="small")
    for path in paths:
        figure.savefig(path)


def _panel(axes: Any, records: Sequence[Record], stage: str) -> None:
    dense = [100 * v for r in records if r.method == "dense" and (v := getattr(r, stage))]
    if dense:
        axes.axhline(statistics.fmean(dense), color="black", lw=0.8, ls=":", label="dense")
    for i, method in enumerate(dict.fromkeys(r.method for r in records if r.method != "dense")):
        points = []
        for budget in sorted({r.budget for r in records if r.method == method}):
            here = [r for r in records if (r.method, r.budget) == (method, budget)]
            shares = [
                r.share for r in here if r.share is not None and getattr(r, stage) is not None
            ]
            values = [100 * getattr(r, stage) for r in here if getattr(r, stage) is not None]
            if shares:
                half = (max(values) - min(values)) / 2
                points.append((statistics.fmean(shares), statistics.fmean(values), half))
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(
                x, y, yerr=error, marker="os^vDP*Xhd<>"[i % 12], ms=5, lw=1.2, capsize=2,
                color=f"C{i % 10}", label=_title(records, method),
            )  # fmt: skip
    axes.grid(alpha=0.3)
