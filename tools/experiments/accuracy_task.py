"""What the methods of an accuracy experiment have in common: network, images, settings, latency."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

import halp_fx
from halp_fx.errors import InfeasibleError, InputError
from halp_fx.latency import Source, measure_paired
from halp_fx.tools.experiments.accuracy_data import Batches, Images, correct

__all__ = ["Candidate", "Settings", "Task", "Variant", "searched", "to_latency"]

T = TypeVar("T")

RECOVERIES = ("plain", "distilled")
IMAGES = ("test", "choose")
_OVER = 0.02  # by how much a measured latency may pass the budget: repeatability of timers
_UNDER = 0.02  # a network so little below the budget is near enough
_NEAR = 0.15  # a latency so near to the budget is worth more measuring
_ROUNDS = 15  # samples of each network in a bout
_BOUTS = 4  # of measuring what may be the result


@dataclass(frozen=True)
class Settings:
    """The same for every method, so that only the method differs."""

    tune_images: int = 10_000  # images that fine-tuning sees
    # Its highest learning rate; of several, each network has the best on images kept for choosing,
    # since one that lost little may be ruined by the rate that one needs that lost much. What
    # trains while it prunes does so at the first.
    rates: tuple[float, ...] = (0.008,)
    batch: int = 64  # its minibatches, and those of the scores
    score_images: int = 1024
    recalibrate_images: int = 2048
    choose_images: int = 1000  # of those kept for choosing between the variants of a method
    test_images: int | None = None  # None: all
    on: str = "test"  # or "choose": the kept training images, to compare methods in development
    recovery: str = "plain"  # or "distilled": from the dense network, see `halp_fx.training`
    alpha: float = 0.9  # share of the dense network in "distilled"
    shift: int = 4  # pixels by which images are shifted in training; they are mirrored too
    tries: int = 8  # networks that are measured to find one at the budget
    pixels: int = 32

    def __post_init__(self) -> None:
        if self.recovery not in RECOVERIES:
            raise InputError(f"recovery is {self.recovery!r}: pass one of {', '.join(RECOVERIES)}")
        if self.on not in IMAGES:
            raise InputError(f"on is {self.on!r}: pass one of {', '.join(IMAGES)}")
        for name in ("batch", "score_images", "recalibrate_images", "choose_images", "tries"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: pass at least 1")
        if self.tune_images < 0:
            raise InputError(f"tune_images is {self.tune_images}: pass at least 0")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise InputError(f"rates is {self.rates!r}: pass learning rates above 0")

    def digest(self, *further: str) -> str:
        """A short text that differs where the settings, or what is passed besides, differ."""
        text = json.dumps([asdict(self), *further], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Candidate:
    """A pruned network as a method gives it, before recalibration and fine-tuning."""

    network: nn.Module
    knob: float  # what was asked for to meet the budget
    variant: str = ""  # of a method with several, the one that was chosen
    used_images: int = 0  # training images that pruning took from those of fine-tuning
    recalibrate: bool = True


@dataclass(frozen=True)
class Variant:
    """A family of networks, larger with the knob, from 0 (nothing left) to 1 (the dense one)."""

    name: str
    make: Callable[[float], nn.Module]
    start: float  # where to begin


@dataclass
class Task:
    """One trained network with its images and its device."""

    name: str
    dense: nn.Module  # on the CPU, in eval mode; never changed
    head: str  # its last layer
    train: Images
    choose: Images  # training images kept for choosing
    test: Images
    settings: Settings
    source: Source  # the back-end and the table that all methods share
    example: torch.Tensor  # input at the batch size that the latency is meant for
    device: str = "cpu"  # for training and testing; latencies are measured by the back-end
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gave the first time for this key."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The cross entropy."""
        return F.cross_entropy(output, target)

    def scoring(self, seed: int, *, batch: int | None = None, shift: int = 0) -> list[Any]:
        """Minibatches of training images to score channels by."""
        images = self.train.sample(self.settings.score_images, seed)
        size = batch if batch is not None else self.settings.batch
        return list(Batches(images, size, seed if shift else None, shift=shift))

    def choosing(self) -> Images:
        """The kept training images that variants and rates are compared on."""
        return self.choose.sample(self.settings.choose_images, 0)

    def tested(self) -> Images:
        """The images that accuracies are reported on; nothing was chosen by them.

        Raises:
            InputError: all kept images are for choosing.
        """
        images = self.test
        if self.settings.on == "choose":
            images = self.choose.rest(self.settings.choose_images, 0)
            if not len(images):
                raise InputError(
                    f"choose_images is {self.settings.choose_images}: all {len(self.choose)} kept "
                    'training images are then for choosing, and none is left for on="choose"; '
                    "pass fewer"
                )
        count = self.settings.test_images
        return images if count is None else images.sample(count, 0)

    def recalibrate(self, network: nn.Module, seed: int) -> None:
        """Batch norm statistics afresh from training images, the same for all methods."""
        images = self.train.sample(self.settings.recalibrate_images, seed)
        halp_fx.recalibrate(network, Batches(images, 128))

    def reconstruct(self, network: Any, seed: int) -> None:
        """Weights and batch norms fitted to the dense network, on the images of `recalibrate`."""
        images = self.train.sample(self.settings.recalibrate_images, seed)
        batches = Batches(images, self.settings.batch)
        halp_fx.reconstruct(network, self.dense, batches, minibatches=len(batches))

    def measured(self, network: nn.Module, bouts: int = _BOUTS) -> tuple[float, float]:
        """Milliseconds of the dense network and of this one, sampled in turn.

        The median ratio over bouts counts, in which both are prepared anew.
        """
        inputs = (self.example,)
        dense, pruned = measure_paired(
            self.dense, network, self.source.backend, inputs, inputs, rounds=_ROUNDS, bouts=bouts
        )
        return dense.median_ms, pruned.median_ms

    def share_of(self, network: nn.Module, budget: float) -> float:
        """Measured share of the dense latency; with more care where it is near the budget."""
        dense_ms, ms = self.measured(network, 1)
        if abs(ms / dense_ms / budget - 1) < _NEAR:
            dense_ms, ms = self.measured(network)
        return ms / dense_ms

    def chosen_accuracy(self, network: nn.Module, seed: int) -> float:
        """Accuracy after recalibration on the images kept for choosing; the network is copied."""
        trial = deepcopy(network)
        self.recalibrate(trial, seed)
        return float(correct(trial, self.choosing()).mean())


