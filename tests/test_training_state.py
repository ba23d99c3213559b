"""Where a run can be taken up: states loaded in place, early ends, nothing left to prune."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from halp_fx.errors import InputError
from halp_fx.training import GradualPruner
from halp_fx.training.scores import _finest
from tests.training_networks import Residual, batches, example, network


def _pruner(**options: Any) -> GradualPruner:
    settings = {"steps": 3, "every": 2, "latency": "analytic", **options}
    return GradualPruner(network(), 0.4, example(), **settings)


def _sgd(pruner: GradualPruner) -> torch.optim.Optimizer:
    return torch.optim.SGD(pruner.model.parameters(), 0.02, momentum=0.9)


def _train(pruner: GradualPruner, optimizer: torch.optim.Optimizer, data: list[Any]) -> None:
    for images, classes in data:
        nn.functional.cross_entropy(pruner.model(images), classes).backward()
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(optimizer)


def _weights(pruner: GradualPruner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pruner.network.state_dict().items()}


@pytest.mark.parametrize("soft", [False, True])
def test_going_back_a_few_steps_keeps_parameters_and_optimiser(soft: bool) -> None:
    """Between milestones widths are the same: a state goes into the network as it is."""
    pruner, data = _pruner(every=4, soft=soft), batches(8)
    optimizer = _sgd(pruner)
    _train(pruner, optimizer, data[:5])
    held = [id(p) for p in pruner.network.parameters()]
    state, inner, momenta = pruner.state_dict(), _weights(pruner), optimizer.state_dict()
    momenta = {**momenta, "state": {k: _cloned(v) for k, v in momenta["state"].items()}}
    _train(pruner, optimizer, data[5:])
    ends = _weights(pruner)
    if not soft:
        assert [id(p) for p in pruner.network.parameters()] != held
    # A pruner at the same widths as the state, elsewhere in the schedule.
    again = _pruner(every=4, soft=soft)
    other = _sgd(again)
    _train(again, other, data[:4])
    _train(again, other, batches(2, seed=9))
    kept, wrapped = [id(p) for p in again.network.parameters()], again.model
    again.load_state_dict(state)
    other.load_state_dict(momenta)
    assert [id(p) for p in again.network.parameters()] == kept and again.model is wrapped
    assert all(torch.equal(value, inner[name]) for name, value in _weights(again).items())
    _train(again, other, data[5:])
    assert again.milestone == pruner.milestone == 2
    assert all(torch.equal(value, ends[name]) for name, value in _weights(again).items())


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def test_finishing_right_after_a_milestone_goes_by_its_scores() -> None:
    pruner = _pruner(steps=4)
    optimizer = _sgd(pruner)
    _train(pruner, optimizer, batches(2))
    assert pruner.milestone == 1
    scores = [r[u] for r, u in zip(pruner._scores.relative, pruner.plan.units, strict=True)]
    assert pruner.finish(optimizer) and pruner.done
    assert pruner.plan.predicted_ms <= 0.4 * pruner.plan.dense_ms
    value = sum(
        float(r[u].sum()) for r, u in zip(pruner._scores.relative, pruner.plan.units, strict=True)
    )
    assert pruner.plan.value == pytest.approx(value)
    assert pruner.plan.dense_value == pytest.approx(sum(float(s.sum()) for s in scores))


def test_finishing_without_any_score_is_an_error() -> None:
    pruner = _pruner()
    with pytest.raises(InputError, match="no gradients were scored since the last milestone"):
        pruner.finish(_sgd(pruner))
    optimizer = _sgd(pruner)
    _train(pruner, optimizer, batches(2))
    for images, classes in batches(2):  # a milestone, unlike finish(), needs scores of its own
        nn.functional.cross_entropy(pruner.model(images), classes).backward()
        optimizer.step()
        if pruner._count == 3:
            with pytest.raises(InputError, match="no gradients were scored since the last miles"):
                pruner.step(optimizer)
        else:
            pruner.step(optimizer)


def test_milestones_go_on_when_all_is_gone_that_can_go() -> None:
    """The only channels that may go are inside of a residual branch, which goes whole at first."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), Residual(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 10),
    ).train()  # fmt: skip
    pruner = GradualPruner(
        model, 0.3, example(), steps=3, every=1, latency="analytic", exclude=["0", "5"],
        schedule=lambda _: 1.0, min_share=0.01,
    )  # fmt: skip
    optimizer = _sgd(pruner)
    _train(pruner, optimizer, batches(1))
    assert [len(own) for own in pruner.plan.units] == [0]
    before = _weights(pruner)
    _train(pruner, torch.optim.SGD(pruner.model.parameters(), 0.0), batches(2))
    assert pruner.done and pruner.plan.report["milestone"] == 3
    assert pruner.plan.budget_ms == pytest.approx(0.3 * pruner.plan.dense_ms)
    assert pruner.plan.predicted_ms <= pruner.plan.budget_ms
    assert all(torch.equal(v, before[k]) for k, v in _weights(pruner).items() if "weight" in k)


def test_scores_are_summed_up_in_what_the_device_has() -> None:
    assert _finest(torch.device("cpu")) == torch.float64
    assert _finest(torch.device("mps")) == torch.float32
    pruner = _pruner()
    _train(pruner, _sgd(pruner), batches(1))
    pruner._scores.totals = [t.float() for t in pruner._scores.totals]  # as there
    scores = pruner._scores.saliency(pruner.plan.units).scores
    assert all(own.dtype == np.float64 and np.isfinite(own).all() for own in scores)
