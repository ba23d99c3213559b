"""What the caller leaves to be pruned, and to which widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import halp_fx
from halp_fx.errors import InfeasibleError, InputError, NothingToPruneError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rules.core import Block
from halp_fx.passes.rules.scope import Scope, matches, output_dims, owner_of, scope_of
from halp_fx.passes.rules.widths import GroupWidths, Widths
from halp_fx.passes.select import widths
from halp_fx.passes.trace import trace
from halp_fx.types import Group, Member
from tests import oracle


class Layer(nn.Module):
    """An inverted residual branch: expand, depthwise, project."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.deep = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.project = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Any:
        return x + self.project(torch.relu(self.deep(self.bn1(self.expand(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.layer1, self.layer2 = Layer(16, 32), Layer(16, 64)
        self.up = nn.ConvTranspose2d(16, 24, 2, stride=2)
        self.act = nn.ReLU()
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.layer2(self.layer1(self.norm(self.stem(x))))
        return self.fc(self.act(self.up(x)).mean((2, 3)))


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = oracle.randomize(Net())
    assert isinstance(model, Net)
    return model.eval()


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ALL = {"stem", "layer1.expand", "layer2.expand", "up"}


def compiled(budget: Any = 0.5, **options: Any) -> Any:
    model = net()
    pruned = halp_fx.compile(model, budget, IMAGE, latency="analytic", **options)
    oracle.assert_exact(model, pruned, (IMAGE,))
    return pruned


def prunable(**options: Any) -> set[str]:
    """Layers of which channels may go."""
    model = net()
    groups = find_groups(trace(model, IMAGE), scope=scope_of(model, **options))
    return {layer for g in groups.groups for m in g.members if (layer := _row(model, m)) in ALL}


def _row(model: nn.Module, member: Member) -> str:
    """The layer of which a member holds the output channels, else nothing."""
    dims = output_dims(owner_of(model, member.name), model.state_dict()[member.name])
    return member.name.rpartition(".")[0] if member.dim in dims else ""


CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing asked": ({}, ALL),
    "exclude a layer": ({"exclude": "stem"}, ALL - {"stem"}),
    "exclude a module and all below": ({"exclude": "layer1"}, ALL - {"layer1.expand", "stem"}),
    "exclude by a glob": ({"exclude": "*.expand"}, {"stem", "up"}),
    "exclude several": ({"exclude": ["up", "layer?.expand"]}, {"stem"}),
    "exclude a parameter": ({"exclude": ["layer2.expand.weight"]}, ALL - {"layer2.expand"}),
    "exclude what follows": ({"exclude": "layer1.bn1"}, ALL - {"layer1.expand"}),
    "exclude a layer without channels": ({"exclude": "act"}, ALL),
    "exclude nothing": ({"exclude": []}, ALL),
    "exclude what is transposed": ({"exclude": "up"}, ALL - {"up"}),
    "exclude the last layer": ({"exclude": "fc"}, ALL),
    "include a convolution": ({"include": "layer1.expand"}, {"layer1.expand"}),
    # Its outputs meet those of stem and layer2, which are not included.
    "include a layer": ({"include": "layer1"}, {"layer1.expand"}),
    "include all of a trunk": (
        {"include": ["stem", "*.project"]},
        {"stem"},
    ),
    "include what is transposed": ({"include": "up"}, {"up"}),
    "exclude wins": ({"include": "layer*", "exclude": "layer2"}, {"layer1.expand"}),
    "include by a callable": (
        {"include": lambda name, dim: name.startswith("layer2.expand") and dim == 0},
        {"layer2.expand"},
    ),
    "exclude by a callable": ({"exclude": lambda name, dim: "expand" in name}, {"up"}),
    "exclude inputs by a callable": (
        {"exclude": lambda name, dim: name == "fc.weight" and dim == 1},
        ALL - {"up"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_may_go(case: str) -> None:
    options, expected = CASES[case]
    assert prunable(**options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "layr1"}, r"exclude: no module or parameter of Net matches 'layr1'; did you"),
        ({"exclude": "layr1"}, "'layer1'"),
        ({"include": ["stem", "body.*"]}, r"include: no module .* matches 'body\.\*'"),
        ({"exclude": ""}, "matches ''; there are stem, norm"),
        ({"include": []}, "include is empty"),
        ({"include": 3}, "include is 3: pass a pattern over names"),
        ({"exclude": [nn.ReLU()]}, r"exclude is \[ReLU\(\)\]: pass a pattern"),
    ],
)
def test_what_is_no_pattern(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compiled(**options)


def test_the_rows_stay_and_the_reason_is_told() -> None:
    pruned = compiled(0.6, exclude="layer1")
    assert pruned.layer1.expand.weight.shape == (32, 16, 1, 1)
    assert pruned.layer2.expand.out_channels < 64
    pins = halp_fx.plan_of(pruned).groups.pins
    assert {p.reason for p in pins if p.name.startswith("layer1.expand")} == {
        "excluded by the caller"
    }
    pruned = compiled(0.8, include="layer2")
    assert pruned.stem.out_channels == 16
    reasons = {p.reason for p in halp_fx.plan_of(pruned).groups.pins}
    assert "excluded by the caller: not in include" in reasons


def test_nothing_left() -> None:
    with pytest.raises(NothingToPruneError, match=r"pinned \(excluded by the caller\)"):
        compiled(exclude="*")


def test_no_excluded_layer_goes_with_its_branch() -> None:
    def little_in_branches(groups: halp_fx.ChannelGroups) -> dict[str, Any]:
        low = {g.name: 1e-6 if g.name.startswith("layer") else 1.0 for g in groups.groups}
        return {g.name: np.full(g.units, low[g.name]) for g in groups.groups}

    def state(exclude: list[str]) -> set[str]:
        options = {"saliency": little_in_branches, "exclude": exclude, "min_share": 0.05}
        return set(compiled(0.6, **options).state_dict())

    free = state([])
    assert "_constants.layer2_project" in free
    assert "layer2.expand.weight" not in free
    for name in ("layer2.expand", "layer2.project", "layer2.bn1", "layer2.deep.bias"):
        kept = state([name])
        assert {"layer2.expand.weight", "layer2.project.weight"} <= kept
        assert "_constants.layer2_project" not in kept


def test_shared_parameters_are_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Any:
            return self.b(torch.relu(self.a(x)))

    model = Shared()
    scope = scope_of(model, exclude="b")
    assert scope == Scope(frozenset({("a.weight", 0), ("b.weight", 0)}))
    assert scope.holds(["a.weight"])
    assert not scope.holds(["c.weight"])
    assert scope_of(model, include="b") == Scope()
    assert scope_of(model) is None


def test_pins_of_blocks() -> None:
    scope = Scope(frozenset({("a.weight", 0)}), frozenset({("c.weight", 0)}))
    blocks = [Block("a.weight", 0, 1, 3), Block("a.weight", 1, 4, 2), Block("b.weight", 0, 6, 2)]
    (pin,) = scope.pins(iter(blocks))
    assert pin.labels.tolist() == [1, 2, 3]
    assert pin.reason == "excluded by the caller"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layer1", "layer1.0.conv.weight", True),
        ("layer1", "layer10.conv.weight", False),
        ("layer1.0", "layer1.0.conv.weight", True),
        ("*.conv", "layer1.0.conv.weight", True),
        ("conv", "layer1.0.conv.weight", False),
        ("layer[12]", "layer2.weight", True),
        ("*", "weight", True),
        ("Layer1", "layer1.weight", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


DIMS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3), "weight", (0,)),
    "bias": (lambda: nn.Conv2d(4, 6, 3), "bias", (0,)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), "weight", (1,)),
    "transposed bias": (lambda: nn.ConvTranspose2d(4, 6, 3), "bias", (0,)),
    "transposed groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", (0, 1)),
    "one row": (lambda: nn.Linear(4, 1), "weight", (0,)),
    "embedding": (lambda: nn.Embedding(10, 4), "weight", (1,)),
    "statistics": (lambda: nn.BatchNorm2d(4), "running_mean", (0,)),
    "counter": (lambda: nn.BatchNorm2d(4), "num_batches_tracked", ()),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", (0,)),
    "parametrised": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3), dim=1),
        "parametrizations.weight.original1",
        (1,),
    ),
}


