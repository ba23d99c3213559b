"""What a detector takes: lists of images, and with them in training the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from halp_fx.errors import InputError
from halp_fx.passes.rules.structure import structural_copy

__all__ = ["Batches", "example_images", "for_losses", "sum_of_losses"]

_TAKES = "a list of images (3, H, W), a tensor (N, 3, H, W), or a tuple with such a list"


def example_images(model: nn.Module, given: Any = None) -> list[torch.Tensor]:
    """The images of the example; None: one random image of the size that the detector expects.

    Raises:
        InputError: they are no images.
    """
    if given is None:
        return [_random_image(model)]
    if isinstance(given, tuple) and len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = given[0]
    images = list(given) if isinstance(given, (list, tuple, torch.Tensor)) else []
    if not images or any(not isinstance(i, torch.Tensor) or i.ndim != 3 for i in images):
        raise InputError(f"example_inputs of a detector must be {_TAKES}, not {_described(given)}")
    return images


def _random_image(model: nn.Module) -> torch.Tensor:
    transform: Any = model.get_submodule("transform")
    short = int(transform.min_size[-1])
    long = min(int(transform.max_size), short * 4 // 3)
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, short, max(long, short), generator=generator).to(parameter)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {[_described(item) for item in value[:3]]}"
    return type(value).__name__


class Batches:
    """Minibatches `(images, targets)` as arguments of the detector, on its device."""

    def __init__(self, data: Iterable[Any], device: torch.device) -> None:
        if not isinstance(data, Iterable):
            raise InputError(
                f"data must be an iterable of (images, targets), not {type(data).__name__}"
            )
        self.data = data
        self.device = device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            if not _is_pair(batch):
                raise InputError(
                    "a batch of data must be a pair (images, targets): a list of images "
                    f"(3, H, W) and a list of dicts, not {_described(batch)}"
                )
            images = [image.to(self.device) for image in batch[0]]
            targets = [
                {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in t.items()}
                for t in batch[1]
            ]
            yield (images, targets), targets


def _is_pair(batch: Any) -> bool:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return False
    images, targets = batch
    return (
        isinstance(images, (tuple, list, torch.Tensor))
        and isinstance(targets, (tuple, list))
        and all(isinstance(image, torch.Tensor) for image in images)
        and all(isinstance(target, Mapping) for target in targets)
    )


def for_losses(model: nn.Module) -> nn.Module:
    """The detector, sharing all tensors, so that each call gives losses with norms as in eval."""
    twin = structural_copy(model)
    twin.register_forward_pre_hook(_training_but_norms)
    return twin


def _training_but_norms(model: nn.Module, _args: Any) -> None:
    fixed = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    for module in model.modules():
        module.training = not isinstance(module, fixed)


def sum_of_losses(
    loss: Callable[[Any, Any], torch.Tensor] | None,
) -> Callable[[Any, Any], torch.Tensor]:
    """The caller's loss of the dict of losses and the targets; None: their sum."""

    def total(losses: Any, _targets: Any) -> torch.Tensor:
        return torch.stack([value.sum() for value in losses.values()]).sum()

    return total if loss is None else loss
