"""Exactness where tensors are changed in place, and where numbers hold batch or image size."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import halp_fx
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.trace import trace
from halp_fx.types import ChannelGroups
from tests import oracle
from tests.pruning import plan_by_hand

__all__: list[str] = []

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ready(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return oracle.randomize(model).eval()


def groups_of(model: nn.Module, *inputs: Tensor) -> ChannelGroups:
    return find_groups(trace(model, inputs or (X,)))


def pruned_by_hand(groups: ChannelGroups, gone: str = "") -> fx.GraphModule:
    """About half of each group, scattered; nothing of the groups whose name starts with `gone`."""
    random = np.random.default_rng(0)
    units = []
    for group in groups.groups:
        count = max(group.least, group.units // 2)
        if gone and group.name.startswith(gone):
            count = 0
        units.append(np.sort(random.permutation(group.units)[:count]))
    return rewrite(plan_by_hand(groups, units))


# Branches that change the trunk.


class Unit(nn.Module):
    """As the refinement units of depth networks: the activation works on the trunk too."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.way = way
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        if self.way == "module":
            y = self.act(x)
        elif self.way == "method":
            y = x.relu_()
        elif self.way == "function":
            y = F.relu(x, inplace=True)
        elif self.way == "view":
            y = x.flatten(2).relu_().view(x.shape)
        else:
            x *= 0.5
            y = x
        return self.two(torch.relu(self.one(y))) + x


@pytest.mark.parametrize("way", ["module", "method", "function", "view", "operator"])
def test_what_a_branch_does_to_the_trunk_stays_when_it_is_dropped(way: str) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 16, 3), Unit(way), nn.Conv2d(16, 4, 1)))
    groups = groups_of(model)
    assert len(groups.branches) == 1
    assert [groups.groups[g].name for g in groups.branches[0].groups] == ["1.one"]
    pruned = pruned_by_hand(groups, gone="1.one")
    assert not any(name.startswith("1.") for name, _ in pruned.named_parameters())
    oracle.assert_exact(model, pruned, (X,), strict=True)


@pytest.mark.parametrize("way", ["add_", "iadd"])
def test_a_sum_into_a_branch_is_not_one_into_its_constant(way: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.one, self.two = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            y = self.two(torch.relu(self.one(x)))
            if way == "add_":
                y = y.add_(x)
            else:
                y += x
            return self.head(y)

    model = ready(Net())
    pruned = pruned_by_hand(groups_of(model), gone="one")
    constants = {k: v.clone() for k, v in pruned.state_dict().items() if "_constants" in k}
    assert len(constants) == 1
    oracle.assert_exact(model, pruned, (X,), strict=True)
    pruned(X)
    assert all(torch.equal(pruned.state_dict()[k], v) for k, v in constants.items())


# Numbers that are computed from widths.


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 1)
        self.q, self.k, self.v = (nn.Linear(32, 16) for _ in range(3))
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5 * 2.0))


def test_a_scale_of_attention_stays() -> None:
    model = ready(Attention())
    pruned = pruned_by_hand(groups_of(model))
    (node,) = pruned.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    assert node.kwargs["scale"] == 0.5  # of width 16, whatever is left
    oracle.assert_exact(model, pruned, (X,))


class Heads(nn.Module):
    """Batch and heads in one dim."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Conv2d(3, 32, 1), nn.Linear(32, 96), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 8, 4).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (z.reshape(b * 8, -1, 4) for z in (q, k, v))
        y = (q @ k.transpose(1, 2) * 0.5).softmax(-1) @ v
        return self.out(y.reshape(b, 8, -1, 4).transpose(1, 2).reshape(b, n, -1))


def test_batch_and_heads_in_one_dim() -> None:
    model = ready(Heads())
    groups = groups_of(model)
    assert "qkv" in [group.name for group in groups.groups]
    pruned = pruned_by_hand(groups)
    oracle.assert_exact(model, pruned, (X,), batches=[1, 2, 3, 5])


class Correlation(nn.Module):
    """Each image's features are the filters of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kernel = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.search, self.out = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, z: Tensor, x: Tensor) -> Any:
        z, x = self.kernel(self.body(z)), self.search(self.body(x))
        b, c, h, w = x.shape
        y = F.conv2d(x.view(1, b * c, h, w), z.reshape(b * c, 1, *z.shape[2:]), groups=b * c)
        return self.out(y.view(b, c, *y.shape[2:]))


@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_in_as_many_groups_as_the_batch_has_channels(batch: int) -> None:
    model = ready(Correlation())
    z = X[:batch, :, :5, :5].clone()
    groups = groups_of(model, z, X[:batch].clone())
    assert {group.name for group in groups.groups} == {"body", "kernel"}
    oracle.assert_exact(
        model, pruned_by_hand(groups), (z, X[:batch].clone()), batches=[1, 2, 3], strict=True
    )


