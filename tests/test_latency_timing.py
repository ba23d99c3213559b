"""Measuring: what is measured, when it is redone, and what stays untouched."""

from __future__ import annotations

import gc
import logging
import os
import random
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import halp_fx
from halp_fx.errors import DependencyError, LatencyError
from halp_fx.latency import (
    Analytic,
    Backend,
    Job,
    LatencyTable,
    Timing,
    Torch,
    measure_jobs,
    measure_network,
    measure_paired,
)


class Fixed(nn.Module):
    """A kernel of a known cost."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms


@dataclass
class Run:
    ms: float
    sentinel: bool
    sampled: int = 0  # blocks after warming up
    tries: int = 0  # times that it was prepared before

    def __call__(self) -> None: ...


@dataclass
class Simulated:
    """A back-end on a clock of its own. The sentinel takes 2 ms, other kernels what they say.

    `speed(attempt)` scales all times in the attempt-th round-robin over a batch, where there is one
    batch.
    """

    speed: Callable[[int], float] = lambda attempt: 1.0
    samples: int = 4
    min_sample_ms: float = 1.0
    name: str = "simulated"
    measured: bool = True
    fuses: bool = False
    trace: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    always: float = 1.0  # scales all times, those that the sentinel is first known by too
    prepared: Counter[float] = field(default_factory=Counter)

    def fingerprint(self) -> str:
        return '{"backend": "simulated"}'

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        sentinel = not isinstance(module, Fixed)
        ms = 2.0 if isinstance(module, nn.Conv2d) else float(module.ms)  # type: ignore[arg-type]
        tries = 0 if sentinel else self.prepared[ms]
        self.prepared[ms] += 1
        # 3 blocks to warm up and 1 or 2 to size the block; the sentinel is sampled once beforehand.
        before = 4 if ms >= 10 * self.min_sample_ms else 5
        return Run(ms, sentinel, -(before + self.samples) if sentinel else -before, tries)

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        assert isinstance(run, Run)
        speed = self.speed(run.tries + run.sampled // self.samples) if run.sampled >= 0 else 1.0
        run.sampled += 1
        self.trace.append(run.ms)
        self.counts.append(calls)
        return run.ms * speed * self.always * calls


@dataclass
class Small(Simulated):
    """Its memory holds two kernels beside the sentinel."""

    alive: list[Any] = field(default_factory=list)
    refused: int = 0

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        self.alive = [ref for ref in self.alive if ref() is not None]
        if len(self.alive) > 2:
            self.refused += 1
            raise torch.OutOfMemoryError("no memory is left")
        run = super().prepare(module, inputs)
        self.alive.append(weakref.ref(run))
        return run


@dataclass
class Crowded(Small):
    """Its memory lacks once kernels are sampled: they take their workspace anew in each call."""

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        run = Simulated.prepare(self, module, inputs)
        self.alive.append(weakref.ref(run))
        return run

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        assert isinstance(run, Run)
        alive = sum(ref() is not None for ref in self.alive)
        if run.sampled >= 0 and not run.sentinel and alive > 3:
            self.refused += 1
            raise RuntimeError("CUDA error: out of memory")
        return super().block_ms(run, calls)


@dataclass
class Throttled(Simulated):
    """The clock rate falls to a third in the fifth of seven rounds; what takes 5 ms hiccups once.

    So the median of the one that hiccups is of a slow round, and that of all others of a fast one.
    """

    samples: int = 7

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        assert isinstance(run, Run)
        turn = run.sampled
        ms = super().block_ms(run, calls)
        if turn >= 0 and turn % self.samples >= 4:
            ms *= 3.0
        return ms * 10.0 if turn == 0 and run.ms == 5.0 else ms


class Builds:
    """Jobs that count how often each is built."""

    def __init__(self, count: int) -> None:
        self.built: list[str] = []
        self.jobs = [Job(f"k{i}", self._build(i)) for i in range(count)]

    def _build(self, i: int) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
        def build() -> tuple[nn.Module, tuple[Any, ...]]:
            self.built.append(f"k{i}")
            return Fixed(1.0 + i), ()

        return build


@pytest.fixture
def table() -> Any:
    with LatencyTable.open(":memory:") as table:
        yield table


def test_each_kernel_gets_its_own_time(table: LatencyTable) -> None:
    backend = Simulated()
    assert isinstance(backend, Backend)
    measure_jobs(Builds(30).jobs, backend, table)
    for i in range(30):
        assert table.get(f"k{i}", backend.fingerprint()) == Timing(1.0 + i, 0.0, 4)


def test_only_what_is_missing_is_measured(table: LatencyTable) -> None:
    backend, builds = Simulated(), Builds(20)
    for i in range(0, 20, 2):
        table.put(f"k{i}", backend.fingerprint(), Timing(99.0, 0.0, 1))
    measure_jobs(builds.jobs, backend, table)
    assert sorted(builds.built) == sorted(f"k{i}" for i in range(1, 20, 2))
    assert table.get("k0", backend.fingerprint()) == Timing(99.0, 0.0, 1)
    builds.built.clear()
    backend.trace.clear()
    measure_jobs(builds.jobs, backend, table)
    assert builds.built == []
    assert backend.trace == []  # not even the sentinel


def test_timings_of_another_device_do_not_count(table: LatencyTable) -> None:
    builds = Builds(3)
    for i in range(3):
        table.put(f"k{i}", '{"backend": "other"}', Timing(99.0, 0.0, 1))
    measure_jobs(builds.jobs, Simulated(), table)
    assert len(builds.built) == 3


def test_a_key_given_twice_is_measured_once(table: LatencyTable) -> None:
    builds = Builds(2)
    measure_jobs([*builds.jobs, *builds.jobs], Simulated(), table)
    assert sorted(builds.built) == ["k0", "k1"]


def test_an_interrupted_run_goes_on_where_it_was(table: LatencyTable) -> None:
    backend, builds = Simulated(), Builds(30)

    def stop(done: int, total: int, key: str) -> None:
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_jobs(builds.jobs, backend, table, progress=stop)
    kept = {entry.key for entry in table.entries()}
    assert 14 <= len(kept) < 30
    builds.built.clear()
    measure_jobs(builds.jobs, backend, table)
    assert set(builds.built) == {job.key for job in builds.jobs} - kept
    assert len(table.entries()) == 30


_KILLED = """
import os, sys
from tests.test_latency_timing import Builds, Simulated
from halp_fx.latency import LatencyTable, measure_jobs
table = LatencyTable.open(sys.argv[1])
measure_jobs(Builds(20).jobs, Simulated(), table, progress=lambda done, total, key: os._exit(9))
"""


def test_a_killed_run_loses_nothing_it_has_written(tmp_path: Path) -> None:
    path = tmp_path / "table.sqlite"
    root = Path(halp_fx.__file__).resolve().parent.parent
    answer = subprocess.run(
        [sys.executable, "-c", _KILLED, str(path)],
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 9, answer.stderr
    with LatencyTable.open(path) as table:
        kept = {entry.key for entry in table.entries()}
        assert 1 <= len(kept) < 20
        builds = Builds(20)
        measure_jobs(builds.jobs, Simulated(), table)
        assert set(builds.built) == {job.key for job in builds.jobs} - kept
        assert len(table.entries()) == 20


def test_progress_counts_what_was_known(table: LatencyTable) -> None:
    backend, seen = Simulated(), []
    table.put("k1", backend.fingerprint(), Timing(1.0, 0.0, 1))
    measure_jobs(
        Builds(4).jobs, backend, table, progress=lambda done, total, key: seen.append((done, total))
    )
    assert seen == [(2, 4), (3, 4), (4, 4)]


def test_samples_are_interleaved_and_shuffled(table: LatencyTable) -> None:
    backend = Simulated()
    measure_jobs(Builds(6).jobs, backend, table)
    rounds = np.array(backend.trace[-4 * 7 :]).reshape(4, 7)
    for one in rounds:
        assert sorted(one) == [1.0, 2.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # each once, and the sentinel
    assert len({tuple(one) for one in rounds}) > 1


def test_the_seed_alone_decides_the_order() -> None:
    traces = []
    for seed in (1, 1, 2):
        backend = Simulated()
        with LatencyTable.open(":memory:") as table:
            measure_jobs(Builds(20).jobs, backend, table, seed=seed)
        traces.append(backend.trace)
    assert traces[0] == traces[1] != traces[2]


def test_short_kernels_are_called_in_blocks(table: LatencyTable) -> None:
    backend = Simulated(min_sample_ms=1.0)
    measure_jobs([Job("short", lambda: (Fixed(0.001), ()))], backend, table)
    assert max(backend.counts) >= 1000
    timing = table.get("short", backend.fingerprint())
    assert timing is not None
    assert timing.median_ms == pytest.approx(0.001)


def test_a_kernel_that_takes_no_time_ends(table: LatencyTable) -> None:
    backend = Simulated()
    measure_jobs([Job("nothing", lambda: (Fixed(0.0), ()))], backend, table)
    assert table.get("nothing", backend.fingerprint()) == Timing(0.0, 0.0, 4)


def _slow_at(*speeds: float) -> Callable[[int], float]:
    return lambda attempt: speeds[attempt] if attempt < len(speeds) else 1.0


def _attempts(backend: Simulated) -> int:
    """How often the one kernel of 10 ms was sampled in full."""
    assert backend.trace.count(10.0) == backend.prepared[10.0] * (4 + backend.samples)
    return backend.prepared[10.0]


@pytest.mark.parametrize(
    ("speeds", "attempts"),
    [
        ((1.0,), 1),
        ((1.05,), 1),  # as a quiet machine varies
        ((1.2, 1.0), 2),
        ((0.5,), 1),  # quieter than at first
        ((3.0, 2.0, 1.0), 3),
        ((3.0, 1.5, 2.0), 3),  # never quiet: the attempt in which the sentinel was fastest
    ],
)
def test_a_batch_is_measured_again_when_the_machine_was_busy(
    table: LatencyTable, speeds: tuple[float, ...], attempts: int
) -> None:
    """Times are as if the machine were as fast as at first."""
    backend = Simulated(speed=_slow_at(*speeds))
    measure_jobs([Job("k", lambda: (Fixed(10.0), ()))], backend, table)
    assert _attempts(backend) == attempts
    found = table.get("k", backend.fingerprint())
    assert found is not None
    assert (found.median_ms, found.spread_ms, found.samples) == (pytest.approx(10.0), 0.0, 4)


def test_a_machine_that_is_slower_on_another_day(tmp_path: Path) -> None:
    backend, slower = Simulated(), Simulated(always=1.5)
    with LatencyTable.open(tmp_path / "table.sqlite") as table:
        measure_jobs([Job("first", lambda: (Fixed(10.0), ()))], backend, table)
    with LatencyTable.open(tmp_path / "table.sqlite") as table:
        measure_jobs([Job("second", lambda: (Fixed(10.0), ()))], slower, table)
        found = table.get("second", backend.fingerprint())
    assert found is not None
    assert found.median_ms == pytest.approx(10.0)
    assert _attempts(slower) == 1


@dataclass
class Shared(Simulated):
    """While a neighbour is busy, the sentinel takes half as long again and kernels a tenth."""

    busy: Callable[[float], bool] = lambda clock_ms: False
    clock_ms: float = 0.0

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        assert isinstance(run, Run)
        slower = (1.5 if run.sentinel else 1.1) if self.busy(self.clock_ms) else 1.0
        ms = super().block_ms(run, calls) * slower
        self.clock_ms += ms
        return ms


def _medians(table: LatencyTable, backend: Backend, count: int) -> dict[str, float]:
    found = {f"k{i}": table.get(f"k{i}", backend.fingerprint()) for i in range(count)}
    return {key: timing.median_ms for key, timing in found.items() if timing is not None}


@dataclass
class ByTurns(Shared):
    """The neighbour is busy in every other round over the kernels."""

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        assert isinstance(run, Run)
        turn = run.sampled
        self.busy = lambda _: turn >= 0 and turn % 2 == 1
        return super().block_ms(run, calls)


def test_rounds_in_which_the_machine_was_busy_do_not_count(table: LatencyTable) -> None:
    backend = ByTurns()
    measure_jobs(Builds(6).jobs, backend, table)
    assert _medians(table, backend, 6) == {f"k{i}": pytest.approx(1.0 + i) for i in range(6)}


def test_what_was_measured_on_a_busy_machine_does_not_outlive_a_kill(tmp_path: Path) -> None:
    builds = Builds(24)
    busy = Shared(busy=lambda clock_ms: clock_ms > 100.0)
    killed = list(builds.jobs)
    killed[-1] = Job("k23", _broken)
    path = tmp_path / "table.sqlite"
    with LatencyTable.open(path) as table, pytest.raises(LatencyError, match="k23"):
        measure_jobs(killed, busy, table)
    with LatencyTable.open(path) as table:
        assert not _medians(table, busy, 24)
        measure_jobs(builds.jobs, Shared(), table)
        assert _medians(table, busy, 24) == {f"k{i}": pytest.approx(1.0 + i) for i in range(24)}


def test_a_batch_is_judged_by_the_kernel_that_was_measured_worst(table: LatencyTable) -> None:
    """One kernel scatters and is sampled on until the machine is quiet, the other is not."""

    @dataclass
    class Scattering(Shared):
        def block_ms(self, run: Callable[[], None], calls: int) -> float:
            assert isinstance(run, Run)
            ms = super().block_ms(run, calls)
            return ms * (1.0 + 0.3 * (run.sampled % 3)) if run.ms == 2.5 else ms

    backend = Scattering(busy=lambda clock_ms: 60.0 < clock_ms < 160.0, samples=9)
    jobs = [Job("k0", lambda: (Fixed(1.0), ())), Job("scatters", lambda: (Fixed(2.5), ()))]
    measure_jobs(jobs, backend, table)
    assert backend.prepared[1.0] > 1
    assert _medians(table, backend, 1) == {"k0": pytest.approx(1.0)}


def test_only_what_was_missing_is_measured_again(table: LatencyTable) -> None:
    """Of a batch that another process has measured in part."""
    builds, backend = Builds(4), Shared(busy=lambda clock_ms: 60.0 < clock_ms < 200.0)
    other = {"k0": Timing(1.25, 0.0, 4)}

    started = [Job("k0", lambda: (Fixed(1.0), ())), *builds.jobs[1:]]
    put = table.reference_ms

    def reference_ms(fingerprint: str, found: float) -> float:
        table.put_all(other, fingerprint)  # after the start, before the batch
        return put(fingerprint, found)

    table.reference_ms = reference_ms  # type: ignore[method-assign]
    measure_jobs(started, backend, table)
    assert builds.built.count("k1") > 1
    assert table.get("k0", backend.fingerprint()) == other["k0"]


def test_an_unsteady_machine_is_logged(
    table: LatencyTable, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Simulated(speed=lambda attempt: 3.0)
    with caplog.at_level(logging.WARNING, logger="halp_fx.latency"):
        measure_jobs([Job("k", lambda: (Fixed(10.0), ()))], backend, table)
    assert _attempts(backend) == 3
    assert "the machine is unsteady" in caplog.text


def test_a_machine_that_stays_slow_is_measured_a_few_times(table: LatencyTable) -> None:
    backend, builds = Simulated(speed=lambda attempt: 3.0), Builds(30)
    measure_jobs(builds.jobs, backend, table)
    assert {builds.built.count(f"k{i}") for i in range(30)} == {3}
    for i in range(30):
        assert table.get(f"k{i}", backend.fingerprint()) == Timing(1.0 + i, 0.0, 4)


@dataclass
class Waking(Simulated):
    """Slower by half for its first two seconds."""

    clock_ms: float = 0.0

    def block_ms(self, run: Callable[[], None], calls: int) -> float:
        ms = super().block_ms(run, calls) * (1.5 if self.clock_ms < 2000.0 else 1.0)
        self.clock_ms += ms
        return ms


def test_what_was_taken_for_quiet_is_measured_again(table: LatencyTable) -> None:
    backend, builds, told = Waking(), Builds(24), list[tuple[int, int, str]]()
    measure_jobs(builds.jobs, backend, table, progress=lambda *what: told.append(what), seed=0)
    often = [job.key for job in builds.jobs if builds.built.count(job.key) > 1]
    assert len(often) == 12  # the batch that came first
    assert [done for done, _, _ in told] == list(range(1, 25))
    for i in range(24):
        found = table.get(f"k{i}", backend.fingerprint())
        assert found is not None
        assert found.median_ms == pytest.approx(1.5 * (1.0 + i))  # as if as slow as when it began


def _broken() -> tuple[nn.Module, tuple[Any, ...]]:
    raise RuntimeError("no such op")


def test_a_kernel_that_cannot_be_built_is_named(table: LatencyTable) -> None:
    with pytest.raises(
        LatencyError, match=r"kernel odd can't be run on the back-end 'simulated': .*no such op"
    ):
        measure_jobs([Job("odd", _broken)], Simulated(), table)


def test_a_kernel_that_cannot_run_is_named(table: LatencyTable) -> None:
    job = Job("odd", lambda: (nn.Linear(3, 3), (torch.zeros(1, 4),)))
    with pytest.raises(LatencyError, match="kernel odd can't be run on the back-end 'torch'"):
        measure_jobs([job], Torch(threads=1), table)


def test_a_missing_package_is_told_as_it_is(table: LatencyTable) -> None:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        raise DependencyError("run pip install it")

    with pytest.raises(DependencyError, match=r"^run pip install it$"):
        measure_jobs([Job("k", build)], Simulated(), table)


def test_the_analytic_backend_measures_nothing(table: LatencyTable) -> None:
    with pytest.raises(LatencyError, match="computes costs"):
        measure_jobs(Builds(1).jobs, Analytic(), table)


@pytest.mark.parametrize("fails", [False, True])
def test_global_settings_come_back(table: LatencyTable, fails: bool) -> None:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        random.random()
        np.random.random()  # noqa: NPY002
        torch.rand(1)
        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
        return (nn.Linear(2, 2), (torch.zeros(1, 3 if fails else 2),))

    def state() -> tuple[Any, ...]:
        numpy = np.random.get_state(legacy=True)  # noqa: NPY002
        return (
            random.getstate(),
            numpy[1].tolist(),  # type: ignore[index]
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            gc.isenabled(),
        )

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        before = state()
        backend = Torch(threads=1, samples=2, min_sample_ms=0.01)
        try:
            measure_jobs([Job("k", build)], backend, table)
        except LatencyError:
            assert fails
        assert state() == before
    finally:
        torch.set_num_threads(threads)


def test_a_network_is_measured_whole() -> None:
    assert measure_network(Fixed(7.0), (), Simulated()) == Timing(7.0, 0.0, 4)
    assert measure_network(Fixed(7.0), (), Simulated(), samples=3) == Timing(7.0, 0.0, 3)


def test_two_networks_are_measured_in_turn() -> None:
    backend = Simulated()
    a, b = measure_paired(Fixed(7.0), Fixed(5.0), backend, (), (), rounds=6)
    assert (a, b) == (Timing(7.0, 0.0, 6), Timing(5.0, 0.0, 6))
    rounds = [
        tuple(backend.trace[k : k + 2])
        for k in range(len(backend.trace) - 12, len(backend.trace), 2)
    ]
    assert set(rounds) == {(7.0, 5.0), (5.0, 7.0)}  # each in every round, in both orders


def test_the_spread_is_half_the_interquartile_range() -> None:
    speeds = iter([1.0] * 5 + [1.0, 2.0, 3.0, 4.0, 5.0])

    class Uneven(Simulated):
        def block_ms(self, run: Callable[[], None], calls: int) -> float:
            return next(speeds) * calls

    assert measure_network(Fixed(1.0), (), Uneven(samples=5)) == Timing(3.0, 1.0, 5)


def test_no_samples_is_refused() -> None:
    with pytest.raises(LatencyError, match="0 samples asked for"):
        measure_network(Fixed(1.0), (), Simulated(), samples=0)


class Minimal:
    """The least that a back-end of one's own needs."""

    name = "minimal"
    measured = True
    fuses = False
    grad_modes: tuple[bool, ...] = ()

    def fingerprint(self) -> str:
        return "{}"

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        def run() -> None:
            self.grad_modes = (*self.grad_modes[:5], torch.is_grad_enabled())
            module(*inputs)

        return run


