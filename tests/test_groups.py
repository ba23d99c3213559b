"""groups: which channels stand or fall together, as golden texts, and why others must stay."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halp_fx.passes.groups import find_groups
from halp_fx.passes.trace import trace
from halp_fx.types import ChannelGroups, Extent, Member
from tests.patterns import PATTERNS

__all__: list[str] = []


def groups_of(model: nn.Module, *inputs: Any, exact: bool = False) -> ChannelGroups:
    return find_groups(trace(model.eval(), inputs or (torch.randn(2, 3, 8, 8),)), exact=exact)


def _positions(member: Member) -> str:
    """The positions of all units: "0..7", or unit by unit where that says more."""
    index = member.index
    start = int(index[0, 0])
    run = np.arange(start, start + index.size).reshape(index.shape)
    if np.array_equal(index, run):
        return f"{start}..{start + index.size - 1}"
    return " ".join("+".join(str(int(p)) for p in unit) for unit in index)


def describe(groups: ChannelGroups) -> str:
    """Every group, its members and its pins, one a line."""
    lines: list[str] = []
    for group in groups.groups:
        inexact = f" inexact at {', '.join(group.inexact)}" if group.inexact else ""
        lines.append(
            f"{group.name}: {group.units} units of {group.width}, at least {group.least}{inexact}"
        )
        lines += [f"  {m.name}[{m.dim}] {_positions(m)}" for m in group.members]
    lines += [
        f"pin {p.name}[{p.dim}] {int(p.index[0])}..{int(p.index[-1])}: {p.node}: {p.reason}"
        for p in groups.pins
    ]
    return "\n".join(lines) + "\n"


def assert_text(groups: ChannelGroups, golden: str) -> None:
    assert describe(groups) == textwrap.dedent(golden).lstrip("\n")


class Small(nn.Module):
    """A residual sum and a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.side = nn.Conv2d(8, 4, 1)
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        y = x + self.b(F.relu(self.a(x)))
        y = torch.cat([y, self.side(x)], 1)
        return self.out(y.mean((2, 3)))


def test_residual_and_concat() -> None:
    assert_text(
        groups_of(Small()),
        """
        stem: 8 units of 1, at least 1
          stem.weight[0] 0..7
          norm.weight[0] 0..7
          norm.bias[0] 0..7
          a.weight[1] 0..7
          b.weight[0] 0..7
          b.bias[0] 0..7
          side.weight[1] 0..7
          out.weight[1] 0..7
          norm.running_mean[0] 0..7
          norm.running_var[0] 0..7
        a: 6 units of 1, at least 1
          a.weight[0] 0..5
          a.bias[0] 0..5
          b.weight[1] 0..5
        side: 4 units of 1, at least 1
          side.weight[0] 0..3
          side.bias[0] 0..3
          out.weight[1] 8..11
        pin stem.weight[1] 0..2: stem: reads channels that can't be removed
        pin out.weight[0] 0..1: output: output of the network
        pin out.bias[0] 0..1: output: output of the network
        """,
    )


class Grouped(nn.Module):
    """A convolution in groups, one a channel, a channel shuffle between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.out = nn.Conv2d(12, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.depthwise(self.grouped(self.a(x)))))


def test_a_unit_of_a_grouped_convolution_is_a_convolution_group() -> None:
    groups = groups_of(Grouped())
    (group,) = groups.groups
    assert (group.units, group.width) == (4, 2)
    by_name = {(m.name, m.dim): m.index.tolist() for m in group.members}
    assert by_name["a.weight", 0] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    triples = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert by_name["grouped.weight", 0] == triples
    assert by_name["depthwise.weight", 0] == triples
    assert by_name["out.weight", 1] == triples


class Attending(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.q, self.k, self.v = (nn.Linear(6, heads * width) for _ in range(3))
        self.out = nn.Linear(heads * width, 2)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("heads", "width", "rows", "together"),
    [
        # The channels of each head: the same place in every head goes; values on their own.
        (2, 4, [[0, 4], [1, 5], [2, 6], [3, 7]], [{"q", "k"}, {"v", "out"}]),
        # Whole heads.
        (4, 2, [[0, 1], [2, 3], [4, 5], [6, 7]], [{"q", "k", "v", "out"}]),
    ],
)
def test_heads_or_their_channels_go(
    heads: int, width: int, rows: list[list[int]], together: list[set[str]]
) -> None:
    groups = groups_of(Attending(heads, width), torch.randn(2, 5, 6)).groups
    assert [{m.name.split(".")[0] for m in g.members} for g in groups] == together
    assert all(m.index.tolist() == rows for g in groups for m in g.members)


class Windows(nn.Module):
    """Neighbours are added, so that all eight channels stand or fall together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.two, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        x = torch.cat([x[:, :-1] + x[:, 1:], x[:, :1]], 1)
        y = self.two(x)
        return self.out(y * y.flip(1))


