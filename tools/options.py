"""Arguments that commands have in common, and the network they name."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from halp_fx.detection import detector_core, example_images, has_regions, is_detector
from halp_fx.errors import InputError
from halp_fx.passes.trace import trace
from halp_fx.tools.detectors import TensorPart
from halp_fx.tools.models import load_model, parse_input

__all__ = [
    "AlsoOption",
    "BatchOption",
    "CandidatesOption",
    "ForeignOption",
    "InputOption",
    "LatencyOption",
    "MacsOption",
    "MemoryOption",
    "ModelArgument",
    "ParamsOption",
    "PretrainedOption",
    "ReconstructOption",
    "SamplesOption",
    "StepsOption",
    "WeightsOption",
    "by_samples",
    "load",
]

_MINIBATCH = 32

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME or package.module:factory.",
        show_default=False,
    ),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="Shape of an input, as 1x3x224x224 or 1x16:int64; again for the next input. "
        "Default: what the model brings or expects.",
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch", min=1, help="Batch size that the latency is meant for."),
]
LatencyOption = Annotated[
    str | None,
    typer.Option(
        "--latency",
        help="analytic, torch, torch.compile, onnxruntime, or a table of halp-fx profile. "
        "Default: measure this device.",
    ),
]
AlsoOption = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        metavar="LATENCY=BUDGET",
        help="Limit the latency of a further device or back-end too (torch=0.7, "
        "board.sqlite=4ms); repeatable.",
    ),
]
ForeignOption = Annotated[
    bool,
    typer.Option(
        "--foreign", help="The table was made on another device, which is the one to prune for."
    ),
]
ParamsOption = Annotated[
    float | None,
    typer.Option("--params", help="Limit on the parameters: their count, or a share up to 1."),
]
MacsOption = Annotated[
    float | None,
    typer.Option("--macs", help="Limit on the multiply-adds: their count, or a share up to 1."),
]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        "--memory", help="Limit on the bytes of activations at a time, or a share up to 1."
    ),
]
PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="Load trained weights (torchvision, timm).")
]
SamplesOption = Annotated[
    Path | None,
    typer.Option(
        "--samples",
        metavar="FILE",
        help="Inputs, without labels, as the network takes them: an array (N, ...) in a .npy "
        "file, or one for each input, in order, in a .npz file. Channels are scored by what the "
        "outputs lose without them. Default: by their weights alone.",
    ),
]
CandidatesOption = Annotated[
    int,
    typer.Option(
        "--candidates", min=1, help="With --samples: try so many plans on them, keep the best."
    ),
]
StepsOption = Annotated[
    int,
    typer.Option(
        "--steps", min=1, help="With --samples: prune in so many steps, scoring anew in between."
    ),
]
ReconstructOption = Annotated[
    bool,
    typer.Option(
        "--reconstruct",
        help="With --samples: fit the weights that are left to what the dense network computes "
        "on them, by least squares.",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="A safetensors file with the state_dict."),
]


def load(
    model: str,
    shapes: list[str] | None,
    *,
    batch: int | None = None,
    whole: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """The network, and its example inputs: as given, as it brings them, or None.

    Args:
        whole: of a detector give the detector and a list of images, not what is pruned of it.

    Raises:
        InputError: the model or a shape is wrong, or `batch` has no meaning for the inputs.
    """
    network, example = load_model(model, **options)
    if shapes:
        example = tuple(parse_input(text) for text in shapes)
    if is_detector(network):
        images = example_images(network, example[0] if example else None)
        if batch is not None:
            images = images[:1] * batch
        return (network, images) if whole else _tensor_part(network, images)
    if batch is not None:
        example = _of_batch(trace(network, example, quiet=True).example_inputs, batch)
    return network, example


def by_samples(path: Path | None, candidates: int, steps: int, reconstruct: bool) -> dict[str, Any]:
    """Arguments of `halp_fx.compile` for scores by the samples of a file.

    Raises:
        InputError: the file is missing or has no arrays of as many samples, or there is none
            though an option needs one.
    """
    if path is None:
        if candidates > 1 or steps > 1 or reconstruct:
            raise InputError(
                "--candidates, --steps and --reconstruct run networks on samples: give "
                "--samples FILE"
            )
        return {}
    return {
        "data": _minibatches(path),
        "candidates": candidates,
        "steps": steps,
        "reconstruct": reconstruct,
    }


def _minibatches(path: Path) -> list[Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
        found = [loaded]
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                found = [loaded[name] for name in loaded.files]
    except OSError as error:
        raise InputError(f"--samples {path} can't be read: {error.strerror or error}") from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"--samples {path} is no .npy or .npz file of plain arrays") from error
    counts = {len(array) if array.ndim else 0 for array in found}
    if len(counts) != 1 or counts == {0}:
        shapes = ", ".join(str(array.shape) for array in found) or "no arrays"
        raise InputError(f"--samples {path} has {shapes}: give N samples of each input, (N, ...)")
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in found]
    floats = [t.float() if t.is_floating_point() else t for t in tensors]
    parts = zip(*(t.split(_MINIBATCH) for t in floats), strict=True)
    # A pair: inputs, and no target.
    return [(inputs, None) for inputs in parts]


def _tensor_part(detector: Any, images: list[torch.Tensor]) -> tuple[Any, Any]:
    core, tensors = detector_core(detector, images)
    # Of one stage, `TensorPart` says which outputs are which.
    return (core if has_regions(detector) else TensorPart(detector).eval()), tensors


def _of_batch(example: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    def resized(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.ndim == 0:
            raise InputError("--batch: an input has no dims; give the shapes with --input")
        return value[:1].expand(batch, *value.shape[1:]).contiguous()

    return tuple(resized(value) for value in example)
