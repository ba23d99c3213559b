"""Measuring: steady on a machine that is not, and resumable.

One sample is a block of calls that takes at least a millisecond or so. Kernels are sampled in
small batches, round-robin in random order, so that a slow moment is spread over all of them. A
sentinel, one small convolution, is timed in each round.

What counts are ratios within a round, of a kernel to the sentinel or of one network to another:
what makes a machine slower for a while cancels in them, and their median repeats several times
better than the ratio of two medians. Not all of it cancels: a neighbour that slows arithmetic by
a third may slow copying by a tenth. So rounds in which the sentinel was slow don't count where
there are enough others, and a batch that had too few is measured again after some others.
"""

from __future__ import annotations

import gc
import logging
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from ..errors import HalpError, LatencyError
from ..random_state import same_random_state
from .backend import SENTINEL, Backend, BlockTimer, Job, Timing, wall_ms
from .table import LatencyTable

__all__ = ["measure_jobs", "measure_network", "measure_paired"]

_log = logging.getLogger(__name__)

_BATCH = 12  # kernels alive at a time
_QUIET = 1.1  # times its least that the sentinel takes at most while the machine is quiet
_TOGETHER = 8  # batches of which the busy ones are measured again before the next
_MAX_REDOS = 2  # times that a batch is measured again, since the machine was busy
_UNCERTAINTY = 0.02  # of a median, at which a kernel has been sampled enough
_MAX_PAIRED_EXTENSIONS = 3  # the same for two networks
_MAX_EXTENSIONS = 2  # times that the samples of an uncertain kernel are taken again
_RISE_MS = 500.0  # for which a GPU computes before it counts
_SENTINEL_MEMORY = 2000  # times that its least is taken from
_WARM_UP_CALLS = 3
_WARM_UP_MS = 200.0  # a call longer than this warms up by itself
_Rounds: TypeAlias = list[tuple[float, float]]  # (ratio to the sentinel, the sentinel's time)

_MAX_CALLS = 1_000_000  # of a block; a kernel that does nothing would never fill one
_SURELY = 10  # times the least length of a block, that a short one does not come to by chance

