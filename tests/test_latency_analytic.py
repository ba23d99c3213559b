"""Costs by formula."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch import nn

from halp_fx.errors import InputError, LatencyError
from halp_fx.latency import Analytic, Backend


def test_it_is_a_backend_that_computes() -> None:
    backend = Analytic()
    assert isinstance(backend, Backend)
    assert (backend.name, backend.measured, backend.fuses) == ("analytic", False, True)


def test_the_larger_of_arithmetic_and_memory_counts() -> None:
    backend = Analytic(peak_gflops=100.0, bandwidth_gbs=20.0)
    assert backend.cost_ms(2e8, 1e6) == 2.0  # 2e8 / 1e11 s
    assert backend.cost_ms(1e6, 4e6) == 0.2  # 4e6 / 2e10 s
    assert isinstance(backend.cost_ms(1, 1), float)


def test_overhead_is_added_to_each_kernel() -> None:
    assert Analytic(overhead_ms=0.25).cost_ms(0, 0) == 0.25


def test_arrays_broadcast() -> None:
    flops = np.array([[1e8], [2e8]])
    bytes_ = np.array([0.0, 3e7])
    cost = Analytic().cost_ms(flops, bytes_)
    np.testing.assert_allclose(cost, [[1.0, 1.5], [2.0, 2.0]], rtol=0, atol=1e-12)


def test_channels_are_rounded_up_to_the_step() -> None:
    backend = Analytic(step=16)
    rounded = backend.round_channels(np.arange(34))
    np.testing.assert_array_equal(rounded, [0] + [16] * 16 + [32] * 16 + [48])
    assert backend.round_channels(17) == 32
    assert Analytic().round_channels(17) == 17


def test_a_staircase_is_flat_within_a_step() -> None:
    backend = Analytic(step=8)
    channels = np.arange(1, 65)
    cost = backend.cost_ms(1e6 * backend.round_channels(channels), 0)
    assert len(np.unique(cost)) == 8
    assert np.all(cost.reshape(8, 8) == cost.reshape(8, 8)[:, :1])


def test_the_fingerprint_holds_every_parameter() -> None:
    assert json.loads(Analytic(overhead_ms=0.5, step=4).fingerprint()) == {
        "backend": "analytic",
        "peak_gflops": 100.0,
        "bandwidth_gbs": 20.0,
        "overhead_ms": 0.5,
        "step": 4,
    }
    assert Analytic(step=4).fingerprint() != Analytic(step=8).fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peak_gflops": 0}, "peak_gflops is 0: pass a finite number above 0"),
        ({"bandwidth_gbs": float("nan")}, "bandwidth_gbs is nan"),
        ({"overhead_ms": -1.0}, r"overhead_ms is -1.0: pass a number of at least 0"),
        ({"step": 0}, "step is 0: pass a whole number of at least 1"),
        ({"step": 1.5}, "step is 1.5"),
    ],
)
def test_parameters_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Analytic(**options)  # type: ignore[arg-type]


def test_it_runs_nothing() -> None:
    with pytest.raises(LatencyError, match="computes costs and runs nothing"):
        Analytic().prepare(nn.Identity(), ())
