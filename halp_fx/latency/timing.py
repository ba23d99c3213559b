"""Measuring: steady on a machine that is not, and resumable.

One sample is a block of calls that takes at least a millisecond or so. Kernels are sampled in
small batches, round-robin in random order, so that a slow moment is spread over all of them. A
sentinel, one small convolution, is timed in each round; when it drifts from its running median,
the machine was busy with something else, and the batch is measured again.

What counts are ratios within a round, of a kernel to the sentinel or of one network to another:
what makes a machine slower for a while cancels in them, and their median repeats several times
better than the ratio of two medians.
"""

from __future__ import annotations

import gc
import logging
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import HalpError, LatencyError
from .backend import Backend, BlockTimer, Job, Timing, wall_ms
from .table import LatencyTable

__all__ = ["measure_jobs", "measure_network", "measure_paired"]

_log = logging.getLogger(__name__)

_BATCH = 12  # kernels alive at a time
_MAX_DRIFT = 0.25  # of the sentinel from its running median
_MAX_REDOS = 2
_UNCERTAINTY = 0.02  # of a median, at which a kernel has been sampled enough
_MAX_PAIRED_EXTENSIONS = 3  # the same for two networks
_MAX_EXTENSIONS = 2  # times that the samples of an uncertain kernel are taken again
_SENTINEL_MEMORY = 15  # times that its running median is taken over
_WARM_UP_CALLS = 3
_WARM_UP_MS = 200.0  # a call longer than this warms up by itself
_MAX_CALLS = 1_000_000  # of a block; a kernel that does nothing would never fill one


@dataclass(frozen=True)
class _Probe:
    """A kernel ready to be timed."""

    run: Callable[[], None]
    calls: int  # of one block


def measure_jobs(
    jobs: Iterable[Job],
    backend: Backend,
    table: LatencyTable,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    seed: int = 0,
) -> None:
    """Measure the kernels that the table doesn't have yet for this back-end.

    The timings of a batch are written as soon as they are known: a run that is killed goes on
    where it was. The global random states, torch's thread count and its grad mode stay as they
    were.

    Args:
        jobs: the kernels; of several with one key, the first is measured.
        backend: what runs them.
        table: where timings are looked up and written, under `backend.fingerprint()`.
        progress: called as `progress(done, total, key)` after each kernel; kernels that the
            table had already are counted as done.
        seed: of the order in which kernels are measured.

    Raises:
        LatencyError: a kernel can't be built or run; the message names its key. What was measured
            before is in the table.
    """
    fingerprint = backend.fingerprint()
    by_key: dict[str, Job] = {}
    for job in jobs:
        by_key.setdefault(job.key, job)
    todo = [job for job in by_key.values() if table.get(job.key, fingerprint) is None]
    if not todo:
        return
    order = random.Random(seed)
    order.shuffle(todo)
    done = len(by_key) - len(todo)
    with _preserved():
        sentinel = _Sentinel(backend)
        reference_ms = table.reference_ms(fingerprint, sentinel.usual_ms)
        for start in range(0, len(todo), _BATCH):
            batch = todo[start : start + _BATCH]
            # Another process may have been measuring into the same table meanwhile.
            missing = [job for job in batch if table.get(job.key, fingerprint) is None]
            timings = _measure_batch(missing, backend, sentinel, order, reference_ms)
            known = {job.key: timing for job, timing in zip(missing, timings, strict=True)}
            table.put_all(known, fingerprint)
            for job in batch:
                done += 1
                if progress is not None:
                    progress(done, len(by_key), job.key)


def measure_network(
    module: nn.Module,
    inputs: tuple[Any, ...],
    backend: Backend,
    *,
    samples: int | None = None,
    min_sample_ms: float | None = None,
) -> Timing:
    """How long a whole network takes.

    Args:
        module: the network; left as it is.
        inputs: its positional arguments.
        backend: what runs it.
        samples: how many; None: the back-end's own setting.
        min_sample_ms: least length of a sample; None: the back-end's own setting.

    Raises:
        LatencyError: the network can't be run by the back-end.
    """
    with _preserved():
        probe = _probe(backend, module, inputs, _min_sample_ms(backend, min_sample_ms))
        blocks = _round_robin(backend, [probe], _samples(backend, samples), None)
    return _timing(blocks[0])


