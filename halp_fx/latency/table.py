"""The latency table: an SQLite file of what each kernel takes on each device."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import platformdirs

from ..errors import LatencyError
from .backend import Timing
from .calibration import Calibration

__all__ = ["SCHEMA_VERSION", "Entry", "LatencyTable", "default_table_path"]

SCHEMA_VERSION = 2
_FORMAT = "halp_fx latency table"
_BUSY_TIMEOUT_S = 30.0
_IMPORTED = "imported: "  # and the fingerprint: a name in the table of facts

_CALIBRATIONS = """CREATE TABLE calibrations (
        fingerprint INTEGER NOT NULL REFERENCES fingerprints (id),
        network TEXT NOT NULL,
        offset_ms REAL NOT NULL,
        scale REAL NOT NULL,
        weights_ms_per_mb REAL NOT NULL,
        networks INTEGER NOT NULL,
        held_out INTEGER NOT NULL,
        median_error REAL NOT NULL,
        worst_error REAL NOT NULL,
        rank_correlation REAL NOT NULL,
        PRIMARY KEY (fingerprint, network)
    ) WITHOUT ROWID"""
_REFERENCES = """CREATE TABLE reference_times (
        fingerprint INTEGER PRIMARY KEY REFERENCES fingerprints (id),
        ms REAL NOT NULL
    )"""
# One statement each: sqlite3's executescript would commit the transaction they run in.
_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE fingerprints (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE)",
    """CREATE TABLE timings (
        fingerprint INTEGER NOT NULL REFERENCES fingerprints (id),
        key TEXT NOT NULL,
        median_ms REAL NOT NULL,
        spread_ms REAL NOT NULL,
        samples INTEGER NOT NULL,
        PRIMARY KEY (fingerprint, key)
    ) WITHOUT ROWID""",
    _CALIBRATIONS,
    _REFERENCES,
)


@dataclass(frozen=True)
class Entry:
    """One row of a table."""

    key: str  # signature of the kernel
    fingerprint: str  # device and settings
    timing: Timing


def default_table_path() -> Path:
    """Where timings are cached: the folder `$HALP_FX_CACHE`, or the user's cache folder."""
    folder = os.environ.get("HALP_FX_CACHE")
    return Path(folder or platformdirs.user_cache_dir("halp_fx")) / "latency.sqlite"


