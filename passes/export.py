"""export: a network as an ONNX file that was checked against it."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halp_fx.devices import rename_devices
from halp_fx.errors import DependencyError, ExportError, HalpError, InputError

__all__ = ["DEFAULT_OPSET", "export_onnx"]

# The opset that torch's exporter is written in; for any other it converts the finished graph.
DEFAULT_OPSET = 18
# A protobuf file ends at 2 GiB; the graph itself needs room next to the weights.
_ONE_FILE_BYTES = 1_500_000_000
_SEED = 0

_RTOL = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
_DEFAULT_RTOL = 1e-3
_DEFAULT_ATOL = 1e-5


def export_onnx(
    pruned: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    external_data: bool | None = None,
    check: bool = True,
    rtol: float | None = None,
    atol: float = _DEFAULT_ATOL,
) -> Path:
    """Write a network to an ONNX file, checked against PyTorch before the path is returned.

    The network is exported in evaluation mode from a copy on the CPU; yours is left as it is. The
    inputs are named after the arguments of `forward`; the outputs "output", "output_0" ..., or
    after the keys of the dict that the network returns. Results that aren't tensors (None, sizes)
    have no output. ONNX Runtime and PyTorch must agree on random inputs at two batch sizes: the
    largest difference in an output may be `atol + rtol * max(abs(output))`.

    Weights are in the file itself; where that gets larger than about 1.5 GB, or if `external_data`
    is True, they are in a second file beside it with ".data" added to its name, to be moved along.
    On an error no file is written, and one that was there stays as it was.

    Args:
        pruned: the network; `halp_fx.compile` returns one, any other `nn.Module` does as well.
        path: the file to write, usually ending in ".onnx".
        example_inputs: a tensor or a tuple of positional arguments, the first dim of each tensor
            being the batch. None: inputs of the shapes that `halp_fx.compile` recorded.
        opset: version of the ONNX operator set; None: `DEFAULT_OPSET`.
        dynamic_batch: whether the file takes any batch size, or the one of the example only.
        external_data: whether the weights go to a file of their own; None: if they must.
        check: whether to compare with ONNX Runtime.
        rtol: relative tolerance; None: 1e-3, for float16 2e-2.
        atol: absolute tolerance.

    Returns:
        The path written.

    Raises:
        InputError: `example_inputs` is missing or has no common batch.
        DependencyError: onnxscript, onnx or onnxruntime isn't installed.
        ExportError: the network can't be exported, the file can't be run or written, or its
            outputs differ.

    Example:
        >>> halp_fx.export_onnx(pruned, "small.onnx")
    """
    if not isinstance(pruned, nn.Module):
        raise InputError(f"export_onnx takes an nn.Module, not a {type(pruned).__qualname__}")
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {str(target.parent)!r}; create it first")
    _require("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    if target.is_dir():
        raise InputError(f"{str(target)!r} is a folder; pass the path of a file")
    inputs = _example(pruned, example_inputs)
    try:
        with torch.random.fork_rng(devices=[]):
            network = _evaluation_copy(pruned)
            call = _prepare(network, inputs, dynamic_batch)
            if check:
                _refuse_unsupported(network, call)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".halp_fx_") as folder:
                # Under its final name, which it calls the file with the weights by.
                partial = Path(folder) / target.name
                _write(network, call, partial, opset, external_data)
                if check:
                    _compare(call, partial, rtol, atol)
                _move(partial, target)
    except HalpError:
        raise
    except Exception as error:
        raise ExportError(
            f"{type(pruned).__name__} can't be exported to ONNX: {_reason(error)}"
        ) from error
    return target


def _require(*packages: str) -> None:
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise DependencyError(
                f'export_onnx needs {package}: pip install "halp_fx[onnx]"'
            ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: the outer ones are the exporter's advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# --- what is exported -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call of the network by its tensors alone."""

    tensors: tuple[torch.Tensor, ...]  # the example's, flat
    function: Callable[..., tuple[torch.Tensor, ...]]  # those -> tensors of the result, flat
    input_names: list[str]
    output_names: list[str]
    batched: tuple[bool, ...]  # which tensors have the batch as their first dim
    batch: int | None  # the example's; None: fixed


