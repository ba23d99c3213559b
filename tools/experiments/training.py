"""A training loop that goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halp_fx.errors import HalpError, InputError

__all__ = ["Epochs", "Recipe", "read_weights", "train"]

_FORMAT = "halp_fx experiment checkpoint 1"


class Epochs(Protocol):
    """Minibatches of an epoch, whose number is known."""

    def __iter__(self) -> Any: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to zero.

    Raises:
        InputError: a number is out of range.
    """

    epochs: int
    rate: float  # the highest learning rate
    seed: int = 0
    decay: float = 1e-2
    warm_up: float = 0.05  # share of the steps
    clip: float = 10.0  # the most that the norm of all gradients may be

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise InputError(f"epochs is {self.epochs}: pass 0 or more")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise InputError(f"the learning rate is {self.rate}: pass a number above 0")

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, of so many."""
        rising = max(round(self.warm_up * steps), 1)
        if step < rising:
            return self.rate * (step + 1) / rising
        done = (step - rising) / max(steps - rising, 1)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))


def train(
    network: nn.Module,
    recipe: Recipe,
    epochs: Callable[[int], Epochs],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    checkpoint: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> None:
    """Train `network` in place; it is left in evaluation mode.

    Args:
        epochs: the minibatches of an epoch, by its number from 0; as many in each.
        loss: of a network in training mode and a minibatch.
        checkpoint: a file that is written after each epoch; where there is one already, training
            goes on after its last epoch, and ends with the same weights as without a stop.
        settings: what the result depends on besides the recipe; kept in the checkpoint.
        tick: called as `tick(done, total)` in minibatches.

    Raises:
        InputError: the checkpoint is of other settings, or damaged.
        HalpError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    known = {**(settings or {}), **vars(recipe)}
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = _restore(checkpoint, network, optimizer, known)
    steps = recipe.epochs * _length(epochs(0))
    done = first * _length(epochs(0))
    if tick is not None:
        tick(done, steps)
    for epoch in range(first, recipe.epochs):
        network.train()
        # Dropout of an epoch is the same after a stop, and the caller's random state is kept.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed * 100_003 + epoch)
            for batch in epochs(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate_at(done, steps)
                _step(network, optimizer, loss(network, batch), recipe, epoch)
                done += 1
                if tick is not None:
                    tick(done, steps)
        if checkpoint is not None:
            _write(checkpoint, network, optimizer, epoch + 1, known)
    network.eval()


def read_weights(path: Path, network: nn.Module) -> int:
    """Put the weights of a checkpoint into `network`.

    Returns:
        After how many epochs it was written.

    Raises:
        InputError: there is no such file, it is damaged or of another network.
    """
    tensors, facts = _read(path)
    _load(path, network, tensors)
    return int(facts["epoch"])


def _length(batches: Sized) -> int:
    return len(batches)


def _step(network: nn.Module, optimizer: Any, value: Tensor, recipe: Recipe, epoch: int) -> None:
    if not bool(torch.isfinite(value)):
        raise HalpError(
            f"the loss is {value.item()} in epoch {epoch + 1}: pass a lower learning rate than "
            f"{recipe.rate}"
        )
    optimizer.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
    optimizer.step()


def _write(
    path: Path, network: nn.Module, optimizer: Any, epoch: int, settings: Mapping[str, Any]
) -> None:
    tensors = {f"network.{k}": v.detach().contiguous() for k, v in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).contiguous()
    facts = {"format": _FORMAT, "epoch": str(epoch), "settings": json.dumps(settings)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, facts)
    os.replace(unfinished, path)


def _restore(path: Path, network: nn.Module, optimizer: Any, settings: Mapping[str, Any]) -> int:
    tensors, facts = _read(path)
    before = json.loads(facts["settings"])
    now = json.loads(json.dumps(settings))
    other = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    if other:
        told = ", ".join(f"{k} {before.get(k)}, now {now.get(k)}" for k in other)
        raise InputError(f"{path} was trained with {told}: give these again, or another folder")
    _load(path, network, tensors)
    for name, parameter in network.named_parameters():
        state = {
            key: tensors[f"optimizer.{key}.{name}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.{key}.{name}" in tensors
        }
        if state:
            optimizer.state[parameter] = state
    return int(facts["epoch"])


def _load(path: Path, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    weights = {
        name.removeprefix("network."): tensor
        for name, tensor in tensors.items()
        if name.startswith("network.")
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path} has the weights of another network than this {type(network).__name__}: give "
            "another folder"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _keys(file)}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read: {error}. Remove it to begin again") from error
    if facts.get("format") != _FORMAT:
        raise InputError(f"{path} is no checkpoint of an experiment: give another folder")
    return tensors, facts


def _keys(file: Any) -> Iterable[str]:
    return list(file.keys())
