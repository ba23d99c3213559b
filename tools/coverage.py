"""`halp-fx bench coverage`: what can be pruned in every model of a library, and whether it's right.

Each model is examined in a process of its own (`coverage_worker`), so that a crash, a hang or a
hunger for memory ends nothing but itself. What is known is appended to a file at once; the next
run goes on from there.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from halp_fx.tools.coverage_models import Family, model_names
from halp_fx.tools.coverage_worker import Record

__all__ = [
    "Limits",
    "coverage",
    "coverage_table",
    "read_records",
    "sweep",
    "to_markdown",
    "write_csv",
]

_POLL_S = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_COLUMNS = (
    "model", "status", "error", "signal", "groups", "prunable", "inexact_groups",
    "parameters", "parameters_kept", "latency_kept", "trace_s", "groups_s", "rewrite_s",
    "total_s", "memory_gb", "inputs", "traced", "pinned", "stage", "message",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one model may take."""

    timeout_s: float = 600.0
    memory_gb: float = 8.0  # resident
    threads: int = 1  # of torch


def coverage(
    family: Family,
    folder: Path,
    *,
    models: Sequence[str] = (),
    limit: int | None = None,
    max_params: float = 100e6,
    budget: float = 0.5,
    seed: int = 0,
    limits: Limits | None = None,
    jobs: int = 1,
    again: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Record]:
    """Examine the models of a family; leaves FAMILY.jsonl, FAMILY.csv and FAMILY.md in a folder.

    Args:
        family: which models; see `model_names` for `models`, `limit`, `max_params` and `seed`.
        folder: made where it is missing; a record that its FAMILY.jsonl has is not made again.
        budget, seed, limits, jobs, again: see `sweep`.
        progress: called with a stage, what is done of it and what there is in all.

    Returns:
        The records of the models asked for; the files have those of earlier runs besides.

    Raises:
        DependencyError: the family's library is not installed.
        InputError: one of `models` is unknown.
    """
    names = model_names(
        family, limit=limit, names=models, seed=seed, max_params=max_params, progress=progress
    )
    log = folder / f"{family.value}.jsonl"
    records = sweep(
        names,
        log,
        budget=budget,
        seed=seed,
        limits=limits,
        jobs=jobs,
        again=again,
        progress=progress,
    )
    every = sorted(read_records(log), key=lambda record: record.model)
    write_csv(every, folder / f"{family.value}.csv")
    page = to_markdown(every, family)
    (folder / f"{family.value}.md").write_text(page, encoding="utf-8")
    return records


def sweep(
    models: Sequence[str],
    log: Path,
    *,
    budget: float = 0.5,
    seed: int = 0,
    limits: Limits | None = None,
    jobs: int = 1,
    again: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Record]:
    """Examine models that `log` has no record of, `jobs` at a time.

    Args:
        models: names as `load_model` takes them.
        log: a file of JSON lines; each record is appended when it is known.
        budget: share of the analytic latency.
        seed: of the random norm statistics.
        limits: for each model.
        again: also examine the models again whose record is not exact.
        progress: called with the model, models done and models in all.

    Returns:
        The records of `models`, in their order.
    """
    bounds = limits if limits is not None else Limits()
    known = {r.model: r for r in read_records(log) if not (again and r.status != "exact")}
    missing = [model for model in models if model not in known]
    log.parent.mkdir(parents=True, exist_ok=True)
    done = len(models) - len(missing)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        waiting = {
            pool.submit(run_one, model, budget=budget, seed=seed, limits=bounds): model
            for model in missing
        }
        try:
            for future in as_completed(waiting):
                record = future.result()
                known[record.model] = record
                with log.open("a", encoding="utf-8") as file:
                    file.write(record.to_json() + "\n")
                done += 1
                if progress is not None:
                    progress("models", done, len(models))
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
    return [known[model] for model in models]


def read_records(log: Path) -> list[Record]:
    """Records of a sweep's file, the last one of each model; a line cut off is left out."""
    if not log.exists():
        return []
    found: dict[str, Record] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            record = Record.from_json(line)
        except (ValueError, KeyError, TypeError):
            continue
        found[record.model] = record
    return list(found.values())


def run_one(model: str, *, budget: float, seed: int, limits: Limits) -> Record:
    """Examine one model in a process of its own, ended where it passes the limits."""
    job = {"model": model, "budget": budget, "seed": seed, "threads": limits.threads}
    with tempfile.TemporaryDirectory(prefix="halp_fx_coverage_") as folder:
        output, errors = Path(folder) / "record.json", Path(folder) / "stderr.txt"
        command = [sys.executable, "-m", "halp_fx.tools.coverage_worker", json.dumps(job)]
        start = time.perf_counter()
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                [*command, str(output)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                env={**os.environ, "OMP_NUM_THREADS": str(limits.threads)},
                start_new_session=True,
            )
            try:
                ended, peak = _watch(process, limits)
            finally:
                _end(process)
        record = Record(model)
        if output.exists():
            record = Record.from_json(output.read_text(encoding="utf-8"))
        if ended == "" and record.total_s is not None:
            return record
        record = replace(record, total_s=time.perf_counter() - start, memory_gb=peak or None)
        if ended:
            limit = f"{limits.timeout_s:g} s" if ended == "timeout" else f"{limits.memory_gb:g} GB"
            message = f"more than {limit} in the stage {record.stage!r}"
            return replace(record, status=ended, message=message)
        last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        how = f"the process ended with {process.returncode} in the stage {record.stage!r}"
        return replace(record, status="error", message=": ".join([how, *last]))


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> tuple[str, float]:
    """Wait for the end; returns "timeout", "memory" or "" and the peak memory in GB."""
    deadline = time.perf_counter() + limits.timeout_s
    peak = 0.0
    while True:
        try:
            process.wait(_POLL_S)
            return "", peak
        except subprocess.TimeoutExpired:
            pass
        peak = max(peak, _resident_gb(process.pid))
        if peak > limits.memory_gb:
            return "memory", peak
        if time.perf_counter() > deadline:
            return "timeout", peak


def _resident_gb(pid: int) -> float:
    """Resident memory of a process; 0 where the system has no /proc."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0.0
    return int(fields[1]) * _PAGE / (1 << 30)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started."""
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


# --- what is shown and written ---------------------------------------------------------------

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
        "- prunable: share of the output channels of convolutions and linear layers that can go",
        "- error: largest difference between the pruned network and the dense one with the removed",
        "  channels masked, relative to the output's magnitude, in float64 at two batch sizes",
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
