"""Measures the kernels of a bundle with ONNX Runtime, on a device that has no PyTorch.

It is copied into bundles as run.py and stands alone: Python 3.8 or newer, numpy and onnxruntime
are all that it needs (pip install numpy onnxruntime). In the folder of the bundle:

    python run.py --threads 1

The results, one JSON line a kernel, are flushed to disk as they are measured. A run that was
stopped goes on with the same command. Afterwards take the file back to where the bundle was made,
and read it there with halp_fx.latency.bundle.import_results.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

__all__ = ["BundleError", "main"]

MANIFEST_FORMAT = "halp_fx kernel bundle"
RESULTS_FORMAT = "halp_fx kernel timings"
VERSION = 1

_BATCH = 12  # kernels alive at a time
_MAX_DRIFT = 0.25  # of the sentinel from its running median
_MAX_REDOS = 2
_UNCERTAINTY = 0.02  # of a median, at which a kernel has been sampled enough
_MAX_EXTENSIONS = 2  # times that the samples of an uncertain kernel are taken again
_SENTINEL_MEMORY = 15  # times that its running median is taken over
_WARM_UP_CALLS = 3
_WARM_UP_MS = 200.0  # a call longer than this warms up by itself
_MAX_CALLS = 1000000  # of a block; a kernel that does nothing would never fill one
_SURELY = 10  # times the least length of a block, that a short one does not come to by chance
_RISE_MS = 500.0  # for which a GPU computes before it counts: its clock takes its time to rise
# How libraries say that memory lacks: ONNX Runtime, CUDA and TensorRT, cuBLAS, C++, PyTorch, numpy.
_NO_MEMORY = (
    "failed to allocate memory", "out of memory", "cublas_status_alloc_failed", "bad_alloc",
    "can't allocate memory", "unable to allocate",
)  # fmt: skip

# Model names of virtual machines are often generic ("AMD EPYC"); these tell generations apart.
_CPUINFO_FIELDS = ("model name", "cpu family", "model", "CPU implementer", "CPU part", "Hardware")
_ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


class BundleError(Exception):
    """The bundle, the results file or an option can't be used; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the results file lacks.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        the exit status: 0 if every kernel is measured, 1 after an error, 130 when interrupted.
    """
    folder = Path(__file__).resolve().parent
    options = _options(folder, arguments)
    try:
        _measure_bundle(folder, options)
    except BundleError as e:
        _say(f"error: {e}")
        return 1
    except KeyboardInterrupt:
        _say("stopped: the same command goes on from here")
        return 130
    return 0


def _options(folder: Path, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures the kernels in this folder with ONNX Runtime. Run it again to go on."
    )
    add = parser.add_argument
    add("--threads", type=_count, default=1, help="CPU threads of a kernel (default: 1)")
    add(
        "--provider",
        default="CPUExecutionProvider",
        help="execution provider of ONNX Runtime (default: CPUExecutionProvider)",
    )
    add(
        "--samples",
        type=_count,
        default=9,
        help="samples of each kernel (default: 9); up to three times as many where they scatter",
    )
    add(
        "--min-sample-ms",
        type=_positive,
        default=1.0,
        metavar="MS",
        help="a sample is a block of calls of at least this long (default: 1)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        default=folder / "results.jsonl",
        metavar="FILE",
        help="file of the results (default: results.jsonl beside run.py)",
    )
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number above 0")
    return value


def _measure_bundle(folder: Path, options: argparse.Namespace) -> None:
    meter = _Meter(folder, options)
    manifest, name = _manifest(folder)
    shared = [] if manifest.get("weights") is None else [manifest["weights"]]
    sentinel = manifest["gpu_sentinel" if options.provider in _ON_CUDA else "sentinel"]
    for entry in [sentinel, *shared, *manifest["kernels"]]:
        _contents(folder, entry)  # a damaged copy is better told now than after hours
    header = {
        "format": RESULTS_FORMAT,
        "version": VERSION,
        "bundle": name,
        "kernels": len(manifest["kernels"]),
        "settings": {"samples": options.samples, "min_sample_ms": options.min_sample_ms},
        "fingerprint": meter.fingerprint(),
    }
    keys = [entry["key"] for entry in manifest["kernels"]]
    with _Results(options.output, header, keys) as results:
        todo = [entry for entry in manifest["kernels"] if entry["key"] not in results.medians]
        if todo:
            _say(f"{len(keys)} kernels, {len(todo)} to measure")
            _measure(todo, sentinel, meter, results)
        network = manifest["network"]
        if network is not None:
            _say(f"the whole network takes {results.medians[network]:.3f} ms")
    _say(f"all {len(keys)} kernels are measured: {options.output}")


def _manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """What is in the bundle, and a name for it: the checksum of the manifest."""
    path = folder / "manifest.json"
    try:
        data = path.read_bytes()
        manifest = json.loads(data.decode("utf-8"))
    except (OSError, ValueError) as e:
        raise BundleError(f"{path} can't be read ({e}): copy the bundle again") from e
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise BundleError(f"{path} is not the manifest of a bundle: copy the bundle again")
    if manifest.get("version") != VERSION:
        raise BundleError(
            f"{path} is of version {manifest.get('version')}, and this run.py reads version "
            f"{VERSION}: copy the whole bundle again"
        )
    if not manifest.get("complete"):
        raise BundleError(
            f"the bundle in {folder} is not complete, writing it was stopped: write it again, "
            "which goes on where it was"
        )
    return manifest, hashlib.sha256(data).hexdigest()


def _contents(folder: Path, entry: dict[str, Any]) -> bytes:
    """The ONNX file of a kernel, as it was written."""
    path = folder / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as e:
        raise BundleError(f"{path} can't be read ({e}): copy the bundle again") from e
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise BundleError(f"{path} differs from its checksum: copy the bundle again")
    return data


class _Probe:
    """A kernel ready to be timed."""

    def __init__(self, run: Callable[[], None], min_sample_ms: float, rise_ms: float = 0) -> None:
        """Warm up, and find how many calls make a block of `min_sample_ms`."""
        self.run = run
        self.calls = 1  # of one block
        warmed = 0.0
        for _ in range(_WARM_UP_CALLS):
            warmed += _block_ms(run, 1)
            if warmed >= _WARM_UP_MS:
                break
        while warmed < rise_ms:
            warmed += _block_ms(run, 1)
        while self.calls < _MAX_CALLS:
            took = _block_ms(run, self.calls)
            if took < _SURELY * min_sample_ms:  # it may be one that was held up
                took = min(took, _block_ms(run, self.calls))
            if took >= min_sample_ms:
                break
            wanted = math.ceil(1.2 * self.calls * min_sample_ms / max(took, 1e-6))
            self.calls = min(max(wanted, self.calls + 1), 10 * self.calls, _MAX_CALLS)


class _Meter:
    """ONNX Runtime with the settings of the command line."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.samples = folder, options.samples
        self.provider, self.threads = options.provider, options.threads
        self.min_sample_ms = options.min_sample_ms
        self.numpy, self.runtime = _package("numpy"), _package("onnxruntime")
        available = self.runtime.get_available_providers()
        if self.provider not in available:
            raise BundleError(
                "provider is {!r}: this build of onnxruntime has {}".format(
                    self.provider, ", ".join(available)
                )
            )
        preload = getattr(self.runtime, "preload_dlls", None)
        if self.provider in _ON_CUDA and preload is not None:
            with redirect_stdout(sys.stderr):
                preload()  # libraries of CUDA that packages brought

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the device and the settings; names no host."""
        return {
            "backend": "onnxruntime",
            "provider": self.provider,
            "onnxruntime": self.runtime.__version__,
            "optimization": "all",
            "threads": self.threads,
            **_cpu_facts(),
            **(_gpu_facts() if self.provider in _ON_CUDA else {}),
        }

    def probe(self, entry: dict[str, Any]) -> _Probe:
        """A kernel of the manifest, ready to be timed."""
        _contents(self.folder, entry)
        is_reference = "key" not in entry
        rise_ms = _RISE_MS if is_reference and self.provider in _ON_CUDA else 0
        try:
            session = self._session(entry)
            return _Probe(self._bound(session, entry), self.min_sample_ms, rise_ms)
        except BundleError:
            raise
        except Exception as e:  # onnxruntime's share no base class of their own
            name = "the reference kernel" if is_reference else f"kernel {entry['key']}"
            raise BundleError(
                f"{name} can't be run ({entry['file']}, opset {entry['opset']}, onnxruntime "
                f"{self.runtime.__version__}): {e}"
            ) from e

    def round_robin(self, probes: Sequence[_Probe], order: random.Random) -> list[list[float]]:
        """Samples of each probe, in milliseconds a call, in a new order each round."""
        blocks: list[list[float]] = [[] for _ in probes]
        turns = list(range(len(probes)))
        with _no_collection():
            for _ in range(self.samples):
                order.shuffle(turns)
                for turn in turns:
                    probe = probes[turn]
                    blocks[turn].append(_block_ms(probe.run, probe.calls) / probe.calls)
        return blocks

    def timing(self, blocks: Sequence[float]) -> dict[str, Any]:
        """Median and half the interquartile range, milliseconds."""
        lower, median, upper = (float(p) for p in self.numpy.percentile(blocks, [25, 50, 75]))
        return {"median_ms": median, "spread_ms": (upper - lower) / 2, "samples": len(blocks)}

    def is_uncertain(self, blocks: Sequence[float]) -> bool:
        """Whether the 95 % interval of the median is wide.

        1.57 IQR / sqrt(n): McGill, Tukey and Larsen, Variations of Box Plots, 1978.
        """
        lower, median, upper = (float(p) for p in self.numpy.percentile(blocks, [25, 50, 75]))
        return 1.57 * (upper - lower) / math.sqrt(len(blocks)) > _UNCERTAINTY * median

    def _session(self, entry: dict[str, Any]) -> Any:
        path, runtime = self.folder / entry["file"], self.runtime
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads of idle sessions would spin on the cores that the session being timed needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers: list[Any] = [self.provider]
        if self.provider.startswith("Tensorrt"):
            half = any(tensor["dtype"] == "float16" for tensor in entry["inputs"])
            providers = [(self.provider, {"trt_fp16_enable": str(half)})]
            # What TensorRT does not take goes to CUDA, as in use, and not to the CPU.
            beside = ["CUDAExecutionProvider"]
            providers += [name for name in beside if name in runtime.get_available_providers()]
        # By its path: the weights lie in a file beside it. Without the fallback, why a provider
        # does not start is told.
        session = runtime.InferenceSession(
            str(path), options, providers=providers, enable_fallback=0
        )
        active = session.get_providers()
        if active[0] != self.provider:
            raise BundleError(
                f"ONNX Runtime fell back from {self.provider} to {active[0]}: the libraries of the "
                "provider could not be loaded. Install them, or pass another --provider."
            )
        return session

    def _bound(self, session: Any, entry: dict[str, Any]) -> Callable[[], None]:
        """A run with inputs and outputs that are allocated once, on the device of the provider."""
        device = "cuda" if self.provider in _ON_CUDA else "cpu"
        stated = {tensor["name"]: tensor for tensor in entry["inputs"]}
        binding = session.io_binding()
        held: list[Any] = []  # the binding keeps no references of its own
        for node in session.get_inputs():
            array = self._array(stated[node.name])
            value = self.runtime.OrtValue.ortvalue_from_numpy(array, device, 0)
            binding.bind_ortvalue_input(node.name, value)
            held.extend([array, value])
        names = [node.name for node in session.get_outputs()]
        for name in names:
            binding.bind_output(name, device)
        session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        held.extend(outputs)
        for i, name in enumerate(names):
            binding.bind_ortvalue_output(name, outputs[i])

        def run(memory: Any = held) -> None:  # noqa: ARG001  # lives as long as the run
            session.run_with_iobinding(binding)

        return run

    def _array(self, tensor: dict[str, Any]) -> Any:
        """Random numbers where they are floating point, else zeros."""
        shape, dtype = tuple(tensor["shape"]), self.numpy.dtype(tensor["dtype"])
        if dtype.kind != "f":
            return self.numpy.zeros(shape, dtype)
        values = self.numpy.random.default_rng(0).standard_normal(shape, self.numpy.float32)
        return self.numpy.asarray(values, dtype)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise BundleError(
            f"the package {name} can't be imported ({e}): run pip install numpy onnxruntime"
        ) from e


class _Sentinel:
    """A small convolution whose time tells whether the machine is as it was."""

    def __init__(self, entry: dict[str, Any], meter: _Meter, order: random.Random) -> None:
        self.probe = meter.probe(entry)
        first = meter.round_robin([self.probe], order)[0]
        self._history: deque[float] = deque(first, maxlen=_SENTINEL_MEMORY)

    def drift(self, ms: float) -> float:
        """Relative distance of a time from the running median."""
        usual = statistics.median(self._history)
        return abs(ms - usual) / usual if usual > 0 else 0.0

    def record(self, ms: float) -> None:
        """Let a time count; also one that drifted, or a lasting change would never be followed."""
        self._history.append(ms)


def _measure(
    todo: list[dict[str, Any]], sentinel_entry: dict[str, Any], meter: _Meter, results: _Results
) -> None:
    order = random.Random(0)
    order.shuffle(todo)
    sentinel = _Sentinel(sentinel_entry, meter, order)
    start = time.monotonic()
    for first in range(0, len(todo), _BATCH):
        batch = todo[first : first + _BATCH]
        timings = _measure_parts(batch, meter, sentinel, order)
        results.add({entry["key"]: timings[i] for i, entry in enumerate(batch)})
        done = first + len(batch)
        left = (time.monotonic() - start) / done * (len(todo) - done)
        _say(f"{len(results.medians)}/{results.total} kernels, {_clock(left)} left")


def _measure_parts(
    batch: list[dict[str, Any]], meter: _Meter, sentinel: _Sentinel, order: random.Random
) -> list[dict[str, Any]]:
    """Timings of a few kernels, in smaller parts where the memory does not hold all of them."""
    try:
        return _measure_batch(batch, meter, sentinel, order)
    except Exception as e:
        if len(batch) == 1 or not _out_of_memory(e):
            raise
    gc.collect()
    half = len(batch) // 2
    parts = (batch[:half], batch[half:])
    return [timing for part in parts for timing in _measure_parts(part, meter, sentinel, order)]


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory that the device lacks led to an error."""
    found: Any = error
    while found is not None:
        text = str(found).lower()
        if isinstance(found, MemoryError) or any(words in text for words in _NO_MEMORY):
            return True
        found = found.__cause__ or found.__context__
    return False