@pytest.mark.parametrize("case", DIMS)
def test_output_dims(case: str) -> None:
    build, name, dims = DIMS[case]
    model = build()
    tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
    assert output_dims(owner_of(model, name), tensor) == dims


def test_output_dims_of_bare_parameters() -> None:
    owner = nn.Module()
    assert output_dims(owner, torch.zeros(1, 16, 8)) == (0, 1, 2)
    assert output_dims(owner, torch.zeros(8, 1, 1)) == (0,)
    assert owner_of(owner, "nowhere.weight") is None


def _group(units: int, width: int = 1, least: int = 1) -> Group:
    member = Member("w", 0, np.arange(units * width, dtype=np.int64).reshape(units, width))
    return Group("g", units, width, (member,), least)


@pytest.mark.parametrize(
    ("group", "options", "expected"),
    [
        (_group(32), {"round_to": 8}, [8, 16, 24, 32]),
        (_group(30), {"round_to": 8}, [8, 16, 24, 30]),
        (_group(6), {"round_to": 8}, [6]),
        (_group(6), {"round_to": 1}, [1, 2, 3, 4, 5, 6]),
        (_group(8, width=4), {"round_to": 8}, [2, 4, 6, 8]),
        (_group(8, width=6), {"round_to": 8}, [4, 8]),
        (_group(32), {"round_to": 8, "min_width": 9}, [16, 24, 32]),
        (_group(32), {"round_to": 8, "min_share": 0.5}, [16, 24, 32]),
        (_group(32), {"round_to": 16, "droppable": True}, [0, 16, 32]),
        (_group(32, least=0), {"round_to": 16}, [0, 16, 32]),
        (_group(7), {"min_width": 5}, [5, 6, 7]),
        (_group(7, width=4), {"min_width": 19}, [5, 6, 7]),
        (_group(8), {"min_width": 100}, [8]),
        (_group(10), {"min_share": 0.3}, [3, 4, 6, 8, 10]),
        (_group(4), {"min_share": 1.0}, [4]),
    ],
)
def test_widths(group: Group, options: dict[str, Any], expected: list[int]) -> None:
    assert widths(group, **options).tolist() == expected