def _evaluation_copy(model: nn.Module) -> nn.Module:
    # A plan in `meta` holds the dense network: no need to copy that as well.
    skipped: dict[int, Any] = {id(model.meta): {}} if isinstance(model, fx.GraphModule) else {}
    network = copy.deepcopy(model, skipped).cpu().eval()
    rename_devices(network, torch.device("cpu"))
    return network


def _example(model: nn.Module, example: Any) -> tuple[Any, ...]:
    # A subclass with a `forward` of its own may well take tensors.
    written_in = getattr(type(model).forward, "__module__", None)  # None: compiled from text
    if (written_in or "").startswith("torchvision.models.detection."):
        raise InputError(
            f"{type(model).__name__} takes and gives lists of any length, which is not exported. "
            "Pass the tensor part of what halp_fx.compile made of it, "
            "export_onnx(halp_fx.core_of(pruned), path), or, where it has two stages, backbone, "
            "region proposals and box head one by one"
        )
    if example is None:
        recorded = getattr(model, "meta", {}).get("halp_fx_example")
        if recorded is None:
            raise InputError(
                "example_inputs is missing: pass a tensor or tuple that the network accepts, as "
                "export_onnx(network, path, torch.zeros(1, 3, 224, 224))"
            )
        generator = torch.Generator().manual_seed(_SEED)
        return tuple(_recorded(entry, generator) for entry in recorded)
    if isinstance(example, torch.Tensor):
        return (example.detach().cpu(),)
    if not isinstance(example, (tuple, list)):
        raise InputError(
            f"example_inputs is a {type(example).__qualname__}; pass a tensor or a tuple of "
            "positional arguments"
        )
    return tuple(pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), tuple(example)))


def _recorded(entry: Any, generator: torch.Generator) -> Any:
    """A tensor for its (shape, dtype); an argument of any other kind was recorded itself."""
    match entry:
        case (tuple() | list() as shape, torch.dtype() as dtype):
            return _random(shape, dtype, generator)
    return entry


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    # Zero is the one integer that is an index into anything.
    return torch.zeros(tuple(shape), dtype=dtype)