# How libraries say that memory lacks: ONNX Runtime, CUDA and TensorRT, cuBLAS, C++, PyTorch, numpy.
_NO_MEMORY = (
    "failed to allocate memory", "out of memory", "cublas_status_alloc_failed", "bad_alloc",
    "can't allocate memory", "unable to allocate",
)  # fmt: skip


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

    The timings of a batch are written as soon as they are known, or the last try is over where
    the machine was busy: a run that is killed goes on where it was. The global random states,
    torch's thread count and its grad mode stay as they were.

    Args:
        jobs: the kernels; of several with one key, the first is measured. Optional ones that
            can't be run are left out, with a message to the log.
        backend: what runs them.
        table: where timings are looked up and written, under `backend.fingerprint()`.
        progress: called as `progress(done, total, key)` for each kernel after its batch; kernels
            that the table had already are counted as done.
        seed: of the order in which kernels are measured.

    Raises:
        LatencyError: a kernel can't be built or run; the message names its key. What was written
            before stays in the table.
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
    with _preserved():
        todo = [job for job in todo if not job.optional or _can_run(job, backend)]
    if not todo:
        return
    turns = [_Turn(todo[start : start + _BATCH]) for start in range(0, len(todo), _BATCH)]
    done = len(by_key) - len(todo)

    def tell(turn: _Turn) -> None:
        nonlocal done
        turn.told = True
        for key in turn.keys:
            done += 1
            if progress is not None:
                progress(done, len(by_key), key)

    with _preserved():
        sentinel = _Sentinel(backend, _history(table, fingerprint))
        reference_ms = table.reference_ms(fingerprint, sentinel.usual_ms)
        bench = _Bench(backend, table, fingerprint, sentinel, reference_ms, order)
        for stop in range(_TOGETHER, len(turns) + _TOGETHER, _TOGETHER):
            begun = turns[:stop]
            # What was taken for quiet may prove to have been busy.
            while pending := [turn for turn in begun if not turn.settled(sentinel)]:
                for turn in pending:
                    bench.take(turn)
                    if turn.settled(sentinel) and not turn.told:
                        tell(turn)
            for turn in begun:  # what was taken for busy may prove to have been quiet
                if not turn.told:
                    bench.write(turn)
                    tell(turn)
    busy = [turn for turn in turns if sentinel.was_busy(turn)]
    if busy:
        worst = max(turn.sentinel_ms for turn in busy) / sentinel.quiet_ms
        _log.warning(
            "the machine is unsteady: %d of %d kernels were measured while a reference kernel took "
            "up to %.0f %% longer than at best; close other programs or fix the clock rate for "
            "better measurements",
            sum(len(turn.jobs) for turn in busy),
            len(todo),
            100 * (worst - 1),
        )


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
        probe = _network_probe(backend, module, inputs, _min_sample_ms(backend, min_sample_ms))
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
    bouts: int = 1,
    min_sample_ms: float | None = None,
) -> tuple[Timing, Timing]:
    """How long two networks take, sampled in turn so that both see the same machine.

    The median of the second is that of the first times the median ratio of the two within a
    round, and its spread that of the ratio. With several bouts the median of their ratios counts.

    Args:
        a: the one network; left as it is.
        b: the other.
        backend: what runs them.
        inputs_a: positional arguments of a.
        inputs_b: positional arguments of b.
        rounds: samples of each in a bout; up to four times as many while the ratio is uncertain
            by more than 2 %.
        bouts: times that both are prepared, b first every other time: where their memory lies and
            which was first can make a difference of 2 % that no number of samples takes away.
            An even number, for it to cancel.
        min_sample_ms: least length of a sample; None: the back-end's own setting.

    Raises:
        LatencyError: a network can't be run by the back-end, or there are no rounds or bouts.
    """
    if bouts < 1:
        raise LatencyError(f"{bouts} bouts asked for: take at least one")
    least = _min_sample_ms(backend, min_sample_ms)
    order = random.Random(0)  # who follows whom matters by a percent or two
    both = [(a, inputs_a), (b, inputs_b)]
    firsts: list[float] = []
    ratios: list[list[float]] = []
    with _preserved():
        for bout in range(bouts):
            swapped = bout % 2 == 1
            turns = both[::-1] if swapped else both
            probes = [_network_probe(backend, *one, least) for one in turns]
            first, second = _paired(backend, probes[::-1] if swapped else probes, rounds, order)
            firsts += first
            ratios.append(_relative(second, first))
            del probes  # or those of two bouts were in memory at once
            if _rises(backend):  # a GPU's memory is scarce
                gc.collect()  # a GraphModule and its graph hold each other
    one = _timing(firsts)
    ratio = statistics.median(statistics.median(bout) for bout in ratios)
    other = _timing([one.median_ms * r for bout in ratios for r in bout])
    return one, replace(other, median_ms=one.median_ms * ratio)


def _paired(
    backend: Backend, probes: Sequence[_Probe], rounds: int, order: random.Random
) -> list[list[float]]:
    """Samples of two probes, more of them while their ratio is uncertain."""
    first, second = _round_robin(backend, probes, rounds, order)
    for _ in range(_MAX_PAIRED_EXTENSIONS):
        if _uncertainty(_relative(second, first)) <= _UNCERTAINTY:
            break
        more = _round_robin(backend, probes, rounds, order)
        first += more[0]
        second += more[1]
    return [first, second]


@dataclass(eq=False)
class _Turn:
    """Kernels that are measured together."""

    jobs: Sequence[Job]
    tries: int = 0
    sentinel_ms: float = math.inf  # of the rounds that count, in the best try
    timings: dict[str, Timing] = field(default_factory=dict)  # of that try
    told: bool = False

    def __post_init__(self) -> None:
        self.keys = [job.key for job in self.jobs]

    def settled(self, sentinel: _Sentinel) -> bool:
        """Whether it needs no further try."""
        return self.tries > _MAX_REDOS or (self.tries > 0 and not sentinel.was_busy(self))