def test_a_backend_of_ones_own_needs_no_clock() -> None:
    backend = Minimal()
    timing = measure_network(nn.Identity(), (torch.zeros(1),), backend, min_sample_ms=0.01)
    assert timing.samples == 9
    assert timing.median_ms > 0
    assert not any(backend.grad_modes)


def test_what_slows_all_for_a_while_cancels(table: LatencyTable) -> None:
    backend = Throttled()
    measure_jobs(Builds(8).jobs, backend, table)
    for i in range(8):
        timing = table.get(f"k{i}", backend.fingerprint())
        assert timing is not None
        assert timing.median_ms == pytest.approx(1.0 + i)
    dense, pruned = measure_paired(Fixed(5.0), Fixed(2.0), Throttled(), (), (), rounds=7)
    assert pruned.median_ms / dense.median_ms == pytest.approx(0.4)
    assert pruned.spread_ms == pytest.approx(0.0)


@dataclass
class Favouring(Simulated):
    """What is prepared first is slower by a tenth."""

    def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
        run = super().prepare(module, inputs)
        assert isinstance(run, Run)
        run.ms *= 1.1 if sum(self.prepared.values()) % 2 else 1.0
        return run


def test_which_network_was_prepared_first_cancels_over_bouts() -> None:
    def ratio(bouts: int) -> float:
        a, b = measure_paired(Fixed(8.0), Fixed(4.0), Favouring(), (), (), rounds=4, bouts=bouts)
        assert (a.samples, b.samples) == (4 * bouts, 4 * bouts)
        return b.median_ms / a.median_ms

    assert ratio(1) == pytest.approx(0.5 / 1.1)
    assert ratio(2) == pytest.approx(0.5 * (1.1 + 1 / 1.1) / 2)
    with pytest.raises(LatencyError, match="0 bouts asked for"):
        ratio(0)


