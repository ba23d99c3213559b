"""Small data in the format of the experiments: bright rectangles, and scenes of three parts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from halp_fx.tools.experiments.segmentation_data import VOID

__all__ = ["write_boxed", "write_data", "write_scenes"]


def encoded(image: np.ndarray[Any, Any]) -> bytes:
    """An image as the bytes of a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def packed(files: list[bytes]) -> dict[str, Any]:
    """Files as the arrays `blob` and `off`."""
    offsets = np.cumsum([0, *map(len, files)])
    return {"blob": np.frombuffer(b"".join(files), dtype=np.uint8), "off": offsets}


def write_boxed(path: Path, count: int, seed: int) -> None:
    """Images 96x96, dark, each with one bright rectangle; the class is its shape.

    Every third one is large enough for the last level of an SSD.
    """
    generator = np.random.default_rng(seed)
    files, boxes, labels = [], [], []
    for i in range(count):
        image = generator.integers(20, 40, (96, 96, 3), dtype=np.uint8)
        label = i % 3
        w, h = ((20, 40), (40, 20), (80, 72))[label]
        x, y = generator.integers(4, 92 - w), generator.integers(4, 92 - h)
        image[y : y + h, x : x + w] = 250
        files.append(encoded(image))
        boxes.append([x, y, x + w, y + h])
        labels.append(label)
    np.savez(
        path,
        **packed(files),
        boxes=np.array(boxes, dtype=np.float32),
        labels=np.array(labels, dtype=np.int16),
        box_off=np.arange(count + 1),
        classes=np.array(["tall", "wide", "large"]),
    )


def write_scenes(folder: Path, part: str, count: int, seed: int) -> None:
    """Scenes 64x48 whose left part is class 0, then 5, then void; brightness follows the class."""
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(count):
        first, second = sorted(generator.integers(12, 52, 2))
        classes = np.full((48, 64), VOID, dtype=np.uint8)
        classes[:, :second] = 5
        classes[:, :first] = 0
        shade = np.select([classes == 0, classes == 5], [10, 120], 250).astype(np.uint8)
        images.append(encoded(np.repeat(shade[:, :, None], 3, axis=2)))
        labels.append(encoded(classes))
    np.savez(folder / f"{part}_images.npz", **packed(images))
    np.savez(folder / f"{part}_labels.npz", **packed(labels))


def write_data(folder: Path) -> Path:
    """A folder of data as the experiments read it."""
    for part in ("detection", "camvid"):
        (folder / part).mkdir()
    write_boxed(folder / "detection" / "train.npz", 8, 0)
    write_boxed(folder / "detection" / "test.npz", 4, 1)
    write_scenes(folder / "camvid", "train", 4, 0)
    write_scenes(folder / "camvid", "test", 2, 1)
    return folder
