"""Where a run can be taken up: states loaded in place, early ends, nothing left to prune."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import halp_fx
from halp_fx.errors import InputError
from halp_fx.latency import Analytic
from halp_fx.passes.rules.scored import finest_dtype
from halp_fx.training import GradualPruner
from tests.training_networks import Residual, batches, example, network

_DOCS = Path(__file__).resolve().parent.parent / "docs" / "training.md"
_SETTINGS = 'steps=3, every=2, latency="analytic"'


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
    assert finest_dtype(torch.device("cpu")) == torch.float64
    assert finest_dtype(torch.device("mps")) == torch.float32
    pruner = _pruner()
    _train(pruner, _sgd(pruner), batches(1))
    pruner._scores.totals = [t.float() for t in pruner._scores.totals]  # as there
    scores = pruner._scores.saliency(pruner.plan.units).scores
    assert all(own.dtype == np.float64 and np.isfinite(own).all() for own in scores)


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ({"round_to": 4}, {}, "saved with round_to=4, this pruner has round_to=None"),
        ({}, {"min_share": 0.2}, "saved with min_share=0.1, this pruner has min_share=0.2"),
        (
            {"min_share": {"5": 0.3}}, {"min_share": {"5": 0.2}},
            r"saved with min_share 0\.3 for group \d of \d, this pruner has 0\.2: build it",
        ),
        ({}, {"min_width": 2}, "saved with min_width=0, this pruner has min_width=2"),
        ({}, {"drop_blocks": False}, "saved with drop_blocks=True"),
        ({}, {"exact": True}, "saved with exact=False"),
        ({}, {"solver": "greedy"}, "saved with solver='joint'"),
        ({}, {"saliency": "taylor"}, "saved with saliency='fisher'"),
        (
            {"schedule": lambda p: p}, {"schedule": lambda p: p**2},
            r"saved with schedule 0\.333\d* for milestone 1 of 3, this pruner has 0\.111",
        ),
        ({"schedule": lambda p: p}, {}, "this pruner has schedule='exponential'"),
        (
            {}, {"latency": Analytic(bandwidth_gbs=19.0)},
            r"latencies of another device or other settings \(bandwidth_gbs: 20\.0, here 19\.0\)",
        ),
    ],
)  # fmt: skip
def test_a_state_of_a_pruner_with_other_arguments_is_an_error(
    saved: dict[str, Any], here: dict[str, Any], message: str
) -> None:
    state = _pruner(**saved).state_dict()
    with pytest.raises(InputError, match=message):
        _pruner(**here).load_state_dict(state)
    _pruner(**saved).load_state_dict(state)


def test_a_state_of_another_size_of_inputs_is_an_error() -> None:
    state = _pruner().state_dict()
    larger = torch.rand(2, 1, 16, 16)
    other = GradualPruner(network(), 0.4, larger, steps=3, every=2, latency="analytic")
    with pytest.raises(
        InputError, match=r"the dense network takes .* ms here, and took .* ms wher"
    ):
        other.load_state_dict(state)


def test_a_state_that_lacks_newer_settings_is_taken() -> None:
    state = _pruner(schedule=lambda p: p).state_dict()
    older = ("budget", "steps", "every", "soft", "solver", "saliency", "smoothing")
    state["settings"] = {name: state["settings"][name] for name in older} | {"schedule": "own"}
    del state["put_off"]
    _pruner(schedule=lambda p: p).load_state_dict(state)


def test_a_run_with_dropout_goes_on_as_the_docs_have_it(tmp_path: Path) -> None:
    """The blocks of the section, with little data around them."""
    _, _, text = _DOCS.read_text(encoding="utf-8").partition("## Stop and go on\n")
    save, load = re.findall(r"```python\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)
    load = load.replace('steps=30, every=100, latency="onnxruntime"', _SETTINGS)
    load = load.replace('GradScaler("cuda")', 'GradScaler("cpu")')

    def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / "block.py").write_text(code.replace("run.pt", str(tmp_path / "run.pt")))
        return runpy.run_path(str(tmp_path / "block.py"), init_globals=names)

    model = nn.Sequential(*network()[:-1], nn.Dropout(0.5), nn.Linear(16, 10))
    data = batches(8)

    def train(names: dict[str, Any], data: list[Any]) -> Any:
        for images, classes in data:
            loss = nn.functional.cross_entropy(names["pruner"].model(images), classes)
            names["scaler"].scale(loss).backward()
            names["scaler"].unscale_(names["optimizer"])
            names["pruner"].after_backward()
            names["scaler"].step(names["optimizer"])
            names["scaler"].update()
            names["optimizer"].zero_grad()
            names["scheduler"].step()
            names["pruner"].step(names["optimizer"])
        return _weights(names["pruner"])

    torch.manual_seed(3)
    pruner = GradualPruner(model, 0.5, example(), steps=3, every=2, latency="analytic")
    optimizer = _sgd(pruner)
    names: dict[str, Any] = {
        "pruner": pruner,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5000),
        "scaler": torch.amp.GradScaler("cpu", growth_interval=3),
    }
    train(names, data[:5])
    run(save, {**names, "torch": torch})
    ends = train(names, data[5:])
    torch.manual_seed(4)
    given = {"halp_fx": halp_fx, "torch": torch, "model": model, "example_inputs": example()}
    again = run(load, given)
    resumed = train(again, data[5:])
    assert list(ends) == list(resumed)
    assert all(torch.equal(value, resumed[name]) for name, value in ends.items())
    assert again["scheduler"].state_dict() == names["scheduler"].state_dict()
    assert again["scaler"].state_dict() == names["scaler"].state_dict()
