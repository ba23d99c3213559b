"""Torch-Pruning as its users run it, brought to a measured latency.

It is given what it has to offer: widths rounded or not, one step or ten, and structurally alike
layers ranked together; what does best on images kept for choosing is what counts. Its Taylor
scores come from the same images as ours.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from halp_fx.errors import DependencyError, InfeasibleError
from halp_fx.tools.experiments.accuracy_task import Candidate, Task, Variant, searched

__all__ = ["Way", "gradients", "library", "torch_pruned", "torch_pruning"]


@dataclass(frozen=True)
class Way:
    """How Torch-Pruning is run."""

    everywhere: bool  # channels of all layers are ranked together, else in each layer
    round_to: int | None = None  # channels kept are multiples
    steps: int = 1  # scores are normalised and ranked anew in each
    isomorphic: bool = False  # only layers of the same structure are ranked together

    @property
    def name(self) -> str:
        """For people."""
        widths = f"rounded to {self.round_to}" if self.round_to else "any width"
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return f"{widths}, {steps}{', isomorphic' if self.isomorphic else ''}"


LOCAL = (Way(False), Way(False, 4), Way(False, 8))
GLOBAL = (
    Way(True),
    Way(True, None, 10),
    Way(True, 4, 10),
    Way(True, 8),
    Way(True, 8, 10),
    Way(True, 8, 10, isomorphic=True),
)


def torch_pruning(
    task: Task, budget: float, seed: int, *, importance: str, everywhere: bool
) -> Candidate:
    """Torch-Pruning's best network at a measured share of the dense latency.

    Args:
        importance: "magnitude" or "taylor".
        everywhere: rank the channels of all layers together.

    Raises:
        DependencyError: Torch-Pruning is not installed.
        InfeasibleError: no way of running it meets the budget.
    """
    library()
    slopes: Mapping[str, torch.Tensor] | None = None
    if importance == "taylor":
        slopes = task.once(("gradients", seed), lambda: gradients(task, seed))
    variants = [
        Variant(way.name, partial(_kept_share, task, importance, way, slopes), budget)
        for way in (GLOBAL if everywhere else LOCAL)
    ]
    return searched(task, budget, variants, seed)


def _kept_share(
    task: Task,
    importance: str,
    way: Way,
    gradients: Mapping[str, torch.Tensor] | None,
    kept: float,
) -> nn.Module:
    return torch_pruned(
        task.dense, task.example, task.head, 1 - kept, importance=importance, way=way,
        gradients=gradients,
    )  # fmt: skip


def torch_pruned(
    dense: nn.Module,
    example: torch.Tensor,
    head: str,
    ratio: float,
    *,
    importance: str,
    way: Way,
    gradients: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """A copy of a network, pruned by Torch-Pruning.

    Args:
        dense: left as it is.
        example: an input.
        head: name of the last layer, whose outputs stay.
        ratio: share of the channels to remove.
        importance: "magnitude", or "taylor", which needs gradients.
        way: how to run it.
        gradients: parameter name -> gradient of the loss.

    Raises:
        DependencyError: Torch-Pruning is not installed.
        InfeasibleError: it fails at this ratio, or the network that it made can't be run.
    """
    module = library()
    network = deepcopy(dense)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = gradients[name].clone() if gradients is not None else None
    score = (
        module.importance.GroupTaylorImportance()
        if importance == "taylor"
        else module.importance.GroupMagnitudeImportance(p=2)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = module.pruner.MetaPruner(
                network,
                example,
                importance=score,
                global_pruning=way.everywhere,
                pruning_ratio=ratio,
                iterative_steps=way.steps,
                round_to=way.round_to,
                isomorphic=way.isomorphic,
                ignored_layers=[network.get_submodule(head)],
            )
            for _ in range(way.steps):
                pruner.step()
        with torch.no_grad():
            network.train(dense.training)(example)
    except Exception as error:  # it fails in many ways; other ways of running it go on
        raise InfeasibleError(
            f"Torch-Pruning ({way.name}) fails at ratio {ratio:.3f}: "
            f"{type(error).__name__}: {error}",
            0.0,
        ) from error
    asked = {name: parameter.requires_grad for name, parameter in dense.named_parameters()}
    for name, parameter in network.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(asked[name])
    return network


def gradients(task: Task, seed: int) -> dict[str, torch.Tensor]:
    """Gradients of the loss added up over the scoring minibatches, as its documentation does.

    Returns:
        Parameter name -> gradient; zeros where there is none.
    """
    network = deepcopy(task.dense)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    for inputs, target in task.scoring(seed):
        task.loss(network(inputs), target).backward()
    return {
        name: parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in network.named_parameters()
    }


def library() -> Any:
    """The module `torch_pruning`.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise DependencyError(
            "the comparison needs Torch-Pruning, which is not installed: run "
            'pip install "halp-fx[peers]"'
        ) from error
