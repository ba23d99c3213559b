"""rewrite: the plan carried out, at random choices of units."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from halp_fx.passes.groups import find_groups
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.trace import trace
from halp_fx.types import ChannelGroups, Plan
from tests import oracle
from tests.patterns import PATTERNS
from tests.pruning import plan_by_hand

__all__: list[str] = []


def plan_for(groups: ChannelGroups, count: Callable[[Any], int], seed: int = 0) -> Plan:
    """Keeps `count(group)` units of each group, chosen at random."""
    generator = np.random.default_rng(seed)
    units = tuple(
        np.sort(generator.permutation(g.units)[: min(max(count(g), g.least), g.units)])
        for g in groups.groups
    )
    return plan_by_hand(groups, units)


def cut(
    model: nn.Module, inputs: tuple[Any, ...], count: Callable[[Any], int], seed: int = 0
) -> fx.GraphModule:
    return rewrite(plan_for(find_groups(trace(model, inputs)), count, seed))


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_random_choices_are_exact(name: str, seed: int) -> None:
    pattern = PATTERNS[name]
    model, inputs = pattern()
    generator = np.random.default_rng(seed)
    with oracle.snapshot(model):
        pruned = cut(model, inputs, lambda g: int(generator.integers(1, g.units + 1)), seed)
    oracle.assert_exact(
        model,
        pruned,
        inputs,
        strict=pattern.strict,
        norm_stats=pattern.norm_stats,
        norm_channels=pattern.norm_channels,
        columns=pattern.columns,
        unmasked=pattern.unmasked,
    )
    pruned.graph.lint()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_keeping_everything_changes_nothing(name: str) -> None:
    model, inputs = PATTERNS[name]()
    pruned = cut(model, inputs, lambda g: g.units)
    assert list(pruned.state_dict()) == list(model.state_dict())
    oracle.assert_exact(model, pruned, inputs)


class Attributes(nn.Module):
    """One of each module that repeats sizes in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16, affine=False)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.group_norm = nn.GroupNorm(8, 32)
        self.act = nn.PReLU(32)
        self.up = nn.ConvTranspose2d(32, 24, 2, stride=2)
        self.instance = nn.InstanceNorm2d(24, affine=True)
        self.flat = nn.Linear(24, 20)
        self.layer_norm = nn.LayerNorm(20)
        self.out = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.conv(x))
        x = self.act(self.group_norm(self.grouped(x)))
        x = self.instance(self.up(x)).square().mean((2, 3))
        return self.out(F.relu(self.layer_norm(self.flat(x))))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return oracle.randomize(Attributes()).eval(), (torch.randn(2, 3, 8, 8),)


def test_attributes_of_modules_follow() -> None:
    model, inputs = make()
    pruned = cut(model, inputs, lambda g: (g.units + 1) // 2)
    part: Any = pruned
    assert part.conv.out_channels == part.conv.weight.shape[0] == part.norm.num_features < 16
    assert part.grouped.in_channels == part.conv.out_channels
    assert part.grouped.out_channels == part.grouped.weight.shape[0] < 32
    assert part.grouped.groups * part.grouped.weight.shape[1] == part.grouped.in_channels
    assert part.group_norm.num_channels == part.grouped.out_channels
    assert part.group_norm.num_channels // part.group_norm.num_groups == 4
    assert part.act.num_parameters == part.grouped.out_channels
    assert (part.up.in_channels, part.up.out_channels) == tuple(part.up.weight.shape[:2])
    assert part.instance.num_features == part.up.out_channels < 24
    assert (part.flat.out_features, part.flat.in_features) == tuple(part.flat.weight.shape)
    assert part.layer_norm.normalized_shape == (part.flat.out_features,)
    assert part.flat.out_features < 20
    assert (part.out.in_features, part.out.out_features) == (part.flat.out_features, 4)
    repr(pruned)
    oracle.assert_exact(model, pruned, inputs, norm_stats=True)


def test_nothing_is_shared_with_the_dense_network() -> None:
    model, inputs = make()
    pruned = cut(model, inputs, lambda g: (g.units + 1) // 2)
    dense = {t.data_ptr() for t in oracle.named_tensors(model).values()}
    assert not dense & {t.data_ptr() for t in oracle.named_tensors(pruned).values()}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in oracle.named_tensors(pruned).values():
            tensor.zero_()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(t.device.type == "cpu" for t in oracle.named_tensors(pruned).values())


def test_the_plan_and_the_example_are_kept() -> None:
    model, inputs = make()
    pruned = cut(model, inputs, lambda g: g.units - 1)
    assert pruned.meta["halp_fx"].solver == "by hand"
    assert pruned.meta["halp_fx_example"] == (((2, 3, 8, 8), torch.float32),)


class Extras(nn.Module):
    """State that the graph never reads, buffers outside the state dict, a frozen layer."""

    hidden: Tensor
    spare: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(3))
        self.aux = nn.Sequential(nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4))
        self.conv, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)
        self.alias = self.conv
        self.register_buffer("hidden", torch.rand(16, 1, 1), persistent=False)
        self.register_buffer("spare", torch.arange(4))
        self.conv.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.conv(x) * self.hidden))


def test_state_that_the_graph_never_reads_is_carried_over() -> None:
    model, inputs = Extras().eval(), (torch.randn(2, 3, 4, 4),)
    pruned = cut(model, inputs, lambda g: g.units // 2)
    assert list(pruned.state_dict()) == list(model.state_dict())
    assert "hidden" not in pruned.state_dict()
    assert pruned.hidden.shape == (8, 1, 1)
    assert pruned.alias.weight is pruned.conv.weight
    assert not pruned.conv.weight.requires_grad
    spare = pruned.get_parameter("aux.0.weight")
    assert torch.equal(spare, model.aux[0].weight)
    assert spare is not model.aux[0].weight
    oracle.assert_exact(model, pruned, inputs, strict=True)


def test_a_module_of_the_callers_class_is_not_needed() -> None:
    model, inputs = make()
    pruned = cut(model, inputs, lambda g: g.units // 2)
    kinds = {type(module).__module__.split(".")[0] for module in pruned.modules()}
    assert kinds == {"torch"}
