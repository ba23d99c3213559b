"""Reading what the runner of a bundle measured into a latency table."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, LatencyError
from .backend import Timing
from .device import fingerprint_text
from .table import LatencyTable

__all__ = ["MANIFEST_FORMAT", "RESULTS_FORMAT", "VERSION", "import_results"]

# The runner has these too: it stands alone.
MANIFEST_FORMAT = "halp_fx kernel bundle"
RESULTS_FORMAT = "halp_fx kernel timings"
VERSION = 1

_MAX_SAMPLES = 2**31  # what SQLite stores is far above


def import_results(
    path: str | os.PathLike[str],
    table: LatencyTable,
    *,
    manifest: str | os.PathLike[str] | None = None,
) -> str:
    """Read what `run.py` measured into a latency table: all of it, or nothing.

    The table then serves as `halp_fx.compile(model, budget, x, latency=table)`. On another device
    than the one measured it is for look-up only. Timings that the table has already for the same
    kernels and device are replaced.

    Args:
        path: the results file of a run that came to its end.
        table: where the timings go.
        manifest: the bundle, or its `manifest.json`: also check that the results are of this
            bundle.

    Returns:
        the fingerprint of the device and its settings, under which the timings are in the table.

    Raises:
        InputError: `table` is no `LatencyTable`.
        LatencyError: the file is empty, cut off, damaged, of another format or not complete, or
            of another bundle; the message names the line. Or the table can't be written.

    Example:
        >>> table = LatencyTable.open("phone.sqlite")  # doctest: +SKIP
        >>> fingerprint = import_results("bundle/results.jsonl", table)  # doctest: +SKIP
        >>> small = halp_fx.compile(net, 0.5, x, latency=table)  # doctest: +SKIP
    """
    if not isinstance(table, LatencyTable):
        raise InputError(
            f"table is {table!r}: pass a latency table, as halp_fx.LatencyTable.open(path) gives"
        )
    source = Path(path)
    lines = _read(source, "pass the results.jsonl that run.py wrote").split(b"\n")
    header = _results_header(source, lines[0])
    timings = _timings(source, lines)
    wanted = header["kernels"]
    if manifest is not None:
        _check_bundle(source, header, set(timings), Path(manifest))
    if len(timings) > wanted:
        raise _damaged(source, wanted + 2, f"the bundle has {wanted} kernels")
    if len(timings) < wanted:
        raise LatencyError(
            f"{source} has {len(timings)} of {wanted} kernels: run run.py again on the device, "
            "which goes on where it was"
        )
    fingerprint = fingerprint_text(header["fingerprint"])
    table.mark_imported(fingerprint)  # first: without it the timings would be refused as foreign
    table.put_all(timings, fingerprint)
    return fingerprint


def _read(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise LatencyError(f"{path} can't be read ({e}): {advice}") from e


def _results_header(path: Path, line: bytes) -> dict[str, Any]:
    """The first line of a results file."""
    if not line:
        raise LatencyError(f"{path} is empty: run run.py on the device first")
    found = _record(line)
    if found is None or found.get("format") != RESULTS_FORMAT:
        raise LatencyError(
            f"{path} is no results file of a bundle (line 1): pass the results.jsonl that run.py "
            "wrote"
        )
    if found.get("version") != VERSION:
        raise LatencyError(
            f"{path} has version {found.get('version')!r}, and this halp_fx reads {VERSION} "
            "(line 1): use the halp_fx that wrote the bundle, or write it again and measure it"
        )
    fingerprint = found.get("fingerprint")
    if not isinstance(fingerprint, dict) or fingerprint.get("backend") != "onnxruntime":
        raise _damaged(path, 1, "the header lacks the device")
    if not all(value is None or isinstance(value, str | int) for value in fingerprint.values()):
        raise _damaged(path, 1, "the device is described by more than texts and whole numbers")
    if not _is_count(found.get("kernels")):
        raise _damaged(path, 1, "the header lacks the number of kernels")
    return found


def _timings(path: Path, lines: list[bytes]) -> dict[str, Timing]:
    """The lines after the first; the last of `lines` is what follows the last line's end."""
    if lines[-1]:
        raise LatencyError(
            f"{path} is cut off in line {len(lines)}: run run.py again on the device, which goes "
            "on where it was, and copy the file when it has ended"
        )
    timings: dict[str, Timing] = {}
    for number, line in enumerate(lines[1:-1], 2):
        record = _record(line)
        if record is None:
            raise _damaged(path, number, "no JSON object")
        key = record.get("key")
        if not isinstance(key, str) or not key or not _encodes(key):
            raise _damaged(path, number, f"key is {key!r}")
        if key in timings:
            raise _damaged(path, number, f"kernel {key} occurs twice")
        timings[key] = _timing(path, number, record)
    return timings


def _timing(path: Path, number: int, record: Mapping[str, Any]) -> Timing:
    for name in ("median_ms", "spread_ms"):
        if isinstance(record.get(name), bool) or not isinstance(record.get(name), int | float):
            raise _damaged(path, number, f"{name} is {record.get(name)!r}")
    if not _is_count(record.get("samples")):
        raise _damaged(path, number, f"samples is {record.get('samples')!r}")
    try:
        return Timing(float(record["median_ms"]), float(record["spread_ms"]), record["samples"])
    except (LatencyError, OverflowError) as e:
        raise _damaged(path, number, str(e)) from e


def _check_bundle(path: Path, header: Mapping[str, Any], keys: set[str], manifest: Path) -> None:
    if manifest.is_dir():
        manifest = manifest / "manifest.json"
    data = _read(manifest, "pass the bundle, or its manifest.json")
    found = _record(data)
    if found is None or found.get("format") != MANIFEST_FORMAT or not found.get("complete"):
        raise LatencyError(f"{manifest} is not the manifest of a complete bundle: write it again")
    same = hashlib.sha256(data).hexdigest() == header.get("bundle")
    if not same or not keys <= {entry["key"] for entry in found["kernels"]}:
        raise LatencyError(
            f"{path} has the results of another bundle than {manifest.parent}: pass the bundle "
            "that was measured, or measure this one"
        )


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_SAMPLES


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _damaged(path: Path, number: int, problem: str) -> LatencyError:
    return LatencyError(
        f"{path} is damaged in line {number} ({problem}): copy it from the device again, or "
        "measure again"
    )
