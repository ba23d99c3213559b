"""The methods that are compared: each a function of task, budget and seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from halp_fx.budget import Budget
from halp_fx.errors import InputError
from halp_fx.pipeline import Prepared, prepare
from halp_fx.tools.experiments import accuracy_scores as scores
from halp_fx.tools.experiments.accuracy_data import Batches, correct
from halp_fx.tools.experiments.accuracy_task import Candidate, Task, Variant, searched
from halp_fx.tools.experiments.accuracy_tune import training_loss, tune
from halp_fx.tools.experiments.peers import library, torch_pruning
from halp_fx.training import GradualPruner, fine_tune

__all__ = ["DENSE", "METHODS", "SETS", "Method", "Prune", "candidate_key", "chosen_methods"]

_MILESTONES = 10
_GRADUAL_SHARE = 0.5  # of the images of fine-tuning
_TRIES = 3  # of methods that train anew each time
_STEPS = 5
_CANDIDATES = 6
_TRIAL_SHARE = 0.25  # of the images of fine-tuning, that each candidate is trained on


class Prune(Protocol):
    """Gives a network with about `budget` of the dense latency, as measured."""

    def __call__(self, task: Task, budget: float, seed: int) -> Candidate: ...


@dataclass(frozen=True)
class Method:
    """How a network is pruned, and how it recovers."""

    name: str
    title: str  # for tables and charts
    prune: Prune
    seeded: bool = True  # whether the seed makes a difference to what is pruned
    recovery: str | None = None  # None: as the settings say
    needs: Callable[[], object] | None = None  # raises `DependencyError` where a package is missing
    reconstruct: bool = False  # in place of batch norm recalibration
    # The method whose networks these are, before they recover; where a run was cut off between the
    # two, they are searched anew.
    pruned_as: str | None = None


def candidate_key(method: Method, budget: float, seed: int) -> tuple[Any, ...]:
    """What tells a method's network before it recovers from others, within one run."""
    name = method.pruned_as or method.name
    return "candidate", name, budget, seed if method.seeded else None


Data = Callable[[Task, int], Mapping[str, Any]]  # task, seed -> arguments of halp_fx.compile


def _by_data(task: Task, seed: int) -> Mapping[str, Any]:
    return {"data": task.scoring(seed), "loss": task.loss}


def _augmented(task: Task, seed: int) -> Mapping[str, Any]:
    return {"data": task.scoring(seed, shift=task.settings.shift), "loss": task.loss}


def _small_batches(task: Task, seed: int) -> Mapping[str, Any]:
    return {"data": task.scoring(seed, batch=8), "loss": task.loss}


def _fisher(task: Task, seed: int) -> Mapping[str, Any]:
    return {**_by_data(task, seed), "saliency": "fisher"}


def _outputs(task: Task, seed: int) -> Mapping[str, Any]:
    return {**_by_data(task, seed), "saliency": "output"}


def _outputs_power(task: Task, seed: int) -> Mapping[str, Any]:
    return {**_by_data(task, seed), "saliency": "output1.5"}


def _power(task: Task, seed: int) -> Mapping[str, Any]:
    return {**_by_data(task, seed), "saliency": "taylor1.5"}


def _halp_taylor(task: Task, seed: int) -> Mapping[str, Any]:
    return {**_by_data(task, seed), "saliency": "taylor"}


def _magnitude(task: Task, seed: int) -> Mapping[str, Any]:
    del task, seed
    return {"saliency": "magnitude"}


def _l1(task: Task, seed: int) -> Mapping[str, Any]:
    del task, seed
    return {"saliency": scores.filter_l1}


def _rescaled(kind: Callable[[Any, Any], scores.Scores]) -> Data:
    def arguments(task: Task, seed: int) -> Mapping[str, Any]:
        return {"saliency": kind(task.scoring(seed), task.loss)}

    return arguments