def measure_paired(
    a: nn.Module,
    b: nn.Module,
    backend: Backend,
    inputs_a: tuple[Any, ...],
    inputs_b: tuple[Any, ...],
    *,
    rounds: int = 15,
    min_sample_ms: float | None = None,
) -> tuple[Timing, Timing]:
    """How long two networks take, sampled in turn so that both see the same machine.

    The median of the second is that of the first times the median ratio of the two within a
    round, and its spread that of the ratio.

    Args:
        a: the one network; left as it is.
        b: the other.
        backend: what runs them.
        inputs_a: positional arguments of a.
        inputs_b: positional arguments of b.
        rounds: samples of each; up to four times as many while the ratio is uncertain by more
            than 2 %.
        min_sample_ms: least length of a sample; None: the back-end's own setting.

    Raises:
        LatencyError: a network can't be run by the back-end, or there are no rounds.
    """
    least = _min_sample_ms(backend, min_sample_ms)
    order = random.Random(0)  # who follows whom matters by a percent or two
    with _preserved():
        probes = [_probe(backend, a, inputs_a, least), _probe(backend, b, inputs_b, least)]
        first, second = _round_robin(backend, probes, rounds, order)
        for _ in range(_MAX_PAIRED_EXTENSIONS):
            if _uncertainty(_relative(second, first)) <= _UNCERTAINTY:
                break
            for known, more in zip(
                (first, second), _round_robin(backend, probes, rounds, order), strict=True
            ):
                known.extend(more)
    one = _timing(first)
    return one, _timing([one.median_ms * ratio for ratio in _relative(second, first)])


class _Sentinel:
    """A small convolution whose time tells whether the machine is as it was."""

    def __init__(self, backend: Backend) -> None:
        convolution = nn.Conv2d(16, 16, 3, padding=1).eval()
        least = _min_sample_ms(backend, None)
        self.probe = _probe(backend, convolution, (torch.randn(1, 16, 28, 28),), least)
        self._history: deque[float] = deque(maxlen=_SENTINEL_MEMORY)
        for block in _round_robin(backend, [self.probe], _samples(backend, None), None):
            self._history.extend(block)

    @property
    def usual_ms(self) -> float:
        """The running median."""
        return statistics.median(self._history)

    def drift(self, ms: float) -> float:
        """Relative distance of a time from the running median."""
        usual = self.usual_ms
        return abs(ms - usual) / usual if usual > 0 else 0.0

    def record(self, ms: float) -> None:
        """Let a time count; also one that drifted, or a lasting change would never be followed."""
        self._history.append(ms)


def _measure_batch(
    jobs: Sequence[Job],
    backend: Backend,
    sentinel: _Sentinel,
    order: random.Random,
    reference_ms: float,
) -> list[Timing]:
    """Timings of a few kernels, from the attempt in which the sentinel drifted least.

    A machine may be slower in one round than in another, and today than when the table was begun:
    times are given as if the sentinel took `reference_ms` in each.
    """
    if not jobs:
        return []
    probes = [_job_probe(job, backend) for job in jobs]
    best: list[list[float]] = []
    least_drift = math.inf
    for _ in range(1 + _MAX_REDOS):
        sampled, ms = _sampled_by(backend, probes, sentinel, order, reference_ms)
        drift = sentinel.drift(ms)
        sentinel.record(ms)
        if drift < least_drift:
            best, least_drift = sampled, drift
        if drift <= _MAX_DRIFT:
            break
    else:
        _log.warning(
            "the machine is unsteady: a reference kernel drifts by %.0f %%; close other programs "
            "or fix the clock rate for better measurements",
            100 * least_drift,
        )
    return [_timing(blocks) for blocks in best]


