"""What a caller's model may hold besides layers: counters, hooks, aliases, layouts, old norms."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import halp_fx
from halp_fx import pipeline, verification
from halp_fx.errors import InputError
from halp_fx.latency import Timing

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def chain(middle: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    middle = middle if middle is not None else nn.Conv2d(16, 16, 3)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(16, 4, 1))


class Counting(nn.Module):
    def __init__(self, reassign: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.body, self.reassign = chain(), reassign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reassign:
            self.calls = self.calls + 1
        else:
            self.calls.add_(1)
        return self.body(x)


@pytest.mark.parametrize("reassign", [False, True])
@pytest.mark.parametrize("example", [None, X])
def test_buffers_that_forward_writes_stay(reassign: bool, example: Any) -> None:
    model = Counting(reassign)
    pruned = halp_fx.compile(model, 0.5, example, latency="analytic")
    assert model.calls.item() == 0
    assert pruned(X).shape == model(X).shape
    with pytest.raises(InputError, match="rejects the example inputs"):
        halp_fx.compile(Counting(reassign), 0.5, torch.randn(2, 5, 12, 12), latency="analytic")


def test_hooks_of_the_model_stay() -> None:
    model = chain()
    model.register_forward_hook(lambda module, inputs, output: output * 3)
    pruned = halp_fx.compile(model, 0.6, X, latency="analytic")
    torch.testing.assert_close(pruned(X), 3 * pruned.forward(X))


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.again = self.norm
        self.b, self.out = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.again(self.b(self.norm(self.a(x)))))


def test_a_module_under_two_names_is_one() -> None:
    model = Aliased()
    pruned = halp_fx.compile(model, 0.6, X, latency="analytic")
    assert pruned.again is pruned.norm
    pruned.double().train()(X.double())
    state = pruned.state_dict()
    assert list(state) == list(model.state_dict())
    assert torch.equal(state["again.running_mean"], state["norm.running_mean"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
def test_weights_that_hooks_compute(kind: str) -> None:
    layer: nn.Module = nn.Conv2d(16, 16, 3)
    if kind == "weight_norm":
        layer = nn.utils.weight_norm(layer)
    else:
        prune.l1_unstructured(layer, "weight", 0.5)
    model = chain(layer)
    model(X)
    pruned = halp_fx.compile(model, 0.6, X, latency="analytic")
    assert set(pruned.state_dict()) == set(model.state_dict())
    kept = halp_fx.plan_of(pruned).kept
    assert kept["0.weight"][0] is not None or kept["4.weight"][1] is not None
    assert pruned(X).shape == model(X).shape


def test_memory_layout_is_kept() -> None:
    model = chain().to(memory_format=torch.channels_last)
    pruned = halp_fx.compile(model, 0.6, X, latency="analytic")
    weight = pruned.get_parameter("2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_lazy_layers_are_named() -> None:
    with pytest.raises(InputError, match="lazy parameters: run it once"):
        halp_fx.compile(nn.Sequential(nn.LazyConv2d(4, 3)), 0.5, X, latency="analytic")


def test_the_module_can_be_pickled_by_the_caller() -> None:
    pruned = halp_fx.compile(chain(), 0.6, X, latency="analytic")
    torch.save(pruned, io.BytesIO())


def test_works_under_inference_mode() -> None:
    data = [(X, torch.tensor([0, 1]))]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.mean((2, 3)), target)

    with torch.inference_mode():
        pruned = halp_fx.compile(
            chain(), 0.6, torch.zeros(2, 3, 12, 12), data=data, loss=loss, latency="analytic"
        )
    assert halp_fx.plan_of(pruned).report["saliency"] == "both"


def test_the_certificate_holds_for_the_budget_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timings = iter([(1.0, 0.9), (1.0, 0.4)])  # too slow in the first round, not in the second

    def paired(*args: Any, **options: Any) -> tuple[Timing, Timing]:
        return tuple(Timing(ms, 0.0, 1) for ms in next(timings))  # type: ignore[return-value]

    monkeypatch.setattr(verification, "measure_paired", paired)
    for module in (pipeline, verification):
        monkeypatch.setattr(module, "can_measure", lambda source: True)
    plan = halp_fx.plan_of(halp_fx.compile(chain(), 0.6, X, latency="analytic"))
    assert plan.report["measured_rounds"] == 2
    assert plan.report["met"]
    free = halp_fx.plan_of(halp_fx.compile(chain(), 0.6, X, latency="analytic", verify=False))
    assert plan.value < free.value
    assert plan.value / (1 - plan.gap) >= free.value * (1 - 1e-9)


def test_numbers_of_other_kinds_are_budgets() -> None:
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = halp_fx.compile(chain(), np.float32(0.5), X, latency="analytic")
    assert halp_fx.plan_of(pruned).predicted_ms <= halp_fx.plan_of(pruned).budget_ms