def _ours(
    task: Task,
    budget: float,
    seed: int,
    *,
    data: Data = _by_data,
    seeded: bool = True,
    widths: tuple[int | None, ...] = (None,),
    **options: Any,
) -> Candidate:
    """`halp_fx.compile`, asked for what gives the budget when measured.

    With several `widths` (values of `round_to`), the best of them on images kept for choosing.
    """

    def ready(round_to: int | None) -> Prepared:
        return prepare(
            task.dense, task.example, latency=task.source, verify=False, round_to=round_to,
            **data(task, seed), **options,
        )  # fmt: skip

    def variant(round_to: int | None) -> Variant:
        which = tuple(sorted((k, str(v)) for k, v in options.items()))
        key = ("prepared", data, which, round_to, seed if seeded else None)
        prepared = task.once(key, lambda: ready(round_to))
        name = "" if len(widths) == 1 else f"round_to {round_to}"
        return Variant(name, lambda share: prepared.prune(Budget(share=share)), budget)

    return searched(task, budget, [variant(round_to) for round_to in widths], seed)


def _at_once(task: Task, budget: float, seed: int) -> Candidate:
    """The network of "joint"."""
    key = candidate_key(_JOINT, budget, seed)
    return task.once(key, lambda: _JOINT.prune(task, budget, seed))


def _tried(task: Task, budget: float, seed: int) -> Candidate:
    """Candidates in steps and at once, compared after a short training on images kept for it."""
    knob = _at_once(task, budget, seed).knob

    def evaluate(network: nn.Module) -> float:
        trial = deepcopy(network).to(task.device)
        task.recalibrate(trial, seed)
        tune(task, trial, seed, images=int(_TRIAL_SHARE * task.settings.tune_images))
        return float(correct(trial, task.choosing()).mean())

    prepared = prepare(
        task.dense, task.example, latency=task.source, verify=False, steps=_STEPS,
        candidates=_CANDIDATES, evaluate=evaluate, **_by_data(task, seed),
    )  # fmt: skip
    variant = Variant("", lambda share: prepared.prune(Budget(share=share)), knob)
    return searched(task, budget, [variant], seed, tries=_TRIES)


def _gradual(task: Task, budget: float, seed: int) -> Candidate:
    """Pruned in steps while it trains, on a part of the images that others fine-tune on.

    What training leaves is measured; where it misses the budget, it is pruned and trained anew.
    """
    settings = task.settings
    minibatches = int(_GRADUAL_SHARE * settings.tune_images) // settings.batch
    if minibatches < 1:
        raise InputError(
            f"tune_images is {settings.tune_images}: a network that is pruned while it trains "
            f"needs at least {math.ceil(settings.batch / _GRADUAL_SHARE)}"
        )
    steps = min(_MILESTONES, minibatches)
    images = minibatches // steps * steps * settings.batch

    def trained(share: float) -> nn.Module:
        pruner = GradualPruner(
            deepcopy(task.dense).to(task.device), Budget(share=share),
            task.example.to(task.device), steps=steps, every=minibatches // steps,
            latency=task.source, verify=False,
        )  # fmt: skip
        optimizer = torch.optim.SGD(
            pruner.model.parameters(), lr=settings.rates[0] / 2, momentum=0.9, nesterov=True,
            weight_decay=1e-4,
        )  # fmt: skip
        data = Batches(task.train, settings.batch, seed, images, settings.shift)
        fine_tune(pruner, data, training_loss(task), optimizer=optimizer)
        network: nn.Module = pruner.network
        return network.cpu().eval()

    variant = Variant("", trained, _at_once(task, budget, seed).knob)
    return replace(searched(task, budget, [variant], seed, tries=_TRIES), used_images=images)


def _dense(task: Task, budget: float, seed: int) -> Candidate:
    del budget, seed
    return Candidate(deepcopy(task.dense), 1.0, recalibrate=False)


def _method(name: str, title: str, **options: Any) -> Method:
    return Method(
        name, title, partial(_ours, **options), options.get("seeded", True),
    )  # fmt: skip


def _reconstructed(method: Method) -> Method:
    """The same networks, their weights fitted to what the dense network computes."""
    return replace(
        method, name=f"{method.name}-reconstructed", title=f"{method.title}, reconstructed",
        reconstruct=True, pruned_as=method.name,
    )  # fmt: skip


def _recovering(method: Method, recovery: str, told: str) -> Method:
    """The same networks, which recover so whatever the settings say."""
    return replace(
        method, name=f"{method.name}-{recovery}", title=f"{method.title}, {told}",
        recovery=recovery, pruned_as=method.name,
    )  # fmt: skip