def _measure_batch(
    batch: list[dict[str, Any]], meter: _Meter, sentinel: _Sentinel, order: random.Random
) -> list[dict[str, Any]]:
    """Timings of a few kernels, from the attempt in which the sentinel drifted least."""
    probes = [meter.probe(entry) for entry in batch]
    best: list[list[float]] = []
    least_drift = math.inf
    for _ in range(1 + _MAX_REDOS):
        sampled = meter.round_robin([*probes, sentinel.probe], order)
        _settle(sampled, [*probes, sentinel.probe], meter, order)
        ms = statistics.median(sampled.pop())
        drift = sentinel.drift(ms)
        sentinel.record(ms)
        if drift < least_drift:
            best, least_drift = sampled, drift
        if drift <= _MAX_DRIFT:
            break
    else:
        _say(
            f"the device is unsteady: a reference kernel drifts by {100 * least_drift:.0f} %; "
            "close other programs or fix the clock rate for better measurements"
        )
    return [meter.timing(blocks) for blocks in best]


def _settle(
    sampled: list[list[float]], probes: Sequence[_Probe], meter: _Meter, order: random.Random
) -> None:
    """Take more samples of the kernels whose median is still uncertain."""
    for _ in range(_MAX_EXTENSIONS):
        unsure = [k for k, blocks in enumerate(sampled) if meter.is_uncertain(blocks)]
        more = meter.round_robin([probes[k] for k in unsure], order) if unsure else []
        for i, k in enumerate(unsure):
            sampled[k].extend(more[i])


