"""Costs between the sizes that were measured."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from halp_fx.errors import InputError, LatencyError
from halp_fx.latency import Analytic, GridCost


def _grid(seed: int, lengths: tuple[int, ...]) -> GridCost:
    rng = np.random.default_rng(seed)
    axes = tuple(np.cumsum(rng.integers(1, 9, size=length)) for length in lengths)
    return GridCost(axes, rng.uniform(0.1, 5.0, size=lengths))


@pytest.mark.parametrize("lengths", [(2,), (7,), (4, 5), (2, 2), (3, 4, 2), (2, 3, 2, 3)])
def test_it_agrees_with_scipy(lengths: tuple[int, ...]) -> None:
    cost = _grid(len(lengths), lengths)
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(axis[0], axis[-1], size=200) for axis in cost.axes], axis=-1)
    expected = RegularGridInterpolator(cost.axes, cost.values)(points)
    np.testing.assert_allclose(cost(*points.T), expected, rtol=1e-12)


def test_measured_sizes_come_back_exactly() -> None:
    cost = _grid(5, (4, 6, 3))
    np.testing.assert_array_equal(cost(*np.ix_(*cost.axes)), cost.values)


def test_sizes_broadcast() -> None:
    cost = _grid(1, (3, 4))
    a, b = cost.axes
    grid = cost(a[:, None], b[None, :])
    assert grid.shape == (3, 4)
    np.testing.assert_array_equal(cost(int(a[1]), b), grid[1])


def test_numbers_give_a_float() -> None:
    value = GridCost((np.array([8, 16]),), np.array([1.0, 3.0]))(12)
    assert value == 2.0
    assert isinstance(value, float)


def test_no_axes_is_a_constant() -> None:
    cost = GridCost((), np.array(1.25))
    assert cost() == 1.25
    assert isinstance(cost(), float)


def test_one_size_on_an_axis_is_the_only_one() -> None:
    cost = GridCost((np.array([64]), np.array([1, 3])), np.array([[2.0, 4.0]]))
    assert cost(64, 2) == 3.0
    with pytest.raises(LatencyError, match=r"size 63 on axis 0 was not measured.* 64 to 64"):
        cost(63, 2)


@pytest.mark.parametrize("size", [7, 17, 16.5, float("nan")])
def test_it_never_extrapolates(size: float) -> None:
    cost = GridCost((np.array([8, 16]),), np.array([1.0, 3.0]))
    with pytest.raises(LatencyError, match=f"size {size:g} on axis 0 was not measured: the table"):
        cost(size)
    with pytest.raises(LatencyError, match="covers 8 to 16"):
        cost(np.array([8.0, size]))


def test_a_staircase_measured_on_both_sides_of_each_step_is_kept() -> None:
    backend = Analytic(step=16)
    every = np.arange(1, 65)
    edges = np.array([1, 16, 17, 32, 33, 48, 49, 64])

    def price(channels: np.ndarray) -> np.ndarray:
        return np.asarray(backend.cost_ms(1e6 * backend.round_channels(channels), 0))

    np.testing.assert_array_equal(GridCost((edges,), price(edges))(every), price(every))


def test_costs_need_not_be_monotone() -> None:
    cost = GridCost((np.array([32, 64, 96]),), np.array([1.891, 1.806, 2.5]))
    assert cost(64) < cost(48) < cost(32)


def test_the_cost_does_not_follow_the_arrays_it_was_made_of() -> None:
    values = np.array([1.0, 3.0])
    cost = GridCost((np.array([8, 16]),), values)
    values[:] = 0
    assert cost(8) == 1.0
    with pytest.raises(ValueError, match="read-only"):
        cost.values[0] = 2.0


@pytest.mark.parametrize(
    ("axes", "values", "message"),
    [
        (([8, 8],), [1.0, 2.0], "axis 0 is .* ascending"),
        (([16, 8],), [1.0, 2.0], "ascending"),
        (([],), [], "at least one size"),
        (([8, 16],), [1.0], r"values have shape \(1,\): the axes ask for \(2,\)"),
        (([8, 16],), [1.0, float("inf")], "not finite"),
    ],
)
def test_a_grid_that_is_none_is_refused(axes: object, values: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GridCost(axes, values)  # type: ignore[arg-type]


def test_the_number_of_sizes_must_match() -> None:
    with pytest.raises(InputError, match="1 sizes given: this cost has 2 axes"):
        _grid(0, (2, 2))(3)