_HISTORIES: WeakKeyDictionary[LatencyTable, dict[str, deque[float]]] = WeakKeyDictionary()


def _history(table: LatencyTable, fingerprint: str) -> deque[float]:
    """What the sentinel took in this process, while kernels of this table were measured."""
    known = _HISTORIES.setdefault(table, {})
    return known.setdefault(fingerprint, deque(maxlen=_SENTINEL_MEMORY))


class _Sentinel:
    """A small convolution whose time tells whether the machine is busy with something else."""

    def __init__(self, backend: Backend, history: deque[float]) -> None:
        shape = getattr(backend, "sentinel", SENTINEL)
        convolution = nn.Conv2d(shape[1], shape[1], 3, padding=1, device="cpu").eval()
        image = torch.randn(shape, device="cpu")
        self.probe = _probe(
            backend, convolution, (image,), _min_sample_ms(backend, None), rise=_rises(backend)
        )
        self._history = history
        (first,) = _round_robin(backend, [self.probe], _samples(backend, None), None)
        self.usual_ms = statistics.median(first)
        self.record(first)

    @property
    def quiet_ms(self) -> float:
        """What it takes at best: the tenth percentile, since single samples can be too short."""
        return float(np.percentile(self._history, 10))

    def was_busy(self, turn: _Turn) -> bool:
        """Whether the machine was, by what is known by now."""
        return turn.sentinel_ms > _QUIET * self.quiet_ms > 0

    def record(self, blocks: Sequence[float]) -> None:
        """Let more of its times count."""
        self._history.extend(blocks)


