"""Measuring on a device that has no PyTorch.

`write_bundle` puts each kernel into a folder as a small ONNX file, with a runner beside them. On
the device, where Python, numpy and ONNX Runtime are enough, `python run.py` measures them;
`import_results` reads what it found into a latency table, by which networks are then pruned for
that device.

    folder/manifest.json    what is in the folder, with checksums
    folder/run.py           the runner, which stands alone
    folder/sentinel.onnx    a reference kernel that shows whether the device is steady,
    folder/gpu_sentinel.onnx    and one that is more than its launch on a GPU
    folder/kernels/*.onnx   the kernels
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .._version import __version__
from ..errors import HalpError, InputError, LatencyError
from ..random_state import same_random_state
from .backend import GPU_SENTINEL, SENTINEL, Job, iter_tensors
from .bundle_results import MANIFEST_FORMAT, VERSION, import_results
from .onnxruntime_backend import onnx_bytes

__all__ = ["import_results", "write_bundle"]

_log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

_TEMPORARY = ".tmp"  # ending of files that are not whole yet
_NUMPY_KINDS = "fiub"  # floats, integers, booleans: what numpy has without another package
_WEIGHTS = "weights.bin"  # of all kernels: what they are has no influence on the time
_KIND = "signed"  # of the shared numbers; files that share others are not kept
_LEAST_SHARED = 1024  # bytes; smaller tensors stay in the file, as shapes must


def write_bundle(
    jobs: Iterable[Job],
    folder: str | os.PathLike[str],
    *,
    network: tuple[nn.Module, tuple[Any, ...]] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write kernels into a folder, to be measured on a device that has no PyTorch.

    Copy the folder to the device and run `python run.py` in it (`--help` shows the options; it
    needs Python 3.8, numpy and onnxruntime). It leaves `results.jsonl` for `import_results`.

    The folder becomes the bundle of these jobs: kernels that it has already from the same
    versions are kept, which also goes on where a killed call stopped, and kernels of other jobs
    are removed. All kernels read their weights from one file of random numbers, which is as long
    as the largest weight.

    Args:
        jobs: the kernels; of several with one key, the first is written. Optional ones that can't
            be exported are left out, with a message to the log.
        folder: a new or empty folder, or a bundle.
        network: a network and its positional arguments, to be measured as a whole besides. Its
            time is for comparison: in the table its key starts with "network ".
        progress: called as `progress(done, total, key)` after each kernel.

    Returns:
        the folder.

    Raises:
        InputError: there is nothing to write, or the folder holds other files.
        DependencyError: a package that the export needs is not installed.
        LatencyError: a kernel can't be built or exported, which the message names by its key, or
            the folder can't be written. What was written before is kept for the next call.

    Example:
        >>> import tempfile, torch
        >>> from halp_fx.latency import Job
        >>> build = lambda: (torch.nn.Conv2d(3, 8, 3), (torch.zeros(1, 3, 16, 16),))
        >>> folder = write_bundle([Job("conv 3 -> 8", build)], tempfile.mkdtemp())
        >>> sorted(path.name for path in folder.iterdir())
        ['gpu_sentinel.onnx', 'kernels', 'manifest.json', 'run.py', 'sentinel.onnx']
        >>> sorted(path.suffix for path in (folder / "kernels").iterdir())
        ['.onnx']
    """
    by_key = _by_key(jobs)
    if network is not None:
        _check_network(network)
    if not by_key and network is None:
        raise InputError("there are no jobs: pass the kernels to measure, or a network")
    target = Path(folder)
    total = len(by_key) + (network is not None)
    with _explained(target), same_random_state():
        keeps = _claim(target)
        entries: list[dict[str, Any]] = []
        for done, (key, job) in enumerate(by_key.items(), 1):
            try:
                entries.append(_write_kernel(target, job, keeps))
            except LatencyError as error:
                if not job.optional:
                    raise
                _log.warning("left out of the bundle: %s", error)
            if progress is not None:
                progress(done, total, key)
        whole = None if network is None else _write_network(target, *network)
        if whole is not None:
            entries.append(whole)
            if progress is not None:
                progress(total, total, whole["key"])
        _remove_others(target, {entry["file"] for entry in entries})
        weights = _write_weights(target, entries)
        manifest = {
            **_header(),
            "complete": True,
            "network": None if whole is None else whole["key"],
            "weights": weights,
            "sentinel": _write_sentinel(target, "sentinel.onnx", SENTINEL),
            "gpu_sentinel": _write_sentinel(target, "gpu_sentinel.onnx", GPU_SENTINEL),
            "kernels": entries,
        }
        runner = pkgutil.get_data("halp_fx.tools", "bundle_runner.py")
        if runner is None:
            raise LatencyError("this installation of halp_fx lacks the runner: install it again")
        _write(target / "run.py", runner)
        _write_json(target / "manifest.json", manifest)
    return target