def test_a_unit_that_is_alone_says_who_made_it_one() -> None:
    groups = groups_of(Windows())
    assert groups.groups == ()
    pins = {(pin.name, pin.dim): pin for pin in groups.pins}
    first, second = pins["a.weight", 0], pins["two.weight", 0]
    assert first.node == "add"
    assert first.reason == (
        "its 8 channels are all tied to each other: without them nothing would remain"
    )
    assert "x = torch.cat([x[:, :-1] + x[:, 1:], x[:, :1]], 1)" in first.source
    assert pins["a.bias", 0].node == pins["two.weight", 1].node == "add"
    assert (second.node, second.reason[:14]) == ("mul", "its 2 channels")
    assert "y * y.flip(1)" in second.source


def test_flattened_channels_own_several_columns() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2))
    assert_text(
        groups_of(model, torch.randn(2, 3, 4, 4)),
        """
        0: 4 units of 1, at least 1
          0.weight[0] 0..3
          0.bias[0] 0..3
          3.weight[1] 0..15
        pin 0.weight[1] 0..2: _0: reads channels that can't be removed
        pin 3.weight[0] 0..1: output: output of the network
        pin 3.bias[0] 0..1: output: output of the network
        """,
    )


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.norm(self.up(x)))


def test_layer_norm_is_inexact_unless_asked() -> None:
    x = torch.randn(2, 6)
    assert_text(
        groups_of(Normed(), x),
        """
        up: 8 units of 1, at least 1 inexact at norm
          up.weight[0] 0..7
          up.bias[0] 0..7
          norm.weight[0] 0..7
          norm.bias[0] 0..7
          down.weight[1] 0..7
        pin up.weight[1] 0..5: up: reads channels that can't be removed
        pin down.weight[0] 0..1: output: output of the network
        pin down.bias[0] 0..1: output: output of the network
        """,
    )
    exact = groups_of(Normed(), x, exact=True)
    assert exact.groups == ()
    pin = next(p for p in exact.pins if p.name == "norm.weight")
    assert (pin.node, pin.dim, len(pin.index)) == ("norm", 0, 8)
    assert pin.reason == "native_layer_norm takes statistics over the channels"
    assert pin.source.endswith(": return self.down(self.norm(self.up(x)))")


