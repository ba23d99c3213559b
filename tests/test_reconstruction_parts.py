"""What reconstruction is made of: the walk, rows of a layer, least squares and their ridge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halp_fx
from halp_fx.passes.trace import trace
from halp_fx.reconstruction import reconstruct as module_under_test
from halp_fx.reconstruction.checking import held_rows
from halp_fx.reconstruction.dropout import Dropout
from halp_fx.reconstruction.fit import Moments, error, solve
from halp_fx.reconstruction.layers import Layer, layers_of, rows_of
from halp_fx.reconstruction.maps import map_of
from halp_fx.reconstruction.walk import Walk
from tests import oracle
from tests.reconstructible import Chain, far, planned, stream

__all__: list[str] = []

pytestmark = pytest.mark.usefixtures("seeded")


def test_a_walk_gives_what_the_network_computes() -> None:
    model, data = stream()
    module = trace(model, data[0]).module.eval()
    walk = Walk(module)
    seen: dict[str, Tensor] = {}
    module.get_submodule("two").register_forward_hook(
        lambda m, inputs, output: seen.__setitem__("two", output.clone())
    )
    node = next(n for n in module.graph.nodes if n.name == "two")
    with torch.no_grad():
        walk.join((data[0],))
        walk.run(walk.index["two"])
        walk.join((data[1],))
        walk.run(walk.index["two"] + 1)
        for value, batch in zip(walk.values(node), data[:2], strict=True):
            module(batch)
            torch.testing.assert_close(value, seen["two"])
        with pytest.raises(KeyError):  # nobody needs it any more
            walk.values(next(n for n in module.graph.nodes if n.name == "stem"))
        walk.run(len(walk.nodes))
        peaks = Walk(module).peaks((data[0],))
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] == 0
    assert peaks[0] >= 2 * 4 * 32 * 24 * 100  # the widest layer and its norm, float32


CONVOLUTIONS = [
    (nn.Conv2d(4, 6, 3), (4, 7, 8)),
    (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), dilation=(1, 2)), (4, 9, 8)),
    (nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 7, 8)),
    (nn.Conv2d(4, 4, 4, padding="same", groups=4), (4, 7, 8)),
    (nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (4, 7, 8)),
    (nn.Conv1d(4, 6, 3, 2, 2, dilation=2, padding_mode="replicate"), (4, 19)),
    (nn.Conv3d(4, 6, (2, 3, 1), (1, 2, 1), (1, 0, 1), groups=2), (4, 5, 6, 4)),
    (nn.Linear(4, 6), (7, 4)),
]


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS, ids=lambda v: str(v)[:60])
def test_rows_are_what_the_layer_reads_and_gives(module: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, *shape)
    with torch.no_grad():
        y = module(x)
    node: Any = None
    own = map_of(module)
    assert own is not None
    layer = Layer("layer", own, node, node, None)
    found = rows_of(layer, x, y, 20, torch.Generator().manual_seed(0))
    assert found is not None
    read, given_ = found.read, found.given
    assert set(found.samples.tolist()) == {0, 1, 2}
    groups = getattr(module, "groups", 1)
    assert read.shape[:2] == given_.shape[:2] == (20, groups)
    weight = module.weight.detach().reshape(groups, len(module.weight) // groups, -1)
    bias = module.bias.detach().reshape(groups, -1)
    computed = torch.einsum("rgd,god->rgo", read, weight) + bias
    torch.testing.assert_close(computed, given_, rtol=1e-4, atol=1e-5)
    of_one = found.where(found.samples == 1)
    moved = rows_of(layer, x[1:2], y[1:2], 1000, torch.Generator())
    assert moved is not None
    assert all((moved.read == row).flatten(1).all(1).any() for row in of_one.read)
    assert rows_of(layer, x, y[:-1], 20, torch.Generator()) is None


@pytest.mark.parametrize("centred", [False, True])
def test_least_squares_are_those_of_lapack(centred: bool) -> None:
    x, present = torch.randn(300, 2, 7).double() + 1, torch.randn(2, 3, 7).double()
    y = torch.einsum("rgd,god->rgo", x, torch.randn(2, 3, 7).double()) + torch.randn(300, 2, 3)
    moments = Moments()
    for part in range(3):
        moments.add(x[part::3], y[part::3])
    ridge = 0.1
    new = solve(moments, present, centred=centred, ridge=ridge)
    assert new is not None
    for g in range(2):
        own, aim = x[:, g], y[:, g]
        if centred:
            own, aim = own - own.mean(0), aim - aim.mean(0)
        damp = (300 * ridge * own.square().mean()).sqrt()
        rows = torch.cat([own, damp * torch.eye(7, dtype=torch.float64)])
        aims = torch.cat([aim, damp * present[g].T])
        expected = torch.linalg.lstsq(rows, aims).solution.T
        torch.testing.assert_close(new[g], expected, rtol=1e-6, atol=1e-8)
    bias = torch.randn(2, 3).double()
    off = (torch.einsum("rgd,god->rgo", x, new) + bias - y).square().mean(0).sum()
    variance = y.var(0, unbiased=False).sum()
    assert error(moments, new, bias) == pytest.approx(float(off / variance), rel=1e-6)


def test_few_samples_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(module_under_test._RIDGES) == sorted(module_under_test._RIDGES, reverse=True)
    model = oracle.randomize(Chain(nn.Linear(40, 64), nn.Linear(64, 10))).eval()
    data = [torch.randn(6, 40) for _ in range(8)]
    raw = planned(model, data[0], {"first": range(32)})
    fresh = torch.randn(500, 40)
    off = {}
    for name, ridges in (("chosen", module_under_test._RIDGES), ("least", (1.0,))):
        monkeypatch.setattr(module_under_test, "_RIDGES", ridges)
        pruned = copy.deepcopy(raw)
        halp_fx.reconstruct(pruned, model, data)
        off[name] = far(pruned, model, fresh)
    assert off["chosen"] < 0.9 * min(off["least"], far(raw, model, fresh))


def test_of_fits_that_are_level_the_nearest_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle.randomize(Chain(nn.Linear(3, 32), nn.Linear(32, 4))).eval()
    data = [torch.randn(64, 3) for _ in range(8)]
    raw = planned(model, data[0], {"first": range(16)})
    size, before = {}, raw.second.weight.clone()
    for slack in (0.0, 0.5):
        monkeypatch.setattr(module_under_test, "_SLACK", slack)
        pruned = copy.deepcopy(raw)
        fit = halp_fx.reconstruct(pruned, model, data)["second"]
        assert fit.after < fit.before
        size[slack] = float((pruned.second.weight - before).detach().norm())
    assert 0 < size[0.5] < size[0.0]


def test_what_is_level_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle.randomize(Chain(nn.Linear(3, 32), nn.Linear(32, 4))).eval()
    data = [torch.randn(64, 3) for _ in range(8)]
    pruned = planned(model, data[0], {"first": range(16)})
    before = copy.deepcopy(pruned.second.state_dict())
    monkeypatch.setattr(module_under_test, "_SLACK", 0.0)
    fit = halp_fx.reconstruct(copy.deepcopy(pruned), model, data)["second"]
    for slack, stays in ((1.02, True), (0.98, False)):
        monkeypatch.setattr(module_under_test, "_SLACK", slack * fit.before / fit.after - 1)
        fits = halp_fx.reconstruct(pruned, model, data)
        assert (fits == {}) is stays
        after = pruned.second.state_dict()
        assert all(torch.equal(after[k], before[k]) for k in before) is stays


def test_fits_that_fail_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = oracle.randomize(Chain(nn.Linear(3, 32), nn.Linear(32, 4))).eval()
    data = [torch.randn(64, 3) for _ in range(8)]
    raw = planned(model, data[0], {"first": range(16)})
    expected = copy.deepcopy(raw)
    monkeypatch.setattr(module_under_test, "_RIDGES", (1.0,))
    halp_fx.reconstruct(expected, model, data)

    def failing(moments: Moments, weight: Tensor, *, centred: bool, ridge: float, **_: Any) -> Any:
        if ridge > 0.05:
            return None
        if ridge > 5e-3:
            return torch.full_like(weight, torch.nan)
        return solve(moments, weight, centred=centred, ridge=ridge)

    monkeypatch.setattr(module_under_test, "_RIDGES", (100.0, 10.0, 1.0))
    monkeypatch.setattr(module_under_test, "solve", failing)
    halp_fx.reconstruct(raw, model, data)
    torch.testing.assert_close(raw.second.weight, expected.second.weight)


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ([8], [[6, 7]]),
        ([3, 3], [[2], [2]]),
        ([8] * 3, [[6, 7]] * 3),
        ([1, 1], [[], [0]]),
        ([2] * 6, [[], [], [], [0, 1], [], []]),
        # The last of an epoch is too small to check by.
        ([8, 8, 8, 1], [[6, 7], [6, 7], [6, 7], []]),
        ([8, 1], [[6, 7], []]),
        ([2, 1, 2, 2, 2], [[], [], [], [0, 1], []]),
        ([4, 1, 4, 4, 4], [[], [], [], [], [0, 1, 2, 3]]),
    ],
)
def test_samples_that_are_kept_for_checking(sizes: list[int], held: list[list[int]]) -> None:
    rows = [torch.arange(size).repeat_interleave(3) for size in sizes]
    found = [own[held_rows(own, sizes, i)] for i, own in enumerate(rows)]
    assert [part.unique().tolist() for part in found] == held


def test_of_a_single_sample_some_positions_are_kept() -> None:
    assert held_rows(torch.zeros(8), [1], 0).tolist() == [True] * 2 + [False] * 6


def test_nothing_is_learnt_from_zeros() -> None:
    moments = Moments()
    x = torch.randn(10, 2, 4)
    x[:, 1] = 0
    moments.add(x, torch.randn(10, 2, 2))
    assert moments.finite()
    weight = torch.ones(2, 2, 4).double()
    new = solve(moments, weight, centred=True, ridge=1e-3)
    assert new is not None
    torch.testing.assert_close(new[1], weight[1])
    assert not torch.allclose(new[0], weight[0], atol=0.1)
    moments.add(torch.full((1, 2, 4), torch.nan), torch.randn(1, 2, 2))
    assert not moments.finite()
    assert not Moments().finite()


def test_a_sum_that_is_known_before_is_the_aim() -> None:
    model, data = stream()
    pruned = planned(model, data[0][:1], {})
    dense = trace(model, data[0]).module
    layers = {x.name: x for x in layers_of(pruned, dense, halp_fx.plan_of(pruned).kept)}
    assert list(layers) == ["stem", "one", "back", "two", "last", "fc"]
    assert {name for name, layer in layers.items() if layer.sum is not None} == {"back", "last"}
    norms = [layer.norm.name if layer.norm else "" for layer in layers.values()]
    assert norms == [f"{n}.running_mean" for n in ("snorm", "onorm", "bnorm", "tnorm", "lnorm")] + [
        ""
    ]


def test_minibatches_join_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stream()
    results = []
    for memory in (0, 400_000, 1 << 30):
        monkeypatch.setattr(module_under_test, "_MEMORY", memory)
        joined: list[int] = []
        join = Walk.join

        def spy(self: Walk, inputs: Any, join: Any = join, joined: Any = joined) -> None:
            joined.append(self.at)
            join(self, inputs)

        monkeypatch.setattr(Walk, "join", spy)
        pruned = planned(model, data[0][:1], {"one": [], "two": range(12)})
        halp_fx.reconstruct(pruned, model, data)
        monkeypatch.setattr(Walk, "join", join)
        results.append((far(pruned, model, torch.cat(data)), joined))
    (_, alone), (_, some), (_, together) = results
    # Of each network: once to see what it needs, and then the minibatches.
    assert len(alone) == 2 + 2
    assert len(some) == len(together) == 2 + 2 * len(data)
    assert set(together) == {0}
    assert max(some) > 0
    assert results[1][0] == pytest.approx(results[2][0], rel=0.1)
    assert results[0][0] < 2 * results[2][0]  # one minibatch says less


def test_whole_channels_are_dropped_together() -> None:
    moments = Moments()
    x = torch.randn(500, 1, 8, dtype=torch.float64)
    moments.add(x, x @ torch.randn(8, 3, dtype=torch.float64))
    weight = torch.randn(1, 3, 8, dtype=torch.float64)
    each, whole = (
        solve(moments, weight, centred=False, ridge=1e-9, dropout=Dropout(1.0, c), window=4)
        for c in (False, True)
    )
    assert each is not None and whole is not None
    second, xy, _ = moments.about(False)
    for found, blocks in ((each, torch.eye(8)), (whole, torch.eye(2).repeat_interleave(4, 0))):
        noise = second * (blocks @ blocks.mT)
        # Where the derivative of both terms is 0.
        slope = found @ second - xy.mT + (found - weight) @ noise
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-6)