def _by_key(jobs: Iterable[Job]) -> dict[str, Job]:
    by_key: dict[str, Job] = {}
    for job in jobs:
        if not isinstance(job, Job):
            raise InputError(f"jobs has {job!r}: pass halp_fx.latency.Job objects")
        by_key.setdefault(job.key, job)
    return by_key


def _check_network(network: Any) -> None:
    fits = isinstance(network, tuple) and len(network) == 2
    if not (fits and isinstance(network[0], nn.Module) and isinstance(network[1], tuple)):
        raise InputError(
            "network is no module with a tuple of its arguments: pass network=(model, (x,))"
        )


def _header() -> dict[str, Any]:
    return {
        "format": MANIFEST_FORMAT,
        "version": VERSION,
        "made_by": {"halp_fx": __version__, "torch": torch.__version__, "weights": _KIND},
    }


def _claim(folder: Path) -> bool:
    """Make the folder a bundle that is not complete; whether its kernels may be kept."""
    path = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: pass a folder")
    found: Any = None
    if path.is_file():
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
    ours = isinstance(found, dict) and found.get("format") == MANIFEST_FORMAT
    if folder.is_dir() and not ours:
        others = sorted({item.name for item in folder.iterdir()} - {path.name + _TEMPORARY})
        if others:
            raise InputError(
                f"{folder} is no bundle and holds other files ({', '.join(others[:3])}): pass a "
                "new or an empty folder"
            )
    (folder / "kernels").mkdir(parents=True, exist_ok=True)
    _write_json(path, {**_header(), "complete": False})
    return ours and all(found.get(name) == value for name, value in _header().items())


def _write_kernel(folder: Path, job: Job, keep: bool) -> dict[str, Any]:
    """The manifest's entry of a kernel, which is exported unless the folder has it."""
    path = _path(folder, job.key)
    if keep and path.is_file():
        try:
            return _entry(folder, path, path.read_bytes(), job.key)
        except LatencyError:
            pass  # damaged: it is written again
    with _named(f"kernel {job.key}"):
        data = _exported(*job.build())
        entry = _entry(folder, path, data, job.key)
    _write(path, data)
    return entry


