"""`halp-fx prune`: a smaller network, its ONNX file and a report, in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

import halp_fx
from halp_fx.budget import Budget, parse_budget
from halp_fx.detection import has_regions, is_detector
from halp_fx.errors import BudgetError, InputError
from halp_fx.latency import Source, resolve_backend
from halp_fx.report import render_markdown, summarize, to_json
from halp_fx.tools.console import err, out, progress_bars
from halp_fx.types import Plan

__all__ = ["budget_of", "latency_of", "prune", "summary_table", "write_report"]


def budget_of(
    text: str | None,
    *,
    params: float | None = None,
    macs: float | None = None,
    memory: float | None = None,
) -> Budget:
    """The budget: `0.5` is a share of the latency, `4ms` a time; further limits besides.

    Raises:
        BudgetError: none of them is given, or one can't be parsed or is out of range.
    """
    if text is None:
        if params is None and macs is None and memory is None:
            raise BudgetError("nothing is limited: give --budget, --params, --macs or --memory")
        return Budget(params=params, macs=macs, memory=memory)
    return replace(parse_budget(text), params=params, macs=macs, memory=memory)


def prune(
    model: nn.Module,
    budget: Budget,
    example_inputs: Any,
    directory: Path,
    *,
    latency: str | Path | Source | None = None,
    onnx: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Prunes `model` and leaves what came out in `directory`.

    Writes `model.safetensors`, `model.onnx` (unless `onnx` is False), `report.md`, `report.json`.
    Of a detector the files hold the tensor part, which `halp_fx.restore_core` puts back; where
    regions are pooled between the parts, there is no ONNX file of it.

    Args:
        latency: as `halp_fx.compile` takes it; see `latency_of`.
        options: further arguments of `halp_fx.compile`.

    Raises:
        HalpError: a stage failed; nothing has been written then, unless it was the export.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; name a folder for the results")
    with progress_bars() as progress:
        pruned = halp_fx.compile(
            model, budget, example_inputs, latency=latency, progress=progress, **(options or {})
        )
        plan = halp_fx.plan_of(pruned)
        directory.mkdir(parents=True, exist_ok=True)
        write_report(plan, directory)
        detector = is_detector(model)
        core = halp_fx.core_of(pruned) if detector else pruned
        halp_fx.save(core, directory / "model.safetensors")
        in_parts = detector and has_regions(model)
        if onnx and not in_parts:
            progress("export", 0, 1)
            with torch.no_grad():
                halp_fx.export_onnx(core, directory / "model.onnx")
            progress("export", 1, 1)
    out().print(summary_table(plan))
    for path in sorted(directory.iterdir()):
        if path.name.startswith(("model.", "report.")):
            out().print(f"wrote {escape(str(path))}")
    if detector:
        err().print("[dim]model.* is the tensor part: halp_fx.restore_core puts it back.[/]")
    if onnx and in_parts:
        err().print("[yellow]no ONNX file: export backbone and heads one by one, see the docs[/]")
    if plan.report.get("reconstructed_layers"):
        advice = "Weights were fitted to the dense network: check accuracy, fine-tune if it is low."
    else:
        advice = "Weights that are left are the dense network's: fine-tune before use."
    err().print(f"[dim]{advice}[/]")
    return plan


def latency_of(text: str | None, foreign: bool = False) -> str | Path | Source | None:
    """What `--latency` names: a back-end, or the file of a table.

    Args:
        text: as given.
        foreign: accept a table of another device (`--foreign`).

    Raises:
        InputError: it looks like a file, and there is none; or `foreign` has no meaning.
    """
    named = text is not None and ("/" in text or text.endswith(".sqlite"))
    if text is None or not (named or (foreign and Path(text).is_file())):
        if foreign:
            raise InputError("--foreign is for --latency with the file of a table")
        return text
    if not Path(text).is_file():
        raise InputError(f"there is no latency table {text}; make one with halp-fx profile")
    return resolve_backend(Path(text), allow_foreign=True) if foreign else Path(text)


def write_report(plan: Plan, directory: Path) -> None:
    """Leaves `report.md` and `report.json` in a folder that exists."""
    (directory / "report.md").write_text(render_markdown(plan), encoding="utf-8")
    (directory / "report.json").write_text(to_json(plan), encoding="utf-8")


def summary_table(plan: Plan) -> Table:
    """The figures of a plan in a few rows."""
    summary = summarize(plan)
    latency, state = summary["latency_ms"], summary["state_size"]
    table = Table(title=f"{summary['model']}, pruned", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("dense latency by the table", f"{latency['dense']:.3f} ms")
    table.add_row("pruned latency by the table", f"{latency['predicted']:.3f} ms")
    budget, measured = latency["budget"], summary["measured_ms"]
    if measured is not None:
        table.add_row("dense latency measured", f"{measured['dense']:.3f} ms")
        spread = "" if measured["spread"] is None else f" +- {measured['spread']:.3f}"
        table.add_row("pruned latency measured", f"{measured['pruned']:.3f}{spread} ms")
        budget = measured["budget"]
    met = "[green]met[/]" if summary["met"] else "[red]missed[/]"
    table.add_row(f"budget, {met}", f"{budget:.3f} ms")
    table.add_row("channels scored by", summary["saliency"])
    table.add_row("numbers in the state dict", f"{state['dense']:,} -> {state['kept']:,}")
    table.add_row("saliency kept", f"{100 * summary['value_kept']:.1f} %")
    table.add_row("certified gap to the best choice", f"{100 * plan.gap:.2f} %")
    return table