def _block_ms(run: Callable[[], None], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        run()
    return (time.perf_counter_ns() - start) / 1e6


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


class _Results:
    """The results file: a header line, then a line a kernel."""

    def __init__(self, path: Path, header: dict[str, Any], keys: Sequence[str]) -> None:
        self.path, self.total = path, len(keys)
        self.medians: dict[str, float] = {}  # of the kernels measured so far, milliseconds
        try:
            self._file = open(path, "a+b")  # noqa: SIM115  # closed by __exit__
        except OSError as e:
            raise BundleError(f"{path} can't be written ({e}): pass another -o") from e
        try:
            self._lock()
            self._resume(header, set(keys))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _Results:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, timings: dict[str, dict[str, Any]]) -> None:
        """Append the timings of some kernels; they are on the disk afterwards."""
        self._append([{"key": key, **timing} for key, timing in timings.items()])
        self.medians.update({key: timing["median_ms"] for key, timing in timings.items()})

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        try:
            self._file.write(b"".join(_line(record) for record in records))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            raise BundleError(
                f"{self.path} can't be written ({e}): free some space, and run the same command"
            ) from e

    def _lock(self) -> None:
        """Two runs at a time would disturb each other's measurements."""
        try:
            fcntl = importlib.import_module("fcntl")
        except ImportError:  # not on this system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BundleError(f"another run is writing to {self.path}: let it end") from e
        except OSError:  # a file system without locks
            return

    def _resume(self, header: dict[str, Any], keys: set[str]) -> None:
        """Take over what a run before has measured; drop the line that it was killed in."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            if not _line(header).startswith(data):
                raise self._foreign()
            self._file.truncate(0)
            self._append([header])
            return
        first, *rest = whole.splitlines()
        self._check_header(first, header)
        for number, line in enumerate(rest, 2):
            record = _parsed(line)
            key, median = record.get("key"), record.get("median_ms")
            if key not in keys or key in self.medians or not isinstance(median, float):
                raise BundleError(
                    f"{self.path} is damaged in line {number}: move it away and measure again"
                )
            self.medians[key] = median
        self._file.truncate(len(whole))

    def _check_header(self, line: bytes, header: dict[str, Any]) -> None:
        found = _parsed(line)
        if found.get("format") != RESULTS_FORMAT or found.get("version") != VERSION:
            raise self._foreign()
        if found.get("bundle") != header["bundle"]:
            raise BundleError(f"{self.path} has the results of another bundle: pass another -o")
        there = {**found.get("settings", {}), **found.get("fingerprint", {})}
        here = {**header["settings"], **header["fingerprint"]}
        differ = [
            f"{name} {there.get(name)}, now {here.get(name)}"
            for name in sorted({*there, *here})
            if there.get(name) != here.get(name)
        ]
        if differ:
            raise BundleError(
                "{} was measured with other settings or on another device ({}): use the same, or "
                "pass another -o".format(self.path, "; ".join(differ))
            )

    def _foreign(self) -> BundleError:
        return BundleError(f"{self.path} is another file, left as it is: pass another -o")


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode("ascii") + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _cpu_facts() -> dict[str, Any]:
    """Processor, cores, instruction set and operating system of this device."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    first = text.strip().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    found = {name.strip(): value.strip() for name, _, value in pairs}
    facts = [f"{name} {found[name]}" for name in _CPUINFO_FIELDS[1:] if name in found]
    model = found.get("model name", platform.machine()) if text else _cpu_without_proc()
    return {
        "cpu": " ".join([model, *facts]),
        "cores": os.cpu_count(),
        "instructions": _instructions(set(found.get("flags", "").split())),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _instructions(flags: set[str]) -> str:
    """The instruction set in the words of PyTorch, as far as the flags of the processor tell."""
    if {"avx512vl", "avx512bw", "avx512dq", "fma"} <= flags:
        return "AVX512"
    return "AVX2" if {"avx2", "fma"} <= flags else "DEFAULT"


def _cpu_without_proc() -> str:
    if platform.system() != "Darwin":
        return platform.processor() or platform.machine()
    return _answer(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()


def _gpu_facts() -> dict[str, Any]:
    names = ("gpu", "capability", "driver")
    query = "--query-gpu=name,compute_cap,driver_version"
    answer = _answer(["nvidia-smi", query, "--format=csv,noheader", "--id=0"])
    values = [value.strip() for value in answer.split(",")]
    if len(values) == len(names):
        return {name: values[i] for i, name in enumerate(names)}
    try:  # boards have no nvidia-smi, but a name
        board = Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace")
    except OSError:
        board = "unknown"
    return {"gpu": board.strip("\0\n ")}


def _answer(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