@dataclass(frozen=True)
class _Bench:
    """Where batches of kernels are measured.

    A machine may be slower in one round than in another, and today than when the table was begun:
    times are given as if the sentinel took `reference_ms` in each.
    """

    backend: Backend
    table: LatencyTable
    fingerprint: str
    sentinel: _Sentinel
    reference_ms: float
    order: random.Random

    def take(self, turn: _Turn) -> None:
        """Measure a batch, and write it once it needs no further try.

        What was measured while the machine was busy is not written before: a run that is killed
        would take it for good when it goes on.
        """
        if not turn.tries:  # another process may have been measuring into the same table meanwhile
            turn.jobs = [
                job for job in turn.jobs if self.table.get(job.key, self.fingerprint) is None
            ]
        timings, sentinel_ms = self._measured(turn.jobs)
        turn.tries += 1
        if sentinel_ms < turn.sentinel_ms:
            turn.timings = dict(zip((job.key for job in turn.jobs), timings, strict=True))
            turn.sentinel_ms = sentinel_ms
        if turn.settled(self.sentinel):
            self.write(turn)

    def write(self, turn: _Turn) -> None:
        """Into the table."""
        self.table.put_all(turn.timings, self.fingerprint)

    def _measured(self, jobs: Sequence[Job]) -> tuple[list[Timing], float]:
        """Timings of kernels, and the sentinel's in the rounds of that one for which it was most.

        Kernels whose median is still uncertain are sampled again. What does not fit the memory of
        the device together is measured in parts.
        """
        if not jobs:
            return [], 0.0
        try:
            return self._sampled([_job_probe(job, self.backend) for job in jobs])
        except Exception as e:
            if not _out_of_memory(e):
                raise
            if len(jobs) == 1:
                if isinstance(e, HalpError):
                    raise
                raise LatencyError(f"kernel {jobs[0].key}: {e}") from e
        gc.collect()
        halves = jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]
        (left, busy), (right, busier) = (self._measured(half) for half in halves)
        return [*left, *right], max(busy, busier)

    def _sampled(self, probes: Sequence[_Probe]) -> tuple[list[Timing], float]:
        """Timings of what is ready, and the sentinel's in the worst rounds that count."""
        samples = _samples(self.backend, None)
        found: list[_Rounds] = [[] for _ in probes]
        counted = found
        unsure = list(range(len(probes)))
        for _ in range(1 + _MAX_EXTENSIONS):
            turns = [*(probes[k] for k in unsure), self.sentinel.probe]
            *sampled, clock = _round_robin(self.backend, turns, samples, self.order)
            self.sentinel.record(clock)
            for k, blocks in zip(unsure, sampled, strict=True):
                found[k] += _ratios(blocks, clock)
            counted = [
                _quiet(rounds, self.sentinel.quiet_ms, (samples + 1) // 2) for rounds in found
            ]
            unsure = [
                k
                for k, rounds in enumerate(counted)
                if _uncertainty([ratio for ratio, _ in rounds]) > _UNCERTAINTY
            ]
            if not unsure:
                break
        timings = [
            _timing([self.reference_ms * ratio for ratio, _ in rounds]) for rounds in counted
        ]
        return timings, max(statistics.median(ms for _, ms in rounds) for rounds in counted)


def _ratios(blocks: Sequence[float], clock: Sequence[float]) -> _Rounds:
    """(ratio, the sentinel's time) of each round; without those that a clock can't resolve."""
    return [(ms / tick, tick) for ms, tick in zip(blocks, clock, strict=True) if tick > 0] or [
        (1.0, 0.0)
    ]


def _quiet(rounds: _Rounds, quiet_ms: float, least: int) -> _Rounds:
    """The rounds in which the machine was quiet, or all where those are too few."""
    found = [pair for pair in rounds if pair[1] <= _QUIET * quiet_ms]
    return found if len(found) >= least else rounds


def _relative(blocks: Sequence[float], others: Sequence[float]) -> list[float]:
    """Ratios within each round; rounds that a clock can't resolve are left out, unless all are."""
    return [ratio for ratio, _ in _ratios(blocks, others)]


def _uncertainty(blocks: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a median, relative to it.

    1.57 IQR / sqrt(n): McGill, Tukey and Larsen, Variations of Box Plots, 1978.
    """
    lower, median, upper = np.percentile(blocks, [25, 50, 75])
    return float(1.57 * (upper - lower) / math.sqrt(len(blocks)) / max(median, 1e-12))


def _can_run(job: Job, backend: Backend) -> bool:
    try:
        _job_probe(job, backend)
    except LatencyError as error:
        _log.warning("left out: %s", error)
        return False
    return True


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


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether memory that a device lacks led to an error."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if any(words in text for words in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def _network_probe(
    backend: Backend, module: nn.Module, inputs: tuple[Any, ...], min_sample_ms: float
) -> _Probe:
    try:
        return _probe(backend, module, inputs, min_sample_ms, rise=_rises(backend))
    except HalpError:
        raise
    except Exception as e:  # of the device's libraries, of many classes
        raise LatencyError(
            f"{type(module).__name__} can't be run on the back-end {backend.name!r}: "
            f"{type(e).__name__}: {e}"
        ) from e


def _rises(backend: Backend) -> bool:
    """Whether it measures on a GPU, whose clock takes its time to rise after a pause."""
    return tuple(getattr(backend, "sentinel", SENTINEL)) != SENTINEL


def _probe(
    backend: Backend,
    module: nn.Module,
    inputs: tuple[Any, ...],
    min_sample_ms: float,
    *,
    rise: bool = False,
) -> _Probe:
    """Warm up, and find how many calls make a block of `min_sample_ms`."""
    run = backend.prepare(module, inputs)
    warmed = 0.0
    for _ in range(_WARM_UP_CALLS):
        warmed += _block_ms(backend, run, 1)
        if warmed >= _WARM_UP_MS:
            break
    begun, warmed = time.perf_counter(), 0.0
    while rise and max(warmed, 1000 * (time.perf_counter() - begun)) < _RISE_MS:
        warmed += max(_block_ms(backend, run, 1), 0.1)
    calls = 1
    while calls < _MAX_CALLS:
        took = _block_ms(backend, run, calls)
        if took < _SURELY * min_sample_ms:  # it may be one that was held up
            took = min(took, _block_ms(backend, run, calls))
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
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        with same_random_state(), ExitStack() as plain:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):  # what is measured has a type of its own
                    plain.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
