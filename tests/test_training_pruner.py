"""GradualPruner in a loop: scores, milestones, soft mode, checkpoints, mistakes."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from halp_fx import Budget, errors, load, plan_of, save
from halp_fx.errors import InputError, SaliencyError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.saliency import score
from halp_fx.passes.trace import trace
from halp_fx.training import GradualPruner
from halp_fx.training.surgery import cuts_between
from halp_fx.verification import TOLERANCE
from tests.oracle import assert_exact, masked_dense
from tests.training_networks import batches, digits, example, network


def _pruner(**options: Any) -> GradualPruner:
    settings = {"budget": 0.4, "steps": 3, "every": 2, "latency": "analytic", **options}
    return GradualPruner(network(), settings.pop("budget"), example(), **settings)


def _sgd(pruner: GradualPruner) -> torch.optim.Optimizer:
    return torch.optim.SGD(pruner.model.parameters(), 0.02, momentum=0.9)


def _backward(pruner: GradualPruner, batch: Any) -> None:
    nn.functional.cross_entropy(pruner.model(batch[0]), batch[1]).backward()


def _train(pruner: GradualPruner, optimizer: Any, data: list[Any], ema: Any = None) -> list[bool]:
    cuts = []
    for batch in data:
        _backward(pruner, batch)
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update_parameters(pruner.network)
        cuts.append(pruner.step(optimizer, ema=ema))
    return cuts


def _totals(pruner: GradualPruner) -> list[np.ndarray[Any, Any]]:
    scores = pruner._scores
    return [
        (t / w.clamp_min(1)).numpy() for t, w in zip(scores.totals, scores.weights, strict=True)
    ]


@pytest.mark.parametrize("method", ["taylor1.5", "fisher", "taylor"])
def test_scores_are_those_of_the_saliency_pass(method: str) -> None:
    pruner, data = _pruner(saliency=method), batches(3)
    pruner.network.eval()
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.0)
    for batch in data[:-1]:
        _backward(pruner, batch)
        pruner.after_backward()
        optimizer.zero_grad()
        pruner._scored = False
    _backward(pruner, data[-1])
    pruner.after_backward()
    groups = find_groups(trace(network(), example()))
    expected = score(groups, data, nn.functional.cross_entropy, method)
    found = pruner._scores.saliency(plan_of(pruner.network).units)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_scores_of_a_cut_network_are_those_of_the_masked_one() -> None:
    """Of batch norms: a unit's score in the cut network is what the masked dense one gives it."""
    pruner, batch = _pruner(drop_blocks=False), batches(1, seed=9)[0]
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.0)
    pruner.network.eval()  # so that training changes nothing but what is cut
    assert any(_train(pruner, optimizer, batches(6)))
    pruner.milestone, pruner.steps = 0, 9  # not done yet, so that it scores
    _backward(pruner, batch)
    pruner.after_backward()
    masked = masked_dense(network(), pruner.plan.kept).eval()
    nn.functional.cross_entropy(masked(batch[0]), batch[1]).backward()
    parameters = dict(masked.named_parameters())
    groups = {g.name: i for i, g in enumerate(pruner.plan.groups.groups)}
    for name, norms in {"3.conv1": ["3.bn1"], "8.conv1": ["8.bn1"], "0": ["1", "3.bn2"]}.items():
        products = [
            parameters[f"{norm}.{leaf}"] * parameters[f"{norm}.{leaf}"].grad
            for norm in norms
            for leaf in ("weight", "bias")
        ]
        units = pruner.plan.units[groups[name]]
        value = torch.stack(products).sum(0).square().detach().numpy()
        assert len(units) < len(value) or name == "0"
        ours = _totals(pruner)[groups[name]]
        np.testing.assert_allclose(ours[units], value[units], rtol=2e-3, atol=1e-12)
        assert not np.delete(ours, units).any()


@pytest.mark.parametrize("schedule", ["exponential", "linear", lambda p: p**0.5])
def test_each_milestone_is_within_its_budget_and_takes_of_what_is_left(schedule: Any) -> None:
    pruner = _pruner(schedule=schedule)
    optimizer, before = _sgd(pruner), pruner.plan
    for batch in batches(6):
        if _train(pruner, optimizer, [batch]) == [True]:
            plan = pruner.plan
            assert plan.predicted_ms <= plan.budget_ms
            pairs = zip(plan.units, before.units, strict=True)
            assert all(np.isin(own, old).all() for own, old in pairs)
            assert plan_of(pruner.network).units is plan.units
            before = plan
    assert pruner.done and pruner.milestone == 3
    assert pruner.plan.budget_ms == pytest.approx(0.4 * pruner.plan.dense_ms)
    counted = sum(p.numel() for p in pruner.network.parameters())
    assert pruner.plan.report["params"]["pruned"] == counted
    assert pruner.plan.report["params"]["dense"] == sum(p.numel() for p in network().parameters())


