"""Random networks against the oracle; `HALP_FX_FUZZ=5000 pytest tests/test_fuzz.py` for more.

A failure prints the spec; `tests.networks.build(spec)` makes the network again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, note, settings
from torch import fx

from halp_fx.errors import NothingToPruneError
from tests import oracle
from tests.networks import build, has_norm_stats, has_products
from tests.pruning import compile_within
from tests.strategies import budgets, specs

__all__: list[str] = []

_COUNT = int(os.environ.get("HALP_FX_FUZZ", "0"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _settings(quick: int) -> settings:
    return settings(
        max_examples=_COUNT or quick,
        derandomize=not _COUNT,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


_ONE_CHANNEL = {
    "seed": 187,
    "image": [1, 8],
    "steps": [["split", 1, 0, how, 0, 0] for how in range(4)],
    "output": "dict",
    "head": "pool",
}


@_settings(quick=40)
@given(spec=specs())
@example(spec=_ONE_CHANNEL)  # the image itself is split, which has one channel
def test_specs_make_networks(spec: dict[str, Any]) -> None:
    """They survive JSON, run at two batch sizes, stay finite, and torch.fx traces them."""
    model, inputs = build(json.loads(json.dumps(spec)))
    for batch in (1, 3):
        with torch.no_grad():
            output = model(*oracle.rebatch(inputs, batch))
        for path, tensor in oracle.flatten_outputs(output).items():
            assert torch.isfinite(tensor).all(), path
            assert tensor.shape[0] == batch, path
    fx.symbolic_trace(model)


@_settings(quick=200)
@given(spec=specs(), budget=budgets())
def test_random_networks_are_exact(spec: dict[str, Any], budget: float) -> None:
    note(f"spec = {json.dumps(spec)}")
    model, inputs = build(spec)
    with oracle.snapshot(model):
        try:
            pruned = compile_within(model, budget, inputs)
        except NothingToPruneError:
            return
    oracle.assert_exact(
        model,
        pruned,
        inputs,
        strict=not has_products(model),
        norm_stats=has_norm_stats(model),
    )
