"""The latency table: one SQLite file, several processes, no surprises."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import halp_fx
from halp_fx.errors import LatencyError
from halp_fx.latency import Entry, LatencyTable, Timing, default_table_path
from halp_fx.latency.table import SCHEMA_VERSION

HERE = json.dumps({"backend": "torch", "cores": 2, "threads": 1})
THERE = json.dumps({"backend": "torch", "cores": 8, "threads": 4})


def _timing(ms: float) -> Timing:
    return Timing(median_ms=ms, spread_ms=ms / 10, samples=9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "table.sqlite"


def test_what_is_put_is_got_also_after_reopening(path: Path) -> None:
    with LatencyTable.open(path) as table:
        assert table.get("conv", HERE) is None
        table.put("conv", HERE, _timing(1.5))
        table.put("conv", THERE, _timing(0.5))
        assert table.path == str(path)
    with LatencyTable.open(path) as table:
        assert table.get("conv", HERE) == _timing(1.5)
        assert table.get("conv", THERE) == _timing(0.5)
        assert table.get("pool", HERE) is None
        assert table.fingerprints() == (HERE, THERE)
        assert table.entries() == (
            Entry("conv", HERE, _timing(1.5)),
            Entry("conv", THERE, _timing(0.5)),
        )
        assert table.entries(THERE) == (Entry("conv", THERE, _timing(0.5)),)
        assert table.entries("{}") == ()


def test_a_second_put_replaces_the_first() -> None:
    with LatencyTable.open(":memory:") as table:
        table.put("conv", HERE, _timing(1.5))
        table.put("conv", HERE, _timing(2.5))
        assert table.get("conv", HERE) == _timing(2.5)
        assert len(table.entries()) == 1


def test_several_are_put_at_once(path: Path) -> None:
    with LatencyTable.open(path) as table:
        table.put_all({"a": _timing(1.0), "b": _timing(2.0)}, HERE)
        table.put_all({}, THERE)
        assert [entry.key for entry in table.entries()] == ["a", "b"]
        assert table.fingerprints() == (HERE,)


def test_a_device_of_which_nothing_was_measured_is_none(path: Path) -> None:
    with LatencyTable.open(path) as table:
        assert table.reference_ms(THERE, 2.0) == 2.0  # and then the run failed
        assert table.fingerprints() == ()
        table.put("a", HERE, _timing(1.0))
        assert table.fingerprints() == (HERE,)


def test_a_write_that_fails_leaves_nothing_behind(path: Path) -> None:
    with LatencyTable.open(path) as table:
        with pytest.raises(sqlite3.Error):
            table.put_all({"a": _timing(1.0), object(): _timing(2.0)}, HERE)  # type: ignore[dict-item]
        assert table.entries() == ()
        assert table.fingerprints() == ()
        table.put("a", HERE, _timing(1.0))
        assert table.get("a", HERE) == _timing(1.0)


def test_a_table_stays_one_file(path: Path) -> None:
    with LatencyTable.open(path) as table:
        table.put("conv", HERE, _timing(1.0))
        assert os.listdir(path.parent) == [path.name]


def test_threads_may_share_a_table() -> None:
    with LatencyTable.open(":memory:") as table:

        def write(worker: int) -> None:
            for i in range(20):
                table.put(f"{worker}-{i}", HERE, _timing(1.0))

        workers = [threading.Thread(target=write, args=(w,)) for w in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(table.entries()) == 80


_WRITER = """
import sys
from halp_fx.latency import LatencyTable, Timing
path, worker = sys.argv[1], sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
with LatencyTable.open(path) as table:
    for i in range(15):
        table.put(f"{worker}-{i}", "{}", Timing(1.0 + i, 0.0, 1))
        table.put(f"both-{i}", f'{{"worker": {i % 3}}}', Timing(2.0, 0.0, 1))