def _peer(name: str, title: str, importance: str, everywhere: bool) -> Method:
    prune = partial(torch_pruning, importance=importance, everywhere=everywhere)
    return Method(name, title, prune, importance == "taylor", needs=library)


DENSE = Method("dense", "dense", _dense, seeded=False)

_JOINT = _method("joint", "joint")
_UNIFORM = _method(
    "uniform", "uniform, L1", data=_l1, seeded=False, solver="uniform", widths=(None, 1, 4, 8)
)
_HALP = _method("halp", "HALP", data=_halp_taylor, solver="halp")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _JOINT,
        _reconstructed(_JOINT),
        _method("joint-steps", "joint, five steps", steps=5),
        _HALP,
        _UNIFORM,
        _peer("tp-magnitude-local", "Torch-Pruning, magnitude, local", "magnitude", False),
        _peer("tp-magnitude-global", "Torch-Pruning, magnitude, global", "magnitude", True),
        _peer("tp-taylor-local", "Torch-Pruning, Taylor, local", "taylor", False),
        _peer("tp-taylor-global", "Torch-Pruning, Taylor, global", "taylor", True),
        # The value of each part.
        _reconstructed(_HALP),
        _reconstructed(_UNIFORM),
        _method("joint-taylor", "joint, HALP's scores", data=_halp_taylor),
        _method("joint-fisher", "joint, by the loss", data=_fisher),
        _method("joint-output", "joint, by outputs", data=_outputs),
        _method("joint-output-1.5", "joint, by outputs, power 1.5", data=_outputs_power),
        _method("joint-output-steps", "joint, by outputs, five steps", data=_outputs, steps=5),
        _method("joint-1.5", "joint, power 1.5", data=_power),
        _method("joint-1.5-steps", "joint, power 1.5, five steps", data=_power, steps=5),
        _method("halp-scored", "HALP, our scores", solver="halp"),
        _method("greedy", "greedy on true costs", solver="greedy"),
        _method("uniform-scored", "uniform, our scores", solver="uniform", widths=(None, 1, 4, 8)),
        _method("joint-magnitude", "joint, without data", data=_magnitude, seeded=False),
        _method("joint-keep-blocks", "joint, no block dropped", drop_blocks=False),
        _method("joint-candidates", "joint, three candidates", candidates=3),
        Method("joint-tried", "joint, six candidates, each trained a little", _tried),
        Method("joint-gradual", "joint, while training", _gradual),
        _recovering(_JOINT, "distilled", "distilled"),
        _recovering(_JOINT, "plain", "not distilled"),
        # How saliencies of different groups compare, and how much of a group may go.
        _method("joint-normalised", "joint, group means 1", data=_rescaled(scores.normalised)),
        _method("joint-measured", "joint, loss of each group", data=_rescaled(scores.measured)),
        _method("joint-small-batches", "joint, scored by eights", data=_small_batches),
        _method("joint-augmented", "joint, scored on crops", data=_augmented),
        _method("joint-min0", "joint, min_share 0", min_share=0.0),
        _method("joint-min25", "joint, min_share 0.25", min_share=0.25),
        _method("joint-min40", "joint, min_share 0.4", min_share=0.4),
    )
}

_NAMES = list(METHODS)
_PARTS, _SCORES = _NAMES.index("halp-reconstructed"), _NAMES.index("joint-normalised")
SETS: dict[str, tuple[str, ...]] = {
    "main": tuple(_NAMES[:_PARTS]),
    "parts": ("joint", "halp", *_NAMES[_PARTS:_SCORES]),
    "scores": ("joint", *_NAMES[_SCORES:]),
}


def chosen_methods(text: str) -> list[Method]:
    """Methods by comma-separated names; "main", "parts" and "scores" stand for several.

    Raises:
        InputError: there are none, or one is unknown.

    Example:
        >>> [method.name for method in chosen_methods("joint,halp,joint")]
        ['joint', 'halp']
    """
    names: list[str] = []
    for name in (part.strip() for part in text.split(",") if part.strip()):
        names += SETS.get(name, (name,))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        what = f"there is no method {unknown[0]!r}" if unknown else "--methods is empty"
        raise InputError(f"{what}: use {', '.join([*SETS, *METHODS])}")
    return [METHODS[name] for name in dict.fromkeys(names)]
