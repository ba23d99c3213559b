"""Arguments that commands have in common, and the network they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from halp_fx.detection import detector_core, example_images, has_regions, is_detector
from halp_fx.errors import InputError
from halp_fx.passes.trace import trace
from halp_fx.tools.detectors import TensorPart
from halp_fx.tools.models import load_model, parse_input

__all__ = [
    "BatchOption",
    "ForeignOption",
    "InputOption",
    "LatencyOption",
    "ModelArgument",
    "PretrainedOption",
    "WeightsOption",
    "load",
]

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
        help="analytic, torch, onnxruntime, or a table of halp-fx profile. "
        "Default: measure this device.",
    ),
]
ForeignOption = Annotated[
    bool,
    typer.Option(
        "--foreign", help="The table was made on another device, which is the one to prune for."
    ),
]
PretrainedOption = Annotated[
    bool, typer.Option("--pretrained", help="Load trained weights (torchvision, timm).")
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
        example = _of_batch(trace(network, example).example_inputs, batch)
    return network, example


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