def _prepare(network: nn.Module, inputs: tuple[Any, ...], dynamic: bool) -> _Call:
    """Run the network once to learn what its result looks like."""
    named, spec = pytree.tree_flatten_with_path(inputs)
    leaves = [leaf for _, leaf in named]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = tuple(leaves[i] for i in places)
    if not tensors:
        raise InputError("example_inputs has no tensor; pass one that the network accepts")
    batched = tuple(dynamic and tensor.dim() > 0 for tensor in tensors)
    batch = _common_batch(tensors, batched)
    if batch == 1:
        batch = 2  # torch.export takes a size of 1 for a constant
        tensors = _with_batch(tensors, batched, batch)

    def result(flat: Sequence[torch.Tensor]) -> Any:
        arguments = list(leaves)
        for place, tensor in zip(places, flat, strict=True):
            arguments[place] = tensor
        return network(*pytree.tree_unflatten(arguments, spec))

    with torch.no_grad():
        outputs, _ = pytree.tree_flatten_with_path(result(tensors))
    kept = [i for i, (_, leaf) in enumerate(outputs) if isinstance(leaf, torch.Tensor)]
    if not kept:
        raise InputError("the network returns no tensor, so there is nothing to export")

    def function(*flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = pytree.tree_leaves(result(flat))
        return _distinct([found[i] for i in kept], flat)

    return _Call(
        tensors,
        function,
        _input_names(network, [named[i][0] for i in places]),
        [_name(outputs[i][0], "output") for i in kept],
        batched,
        batch,
    )


def _common_batch(tensors: Sequence[torch.Tensor], batched: Sequence[bool]) -> int | None:
    sizes = {t.shape[0] for t, has_batch in zip(tensors, batched, strict=True) if has_batch}
    if len(sizes) > 1 or 0 in sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise InputError(
            f"example_inputs of shapes {shapes} have no common batch as their first dim; pass "
            "ones that have, or dynamic_batch=False"
        )
    return sizes.pop() if sizes else None


def _with_batch(
    tensors: Sequence[torch.Tensor], batched: Sequence[bool], batch: int
) -> tuple[torch.Tensor, ...]:
    """The same examples over and over until there are `batch` of them."""
    return tuple(
        tensor[torch.arange(batch) % tensor.shape[0]] if has_batch else tensor
        for tensor, has_batch in zip(tensors, batched, strict=True)
    )


def _distinct(
    tensors: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """ONNX has no output that is also an input, nor two outputs that are one."""
    seen = {id(tensor) for tensor in inputs}
    distinct = []
    for tensor in tensors:
        distinct.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return tuple(distinct)


def _input_names(network: nn.Module, paths: Sequence[tuple[Any, ...]]) -> list[str]:
    parameters = list(inspect.signature(network.forward).parameters.values())
    names = []
    for position, *path in paths:
        index = min(position.idx, len(parameters) - 1)
        parameter = parameters[index]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            path = [pytree.SequenceKey(position.idx - index), *path]
        names.append(_name((pytree.GetAttrKey(parameter.name), *path), "input"))
    return names


def _name(path: Sequence[Any], root: str) -> str:
    """ "output_0" for the first of a tuple, "aux" for an entry of a dict."""
    parts = [
        str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", key)))) for key in path
    ]
    if not path or isinstance(path[0], pytree.SequenceKey):
        parts.insert(0, root)
    return "_".join(parts)


# --- the file -------------------------------------------------------------------------------


class _Flat(nn.Module):
    """The network as a function of tensors, its parameters under their own names."""

    def __init__(self, network: nn.Module, call: _Call) -> None:
        super().__init__()
        # The network's own registries: as a child, its parameters would get a prefix.
        self._parameters = network._parameters
        self._buffers = network._buffers
        self._modules = network._modules
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self._function = call.function
        self.training = False

    def forward(self, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._function(*flat)


def _write(
    network: nn.Module, call: _Call, path: Path, opset: int | None, external_data: bool | None
) -> None:
    import onnx

    if external_data is None:
        state = {*network.parameters(), *network.buffers()}
        external_data = sum(tensor.nbytes for tensor in state) > _ONE_FILE_BYTES
    axes = tuple({0: "batch"} if has_batch else {} for has_batch in call.batched)
    with _quiet():
        program = torch.onnx.export(
            _Flat(network, call),
            call.tensors,
            dynamo=True,
            verbose=False,
            opset_version=DEFAULT_OPSET if opset is None else opset,
            dynamic_shapes=(axes,) if any(call.batched) else None,
        )
        if program is None:
            raise ExportError("torch.onnx.export returned nothing; update torch")
        _rename(program.model.graph, call)
        program.save(str(path), external_data=external_data)
    onnx.checker.check_model(str(path))


def _rename(graph: Any, call: _Call) -> None:
    """Name inputs and outputs; values inside that have such a name make room."""
    if len(graph.inputs) != len(call.tensors) or len(graph.outputs) != len(call.output_names):
        raise ExportError(
            f"the exporter made {len(graph.inputs)} inputs of {len(call.tensors)} and "
            f"{len(graph.outputs)} outputs of {len(call.output_names)}; update torch"
        )
    taken = set(graph.initializers)
    inputs = _unique(call.input_names, taken)
    outputs = _unique(call.output_names, taken)
    for value in (value for node in graph.all_nodes() for value in node.outputs):
        if value.name:
            (value.name,) = _unique([value.name], taken)
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name


def _unique(names: Sequence[str], taken: set[str]) -> list[str]:
    """Add numbers to names that are taken, and take them."""
    unique = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        unique.append(next(candidate for candidate in candidates if candidate not in taken))
        taken.add(unique[-1])
    return unique


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter says is for those who work on it."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnx_ir", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _move(partial: Path, target: Path) -> None:
    data = partial.with_name(partial.name + ".data")
    if data.exists():
        os.replace(data, target.with_name(data.name))
    os.replace(partial, target)


# --- the check ------------------------------------------------------------------------------


def _refuse_unsupported(network: nn.Module, call: _Call) -> None:
    tensors = (*network.parameters(), *network.buffers(), *call.tensors)
    if any(tensor.dtype is torch.bfloat16 for tensor in tensors):
        raise ExportError(
            "a bfloat16 network can't be checked, as ONNX Runtime has no bfloat16 kernels for the "
            "CPU; convert it with .float() or .half() first, or pass check=False"
        )


def _compare(call: _Call, path: Path, rtol: float | None, atol: float) -> None:
    """Run both on random inputs at the example's batch size and at one more."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in call.tensors})
        raise ExportError(
            f"ONNX Runtime can't load the file for the CPU ({_reason(error)}). Its kernels take "
            f"float32 everywhere, {', '.join(dtypes)} not always; convert the network with "
            ".float() first, or pass check=False"
        ) from error
    generator = torch.Generator().manual_seed(_SEED)
    for batch in [call.batch] if call.batch is None else [call.batch, call.batch + 1]:
        tensors = call.tensors
        if batch is not None:
            tensors = _with_batch(tensors, call.batched, batch)
        tensors = tuple(_random_like(tensor, generator) for tensor in tensors)
        with torch.no_grad():
            expected = call.function(*tensors)
        names = [value.name for value in session.get_outputs()]
        feed = {
            value.name: tensor.numpy()
            for value, tensor in zip(session.get_inputs(), tensors, strict=True)
        }
        where = "" if batch is None else f" at batch size {batch}"
        try:
            actual = session.run(names, feed)
        except Exception as error:
            hint = "; dynamic_batch=False exports for one batch size" if batch else ""
            raise ExportError(
                f"ONNX Runtime can't run the file{where} ({_reason(error)}){hint}"
            ) from error
        for name, ours, theirs in zip(names, expected, actual, strict=True):
            _compare_output(f"output {name!r}{where}", ours, theirs, rtol, atol)


def _random_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # Integers may be indices, whose range isn't known: the example's are valid.
    return _random(tensor.shape, tensor.dtype, generator) if tensor.is_floating_point() else tensor


def _compare_output(
    what: str, expected: torch.Tensor, actual: Any, rtol: float | None, atol: float
) -> None:
    found = torch.as_tensor(actual)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"{what} is {found.dtype} {tuple(found.shape)} in ONNX Runtime and {expected.dtype} "
            f"{tuple(expected.shape)} in PyTorch; if the batch size causes it, pass "
            "dynamic_batch=False"
        )
    if not expected.numel():
        return
    exact = not expected.is_floating_point()
    rtol = _RTOL.get(expected.dtype, _DEFAULT_RTOL) if rtol is None else rtol
    ours, theirs = expected.detach().double(), found.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    difference = torch.where(same, 0.0, (ours - theirs).abs()).nan_to_num(nan=float("inf"))
    largest = float(difference.max())
    scale = float(ours[ours.isfinite()].abs().max()) if ours.isfinite().any() else 0.0
    allowed = 0.0 if exact else atol + rtol * scale
    if largest > allowed:
        raise ExportError(
            f"{what} differs between ONNX Runtime and PyTorch by up to {largest:.3g} (allowed: "
            f"{allowed:.3g}); the largest value is {scale:.3g}. If the batch size "
            "causes it, pass dynamic_batch=False; if it is acceptable, a larger rtol or atol"
        )