def test_a_concat_branch_can_go_whole() -> None:
    """A dim that other groups keep alive lets its smaller ones go, but never all."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)
            self.b = nn.Conv2d(3, 4, 1)
            self.out = nn.Conv2d(12, 2, 1)

        def forward(self, x: Tensor) -> Any:
            return self.out(torch.cat([self.a(x), self.b(x)], 1))

    least = {g.name: g.least for g in groups_of(Branches()).groups}
    assert sum(least.values()) >= 1


def test_one_unit_is_no_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    groups = groups_of(model)
    assert [g.name for g in groups.groups] == ["1"]


class Softmaxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.one(x).softmax(1)
        return self.out(self.two(y))


def test_pins_name_node_reason_and_line() -> None:
    groups = groups_of(Softmaxed())
    assert [g.name for g in groups.groups] == ["two"]
    pin = next(p for p in groups.pins if (p.name, p.dim) == ("one.weight", 0))
    assert (pin.node, pin.reason) == ("softmax", "_softmax reads all channels")
    file, line, code = pin.source.rsplit(":", 2)
    assert file.endswith("test_groups.py")
    assert code == " y = self.one(x).softmax(1)"
    source = Path(file).read_text().splitlines()
    assert source[int(line) - 1].strip() == code.strip()
    assert pin.index.tolist() == list(range(8))


def test_an_opaque_module_pins_what_goes_in_and_its_own() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Any:
            return self.conv(x) if x.sum() > 0 else x

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.hard = nn.Conv2d(3, 8, 1), Opaque()
            self.two, self.out = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Any:
            return self.out(self.two(self.hard(self.one(x))))

    groups = groups_of(Net())
    assert [g.name for g in groups.groups] == ["two"]
    pins = {(p.name, p.dim): p for p in groups.pins}
    for name in [("one.weight", 0), ("hard.conv.weight", 0), ("two.weight", 1)]:
        assert "hard" in pins[name].node or name == ("two.weight", 1)
    assert "the module 'hard' could not be traced (TraceError: " in pins["one.weight", 0].reason


def test_the_coupling_graph() -> None:
    graph = groups_of(Small()).graph
    assert isinstance(graph, nx.MultiGraph)
    assert graph.nodes["stem.weight", 0]["size"] == 8
    assert ("stem.weight", 2) not in graph, "a kernel's rows are no channels"
    ties = {(frozenset((u, v)), d["node"], d["op"]) for u, v, d in graph.edges(data=True)}
    assert (
        frozenset({("stem.weight", 0), ("norm.weight", 0)}),
        "norm",
        "native_batch_norm",
    ) in ties
    assert (frozenset({("a.weight", 0), ("b.weight", 1)}), "b", "convolution") in ties
    sums = [d for u, v, d in graph.edges(data=True) if d["node"] == "add"]
    assert sums
    assert all(d["source"].endswith("y = x + self.b(F.relu(self.a(x)))") for d in sums)
    path = nx.shortest_path(graph, ("stem.weight", 0), ("b.weight", 0))
    assert path[0] == ("stem.weight", 0)
    groups = groups_of(Small()).groups
    for group in groups:
        members = {(m.name, m.dim) for m in group.members}
        component = nx.node_connected_component(graph, next(iter(members)))
        assert members <= component


def test_shared_tensors_are_members_under_every_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.one, self.two = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
            self.two.weight = self.one.weight
            self.out = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return self.out(self.one(x) * self.two(x))

    groups = groups_of(Tied())
    members = {(m.name, m.dim) for g in groups.groups for m in g.members}
    assert {("one.weight", 0), ("two.weight", 0), ("one.weight", 1), ("two.weight", 1)} <= members
    shared = [d for _, _, d in groups.graph.edges(data=True) if d["op"] == "shared"]
    assert shared


def test_names_are_unique() -> None:
    groups = groups_of(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    names = [g.name for g in groups.groups]
    assert len(set(names)) == len(names)
    for name in ("shuffle", "vit", "densenet", "fpn"):
        if name in PATTERNS:
            model, inputs = PATTERNS[name]()
            found = [g.name for g in groups_of(model, *inputs).groups]
            assert len(set(found)) == len(found)


def test_shapes_as_functions_of_the_units() -> None:
    groups = groups_of(Small())
    by_name = {g.name: i for i, g in enumerate(groups.groups)}
    stem, side = by_name["stem"], by_name["side"]
    extent = groups.outputs["cat"].extents[1]
    assert extent == Extent(12, 0, tuple(sorted([(stem, 1), (side, 1)])))
    kept = dict(enumerate(groups.dense_units))
    assert groups.outputs["cat"].shape(kept) == (2, 12, 8, 8)
    kept[stem] = 5
    assert groups.outputs["cat"].shape(kept) == (2, 9, 8, 8)
    assert groups.parameters["out.weight"].shape(kept) == (2, 9)
    assert groups.parameters["norm.bias"].shape(kept) == (5,)
    assert groups.outputs["output"].dense_shape == (2, 2)
    grid = groups.parameters["a.weight"].shape({stem: np.arange(1, 4), by_name["a"]: 2, side: 1})
    assert grid[1].tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_every_group_is_well_formed(name: str) -> None:
    """Units own distinct positions, as many in each, and pins never overlap with them."""
    model, inputs = PATTERNS[name]()
    try:
        groups = groups_of(model, *inputs)
    except Exception:
        if PATTERNS[name].traceable:
            raise
        pytest.skip("torch.fx can't trace it")
    taken: dict[tuple[str, int], set[int]] = {}
    for group in groups.groups:
        assert 0 <= group.least <= group.units
        for member in group.members:
            assert member.index.shape[0] == group.units
            assert member.index.dtype == np.int64
            flat = member.index.ravel().tolist()
            own = taken.setdefault((member.name, member.dim), set())
            assert len(set(flat)) == len(flat)
            assert not own & set(flat)
            own.update(flat)
    for pin in groups.pins:
        assert pin.reason
        assert not taken.get((pin.name, pin.dim), set()) & set(pin.index.tolist())