def jobs_of(*times: float) -> list[Job]:
    return [Job(str(ms), lambda ms=ms: (Fixed(ms), ())) for ms in times]  # type: ignore[misc]


@pytest.mark.parametrize("backend", [Small(), Crowded()], ids=["prepared", "sampled"])
def test_what_does_not_fit_together_is_measured_in_parts(
    backend: Small, table: LatencyTable
) -> None:
    measure_jobs(jobs_of(1.0, 2.5, 3.0, 4.0, 5.0), backend, table)
    assert backend.refused > 0
    found = {entry.key: entry.timing.median_ms for entry in table.entries()}
    assert found == {f"{ms}": pytest.approx(ms) for ms in (1.0, 2.5, 3.0, 4.0, 5.0)}


def test_one_call_that_was_held_up_does_not_size_the_block(table: LatencyTable) -> None:
    @dataclass
    class Stalling(Simulated):
        def block_ms(self, run: Callable[[], None], calls: int) -> float:
            assert isinstance(run, Run)
            sizing = run.sampled == -2  # the first that tells how long a call takes
            ms = super().block_ms(run, calls)
            return ms + 3.0 if sizing else ms

    backend = Stalling()
    measure_jobs(jobs_of(0.01), backend, table)
    sampled = [n for ms, n in zip(backend.trace, backend.counts, strict=True) if ms == 0.01][5:]
    assert sampled[-1] >= 100


