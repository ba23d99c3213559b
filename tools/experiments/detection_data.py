"""Images with boxes around things of 31 classes, for detectors of torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from halp_fx.errors import InputError
from halp_fx.tools.experiments.data import Box, Packed, colour_jitter, open_arrays, to_tensor

__all__ = ["Boxed", "Target", "load_boxed"]

_CROPPED = 0.6  # share of images that are cropped
_LEAST_AREA = 0.3  # of a crop
_TRIES = 10

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Boxed:
    """Images and, in pixels of the files, boxes `(n, 4)` as x0, y0, x1, y1 with labels `(n,)`.

    Labels count from 1: class 0 is the background.
    """

    images: Packed
    boxes: tuple[npt.NDArray[np.float32], ...]
    labels: tuple[npt.NDArray[np.int64], ...]
    classes: tuple[str, ...]
    size: int  # height and width of what `plain` and `augmented` return

    def __len__(self) -> int:
        return len(self.boxes)

    def plain(self, index: int) -> tuple[Tensor, Target]:
        """Image (3, size, size) in [0, 1], and its target in pixels of that."""
        image = self.images.open(index)
        return self._cut(image, (0.0, 0.0, *image.size), self.boxes[index], self.labels[index])

    def augmented(self, index: int, seed: tuple[int, ...]) -> tuple[Tensor, Target]:
        """The same, cropped, mirrored and with other colours at random."""
        generator = np.random.default_rng((*seed, index))
        image = self.images.open(index)
        box, kept = _crop(image.size, self.boxes[index], generator)
        pixels, target = self._cut(image, box, self.boxes[index][kept], self.labels[index][kept])
        if generator.random() < 0.5:
            pixels = pixels.flip(2)
            target["boxes"][:, [0, 2]] = self.size - target["boxes"][:, [2, 0]]
        return colour_jitter(pixels, generator), target

    def _cut(
        self, image: Any, box: Box, boxes: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
    ) -> tuple[Tensor, Target]:
        resized = image.convert("RGB").resize((self.size, self.size), 2, box=box)  # 2: bilinear
        low, high = np.array(box[:2] * 2), np.array([box[2], box[3]] * 2)
        inside = (np.clip(boxes, low, high) - low) / (high - low) * self.size
        # A thing that is cut to less than a pixel has no width that the losses could take.
        wide = ((inside[:, 2:] - inside[:, :2]) >= 1).all(axis=1)
        return to_tensor(resized), {
            "boxes": torch.from_numpy(inside[wide].astype(np.float32)),
            "labels": torch.from_numpy(labels[wide]),
        }


def load_boxed(path: Path, size: int, limit: int | None = None) -> Boxed:
    """The images of an npz file.

    Args:
        path: it has `blob`, `off`, `boxes`, `labels`, `box_off` and `classes`.
        size: height and width that images are resized to.
        limit: take so many images, spread over the file; None: all.

    Raises:
        InputError: the file or one of its arrays is missing, or a label is out of range.
    """
    arrays = open_arrays(path, ("blob", "off", "boxes", "labels", "box_off", "classes"))
    starts, labels = arrays["box_off"], arrays["labels"].astype(np.int64)
    classes = tuple(str(name) for name in arrays["classes"])
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise InputError(f"{path}: labels must be 0 to {len(classes) - 1}, one for each class")
    packed = Packed(arrays["blob"], arrays["off"])
    chosen = np.arange(len(packed))
    if limit is not None and limit < len(packed):
        chosen = np.linspace(0, len(packed) - 1, limit).round().astype(np.int64)
    spans = [(int(starts[i]), int(starts[i + 1])) for i in chosen]
    return Boxed(
        images=_Chosen(packed.blob, packed.offsets, chosen),
        boxes=tuple(arrays["boxes"][a:b].astype(np.float32) for a, b in spans),
        labels=tuple(labels[a:b] + 1 for a, b in spans),
        classes=classes,
        size=size,
    )


@dataclass(frozen=True)
class _Chosen(Packed):
    chosen: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chosen)

    def open(self, index: int) -> Any:
        return super().open(int(self.chosen[index]))


def _crop(
    size: tuple[int, int], boxes: npt.NDArray[np.float32], generator: np.random.Generator
) -> tuple[Box, npt.NDArray[np.bool_]]:
    """A part of the image with the middle of one box at least in it, and which boxes are in it."""
    width, height = size
    whole = (0.0, 0.0, float(width), float(height))
    everything = np.ones(len(boxes), dtype=bool)
    if generator.random() >= _CROPPED:
        return whole, everything
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    for _ in range(_TRIES):
        side = np.sqrt(generator.uniform(_LEAST_AREA, 1.0))
        aspect = np.sqrt(generator.uniform(0.75, 1.33))
        w, h = width * min(side * aspect, 1.0), height * min(side / aspect, 1.0)
        x, y = generator.uniform(0, width - w), generator.uniform(0, height - h)
        low, high = np.array([x, y]), np.array([x + w, y + h])
        inside = np.logical_and.reduce((middles > low) & (middles < high), axis=1)
        if inside.any():
            return (float(x), float(y), float(x + w), float(y + h)), np.asarray(inside)
    return whole, everything