def to_latency(
    make: Callable[[float], nn.Module],
    share_of: Callable[[nn.Module], float],
    budget: float,
    *,
    start: float,
    tries: int = 8,
) -> tuple[float, nn.Module] | None:
    """The largest network of a family that was found to meet a share of the dense latency.

    Each try interpolates between the nearest networks known to be below and above, away from
    both ends. Latencies need not grow with the knob: whatever was tried and meets the budget (to
    2 %) may be the result.

    Args:
        make: knob (0 to 1) -> network, larger with the knob; may raise `InfeasibleError`.
        share_of: measures a network's share of the dense latency.
        budget: the share to reach.
        start: the first knob.
        tries: networks to make at most.

    Returns:
        Knob and network, or None where none was found.

    Example:
        >>> knob, _ = to_latency(lambda knob: nn.Linear(1, int(100 * knob)),
        ...                      lambda net: (net.out_features / 100) ** 2, 0.25, start=0.9)
        >>> 0.49 < knob < 0.51
        True
    """
    low, high = (0.0, 0.0), (1.0, 1.0)  # (knob, share)
    knob = start
    best: tuple[float, nn.Module] | None = None
    for _ in range(tries):
        try:
            network = make(knob)
        except InfeasibleError:
            low = (knob, min(low[1], budget))
        else:
            share = share_of(network)
            if share > budget * (1 + _OVER):
                high = (knob, share)
            else:
                low = (knob, share)
                if best is None or knob > best[0]:
                    best = knob, network
                if share >= budget * (1 - _UNDER):
                    return best
        if high[0] - low[0] < 1e-3:
            break
        knob = _between(low, high, budget)
    return best


def _between(low: tuple[float, float], high: tuple[float, float], budget: float) -> float:
    rise = high[1] - low[1]
    part = (budget - low[1]) / rise if rise > 0 else 0.5
    return low[0] + min(max(part, 0.1), 0.9) * (high[0] - low[0])


def searched(
    task: Task,
    budget: float,
    variants: Sequence[Variant],
    seed: int,
    *,
    tries: int | None = None,
) -> Candidate:
    """Each variant brought to the measured latency; of several, the most accurate one.

    They are compared after batch norm recalibration on training images kept for choosing.

    Args:
        tries: networks to measure of each variant at most; None: as the settings say.

    Raises:
        InfeasibleError: no variant has a network within the budget.
    """
    tries = task.settings.tries if tries is None else tries
    found: list[Candidate] = []
    failed: list[InfeasibleError] = []

    def made(variant: Variant, knob: float) -> nn.Module:
        try:
            return variant.make(knob)
        except InfeasibleError as error:
            failed.append(error)
            raise

    for variant in variants:
        result = to_latency(
            partial(made, variant),
            lambda network: task.share_of(network, budget),
            budget,
            start=variant.start,
            tries=tries,
        )
        if result is not None:
            found.append(Candidate(result[1], result[0], variant.name))
    if not found:
        last = f". {len(failed)} could not be made; the last: {failed[-1]}" if failed else ""
        raise InfeasibleError(
            f"none of {tries} networks measured for each of {len(variants)} variants "
            f"meets {budget:g} of the dense latency: raise the budget{last}",
            budget,
        )
    if len(found) == 1:
        return found[0]
    return max(found, key=lambda candidate: task.chosen_accuracy(candidate.network, seed))