"""


def test_two_processes_may_create_and_write_one_table(path: Path) -> None:
    root = str(Path(halp_fx.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for worker in "ab"
    ]
    for worker in workers:  # start both at once, when both have imported everything
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    answers = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], answers
    with LatencyTable.open(path) as table:
        assert len(table.entries("{}")) == 30
        assert len(table.entries()) == 45
        assert len(table.fingerprints()) == 4


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("width,ms\n64,1.5\n" * 100)
    with pytest.raises(LatencyError, match=r"table\.sqlite is damaged or not a latency table") as e:
        LatencyTable.open(path)
    assert "move the file away and measure again" in str(e.value)
    assert path.read_text().startswith("width,ms")


def _fill(path: Path) -> None:
    with LatencyTable.open(path) as table:
        table.put_all({f"conv2d {i:060d}": _timing(1.0) for i in range(400)}, HERE)


def test_a_truncated_file_is_refused(path: Path) -> None:
    _fill(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LatencyError, match="damaged"):
        LatencyTable.open(path)


def test_a_file_overwritten_in_the_middle_is_refused(path: Path) -> None:
    _fill(path)
    data = bytearray(path.read_bytes())
    data[4 * 4096 : 8 * 4096] = b"\xa5" * (4 * 4096)
    path.write_bytes(data)
    with pytest.raises(LatencyError, match="damaged"):
        LatencyTable.open(path)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE songs (title TEXT)",
        "CREATE TABLE meta (name TEXT, value TEXT)",
        "CREATE TABLE meta (id INTEGER)",
    ],
)
def test_a_database_of_another_program_is_refused_and_left_alone(
    path: Path, statement: str
) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LatencyError, match="of another program, not a latency table"):
        LatencyTable.open(path)
    assert path.read_bytes() == before


def _set_version(path: Path, version: str) -> None:
    LatencyTable.open(path).close()
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE meta SET value = ? WHERE name = 'schema_version'", (version,))
    connection.close()


def test_a_newer_schema_is_refused(path: Path) -> None:
    _set_version(path, str(SCHEMA_VERSION + 1))
    with pytest.raises(LatencyError, match=rf"schema version {SCHEMA_VERSION + 1}.*update halp_fx"):
        LatencyTable.open(path)


def test_a_schema_version_that_is_none_is_refused(path: Path) -> None:
    _set_version(path, "soon")
    with pytest.raises(LatencyError, match="its schema version is 'soon'"):
        LatencyTable.open(path)


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(LatencyError, match="pass the path of a file"):
        LatencyTable.open(tmp_path)


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LatencyError, match="pass the path of a file"):
        LatencyTable.open(tmp_path / "file" / "table.sqlite")


def test_an_empty_file_becomes_a_table(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with LatencyTable.open(path) as table:
        table.put("conv", HERE, _timing(1.0))


def test_a_locked_table_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halp_fx.latency.table._BUSY_TIMEOUT_S", 0.05)
    with LatencyTable.open(path) as table:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LatencyError, match="another process keeps it locked"):
            table.put("conv", HERE, _timing(1.0))
        other.execute("ROLLBACK")
        other.close()
        table.put("conv", HERE, _timing(1.0))


def test_a_closed_table_says_so(path: Path) -> None:
    table = LatencyTable.open(path)
    table.close()
    table.close()
    with pytest.raises(LatencyError, match="is closed: open it again"):
        table.get("conv", HERE)
    with pytest.raises(LatencyError, match="is closed: open it again"):
        table.put("conv", HERE, _timing(1.0))


def test_what_was_imported_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with LatencyTable.open(path) as table:
        table.put("conv", THERE, _timing(1.0))
        assert not table.is_imported(THERE)
        table.mark_imported(THERE)
        table.mark_imported(THERE)
    with LatencyTable.open(path) as table:
        assert table.is_imported(THERE)
        assert not table.is_imported(HERE)
        assert table.fingerprints() == (THERE,)


@pytest.mark.parametrize("figures", [(float("nan"), 0.0, 1), (-1.0, 0.0, 1), (1.0, 0.0, 0)])
def test_a_timing_is_a_time(figures: tuple[float, float, int]) -> None:
    with pytest.raises(LatencyError, match=r"a time is finite|at least one"):
        Timing(*figures)


def test_the_default_path_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALP_FX_CACHE", raising=False)
    assert default_table_path().parent.name.lower() in {"halp_fx", "cache"}
    monkeypatch.setenv("HALP_FX_CACHE", str(tmp_path))
    assert default_table_path() == tmp_path / "latency.sqlite"
