"""Scores of channels that go through norms: they are the first-order effect of a mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halp_fx.errors import InputError, SaliencyError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rules.scored import ScoredMembers
from halp_fx.passes.saliency import score
from halp_fx.passes.trace import trace
from halp_fx.training import GradualPruner
from tests import oracle

__all__: list[str] = []


class ByFunction(nn.Module):
    """A norm of the user's own, without a layer of torch.nn."""

    def __init__(self, kind: str, affine: bool) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(12)) if affine else None
        self.bias = nn.Parameter(torch.zeros(12)) if affine else None

    def forward(self, x: Tensor) -> Any:
        if self.kind == "instance":
            return F.instance_norm(x, weight=self.weight, bias=self.bias)
        return F.group_norm(x, 4, self.weight, self.bias)


class Net(nn.Module):
    def __init__(self, norm: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=bias), norm
        self.two, self.three = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        x = F.relu(self.norm(self.one(x)))
        if mask is not None:
            x = x * mask.view(1, -1, 1, 1)
        return self.three(F.relu(self.two(x))).mean((2, 3))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(12),
    "batch, bare": lambda: nn.BatchNorm2d(12, affine=False),
    "instance": lambda: nn.InstanceNorm2d(12, affine=True),
    "instance, bare": lambda: nn.InstanceNorm2d(12),
    "instance, tracking": lambda: nn.InstanceNorm2d(12, track_running_stats=True),
    "groups": lambda: nn.GroupNorm(4, 12),
    "groups, bare": lambda: nn.GroupNorm(4, 12, affine=False),
    "instance, function": lambda: ByFunction("instance", affine=True),
    "instance, bare function": lambda: ByFunction("instance", affine=False),
    "groups, function": lambda: ByFunction("groups", affine=True),
    "groups, bare function": lambda: ByFunction("groups", affine=False),
}


def network(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return oracle.randomize(Net(norm)).eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, 10, 10, generator=generator), torch.tensor([0, 1, 2, 3]))
        for _ in range(3)
    ]


def effect_of_a_mask(model: nn.Module, units: int = 12) -> np.ndarray:
    """Mean square of the loss's derivative by a mask on each unit's channels, where read."""
    squares = []
    for x, target in batches():
        mask = torch.ones(12, requires_grad=True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x, mask), target), mask)
        squares.append(gradient.double().view(units, -1).sum(1).numpy() ** 2)
    return np.mean(squares, axis=0)


@pytest.mark.parametrize("kind", NORMS)
def test_scores_are_the_effect_of_a_mask(kind: str) -> None:
    model = network(NORMS[kind]())
    groups = find_groups(trace(model, batches()[0][0]))
    (group,) = [g for g, found in enumerate(groups.groups) if found.name == "one"]
    found = score(groups, batches(), F.cross_entropy, "fisher").scores[group]
    units = groups.groups[group].units  # of a group norm whole groups go together
    assert units == (4 if "groups" in kind else 12)
    np.testing.assert_allclose(found, effect_of_a_mask(model, units), rtol=1e-3, atol=1e-12)


def scores_of_training(pruner: GradualPruner) -> np.ndarray:
    """Of the channels before the norm, by the gradients of all minibatches."""
    for x, target in batches():
        pruner.model.zero_grad()
        F.cross_entropy(pruner.model(x), target).backward()
        pruner.after_backward()
        pruner.step([])
    groups = pruner.plan.groups.groups
    (group,) = [g for g, found in enumerate(groups) if found.name == "one"]
    return pruner._scores.saliency(pruner.plan.units).scores[group]


@pytest.mark.parametrize("kind", ["batch, bare", "instance, bare", "instance, bare function"])
def test_scores_of_training_are_the_effect_of_a_mask(kind: str) -> None:
    model = network(NORMS[kind]()).train()
    expected = effect_of_a_mask(copy.deepcopy(model))
    pruner = GradualPruner(model, 0.7, batches()[0][0], steps=1, every=9, latency="analytic")
    np.testing.assert_allclose(scores_of_training(pruner), expected, rtol=1e-3, atol=1e-12)


def test_a_norm_over_all_channels_is_no_norm_of_each() -> None:
    groups = find_groups(trace(network(nn.GroupNorm(1, 12)), batches()[0][0]))
    members = ScoredMembers(groups).of(0)
    assert [m.name for m in members] == ["one.weight"]


def test_frozen_norms_leave_the_scores_to_the_readers() -> None:
    model = network(nn.BatchNorm2d(12))
    for parameter in model.norm.parameters():  # type: ignore[operator, union-attr]
        parameter.requires_grad_(False)
    expected = effect_of_a_mask(model)
    pruner = GradualPruner(model, 0.7, batches()[0][0], steps=1, every=9, latency="analytic")
    pruner.model.eval()
    np.testing.assert_allclose(scores_of_training(pruner), expected, rtol=1e-3, atol=1e-12)


class Heads(nn.Module):
    """Two tasks with a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 32, 3, padding=1)
        self.first, self.second = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)
        self.one, self.two = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.body(x))
        return self.one(F.relu(self.first(x))), self.two(F.relu(self.second(x)))


def test_minibatches_may_leave_out_a_head() -> None:
    torch.manual_seed(0)
    pruner = GradualPruner(
        Heads(), 0.6, torch.randn(2, 3, 8, 8), steps=1, every=4, latency="analytic"
    )
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.01)
    for task in (0, 1, 0, 1):
        optimizer.zero_grad()
        pruner.model(torch.randn(2, 3, 8, 8))[task].square().mean().backward()
        pruner.after_backward()
        optimizer.step()
        pruner.step(optimizer)
    assert pruner.done
    dense = sum(p.numel() for p in Heads().parameters())
    assert sum(p.numel() for p in pruner.network.parameters()) < dense


def test_a_head_that_no_minibatch_trains_is_told() -> None:
    torch.manual_seed(0)
    pruner = GradualPruner(
        Heads(), 0.6, torch.randn(2, 3, 8, 8), steps=1, every=2, latency="analytic"
    )
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.01)
    with pytest.raises(SaliencyError, match=r"no gradient reaches the group 'second'"):
        for _ in range(2):
            optimizer.zero_grad()
            pruner.model(torch.randn(2, 3, 8, 8))[0].square().mean().backward()
            pruner.after_backward()
            optimizer.step()
            pruner.step(optimizer)
    optimizer.zero_grad()
    with pytest.raises(InputError, match="no gradients"):
        pruner.after_backward()