class LatencyTable:
    """Timings by kernel and device fingerprint, kept in one SQLite file.

    Each write is a transaction of its own: a run that is killed loses nothing it has written, and
    several processes may read and write one file. Make tables with `LatencyTable.open`.

    Example:
        >>> with LatencyTable.open(":memory:") as table:
        ...     table.put("conv", "{}", Timing(median_ms=1.5, spread_ms=0.1, samples=9))
        ...     table.get("conv", "{}").median_ms
        1.5
    """

    def __init__(self, connection: sqlite3.Connection, path: str) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._path = path
        self._close = weakref.finalize(self, connection.close)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Open a table, or make an empty one where there is no file.

        Args:
            path: the file; its folder is made if needed. ":memory:" keeps the table in memory.

        Raises:
            LatencyError: the file can't be opened, is damaged, belongs to another program, or was
                written by a newer halp_fx. The message says what to do.
        """
        name = os.fspath(path)
        with _explained(name):
            connection = _connect(name)
        try:
            with _explained(name):
                _ensure_schema(connection, name)
        except BaseException:
            connection.close()
            raise
        return cls(connection, name)

    @property
    def path(self) -> str:
        """The file, as given to `open`."""
        return self._path

    def get(self, key: str, fingerprint: str) -> Timing | None:
        """The timing of a kernel on a device, or None where it was not measured.

        Raises:
            LatencyError: the file is damaged or locked.
        """
        rows = self._rows(
            "SELECT median_ms, spread_ms, samples FROM timings WHERE key = ? AND fingerprint = "
            "(SELECT id FROM fingerprints WHERE text = ?)",
            (key, fingerprint),
        )
        return Timing(*rows[0]) if rows else None

    def put(self, key: str, fingerprint: str, timing: Timing) -> None:
        """Write a timing, in place of an older one of the same kernel and device.

        Raises:
            LatencyError: the file is damaged, locked or read-only.
        """
        self.put_all({key: timing}, fingerprint)

    def put_all(self, timings: Mapping[str, Timing], fingerprint: str) -> None:
        """Write the timings of several kernels at once: all of them or none.

        Raises:
            LatencyError: the file is damaged, locked or read-only.
        """
        if not timings:
            return
        rows = [
            (key, timing.median_ms, timing.spread_ms, timing.samples, fingerprint)
            for key, timing in timings.items()
        ]
        with self._lock, _explained(self._path), _transaction(self._connection) as connection:
            connection.execute(
                "INSERT OR IGNORE INTO fingerprints (text) VALUES (?)", (fingerprint,)
            )
            connection.executemany(
                "INSERT OR REPLACE INTO timings "
                "SELECT id, ?, ?, ?, ? FROM fingerprints WHERE text = ?",
                rows,
            )

    def remove(self, keys: Iterable[str], fingerprint: str) -> None:
        """Forget timings of a device; keys that it does not have are no error.

        Raises:
            LatencyError: the file is damaged, locked or read-only.
        """
        rows = [(key, fingerprint) for key in keys]
        with self._lock, _explained(self._path), _transaction(self._connection) as connection:
            connection.executemany(
                "DELETE FROM timings WHERE key = ? AND fingerprint = "
                "(SELECT id FROM fingerprints WHERE text = ?)",
                rows,
            )

    def calibration(self, network: str, fingerprint: str) -> Calibration | None:
        """How sums of a network's kernels relate to the whole of it, or None where not measured.

        Args:
            network: what identifies the network.
            fingerprint: the device and settings.

        Raises:
            LatencyError: the file is damaged or locked.
        """
        rows = self._rows(
            "SELECT offset_ms, scale, weights_ms_per_mb, networks, held_out, median_error, "
            "worst_error, rank_correlation FROM calibrations WHERE network = ? AND fingerprint = "
            "(SELECT id FROM fingerprints WHERE text = ?)",
            (network, fingerprint),
        )
        return Calibration(*rows[0]) if rows else None

    def put_calibration(self, network: str, fingerprint: str, found: Calibration) -> None:
        """Write a calibration, in place of an older one of the same network and device.

        Raises:
            LatencyError: the file is damaged, locked or read-only.
        """
        with self._lock, _explained(self._path), _transaction(self._connection) as connection:
            connection.execute(
                "INSERT OR IGNORE INTO fingerprints (text) VALUES (?)", (fingerprint,)
            )
            connection.execute(
                "INSERT OR REPLACE INTO calibrations "
                "SELECT id, ?, ?, ?, ?, ?, ?, ?, ?, ? FROM fingerprints WHERE text = ?",
                (network, *dataclasses.astuple(found), fingerprint),
            )

    def reference_ms(self, fingerprint: str, found: float) -> float:
        """What the reference kernel took when the device was first measured.

        Args:
            fingerprint: the device and settings.
            found: what it takes now, which is kept where the table has nothing yet.

        Raises:
            LatencyError: the file is damaged, locked or read-only.
        """
        with self._lock, _explained(self._path), _transaction(self._connection) as connection:
            connection.execute(
                "INSERT OR IGNORE INTO fingerprints (text) VALUES (?)", (fingerprint,)
            )
            connection.execute(
                "INSERT OR IGNORE INTO reference_times SELECT id, ? FROM fingerprints "
                "WHERE text = ?",
                (found, fingerprint),
            )
            row = connection.execute(
                "SELECT ms FROM reference_times JOIN fingerprints ON fingerprint = id "
                "WHERE text = ?",
                (fingerprint,),
            ).fetchone()
        return float(row[0])

    def fingerprints(self) -> tuple[str, ...]:
        """The devices and settings that the table has timings of, oldest first.

        Raises:
            LatencyError: the file is damaged or locked.
        """
        query = (
            "SELECT text FROM fingerprints WHERE id IN (SELECT fingerprint FROM timings) "
            "ORDER BY id"
        )
        return tuple(row[0] for row in self._rows(query))

    def entries(self, fingerprint: str | None = None) -> tuple[Entry, ...]:
        """All rows, or those of one device, ordered by device and key.

        Raises:
            LatencyError: the file is damaged or locked.
        """
        rows = self._rows(
            "SELECT key, text, median_ms, spread_ms, samples FROM timings "
            "JOIN fingerprints ON fingerprint = id "
            "WHERE ?1 IS NULL OR text = ?1 ORDER BY id, key",
            (fingerprint,),
        )
        return tuple(Entry(key, text, Timing(*figures)) for key, text, *figures in rows)

    def mark_imported(self, fingerprint: str) -> None:
        """Note that the timings of a device were brought here on purpose, to be looked up.

        Raises:
            LatencyError: the file is damaged, locked or read-only.
        """
        with self._lock, _explained(self._path), _transaction(self._connection) as connection:
            connection.execute(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)", (_IMPORTED + fingerprint, "1")
            )

    def is_imported(self, fingerprint: str) -> bool:
        """Whether the timings of a device were brought here on purpose; see `mark_imported`.

        Raises:
            LatencyError: the file is damaged or locked.
        """
        return bool(self._rows("SELECT 1 FROM meta WHERE name = ?", (_IMPORTED + fingerprint,)))

    def close(self) -> None:
        """Close the file; nothing is lost by not calling it."""
        self._close()

    def __enter__(self) -> LatencyTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LatencyTable({self._path!r})"

    def _rows(self, query: str, arguments: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock, _explained(self._path):
            return self._connection.execute(query, arguments).fetchall()


def _connect(path: str) -> sqlite3.Connection:
    if path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    # isolation_level None: transactions are begun by _transaction alone. The default rollback
    # journal, not WAL: the table stays one file that can be copied, on network drives too.
    connection = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    # IMMEDIATE takes the write lock first, so that two writers wait instead of failing half-way.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _names(connection: sqlite3.Connection) -> set[str]:
    return {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}


def _ensure_schema(connection: sqlite3.Connection, path: str) -> None:
    """Make the schema in an empty file; refuse a file that is not a table of this version."""
    if not _names(connection):
        with _transaction(connection):
            if not _names(connection):  # another process may have been faster
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.executemany(
                    "INSERT INTO meta VALUES (?, ?)",
                    [("format", _FORMAT), ("schema_version", str(SCHEMA_VERSION))],
                )
        return
    meta: dict[str, str] = {}
    if "meta" in _names(connection):
        columns = [row[1] for row in connection.execute("PRAGMA table_info(meta)")]
        if columns == ["name", "value"]:
            meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
    if meta.get("format") != _FORMAT:
        raise LatencyError(
            f"{path} is an SQLite file of another program, not a latency table: pass another path"
        )
    version = meta.get("schema_version", "")
    if not version.isdecimal():
        raise _damaged(path, f"its schema version is {version!r}")
    if int(version) > SCHEMA_VERSION:
        raise LatencyError(
            f"the latency table {path} has schema version {version}, and this halp_fx reads up to "
            f"{SCHEMA_VERSION}: update halp_fx, or measure into a new table"
        )
    if int(version) < SCHEMA_VERSION:
        _upgrade(connection)
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise _damaged(path, problem)


def _upgrade(connection: sqlite3.Connection) -> None:
    """Version 1 had no calibrations and no reference times."""
    with _transaction(connection):
        if "calibrations" not in _names(connection):  # another process may have been faster
            connection.execute(_CALIBRATIONS)
            connection.execute(_REFERENCES)
            connection.execute(
                "UPDATE meta SET value = ? WHERE name = 'schema_version'", (str(SCHEMA_VERSION),)
            )


def _damaged(path: str, problem: object) -> LatencyError:
    return LatencyError(
        f"{path} is damaged or not a latency table ({problem}): move the file away and measure "
        "again, or pass another path"
    )


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Errors of the file system and of SQLite, said as what to do about the table."""
    try:
        yield
    except sqlite3.ProgrammingError as e:
        if "closed" not in str(e):
            raise
        raise LatencyError(f"the latency table {path} is closed: open it again") from e
    except sqlite3.OperationalError as e:
        text = str(e)
        if "locked" in text or "busy" in text:
            advice = "another process keeps it locked; wait for it to end, or pass another path"
        else:
            advice = (
                "pass the path of a file that can be read and written, or set HALP_FX_CACHE to a "
                "folder of yours"
            )
        raise LatencyError(f"the latency table {path} can't be used ({text}): {advice}") from e
    except sqlite3.DatabaseError as e:
        raise _damaged(path, e) from e
    except OSError as e:
        raise LatencyError(
            f"the latency table {path} can't be used ({e}): pass the path of a file that can be "
            "read and written, or set HALP_FX_CACHE to a folder of yours"
        ) from e
