"""Images packed in npz files, and the folder that they are in."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from halp_fx.errors import DependencyError, InputError

__all__ = [
    "Box",
    "Minibatches",
    "Packed",
    "colour_jitter",
    "data_folder",
    "in_order",
    "library",
    "open_arrays",
    "shuffled",
    "to_tensor",
]

_VARIABLE = "HALP_FX_DATA"

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


def data_folder(given: Path | None, part: str | None = None) -> Path:
    """The folder of all data, or one in it.

    Args:
        given: the folder of all data; None: the environment variable HALP_FX_DATA names it.
        part: "detection" or "camvid"; None: all.

    Raises:
        InputError: no folder is named, there is none, or it has no such part.
    """
    named = given if given is not None else os.environ.get(_VARIABLE)
    if not named:
        raise InputError(f"no data: pass --data DIR, or set {_VARIABLE} to the folder")
    folder = Path(named)
    if not folder.is_dir():
        raise InputError(f"the data folder {str(folder)!r} is no folder: pass another with --data")
    if part is not None and not (folder / part).is_dir():
        raise InputError(
            f"the data folder {str(folder)!r} has no folder {part!r}: pass another with --data"
        )
    return folder if part is None else folder / part


def open_arrays(path: Path, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Arrays of an npz file, read once.

    Raises:
        InputError: the file or one of the arrays is missing.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path.name} in {path.parent}")
    with np.load(path) as archive:
        missing = [name for name in names if name not in archive.files]
        if missing:
            raise InputError(f"{path} has no array {', '.join(missing)}")
        return {name: archive[name] for name in names}


def library(module: str, package: str) -> Any:
    """A module of an optional package.

    Raises:
        DependencyError: it is not installed; the message has the command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"the experiment needs {package}, which is not installed: run pip install {package}"
        ) from error


@dataclass(frozen=True)
class Packed:
    """Files of images in one array: file i is `blob[offsets[i]:offsets[i + 1]]`."""

    blob: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def open(self, index: int) -> Any:
        """Image `index`, decoded by Pillow when it is used.

        Raises:
            DependencyError: Pillow is not installed.
        """
        file = self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return library("PIL.Image", "pillow").open(io.BytesIO(file))


@dataclass(frozen=True)
class Minibatches:
    """Minibatches of an epoch; going through them again gives the same ones."""

    order: npt.NDArray[np.int64]  # samples
    size: int  # samples a minibatch; what is left over at the end is dropped unless it is all
    make: Callable[[list[int]], Any]

    def __len__(self) -> int:
        return max(len(self.order) // self.size, 1)

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self)):
            yield self.make([int(j) for j in self.order[i * self.size : (i + 1) * self.size]])


def shuffled(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Another order of `count` samples for each seed and epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count).astype(np.int64)


def in_order(count: int, size: int) -> Iterator[list[int]]:
    """All of `count` samples, `size` at a time."""
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


def to_tensor(image: Any) -> torch.Tensor:
    """A Pillow image as a tensor (3, H, W) in [0, 1]."""
    array = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 255


def colour_jitter(image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast and the share of each colour, changed by up to 30, 30 and 10 %."""
    contrast, brightness = generator.uniform(0.7, 1.3, 2)
    shares = torch.from_numpy(generator.uniform(0.9, 1.1, (3, 1, 1)).astype(np.float32))
    mean = image.mean()
    return (((image - mean) * contrast + mean * brightness) * shares).clamp(0, 1)
