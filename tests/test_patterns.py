"""Every structural pattern: pruned it computes what the oracle says, and it does get smaller."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import fx, nn

import halp_fx
from tests import oracle
from tests.patterns import PATTERNS, Pattern
from tests.pruning import compile_within

__all__: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _pruned(name: str) -> tuple[nn.Module, fx.GraphModule]:
    model, inputs = PATTERNS[name]()
    with oracle.snapshot(model):
        return model, compile_within(model, 0.6, inputs)


def _check(pattern: Pattern, model: nn.Module, pruned: fx.GraphModule) -> None:
    _, inputs = pattern()
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


def _prunable_dims(pruned: fx.GraphModule) -> set[tuple[str, int]]:
    groups = halp_fx.plan_of(pruned).groups.groups
    return {(member.name, member.dim) for group in groups for member in group.members}


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_exact_at_most_of_the_latency(name: str) -> None:
    pattern = PATTERNS[name]
    model, pruned = _pruned(name)
    _check(pattern, model, pruned)
    if pattern.prunable:
        assert oracle.shrunk(model, pruned) < 1.0, "nothing was removed"


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_exact_at_the_least_latency(name: str) -> None:
    """Nearly everything that can go goes, whole branches too."""
    pattern = PATTERNS[name]
    model, inputs = pattern()
    pruned = compile_within(model, 0.02, inputs)
    _check(pattern, model, pruned)


@pytest.mark.parametrize("name", sorted(name for name in PATTERNS if PATTERNS[name].free))
def test_channels_that_can_go(name: str) -> None:
    _, pruned = _pruned(name)
    missing = set(PATTERNS[name].free) - _prunable_dims(pruned)
    assert not missing, f"could be pruned, but is pinned: {sorted(missing)}"


@pytest.mark.parametrize("name", sorted(name for name in PATTERNS if PATTERNS[name].whole))
def test_channels_that_must_stay(name: str) -> None:
    _, pruned = _pruned(name)
    wrong = set(PATTERNS[name].whole) & _prunable_dims(pruned)
    assert not wrong, f"must stay, but is prunable: {sorted(wrong)}"


@pytest.mark.parametrize("name", ["depthwise", "dropout", "transformer_layer", "vit"])
def test_training_mode_is_kept(name: str) -> None:
    pattern = PATTERNS[name]
    model, inputs = pattern()
    model.train()
    with oracle.snapshot(model):
        pruned = compile_within(model, 0.6, inputs)
    assert pruned.training
    _check(pattern, model, pruned)