@pytest.mark.parametrize(
    "message",
    [
        "no memory is left",
        "Failed to allocate memory for it",
        "Cuda Error in allocate: 2 (out of memory)",
        "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
        "std::bad_alloc",
    ],
)
def test_memory_that_lacks_is_told_in_other_words(message: str) -> None:
    """By back-ends that have an error of their own for all that fails."""

    @dataclass
    class Wrapping(Small):
        def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
            try:
                return super().prepare(module, inputs)
            except torch.OutOfMemoryError as error:
                if message == str(error):
                    raise LatencyError("it can't be recorded") from error
                raise LatencyError(message) from None

    backend, table = Wrapping(), LatencyTable.open(":memory:")
    measure_jobs(jobs_of(1.0, 2.5, 3.0, 4.0, 5.0), backend, table)
    assert backend.refused > 0
    assert len(table.entries()) == 5


def test_what_does_not_fit_alone_is_an_error() -> None:
    @dataclass
    class Full(Simulated):
        def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
            if isinstance(module, Fixed):
                raise torch.OutOfMemoryError("no memory is left")
            return super().prepare(module, inputs)

    with pytest.raises(LatencyError, match=r"kernel [12]\.0 .*no memory is left"):
        measure_jobs(jobs_of(1.0, 2.0), Full(), LatencyTable.open(":memory:"))