class Divided(nn.Module):
    """What is divided by holds the number of positions besides that of channels."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.out = nn.Conv2d(16, 4, 1)
        self.by = by

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.stem(x))
        _, c, h, w = x.shape
        number: Any = {
            "product": lambda: c * h * w,
            "root": lambda: (c * h * w) ** 0.5,
            "numel": lambda: x.numel() // x.shape[0],
            "channels": lambda: x.size(1) * 2,
        }[self.by]()
        return self.out(torch.relu(self.mid(x) / number))


@pytest.mark.parametrize("by", ["product", "root", "numel", "channels"])
def test_numbers_hold_at_other_sizes(by: str) -> None:
    model = ready(Divided(by))
    pruned = pruned_by_hand(groups_of(model))
    for size in (8, 12, 5):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        oracle.assert_exact(model, pruned, (x,), strict=True, tolerance=1e-9)
    if by == "channels":
        assert 32 in [arg for node in pruned.graph.nodes for arg in node.args]  # a plain number
    else:
        assert operator.mul in [node.target for node in pruned.graph.nodes]


# Modules that are used more than once.


class Shared(nn.Module):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.shared = shared
        self.first, self.second = nn.LazyConv2d(4, 1), nn.LazyConv2d(4, 1)

    def forward(self, x: Tensor) -> Any:
        one, two = self.shared(self.one(x)), self.shared(self.two(x))
        if isinstance(self.shared, nn.Unflatten):
            one, two = one.flatten(1, 2), two.flatten(1, 2)
        return self.first(torch.relu(one)), self.second(torch.relu(two))


@pytest.mark.parametrize(
    "shared",
    [
        nn.GroupNorm(8, 16, affine=False),
        nn.InstanceNorm2d(16),
        nn.Unflatten(1, (4, 4)),
    ],
    ids=str,
)
def test_modules_without_tensors_that_are_shared(shared: nn.Module) -> None:
    model = Shared(shared)
    model(X)
    model = ready(model)
    groups = groups_of(model)
    random = np.random.default_rng(1)
    # Widths that differ between the groups.
    units = [
        np.sort(random.permutation(g.units)[: max(g.least, g.units * (i + 2) // 5)])
        for i, g in enumerate(groups.groups)
    ]
    oracle.assert_exact(model, rewrite(plan_by_hand(groups, units)), (X,), norm_stats=True)


# Weights that are computed before each call.


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_the_norm_of_all_weights_pins_them() -> None:
    model = ready(
        nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.utils.spectral_norm(nn.Conv2d(16, 16, 3)),
            nn.ReLU(),
            nn.Conv2d(16, 4, 1),
        )
    )
    groups = groups_of(model)
    assert [group.name for group in groups.groups] == ["0"]
    reasons = {pin.reason for pin in groups.pins if pin.name.startswith("2.")}
    assert "goes into one number of all weights" in reasons
    oracle.assert_exact(model, pruned_by_hand(groups), (X,), strict=True)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_sizes_of_layers_with_computed_weights() -> None:
    from torch.nn.utils import prune

    masked = nn.Conv2d(16, 16, 3, padding=1)
    model = ready(
        nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            masked,
            nn.ReLU(),
            nn.utils.weight_norm(nn.Conv2d(16, 12, 1)),
            nn.ReLU(),
            nn.Conv2d(12, 4, 1),
        )
    )
    prune.l1_unstructured(masked, "weight", amount=0.3)
    model(X)
    with torch.no_grad():
        model(X)
    pruned = pruned_by_hand(groups_of(model))
    for layer in (pruned.get_submodule("2"), pruned.get_submodule("4")):
        weight = dict(layer.named_parameters()).get("weight_orig")
        weight = layer.get_parameter("weight_v") if weight is None else weight
        assert (layer.out_channels, layer.in_channels) == tuple(weight.shape[:2])


def test_a_check_of_a_width_is_named() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.mid = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
            self.two = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.one(x)
            torch._assert(x.shape[1] == 16, "16 channels are needed")
            return self.two(torch.relu(self.mid(x)))

    groups = groups_of(ready(Checked()))
    assert [group.name for group in groups.groups] == ["mid"]
    (pin,) = [p for p in groups.pins if p.name == "one.weight" and p.dim == 0]
    assert pin.node == "_assert" and "16 channels are needed" in pin.reason


def test_a_network_of_such_units_is_compiled() -> None:
    model = ready(
        nn.Sequential(nn.Conv2d(3, 16, 3), Unit("module"), Unit("module"), nn.Conv2d(16, 4, 1))
    )
    pruned = halp_fx.compile(model, 0.5, X, latency="analytic", round_to=1)
    oracle.assert_exact(model, pruned, (X,), strict=True)