def test_memory_is_limited_on_the_way_too() -> None:
    pruner = _pruner(budget=Budget(share=0.7, memory=0.8))
    assert any(_train(pruner, _sgd(pruner), batches(6)))
    memory = pruner.plan.report["memory"]
    assert memory["pruned"] <= 0.8 * memory["dense"]


@pytest.mark.parametrize("solver", ["joint", "halp", "greedy", "uniform"])
def test_every_solver(solver: str) -> None:
    pruner = _pruner(solver=solver, drop_blocks=False)
    assert any(_train(pruner, _sgd(pruner), batches(6)))
    assert pruner.plan.predicted_ms <= 0.4 * pruner.plan.dense_ms
    assert pruner.plan.solver == solver


def test_options_hold_by_the_dense_widths() -> None:
    pruner = _pruner(
        budget=Budget(share=0.5, params=0.6), exclude="5", min_share={"3.conv1": 0.75}, round_to=2,
        drop_blocks=False,
    )  # fmt: skip
    _train(pruner, _sgd(pruner), batches(6))
    assert pruner.done
    assert pruner.network.get_parameter("5.weight").shape[0] == 16
    assert pruner.network.get_parameter("3.conv1.weight").shape[0] >= 6
    assert all(len(units) % 2 == 0 for units in pruner.plan.units)
    dense = sum(p.numel() for p in network().parameters())
    assert sum(p.numel() for p in pruner.network.parameters()) <= 0.6 * dense


def test_smoothing_is_a_moving_average() -> None:
    pruner, plain = _pruner(smoothing=0.75, every=100), _pruner(every=100)
    still = torch.optim.SGD(pruner.model.parameters(), 0.0)
    values = []
    for batch in batches(2):
        _train(pruner, still, [batch])
        one = _pruner(every=100)
        # Batch norm in train mode: the gradient of a batch is the batch's alone.
        _train(one, torch.optim.SGD(one.model.parameters(), 0.0), [batch])
        values.append(_totals(one))
    _train(plain, torch.optim.SGD(plain.model.parameters(), 0.0), batches(2))
    for g, (first, second) in enumerate(zip(*values, strict=True)):
        moving = pruner._scores.totals[g].numpy()
        np.testing.assert_allclose(moving, 0.25 * (0.75 * first + second), rtol=1e-5)
        np.testing.assert_allclose(_totals(plain)[g], (first + second) / 2, rtol=1e-5)