def test_optional_kernels_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> Any:
        raise ValueError("not on random numbers")

    table = LatencyTable.open(":memory:")
    told: list[tuple[int, int]] = []
    measure_jobs(
        [Job("hard", fails, optional=True), *jobs_of(1.0)], Simulated(), table,
        progress=lambda done, total, key: told.append((done, total)),
    )  # fmt: skip
    assert [entry.key for entry in table.entries()] == ["1.0"]
    assert "not on random numbers" in caplog.text
    assert told[-1] == (2, 2)


def test_autocast_of_the_caller_is_no_matter() -> None:
    seen: list[torch.dtype] = []

    class Seeing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((x @ x).dtype)
            return x

    with torch.autocast("cpu", torch.bfloat16):
        measure_network(Seeing().eval(), (torch.ones(2, 2),), Torch(threads=1, samples=1))
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert set(seen) == {torch.float32}


def test_the_reference_kernel_is_of_the_size_that_the_device_needs() -> None:
    shapes: list[tuple[int, ...]] = []

    @dataclass
    class Large(Simulated):
        sentinel: tuple[int, ...] = (2, 8, 5, 5)

        def prepare(self, module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
            if isinstance(module, nn.Conv2d):
                shapes.append(tuple(inputs[0].shape))
            return super().prepare(module, inputs)

    backend = Large()
    measure_jobs(jobs_of(1.0), backend, LatencyTable.open(":memory:"))
    assert shapes == [(2, 8, 5, 5)]
    warming = backend.trace[: backend.trace.index(1.0)]
    assert sum(warming) >= 500  # milliseconds before anything counts
    again = Large()
    measure_network(Fixed(3.0), (), again)
    assert sum(again.trace[: -again.samples]) >= 500
    plain = Simulated()
    measure_network(Fixed(3.0), (), plain)
    assert len(plain.trace) == 3 + 2 + plain.samples
    assert Torch().sentinel == (1, 16, 28, 28) != Torch("cuda:0").sentinel


def test_a_network_that_fails_is_told_in_our_words() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no engine was found")

    with pytest.raises(LatencyError, match=r"Fails can't be run on .*'torch'.*no engine"):
        measure_network(Fails().eval(), (torch.ones(2),), Torch(threads=1))
    with pytest.raises(LatencyError, match=r"Fails can't be run"):
        measure_paired(nn.ReLU(), Fails(), Torch(threads=1), (torch.ones(2),), (torch.ones(2),))