def _write_network(folder: Path, module: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    with _named(f"network {type(module).__name__}"):
        data = _exported(module, inputs)
    shapes = [
        f"{'x'.join(str(n) for n in t.shape) or 'scalar'}:{str(t.dtype).removeprefix('torch.')}"
        for t in iter_tensors(inputs)
    ]
    # Networks of one class are told apart by their files.
    digest = hashlib.sha256(data).hexdigest()[:16]
    key = f"network {type(module).__name__} inputs {shapes} file {digest}"
    path = _path(folder, key)
    entry = _entry(folder, path, data, key)
    _write(path, data)
    return entry


def _write_sentinel(folder: Path, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    convolution = nn.Conv2d(shape[1], shape[1], 3, padding=1)
    for parameter in convolution.parameters():
        nn.init.constant_(parameter, 0.01)  # the same file each time
    data = onnx_bytes(convolution, (torch.zeros(shape),))
    path = folder / name
    _write(path, data)
    return _entry(folder, path, data)


def _exported(module: nn.Module, inputs: tuple[Any, ...]) -> bytes:
    for tensor in iter_tensors(inputs):
        if not _known_to_numpy(tensor.dtype):
            raise LatencyError(f"it takes an input of {tensor.dtype}, which numpy can't make")
    return _with_shared_weights(onnx_bytes(module, inputs))


def _with_shared_weights(data: bytes) -> bytes:
    """The model with its large float32 weights read from the start of the shared file."""
    import onnx

    model = onnx.load_model_from_string(data)
    for tensor in model.graph.initializer:
        size = 4 * math.prod(tensor.dims)
        of_layer = tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1
        if not of_layer or size < _LEAST_SHARED:  # variances, of one dim, must be positive
            continue
        name, dims = tensor.name, list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type = name, onnx.TensorProto.FLOAT
        tensor.dims.extend(dims)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", _WEIGHTS), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
    return bytes(model.SerializeToString())


def _shared_bytes(model: Any) -> int:
    """How much of the shared file a model reads."""
    return max(
        (4 * math.prod(t.dims) for t in model.graph.initializer if t.external_data), default=0
    )


def _write_weights(folder: Path, entries: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The shared file, as long as needed: numbers so small that no deep network overflows."""
    size = max((entry["shared_bytes"] for entry in entries), default=0)
    if size == 0:
        return None
    numbers = np.random.default_rng(0).uniform(-0.05, 0.05, size // 4).astype("<f4")
    path = folder / "kernels" / _WEIGHTS
    _write(path, numbers.tobytes())
    return {
        "file": path.relative_to(folder).as_posix(),
        "sha256": hashlib.sha256(numbers.tobytes()).hexdigest(),
    }


def _known_to_numpy(dtype: torch.dtype) -> bool:
    try:
        kind: str = torch.empty(0, dtype=dtype).numpy().dtype.kind
    except TypeError:
        return False
    return kind in _NUMPY_KINDS


def _entry(folder: Path, path: Path, data: bytes, key: str | None = None) -> dict[str, Any]:
    """What the manifest says about an ONNX file.

    Raises:
        LatencyError: the data is no ONNX file with fixed shapes.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception as e:  # of protobuf, of several classes
        raise LatencyError(f"{path} is no ONNX file: {e}") from e
    opset = max((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), default=0)
    if not opset or not model.graph.node:
        raise LatencyError(f"{path} is no ONNX file with operators")
    return {
        **({} if key is None else {"key": key}),
        "file": path.relative_to(folder).as_posix(),
        "inputs": [_input(value) for value in model.graph.input],
        "opset": opset,
        "shared_bytes": _shared_bytes(model),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _input(value: Any) -> dict[str, Any]:
    """Name, shape and dtype of an input of an ONNX graph."""
    from onnx import helper

    tensor = value.type.tensor_type
    if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        raise LatencyError(f"the shape of {value.name} is not fixed in the exported file")
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape = [dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "shape": shape, "dtype": dtype.name}


def _path(folder: Path, key: str) -> Path:
    name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return folder / "kernels" / f"{name}.onnx"


def _remove_others(folder: Path, files: set[str]) -> None:
    for path in (folder / "kernels").iterdir():
        ours = path.suffix in {".onnx", _TEMPORARY}
        if ours and path.relative_to(folder).as_posix() not in files:
            path.unlink()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(value, indent=1) + "\n").encode("ascii"))


def _write(path: Path, data: bytes) -> None:
    """Write a file whole: a reader finds what was there before, or all of it."""
    temporary = path.with_name(path.name + _TEMPORARY)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors say which kernel they are about."""
    try:
        yield
    except LatencyError as e:
        raise type(e)(f"{what}: {e}") from e
    except HalpError:  # a missing package has nothing to do with the kernel
        raise
    except Exception as e:  # whatever a kernel of the user's network raises
        raise LatencyError(f"{what} can't be exported to ONNX: {type(e).__name__}: {e}") from e


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise LatencyError(
            f"the bundle can't be written to {folder} ({e}): pass a folder that can be written, "
            "with space enough"
        ) from e