def _sampled_by(
    backend: Backend,
    probes: Sequence[_Probe],
    sentinel: _Sentinel,
    order: random.Random,
    reference_ms: float,
) -> tuple[list[list[float]], float]:
    """Samples as if the sentinel took `reference_ms` in each round, and what it took.

    Kernels whose median is still uncertain are sampled again.
    """
    found: list[list[float]] = [[] for _ in probes]
    ticks: list[float] = []
    unsure = list(range(len(probes)))
    for _ in range(1 + _MAX_EXTENSIONS):
        turns = [*(probes[k] for k in unsure), sentinel.probe]
        *sampled, clock = _round_robin(backend, turns, _samples(backend, None), order)
        ticks += clock
        for k, blocks in zip(unsure, sampled, strict=True):
            found[k] += [reference_ms * ratio for ratio in _relative(blocks, clock)]
        unsure = [k for k, blocks in enumerate(found) if _uncertainty(blocks) > _UNCERTAINTY]
        if not unsure:
            break
    return found, statistics.median(ticks)


def _relative(blocks: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ratios within each round; rounds that a clock can't resolve are left out, unless all are."""
    ratios = [ms / other for ms, other in zip(blocks, others, strict=True) if other > 0]
    return ratios or [1.0]


def _uncertainty(blocks: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a median, relative to it.

    1.57 IQR / sqrt(n): McGill, Tukey and Larsen, Variations of Box Plots, 1978.
    """
    lower, median, upper = np.percentile(blocks, [25, 50, 75])
    return float(1.57 * (upper - lower) / math.sqrt(len(blocks)) / max(median, 1e-12))


def _job_probe(job: Job, backend: Backend) -> _Probe:
    try:
        module, inputs = job.build()
        return _probe(backend, module, inputs, _min_sample_ms(backend, None))
    except LatencyError as e:
        raise type(e)(f"kernel {job.key}: {e}") from e
    except HalpError:  # a missing package or device has nothing to do with the kernel
        raise
    except Exception as e:  # whatever a kernel of the user's network raises
        raise LatencyError(
            f"kernel {job.key} can't be run on the back-end {backend.name!r}: "
            f"{type(e).__name__}: {e}"
        ) from e


def _probe(
    backend: Backend, module: nn.Module, inputs: tuple[Any, ...], min_sample_ms: float
) -> _Probe:
    """Warm up, and find how many calls make a block of `min_sample_ms`."""
    run = backend.prepare(module, inputs)
    warmed = 0.0
    for _ in range(_WARM_UP_CALLS):
        warmed += _block_ms(backend, run, 1)
        if warmed >= _WARM_UP_MS:
            break
    calls = 1
    while calls < _MAX_CALLS:
        took = _block_ms(backend, run, calls)
        if took >= min_sample_ms:
            break
        wanted = math.ceil(1.2 * calls * min_sample_ms / max(took, 1e-6))
        calls = min(max(wanted, calls + 1), 10 * calls, _MAX_CALLS)
    return _Probe(run, calls)


def _round_robin(
    backend: Backend, probes: Sequence[_Probe], rounds: int, order: random.Random | None
) -> list[list[float]]:
    """`rounds` samples of each probe, in milliseconds a call; shuffled in each round by `order`."""
    if rounds < 1:
        raise LatencyError(f"{rounds} samples asked for: take at least one")
    blocks: list[list[float]] = [[] for _ in probes]
    turns = list(range(len(probes)))
    with _no_collection():
        for _ in range(rounds):
            if order is not None:
                order.shuffle(turns)
            for turn in turns:
                probe = probes[turn]
                blocks[turn].append(_block_ms(backend, probe.run, probe.calls) / probe.calls)
    return blocks


def _block_ms(backend: Backend, run: Callable[[], None], calls: int) -> float:
    if isinstance(backend, BlockTimer):
        return backend.block_ms(run, calls)
    with torch.inference_mode():
        return wall_ms(run, calls)


def _timing(blocks: Sequence[float]) -> Timing:
    lower, median, upper = np.percentile(blocks, [25, 50, 75])
    return Timing(float(median), float(upper - lower) / 2, len(blocks))


def _samples(backend: Backend, asked: int | None) -> int:
    return int(getattr(backend, "samples", 9)) if asked is None else asked


def _min_sample_ms(backend: Backend, asked: float | None) -> float:
    return float(getattr(backend, "min_sample_ms", 1.0)) if asked is None else asked


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _preserved() -> Iterator[None]:
    """Whatever happens within, the caller's global settings come back."""
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy = np.random.get_state()  # noqa: NPY002  # the global state is what must come back
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
