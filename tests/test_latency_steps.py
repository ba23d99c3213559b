"""Steps in measured times: what is found, and what a width between two of them costs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from halp_fx.errors import InputError
from halp_fx.latency import GridCost, Step, SteppedCost, find_step, probe_sizes
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rules.grids import Grid
from halp_fx.passes.rules.kernels import kernel_parts
from halp_fx.passes.trace import trace

__all__: list[str] = []


def _times(cost: Callable[[int], float], dense: int = 128, noise: float = 0.0) -> dict[int, float]:
    random = np.random.default_rng(0)
    return {n: cost(n) * (1 + noise * random.normal()) for n in probe_sizes(dense)}


def test_what_is_probed() -> None:
    assert probe_sizes(8) == probe_sizes(11) == ()
    for dense in (16, 24, 32, 33, 64, 95, 96, 128, 2048):
        sizes = probe_sizes(dense)
        assert sizes == tuple(sorted(set(sizes)))
        assert min(sizes) >= 1
        assert max(sizes) <= dense
        assert sum(n % 8 == 0 for n in sizes) >= 2


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("dense", [32, 64, 128])
@pytest.mark.parametrize("size", [8, 16])
def test_a_stair(size: int, dense: int, noise: float) -> None:
    found = find_step(_times(lambda n: 1.0 + math.ceil(n / size), dense, noise))
    assert found == Step(size, (1.0,) * int(math.log2(size)))


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_slow_code_between_the_steps(noise: float) -> None:
    """Multiples of 4 take a straight line, other widths 2.6 times as long."""
    found = find_step(_times(lambda n: (2.6 if n % 4 else 1.0) * n, 64, noise))
    assert found.size == 4
    assert found.penalties == pytest.approx((2.5, 2.5), rel=0.1)


def test_a_straight_line_has_no_steps() -> None:
    assert find_step(_times(float, 64)).size <= 2
    assert find_step(_times(lambda n: n**2, 128)).size <= 2


def test_too_few_times() -> None:
    assert find_step({}) == find_step({64: 1.0}) == find_step({65: 1.0, 70: 2.0}) == Step()


def _stair(penalties: tuple[float, ...] = (3.0, 2.0)) -> SteppedCost:
    grid = GridCost((np.array([8, 16, 30]),), np.array([8.0, 16.0, 30.0]))
    return SteppedCost(grid, [Step(4, penalties)], [8], [30])


def test_a_width_between_two_steps_costs_what_the_next_does() -> None:
    cost = _stair()
    assert cost(12) == pytest.approx(12.0)
    assert cost(11) == pytest.approx(3 * 12.0)
    assert cost(10) == pytest.approx(2 * 12.0)
    assert cost(30) == pytest.approx(30.0)  # the dense width, measured as it is
    assert cost(29) == pytest.approx(3 * 30.0)
    assert cost(4) == cost(8) == pytest.approx(8.0)
    assert cost(np.array([11, 12, 30])) == pytest.approx([36.0, 12.0, 30.0])


def test_one_more_measurement() -> None:
    cost = _stair().with_point([12], 20.0)
    assert cost(12) == pytest.approx(20.0)
    assert cost(11) == pytest.approx(60.0)
    assert cost(8) == pytest.approx(8.0)
    assert cost(30) == pytest.approx(30.0)
    assert cost.with_point([16], math.inf)(16) == cost(16)


def test_a_measurement_between_two_steps_holds_for_itself_alone() -> None:
    cost = _stair().with_point([11], 1.0).with_point([4], 2.0)
    assert [cost(n) for n in (4, 11)] == [2.0, 1.0]
    assert cost(np.array([[11], [7]])).tolist() == [[1.0], [_stair()(7)]]
    assert [cost(n) for n in (5, 8, 10, 12, 30)] == [_stair()(n) for n in (5, 8, 10, 12, 30)]
    assert cost.with_point([12], 20.0)(11) == 1.0

    grid = GridCost((np.array([8, 16]), np.array([8, 16])), np.ones((2, 2)))
    two = SteppedCost(grid, [Step(4, (2.0, 1.0)), Step()], [8, 8], [16, 16])
    found = two.with_point([11, 8], 5.0)(np.arange(8, 17)[:, None], np.arange(8, 17)[None])
    assert found[3, 0] == 5.0
    assert found[3, 1] == found[1, 0] == 2.0
    assert found[4, 0] == 1.0


def test_a_point_changes_only_the_cells_around_it() -> None:
    axes = (np.array([8, 16, 32]), np.array([4, 8, 16]))
    grid = GridCost(axes, np.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]))
    refined = grid.with_point([24, 6], 9.0)
    assert refined(24, 6) == 9.0
    assert refined(20, 5) > grid(20, 5)
    assert refined(12, 6) == pytest.approx(grid(12, 6))
    assert refined(24, 12) == pytest.approx(grid(24, 12))
    for one in axes[0]:
        for other in axes[1]:
            assert refined(one, other) == grid(one, other)


@pytest.mark.parametrize(
    ("size", "penalties"), [(3, (1.0,)), (0, ()), (4, ()), (4, (1.0, 0.5)), (2, (1.0, 1.0))]
)
def test_impossible_steps(size: int, penalties: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"penalty of at least 1|power of two"):
        Step(size, penalties)


def test_a_grid_point_off_the_step_costs_what_was_measured() -> None:
    net = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 5, 1))
    groups = find_groups(trace(net, torch.rand(1, 3, 4, 4)))
    part = kernel_parts(groups, True, split=False)[0]
    grid = Grid(groups, part)
    narrow, *_ = (int(n) for n in grid.sizes[0])
    assert narrow % 16, "the narrowest point is on the step"
    cost = grid.kernel(lambda nodes, kept: float(kept[0]), [Step(16, (3.0,) * 4)]).cost
    assert cost(narrow) == narrow
    assert cost(narrow + 1) > 3 * narrow  # what the next step costs, times its penalty
