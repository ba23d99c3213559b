"""Street scenes of which each pixel has a class: CamVid, 11 classes and void."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halp_fx.errors import InputError
from halp_fx.tools.experiments.data import Box, Packed, colour_jitter, open_arrays, to_tensor

__all__ = ["CLASSES", "VOID", "Scenes", "load_scenes"]

CLASSES = 11
VOID = 11  # label of pixels that belong to no class: neither trained on nor counted

_LEAST_SIDE = 0.5  # of a crop


@dataclass(frozen=True)
class Scenes:
    """Images and label maps of one size."""

    images: Packed
    labels: Packed
    count: int

    def __len__(self) -> int:
        return self.count

    def plain(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W), with ImageNet's mean and deviation taken out, and labels (H, W)."""
        image, labels = self.images.open(index), self.labels.open(index)
        return _normalised(to_tensor(image)), _label_tensor(labels)

    def augmented(self, index: int, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The same, cropped, mirrored and with other colours at random."""
        generator = np.random.default_rng((*seed, index))
        image, labels = self.images.open(index), self.labels.open(index)
        width, height = image.size
        side = generator.uniform(_LEAST_SIDE, 1.0)
        w, h = width * side, height * side
        x, y = generator.uniform(0, width - w), generator.uniform(0, height - h)
        box: Box = (float(x), float(y), float(x + w), float(y + h))
        pixels = to_tensor(image.convert("RGB").resize(image.size, 2, box=box))  # 2: bilinear
        classes = _label_tensor(labels.resize(labels.size, 0, box=box))  # 0: nearest
        if generator.random() < 0.5:
            pixels, classes = pixels.flip(2), classes.flip(1)
        return _normalised(colour_jitter(pixels, generator)), classes


def load_scenes(folder: Path, part: str, limit: int | None = None) -> Scenes:
    """The images and label maps of "train", "val" or "test".

    Args:
        limit: take the first so many; None: all.

    Raises:
        InputError: a file is missing, or there are more images than label maps or fewer.
    """
    packed = []
    for kind in ("images", "labels"):
        arrays = open_arrays(folder / f"{part}_{kind}.npz", ("blob", "off"))
        packed.append(Packed(arrays["blob"], arrays["off"]))
    images, labels = packed
    if len(images) != len(labels):
        raise InputError(f"{folder} has {len(images)} images and {len(labels)} labels of {part}")
    count = len(images) if limit is None else min(limit, len(images))
    return Scenes(images, labels, count)


def _label_tensor(image: object) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.int64))


def _normalised(image: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return (image - mean) / deviation
