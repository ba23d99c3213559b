"""One record for each network, method, budget and seed; a run that was cut off goes on."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InputError

__all__ = ["Journal", "Record", "packed", "unpacked"]

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Key: TypeAlias = tuple[str, str, float, int]


@dataclass(frozen=True)
class Record:
    """What came out; None where a figure could not be had, and the remark says why."""

    network: str
    method: str
    budget: float  # share of the dense latency that was asked for
    seed: int
    # Digest of the settings, the kind of device for training, the batch of the latency, the default
    # scores and the fingerprint of the back-end (with its version and its device); of no other
    # package's version. Records with another digest don't count.
    settings: str
    title: str = ""
    share: float | None = None  # measured latency, of the dense one's
    dense_ms: float | None = None
    pruned_ms: float | None = None
    knob: float | None = None  # what the method was asked for, so that the budget is met
    variant: str = ""  # of a method that has several, the one chosen on kept training images
    params_share: float | None = None
    recalibrated: float | None = None  # test accuracy after batch norm recalibration alone
    tuned: float | None = None  # and after fine-tuning
    rate: float | None = None  # the highest learning rate of that
    tested: int = 0  # test images
    seconds: float | None = None
    remark: str = ""
    right_recalibrated: str = ""  # which test images were right, see `unpacked`
    right_tuned: str = ""

    @property
    def key(self) -> Key:
        """What the record is about."""
        return self.network, self.method, self.budget, self.seed


class Journal:
    """Records in a file of JSON lines; each is on the disk before the next is begun.

    Args:
        path: the file; its folder is made if needed.
        settings: records with another digest are left alone and not given back.

    Raises:
        InputError: the file has lines that are no records. A last line that was cut off is fine.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder) / "records.jsonl", "a")
        ...     journal.add(Record("net", "joint", 0.5, 0, "a", tuned=0.9))
        ...     [r.tuned for r in Journal(journal.path, "a").records]
        [0.9]
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings
        found = (r for r in _lines(path) if r.settings == settings)
        self._records: dict[Key, Record] = {record.key: record for record in found}

    @property
    def records(self) -> list[Record]:
        """The latest one of each key, in the order in which they were first made."""
        return list(self._records.values())

    def find(self, network: str, method: str, budget: float, seed: int) -> Record | None:
        """The record of these, if there is one."""
        return self._records.get((network, method, budget, seed))

    def add(self, record: Record) -> None:
        """Write a record to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.read_bytes() if self.path.is_file() else b""
        with self.path.open("a", encoding="utf-8") as file:
            if before and not before.endswith(b"\n"):  # a run was cut off while it wrote
                file.write("\n")
            file.write(json.dumps(asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._records[record.key] = record


def _lines(path: Path) -> Iterator[Record]:
    if not path.is_file():
        return
    known = {field.name for field in fields(Record)}
    needed = {f.name for f in fields(Record) if f.default is f.default_factory is MISSING}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values: Any = json.loads(line)
        except json.JSONDecodeError as error:
            if _is_torn(line):
                continue
            raise InputError(
                f"line {number} of {path} is no record: {error}; mend it or move the file away"
            ) from error
        if not isinstance(values, dict) or not needed <= set(values):
            raise InputError(f"line {number} of {path} is no record: mend it or move the file away")
        yield Record(**{name: value for name, value in values.items() if name in known})


def _is_torn(line: str) -> bool:
    """Whether a line is the beginning of a record that was being written when the run ended."""
    return line.startswith('{"network"') and not line.endswith("}")


def packed(right: BoolArray) -> str:
    """Booleans as text, eight to a byte."""
    return base64.b64encode(np.packbits(right).tobytes()).decode("ascii")


def unpacked(text: str, count: int) -> BoolArray:
    """The booleans that `packed` made text of: (count,).

    Example:
        >>> unpacked(packed(np.array([True, False, True])), 3).tolist()
        [True, False, True]
    """
    bits = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    found: BoolArray = np.unpackbits(bits, count=count).astype(bool)
    return found
