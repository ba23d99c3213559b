"""Batch norm statistics taken afresh from data."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halp_fx
from halp_fx.errors import InputError


class Heads(nn.Module):
    """A norm that runs in training alone, and one over what was pooled to one value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.pool_norm, self.idle_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.last_norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        if self.training:
            return self.idle_norm(x)
        return self.last_norm(x * torch.sigmoid(self.pool_norm(x.mean((2, 3), keepdim=True))))


def _heads() -> Heads:
    torch.manual_seed(0)
    model = Heads()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    return model.eval()


def _state(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith(prefix)}


def _same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return all(torch.equal(now[name], value) for name, value in before.items())


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(4, 3, 6, 6), torch.zeros(4)) for _ in range(count)]


def test_recalibrated_statistics_are_those_of_the_data() -> None:
    model = _heads()
    model.train()
    model.last_norm.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = batches(3)
    assert halp_fx.recalibrate(model, data, batches=2) == 2
    assert {n: m.training for n, m in model.named_modules()} == modes
    seen = [model.stem(x).detach() for x, _ in data[:2]]
    mean = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
    variance = torch.stack([s.var((0, 2, 3), unbiased=True) for s in seen]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert model.norm.momentum == 0.1
    for key, value in model.state_dict().items():
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(value, before[key])


def test_recalibrating_on_what_is_no_data_changes_nothing() -> None:
    model = _heads()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (x, _), (other, _) = batches(2)
    wrong: list[tuple[Any, str]] = [
        ([], "no batches"),
        (x, "data is a Tensor: pass a list of minibatches"),
        (3, "data is a int: pass a list of minibatches"),
        ([x, torch.full_like(other, torch.nan)], "minibatch 1 of data has inputs that are NaN"),
        ([x, other[:, :1]], "minibatch 1 of data can't be run on the network: RuntimeError"),
    ]
    for data, message in wrong:
        with pytest.raises(InputError, match=message):
            halp_fx.recalibrate(model, data)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_norms_that_do_not_run_keep_their_statistics() -> None:
    model = _heads()
    idle, used = _state(model, "idle_norm"), _state(model, "norm")
    halp_fx.recalibrate(model, [torch.randn(4, 3, 6, 6) for _ in range(3)])
    assert _same(model, idle)
    assert not _same(model, used)
    assert not model.idle_norm.training


def test_single_values_have_no_variance() -> None:
    """A last minibatch of one image counts for the norms over its positions alone."""
    whole, single = [torch.randn(4, 3, 6, 6) for _ in range(2)], torch.randn(1, 3, 6, 6)
    model, without = _heads(), _heads()
    assert halp_fx.recalibrate(model, [*whole, single]) == 3
    halp_fx.recalibrate(without, whole)
    assert _same(model, {k: v for k, v in _state(without, "pool_norm").items() if "run" in k})
    assert not _same(model, _state(without, "norm"))

    alone = _heads()
    pooled = _state(alone, "pool_norm")
    halp_fx.recalibrate(alone, [single])
    assert _same(alone, pooled)
    # What follows is measured behind the statistics that stay.
    x = F.relu(F.batch_norm(alone.stem(single), None, None, training=True))
    x = x * torch.sigmoid(alone.pool_norm(x.mean((2, 3), keepdim=True)))
    torch.testing.assert_close(alone.last_norm.running_mean, x.mean((0, 2, 3)).detach())


@pytest.mark.parametrize("value", [torch.inf, 3e38])
def test_statistics_that_are_not_finite_are_refused(value: float) -> None:
    model = _heads()
    before = _state(model, "")
    images = torch.randn(4, 3, 6, 6)
    images[0, 0, 2, 2] = value
    with pytest.raises(InputError, match=r"batch norm norm reads .* not finite on data"):
        halp_fx.recalibrate(model, [torch.randn(4, 3, 6, 6), images])
    assert _same(model, before)


def test_norms_that_are_no_function_count() -> None:
    """One that synchronises processes computes its statistics itself."""

    class Own(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
                self.running_mean.copy_(x.mean((0, 2, 3)))  # type: ignore[union-attr]
            return x - self.running_mean[:, None, None]  # type: ignore[index]

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Own(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    halp_fx.recalibrate(model, [x])
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean((0, 2, 3)).detach())


def test_candidates_and_steps_take_minibatches_of_one_image() -> None:
    """As a network with a norm over pooled values meets them."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
            self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.second(F.relu(self.first(x))).mean((2, 3))
            return self.head(self.norm(x))

    torch.manual_seed(0)
    data = [(torch.randn(1, 3, 8, 8), torch.tensor([i % 4])) for i in range(4)]
    for further in ({"steps": 2}, {"candidates": 2}):
        options: dict[str, Any] = {"loss": F.cross_entropy, "latency": "analytic", **further}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruned = halp_fx.compile(Pooled().eval(), 0.5, data[0][0], data=data, **options)
        plan = halp_fx.plan_of(pruned)
        assert plan.predicted_ms <= plan.budget_ms
