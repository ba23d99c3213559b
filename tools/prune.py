"""`halp-fx prune`: a smaller network, its ONNX file and a report, in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import fx, nn

import halp_fx
from halp_fx.budget import Budget, parse_budget
from halp_fx.detection import has_regions, is_detector
from halp_fx.errors import BudgetError, InputError, LatencyError, RecipeError
from halp_fx.latency import (
    Analytic,
    OnnxRuntime,
    Source,
    Stored,
    Torch,
    TorchCompile,
    resolve_backend,
)
from halp_fx.recipe import save_weights
from halp_fx.report import render_markdown, summarize, to_json
from halp_fx.tools.console import err, out, progress_bars
from halp_fx.types import Plan

__all__ = [
    "budget_of",
    "further_latencies",
    "latencies_of",
    "prune",
    "summary_table",
    "write_report",
]

Latency = str | Path | Source | None  # a back-end by its name, a table by its path

# What may be left besides the reports; each is replaced by a new file, never written into.
_NETWORK_FILES = ("model.safetensors", "weights.safetensors", "model.onnx", "model.onnx.data")
_BACKENDS = tuple(made.name for made in (Torch, TorchCompile, OnnxRuntime, Analytic))


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
            raise BudgetError("there is no budget: give --budget, --params, --macs or --memory")
        return Budget(params=params, macs=macs, memory=memory)
    return replace(parse_budget(text), params=params, macs=macs, memory=memory)


def prune(
    model: nn.Module,
    budget: Budget,
    example_inputs: Any,
    directory: Path,
    *,
    latency: Latency = None,
    onnx: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Prunes `model` and leaves what came out in `directory`.

    Writes `model.safetensors`, `model.onnx` (unless `onnx` is False), `report.md`, `report.json`.
    Of a network that `halp_fx.save` can't describe, `weights.safetensors` has the state dict in
    place of the first. A file of an earlier run that this one doesn't replace stays, with a
    warning. Of a detector the files hold the tensor part, which `halp_fx.restore_core` puts back;
    where regions are pooled between the parts, there is no ONNX file of it.

    Args:
        latency: as `halp_fx.compile` takes it; see `latencies_of`.
        options: further arguments of `halp_fx.compile`.

    Raises:
        HalpError: a stage failed; nothing has been written then, unless it was the export or the
            writing itself.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; name a folder for the results")
    with progress_bars() as progress:
        pruned = halp_fx.compile(
            model, budget, example_inputs, latency=latency, progress=progress, **(options or {})
        )
    plan = halp_fx.plan_of(pruned)
    directory.mkdir(parents=True, exist_ok=True)
    before = _stamps(directory)
    write_report(plan, directory)
    out().print(summary_table(plan))
    detector = is_detector(model)
    in_parts = detector and has_regions(model)
    try:
        _write_network(
            halp_fx.core_of(pruned) if detector else pruned, directory, onnx=onnx and not in_parts
        )
    finally:
        _tell_files(directory, before)
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


def _write_network(network: fx.GraphModule, directory: Path, *, onnx: bool) -> None:
    try:
        halp_fx.save(network, directory / "model.safetensors")
    except RecipeError as error:
        save_weights(network, directory / "weights.safetensors")
        err().print(
            f"[yellow]no model.safetensors: {escape(str(error))}. weights.safetensors has the "
            "state dict alone, for code of your own with these widths[/]"
        )
    if not onnx:
        return
    with progress_bars() as progress, torch.no_grad():
        progress("export", 0, 1)
        halp_fx.export_onnx(network, directory / "model.onnx")


def _stamps(directory: Path) -> dict[Path, tuple[int, int]]:
    """The files of a network in the folder, and by what a new one differs from an older one."""
    paths = [directory / name for name in _NETWORK_FILES]
    states = {path: path.stat() for path in paths if path.is_file()}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in states.items()}


def _tell_files(directory: Path, before: Mapping[Path, tuple[int, int]]) -> None:
    after = _stamps(directory)
    written = [path for path, stamp in after.items() if stamp != before.get(path)]
    for path in sorted([*written, directory / "report.json", directory / "report.md"]):
        out().print(f"wrote {escape(str(path))}")
    for path in sorted(after.keys() - written):
        err().print(
            f"[yellow]warning: {escape(str(path))} was there before and is not of this run[/]"
        )


def latencies_of(
    latency: str | None, also: Sequence[str] = (), foreign: bool = False
) -> tuple[Latency, list[tuple[Latency, Budget]]]:
    """What `--latency` names, and each `--also` with its budget: back-ends, or files of tables.

    Args:
        latency: as given; None: the default.
        also: each LATENCY=BUDGET, as given.
        foreign: accept the tables that are of another device (`--foreign`).

    Raises:
        InputError: there is no such back-end and no such file; a text of `also` is no pair; or
            `foreign` has no meaning. The message names the option.
        BudgetError: the budget in one of `also` can't be parsed or is out of range.
        LatencyError: a table can't be used.
    """
    pairs = [_pair(text) for text in also]
    named = [None if latency is None else _named(latency, f"--latency {latency}")]
    named += [_named(name, f"--also {text}") for text, (name, _) in zip(also, pairs, strict=True)]
    own, *others = _tables_of_others(named) if foreign else named
    return own, [(other, budget) for other, (_, budget) in zip(others, pairs, strict=True)]


def _pair(text: str) -> tuple[str, Budget]:
    # From the right: a path may have the sign in it, a budget has none.
    name, _, budget = (part.strip() for part in text.rpartition("="))
    if not name or not budget:
        raise InputError(
            f"--also {text}: give LATENCY=BUDGET, as --also torch=0.7 or --also board.sqlite=4ms"
        )
    try:
        return name, parse_budget(budget)
    except BudgetError as error:
        raise BudgetError(f"--also {text}: {error}") from error


def _named(text: str, option: str) -> Latency:
    if text in _BACKENDS:
        return text
    if Path(text).is_file():
        return Path(text)
    if "/" in text or text.endswith(".sqlite"):
        raise InputError(
            f"{option}: there is no latency table {text}; make one with halp-fx profile"
        )
    raise InputError(
        f"{option}: there is no back-end {text!r} and no such file; give {', '.join(_BACKENDS)} "
        "or the file of a table"
    )


def _tables_of_others(named: Sequence[Latency]) -> list[Latency]:
    """The same, where the tables of other devices stand for these devices."""
    tables = [each for each in named if isinstance(each, Path)]
    if not tables:
        raise InputError("--foreign is for --latency with the file of a table, or --also with one")
    # Of one table alone the times of another device are meant, even where it has this one's too.
    foreign = tables if len(tables) == 1 else [t for t in tables if not _is_of_this_device(t)]
    if not foreign:
        raise InputError(
            f"--foreign: {' and '.join(map(str, tables))} are of this device: leave it out"
        )
    return [resolve_backend(t, allow_foreign=True) if t in foreign else t for t in named]


def _is_of_this_device(table: Path) -> bool:
    try:
        return not isinstance(resolve_backend(table).backend, Stored)
    except LatencyError:
        return False


def write_report(plan: Plan, directory: Path) -> None:
    """Leaves `report.md` and `report.json` in a folder that exists."""
    (directory / "report.md").write_text(render_markdown(plan), encoding="utf-8")
    (directory / "report.json").write_text(to_json(plan), encoding="utf-8")


def summary_table(plan: Plan) -> Table:
    """The figures of a plan in a few rows."""
    summary = summarize(plan)
    latency, state = summary["latency_ms"], summary["state_size"]
    table = Table(title=f"{summary['model'] or 'network'}, pruned", show_header=False)
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
    for name, figures, within in further_latencies(plan):
        met = "[green]met[/]" if within else "[red]missed[/]"
        table.add_row(f"also {escape(name)}, {met}", figures)
    table.add_row("channels scored by", summary["saliency"])
    if state is not None:
        table.add_row("numbers in the state dict", f"{state['dense']:,} -> {state['kept']:,}")
    table.add_row("saliency kept", f"{100 * summary['value_kept']:.1f} %")
    table.add_row("certified gap to the best choice", f"{100 * plan.gap:.2f} %")
    return table


def further_latencies(plan: Plan) -> list[tuple[str, str, bool]]:
    """Of each latency that `also` limits: its back-end, its figures, and whether it is met.

    Where several have the same back-end, they are numbered in the order given.
    """
    entries = plan.report.get("also", ())
    backends = [entry["backend"] for entry in entries]
    found = []
    for i, (name, entry) in enumerate(zip(backends, entries, strict=True)):
        if backends.count(name) > 1:
            name = f"{name} ({backends[: i + 1].count(name)})"
        if "measured_ms" in entry:
            spread = f" +- {entry['measured_spread_ms']:.3f}"
            ms, most, how = entry["measured_ms"], entry["measured_budget_ms"], "measured"
        else:
            spread = ""
            ms, most, how = entry["predicted_ms"], entry["budget_ms"], "by the table"
        figures = f"{ms:.3f}{spread} of {most:.3f} ms {how}"
        found.append((name, figures, bool(entry.get("met", ms <= most))))
    return found