def test_many_levels_stay_multiples() -> None:
    found = widths(_group(1024), round_to=4, min_width=13)
    assert found[0] == 16
    assert len(found) <= 34
    assert (found % 4 == 0).all()


@pytest.mark.parametrize("solver", ["joint", "halp", "greedy", "uniform"])
def test_compile_rounds(solver: str) -> None:
    pruned = compiled(0.5, round_to=16, solver=solver)
    plan = halp_fx.plan_of(pruned)
    for group, units in zip(plan.groups.groups, plan.units, strict=True):
        assert len(units) % 16 == 0 or len(units) == group.units
    assert plan.predicted_ms < plan.dense_ms


def test_least_widths_by_name() -> None:
    free = compiled(0.5, drop_blocks=False)
    assert free.stem.out_channels < 8
    assert free.up.out_channels < 20
    pruned = compiled(0.5, drop_blocks=False, min_width={"stem": 8, "up": 20})
    assert pruned.stem.out_channels >= 8
    assert pruned.up.out_channels >= 20
    pruned = compiled(0.6, drop_blocks=False, min_share={"layer*.expand": 0.5, "stem": 1.0})
    assert pruned.stem.out_channels == 16
    assert pruned.layer1.expand.out_channels >= 16
    assert pruned.layer2.expand.out_channels >= 32


def test_the_most_specific_pattern_counts() -> None:
    groups = find_groups(trace(net(), IMAGE))
    allowed = Widths(
        min_share={"*": 0.1, "layer*": 0.2, "layer2.expand": 0.3, "layer1": 0.4},
        min_width=4,
        round_to={"up": 8, "u?": 2, "u*": 4},
    )
    found = dict(zip((g.name for g in groups.groups), allowed.resolve(groups), strict=True))
    assert found["layer2.expand"] == GroupWidths(0.3, 4, None)
    assert found["layer1.expand"] == GroupWidths(0.4, 4, None)
    assert found["stem"].min_share == 0.4  # layer1.project gives the same channels
    up = next(own for name, own in found.items() if own.round_to is not None)
    assert up == GroupWidths(0.1, 4, 8)


def test_a_dict_leaves_the_default_to_the_others() -> None:
    pruned = compiled(0.4, drop_blocks=False, min_share={"stem": 0.5})
    plan = halp_fx.plan_of(pruned)
    for group, units in zip(plan.groups.groups, plan.units, strict=True):
        assert len(units) >= 0.1 * group.units


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_share": 1.5}, "min_share is 1.5: pass a share from 0 to 1"),
        ({"min_share": {"stem": True}}, "min_share is True"),
        ({"min_share": "half"}, "min_share is 'half'"),
        ({"min_width": 2.5}, "min_width is 2.5: pass a whole number of channels, at least 0"),
        ({"round_to": 0}, "round_to is 0: pass a whole number of channels, at least 1"),
        ({"round_to": {3: 4}}, "round_to has keys that are no text"),
        ({"min_width": {"steem": 4}}, "min_width: no module .* matches 'steem'; did you mean 'st"),
        ({"min_width": {"stem": 17}}, r"min_width is 17 for 'stem', .* has 16 channels"),
        ({"min_width": 65}, r"min_width is 65 for '\*', .*'layer2.expand'\) has 64 channels"),
    ],
)
def test_widths_that_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compiled(**options)


def test_least_widths_may_leave_no_room() -> None:
    with pytest.raises(InfeasibleError, match="the least latency that Net can be pruned to"):
        compiled(0.5, min_share=0.95, drop_blocks=False)
