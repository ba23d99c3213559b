"""`halp-fx bench coverage`: what can be pruned in every model of a library, and whether it's right.

Each model is examined in a process of its own (`coverage_worker`), so that a crash, a hang or a
hunger for memory ends nothing but itself. What is known is appended to a file at once; the next
run goes on from there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from halp_fx.tools.coverage_models import Family, model_names
from halp_fx.tools.coverage_report import to_markdown, write_csv
from halp_fx.tools.coverage_worker import Record

__all__ = [
    "Limits",
    "coverage",
    "read_records",
    "run_one",
    "sweep",
]

_POLL_S = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


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
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        waiting = [
            pool.submit(run_one, model, budget=budget, seed=seed, limits=bounds, stop=stop)
            for model in missing
        ]
        try:
            for future in as_completed(waiting):
                record = future.result()
                known[record.model] = record
                _append(log, record)
                done += 1
                if progress is not None:
                    progress("models", done, len(models))
        except BaseException:
            stop.set()
            for future in waiting:
                future.cancel()
            raise
    return [known[model] for model in models]


def _append(log: Path, record: Record) -> None:
    with log.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a line that was cut off must not swallow this one
                file.write(b"\n")
        file.write(record.to_json().encode() + b"\n")


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


def run_one(
    model: str,
    *,
    budget: float,
    seed: int,
    limits: Limits,
    stop: threading.Event | None = None,
) -> Record:
    """Examine one model in a process of its own, ended where it passes the limits.

    Args:
        stop: ends the process when it is set, as on Ctrl-C.
    """
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
                ended, peak = _watch(process, limits, stop)
            finally:
                _end(process)
        record = Record(model)
        if output.exists():
            record = Record.from_json(output.read_text(encoding="utf-8"))
        if record.total_s is not None:  # done, even if its end took too long
            return record
        record = replace(record, total_s=time.perf_counter() - start, memory_gb=peak or None)
        if ended:
            limit = f"{limits.timeout_s:g} s" if ended == "timeout" else f"{limits.memory_gb:g} GB"
            message = f"more than {limit} in the stage {record.stage!r}"
            return replace(record, status=ended, message=message)
        last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        how = f"the process ended with {process.returncode} in the stage {record.stage!r}"
        return replace(record, status="error", message=": ".join([how, *last]))


def _watch(
    process: subprocess.Popen[bytes], limits: Limits, stop: threading.Event | None
) -> tuple[str, float]:
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
        if time.perf_counter() > deadline or (stop is not None and stop.is_set()):
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
