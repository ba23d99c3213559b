"""Images of the accuracy experiments: where they lie, how they come as minibatches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from halp_fx.errors import InputError
from halp_fx.modes import in_eval

__all__ = ["Batches", "Images", "correct", "existing"]


def existing(folder: Path, name: str) -> Path:
    """A file of the data folder.

    Raises:
        InputError: it is not there.
    """
    path = folder / name
    if not path.is_file():
        raise InputError(f"the data folder {str(folder)!r} has no {name!r}")
    return path


@dataclass(frozen=True)
class Images:
    """Labelled images, kept as bytes.

    Example:
        >>> images = Images(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), torch.tensor([1, 0]))
        >>> float(images.inputs(torch.tensor([0])).max())
        1.0
    """

    pixels: torch.Tensor  # (N, 3, H, W), uint8
    labels: torch.Tensor  # (N,), int64
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of values from 0 to 1
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: torch.Tensor | slice) -> Images:
        """The images with these positions."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def sample(self, count: int, seed: int) -> Images:
        """So many images at random, each at most once; all in their order where there are fewer."""
        return self if count >= len(self) else self.at(self._order(seed)[:count])

    def rest(self, count: int, seed: int) -> Images:
        """The images that `sample` leaves out."""
        return self.at(self._order(seed)[count:])

    def _order(self, seed: int) -> torch.Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def inputs(self, index: torch.Tensor | slice) -> torch.Tensor:
        """What a network takes: (N, 3, H, W), float32, normalised."""
        shape = (1, 3, 1, 1)
        values = self.pixels[index].float() / 255
        return (values - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)


@dataclass(frozen=True)
class Batches:
    """Minibatches `(inputs, labels)`, the same each time they are gone through.

    Whole minibatches only, so that a batch norm over vectors never sees one alone; a set smaller
    than a minibatch is one.
    """

    images: Images
    size: int
    seed: int | None = None  # of order and augmentation; None: in order, once, as they are
    count: int | None = None  # images in all, the set repeated as often as needed; None: once
    shift: int = 0  # random crops after padding by so many pixels, and random mirroring; 0: neither
    skip: int = 0  # images left out at the beginning: those that were trained on already

    def __len__(self) -> int:
        return max((self.count or len(self.images)) // self._size, 1)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed or 0)
        order = self._order(generator)
        for start in range(0, len(self) * self._size, self._size):
            index = order[start : start + self._size]
            inputs = self.images.inputs(index)
            if self.shift:
                inputs = _augmented(inputs, self.shift, generator)
            yield inputs, self.images.labels[index]

    @property
    def _size(self) -> int:
        return min(self.size, len(self.images))

    def _order(self, generator: torch.Generator) -> torch.Tensor:
        wanted = self.skip + len(self) * self._size
        if self.seed is None:
            return torch.arange(self.skip, wanted) % len(self.images)
        rounds = -(-wanted // len(self.images))
        parts = [torch.randperm(len(self.images), generator=generator) for _ in range(rounds)]
        return torch.cat(parts)[self.skip : wanted]


def _augmented(inputs: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted by up to `shift` pixels, its border repeated, and mirrored or not."""
    count, _, height, width = inputs.shape
    padded = nn.functional.pad(inputs, (shift,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    batch = torch.arange(count).view(-1, 1, 1)
    picked = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def correct(network: nn.Module, images: Images, *, batch: int = 250) -> np.ndarray[Any, Any]:
    """Which images a network in eval mode classifies correctly: bool (N,).

    The network's modes are given back.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    found = []
    with in_eval(network):
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            output = network(images.inputs(part).to(device))
            found.append(output.argmax(1).cpu() == images.labels[part])
    right: np.ndarray[Any, Any] = torch.cat(found).numpy()
    return right