def test_scaled_gradients_give_the_same_scores() -> None:
    one, other = _pruner(), _pruner()
    batch = batches(1)[0]
    _backward(one, batch)
    one.after_backward()
    (nn.functional.cross_entropy(other.model(batch[0]), batch[1]) * 1024).backward()
    other.after_backward(scale=1024)
    for ours, theirs in zip(_totals(one), _totals(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_gradients_that_are_not_finite_are_skipped() -> None:
    one, other = _pruner(), _pruner()
    first, second = batches(2)
    for pruner, data in ((one, [first]), (other, [first, second])):
        for k, batch in enumerate(data):
            _backward(pruner, batch)
            if k == 1:
                for p in pruner.model.parameters():
                    p.grad = torch.full_like(p, torch.inf)
            pruner.after_backward()
            pruner._scored = False
            pruner.network.zero_grad()
    for ours, theirs in zip(_totals(one), _totals(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _step_on(pruner: GradualPruner, optimizer: Any, batch: Any, finite: bool) -> bool:
    _backward(pruner, batch)
    if not finite:  # as where GradScaler skips the step
        for p in pruner.model.parameters():
            p.grad = torch.full_like(p, torch.inf)
    pruner.after_backward()
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return pruner.step(optimizer)


def test_a_milestone_without_finite_scores_is_put_off() -> None:
    pruner = _pruner(every=1)
    optimizer = _sgd(pruner)
    for batch in batches(5):
        assert not _step_on(pruner, optimizer, batch, finite=False)
    assert pruner.milestone == 0 and plan_of(pruner.network).units[0].size == 8
    again = _pruner(every=1)
    again.load_state_dict(_stored(pruner.state_dict()))
    assert again._put_off == pruner._put_off == 5
    assert [_step_on(pruner, optimizer, b, finite=True) for b in batches(3)] == [True] * 3
    assert pruner.done and pruner._put_off == 0


def test_the_milestones_after_one_that_was_put_off_come_when_they_would() -> None:
    pruner = _pruner(every=3)
    optimizer = _sgd(pruner)
    finite = [False] * 4 + [True] * 5
    cuts = [
        _step_on(pruner, optimizer, batch, fine)
        for batch, fine in zip(batches(9), finite, strict=True)
    ]
    assert [k for k, cut in enumerate(cuts, 1) if cut] == [5, 6, 9]
    assert pruner.done


def test_scores_that_are_never_finite_are_an_error() -> None:
    pruner = _pruner(every=18)
    optimizer = _sgd(pruner)
    for batch in batches(35):
        _step_on(pruner, optimizer, batch, finite=False)
    for _ in range(2):
        with pytest.raises(SaliencyError, match=r"not finite in any of 3[67] minibatches"):
            _step_on(pruner, optimizer, batches(1)[0], finite=False)
    assert pruner.milestone == 0 and pruner._count == 35
    assert _step_on(pruner, optimizer, batches(1)[0], finite=True)


def test_an_error_at_a_milestone_leaves_the_schedule_as_it_is() -> None:
    pruner = _pruner()
    optimizer = _sgd(pruner)
    _train(pruner, optimizer, batches(1))
    _backward(pruner, batches(1)[0])
    pruner.after_backward()
    with pytest.raises(InputError, match="SGD has no parameter of the network"):
        pruner.step(torch.optim.SGD(network().parameters(), 0.1))
    assert pruner._count == 1
    assert pruner.step(optimizer) and pruner._count == 2
    assert _train(pruner, optimizer, batches(2)) == [False, True]


def test_mixed_precision_accumulation_and_clipping() -> None:
    pruner = _pruner()
    optimizer = _sgd(pruner)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    data = batches(12)
    for first, second in zip(data[::2], data[1::2], strict=True):
        for images, classes in (first, second):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(pruner.model(images), classes) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        pruner.after_backward()
        nn.utils.clip_grad_norm_(pruner.model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pruner.step(optimizer)
    assert pruner.done
    assert all(p.isfinite().all() for p in pruner.model.parameters())


def test_the_network_that_is_left_is_the_masked_one_and_can_be_saved(tmp_path: Any) -> None:
    pruner = _pruner(drop_blocks=False)
    optimizer = _sgd(pruner)
    _train(pruner, optimizer, batches(3))
    before, plan = copy.deepcopy(pruner.network), pruner.plan
    pruner.finish(optimizer)
    assert pruner.done and not pruner.finish(optimizer)
    kept = cuts_between(plan.kept, pruner.plan.kept)
    assert_exact(before, pruner.network, (example(),), kept=kept)
    save(pruner.network, tmp_path / "net.halp")
    again = load(tmp_path / "net.halp")
    pruner.network.eval()
    assert torch.equal(again.eval()(example()), pruner.network(example()))


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    pruner = GradualPruner(model, 0.4, example(), steps=1, every=1, latency="analytic")
    optimizer = _sgd(pruner)
    _train(pruner, optimizer, batches(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_soft_channels_are_masked_come_back_and_are_cut_at_the_last() -> None:
    pruner = _pruner(soft=True, steps=4, every=6, drop_blocks=False)
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1, momentum=0.9)
    shapes = {n: p.shape for n, p in pruner.network.named_parameters()}
    came_back = 0
    chosen = pruner.plan
    for seed in range(3):
        assert not any(_train(pruner, optimizer, batches(6, seed=seed)))
        assert {n: p.shape for n, p in pruner.network.named_parameters()} == shapes
        masked = masked_dense(pruner.network, pruner.plan.kept).eval()
        ours = copy.deepcopy(pruner.network).eval()
        torch.testing.assert_close(ours(example()), masked(example()))
        came_back += sum(
            int((~np.isin(new, old)).sum())
            for new, old in zip(pruner.plan.units, chosen.units, strict=True)
        )
        chosen = pruner.plan
    assert came_back > 0
    assert plan_of(pruner.network).units[0].size == 8
    assert _train(pruner, optimizer, batches(6, seed=3))[-1]
    assert pruner.done and plan_of(pruner.network).units is pruner.plan.units


def _stored(value: Any) -> Any:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        pytest.param(1, {}, id="before the first milestone"),
        pytest.param(4, {}, id="at a milestone"),
        pytest.param(5, {}, id="between milestones"),
        pytest.param(9, {}, id="done"),
        pytest.param(5, {"soft": True}, id="soft"),
        pytest.param(5, {"smoothing": 0.9}, id="smoothing"),
        pytest.param(7, {"budget": 0.3, "min_share": 0.7}, id="branches dropped"),
        pytest.param(5, {"saliency": "taylor"}, id="taylor"),
        pytest.param(5, {"saliency": "fisher"}, id="fisher"),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(options: Any, stop: int) -> None:
    data = batches(10)

    def start() -> tuple[GradualPruner, Any, Any, Any]:
        pruner = _pruner(**{"steps": 4, **options})
        return pruner, *_around(pruner)

    def _around(pruner: GradualPruner) -> tuple[Any, Any, Any]:
        optimizer = torch.optim.AdamW(pruner.model.parameters(), 1e-2)
        return (
            optimizer,
            torch.optim.lr_scheduler.StepLR(optimizer, 3),
            AveragedModel(pruner.network, use_buffers=True),
        )

    def run(parts: tuple[GradualPruner, Any, Any, Any], data: list[Any]) -> None:
        pruner, optimizer, scheduler, ema = parts
        for batch in data:
            _train(pruner, optimizer, [batch], ema)
            scheduler.step()

    whole = start()
    run(whole, data)
    first = start()
    run(first, data[:stop])
    saved = _stored([part.state_dict() for part in first])
    dropped = any(key.startswith("_constants.") for key in saved[0]["network"])
    assert dropped or "min_share" not in options
    pruner = _pruner(**{"steps": 4, **options})
    pruner.load_state_dict(saved[0])
    second = (pruner, *_around(pruner))
    for part, state in zip(second[1:], saved[1:], strict=True):
        part.load_state_dict(state)
    run(second, data[stop:])
    assert second[0].done
    for one, other in ((whole[0].network, second[0].network), (whole[3], second[3])):
        expected, actual = one.state_dict(), other.state_dict()
        assert list(expected) == list(actual)
        assert all(torch.equal(v, actual[k]) for k, v in expected.items())
    assert repr(whole[1].state_dict()) == repr(second[1].state_dict())


def test_a_checkpoint_of_something_else_is_an_error() -> None:
    state = _pruner().state_dict()
    with pytest.raises(InputError, match="saved with steps=3, this pruner has steps=5"):
        _pruner(steps=5).load_state_dict(state)
    with pytest.raises(InputError, match="the state is of another network"):
        _pruner(exclude="5").load_state_dict(state)
    with pytest.raises(InputError, match=r"not what GradualPruner.state_dict\(\) gave"):
        _pruner().load_state_dict({"step": 3})


def test_an_optimiser_from_before_loading_is_an_error() -> None:
    pruner = _pruner(every=1)
    _train(pruner, _sgd(pruner), batches(1))
    other = _pruner(every=1)
    optimizer = _sgd(other)
    other.load_state_dict(pruner.state_dict())
    with pytest.raises(InputError, match=r"has no parameter of the network: .* after load_state"):
        _train(other, optimizer, batches(1))


def test_a_budget_that_can_not_be_met_is_told_before_training() -> None:
    with pytest.raises(errors.InfeasibleError, match="the least latency that Sequential can be"):
        _pruner(budget=0.001)


def test_nothing_to_prune() -> None:
    with pytest.raises(errors.NothingToPruneError, match="no channel that can be removed"):
        GradualPruner(nn.Linear(3, 2), 0.5, torch.rand(1, 3), latency="analytic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0: pass a whole number of at least 1"),
        ({"every": 1.5}, "every is 1.5: pass a whole number"),
        ({"smoothing": 1.0}, "smoothing is 1.0: pass None or a number from 0 to below 1"),
        ({"solver": "best"}, "solver is 'best': pass one of 'joint'"),
        ({"schedule": "fast"}, "schedule is 'fast'"),
        ({"wrap": 3}, "wrap is 3: pass a callable"),
        ({"budget": 1.5}, "the budget 1.5 is above 1"),
        ({"min_share": 2.0}, "min_share is 2.0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _pruner(**options)


def test_calls_in_the_wrong_order() -> None:
    pruner = _pruner(every=1)
    optimizer = _sgd(pruner)
    with pytest.raises(InputError, match=r"no gradients: call after_backward\(\) after loss"):
        pruner.after_backward()
    with pytest.raises(InputError, match="no gradients were scored since the last milestone"):
        pruner.step(optimizer)
    _backward(pruner, batches(1)[0])
    with pytest.raises(InputError, match="scale is 0: pass what the loss was multiplied by"):
        pruner.after_backward(scale=0)
    pruner.after_backward()
    with pytest.raises(InputError, match=r"called twice without pruner\.step"):
        pruner.after_backward()


def test_a_frozen_group_is_named() -> None:
    model = network()
    for p in model[3].parameters():
        p.requires_grad_(False)
    pruner = GradualPruner(model, 0.6, example(), every=1, latency="analytic")
    _backward(pruner, batches(1)[0])
    with pytest.raises(SaliencyError, match=r"no gradient reaches the group '3.conv1'.*exclude="):
        pruner.after_backward()
    kept = GradualPruner(model, 0.7, example(), steps=1, every=1, latency="analytic", exclude="3")
    optimizer = _sgd(kept)
    _train(kept, optimizer, batches(1))
    assert kept.network.get_parameter("3.conv1.weight").shape[0] == 8


def test_wrap_is_called_after_each_cut() -> None:
    made: list[nn.Module] = []

    def wrap(net: nn.Module) -> nn.Module:
        made.append(nn.Sequential(net))
        return made[-1]

    pruner = _pruner(wrap=wrap)
    cuts = _train(pruner, _sgd(pruner), batches(6))
    assert len(made) == 1 + sum(cuts) and pruner.model is made[-1]
    assert pruner.model[0] is pruner.network  # type: ignore[index]


@pytest.mark.slow
def test_measured_latency_is_verified_at_the_last_milestone(tmp_path: Any) -> None:
    from halp_fx import LatencyTable
    from halp_fx.latency import Source, Torch

    source = Source(Torch("cpu", 1), LatencyTable.open(tmp_path / "table.sqlite"))
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.ReLU()
    )
    images = torch.rand(2, 3, 24, 24)
    pruner = GradualPruner(model, 0.7, images, steps=2, every=1, latency=source)
    optimizer = _sgd(pruner)
    for _ in range(2):
        pruner.model(images).square().mean().backward()
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(optimizer)
    report = pruner.plan.report
    assert report["measured_dense_ms"] > 0 and 1 <= report["measured_rounds"] <= 4
    most_ms = report["measured_budget_ms"] * (1 + TOLERANCE)
    assert report["met"] is (report["measured_ms"] <= most_ms)


def test_digits_survive_half_the_latency() -> None:
    pytest.importorskip("sklearn")
    from halp_fx.training import fine_tune

    data, (images, classes) = digits()
    model = network(width=12)
    loss = nn.CrossEntropyLoss()
    fine_tune(model, data, loss, optimizer=torch.optim.AdamW(model.parameters(), 5e-3), epochs=5)

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net.eval()(images).argmax(1) == classes).float().mean())

    dense = accuracy(model)
    pruner = GradualPruner(model, 0.5, example(), steps=6, every=10, latency="analytic")
    optimizer = torch.optim.AdamW(pruner.model.parameters(), 3e-3)
    fine_tune(pruner, data, loss, optimizer=optimizer, epochs=4)
    assert pruner.done
    assert dense > 0.93
    assert accuracy(pruner.network) > dense - 0.04


def test_masked_units_keep_their_last_score_relative_to_the_others() -> None:
    pruner = _pruner(soft=True, steps=4, drop_blocks=False)
    optimizer = _sgd(pruner)
    _train(pruner, optimizer, batches(2))
    first = [r.copy() for r in pruner._scores.relative]
    hidden = pruner._mask.units
    assert hidden is not None and any(len(own) for own in hidden)
    for batch in batches(2, seed=5):
        _backward(pruner, batch)
        pruner.after_backward()
        pruner._scored = False
        optimizer.zero_grad()
    scores = pruner._scores.saliency(plan_of(pruner.network).units, hidden).scores
    shown = [np.delete(s, own) for s, own in zip(scores, hidden, strict=True)]
    mean = np.concatenate(shown).mean()
    for score_, own, before, total in zip(scores, hidden, first, _totals(pruner), strict=True):
        np.testing.assert_allclose(score_[own], before[own] * mean)
        np.testing.assert_allclose(np.delete(score_, own), np.delete(total, own))
