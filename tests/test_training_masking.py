"""Soft masks: the network computes as without the units, which are trained on aside."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from halp_fx.training import GradualPruner
from halp_fx.training.dense import Dense
from halp_fx.training.masking import Mask, complement
from tests.oracle import masked_dense
from tests.training_networks import batches, example, network


def _masked() -> tuple[
    Mask, torch.fx.GraphModule, list[np.ndarray[tuple[int], np.dtype[np.int64]]]
]:
    dense = Dense.of(
        network().double(), example().double(), include=None, exclude=None, exact=False
    )
    net = dense.build(dense.whole())
    kept = [np.arange(0, n, 2) for n in dense.groups.dense_units]
    mask = Mask(dense.groups)
    mask.put(net, complement(dense.whole().units, kept))
    return mask, net, kept


def test_the_mask_is_what_the_oracle_masks_and_lifts_without_a_trace() -> None:
    mask, net, kept = _masked()
    dims: dict[str, list[torch.Tensor | None]] = {
        n: [None] * p.ndim for n, p in net.named_parameters()
    }
    for group, own in zip(mask.groups.groups, kept, strict=True):
        for member in group.members:
            if member.name in dims:
                dims[member.name][member.dim] = torch.from_numpy(np.sort(member.index[own].ravel()))
    model = network().double()
    expected = masked_dense(model, {n: tuple(d) for n, d in dims.items()}, strict=True)
    images = batches(1, dtype=torch.float64)[0][0]
    torch.testing.assert_close(net.eval()(images), expected.eval()(images))
    mask.lift()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in model.state_dict().items())
    assert mask.units is None


def test_masked_weights_are_trained_as_if_the_mask_let_gradients_through() -> None:
    """By plain SGD: weight - rate * (gradient at the masked network)."""
    mask, net, _ = _masked()
    weight = net.get_parameter("3.conv2.weight")
    dense = network().double().get_parameter("3.conv2.weight").detach()
    assert mask.units is not None
    removed = torch.from_numpy(mask.units[1])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    trained = dense[:, removed].clone()
    for images, classes in batches(3, dtype=torch.float64):
        nn.functional.cross_entropy(net(images), classes).backward()
        assert weight.grad is not None and not weight.detach()[:, removed].any()
        assert weight.grad[:, removed].any()
        trained -= 0.1 * weight.grad[:, removed]
        optimizer.step()
        optimizer.zero_grad()
        mask.absorb()
    assert not weight.detach()[:, removed].any()
    mask.lift()
    torch.testing.assert_close(weight.detach()[:, removed], trained)


def _soft(**options: Any) -> GradualPruner:
    return GradualPruner(
        network(), 0.4, example(), steps=4, every=3, latency="analytic", soft=True,
        drop_blocks=False, **options,
    )  # fmt: skip


def _train(pruner: GradualPruner, optimizer: Any, data: list[Any], ema: Any) -> None:
    for images, classes in data:
        nn.functional.cross_entropy(pruner.model(images), classes).backward()
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(pruner.network)
        pruner.step(optimizer, ema=ema)


def test_an_average_of_a_network_that_does_not_change_is_that_network() -> None:
    pruner = _soft()
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.0)
    ema = AveragedModel(pruner.network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    hidden = []
    for seed in range(4):
        _train(pruner, optimizer, batches(3, seed=seed), ema)
        hidden.append(pruner._mask.units)
        averaged = dict(ema.module.named_parameters())
        for name, p in pruner.network.named_parameters():
            torch.testing.assert_close(averaged[name], p, rtol=1e-6, atol=0)
    assert pruner.done
    one, two = hidden[:2]
    assert one is not None and two is not None
    assert any(len(np.setdiff1d(a, b)) for a, b in zip(one, two, strict=True))  # some came back


def test_an_average_is_masked_while_the_network_is_trained() -> None:
    pruner = _soft()
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    ema = AveragedModel(pruner.network, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    _train(pruner, optimizer, batches(5), ema)
    weight = ema.module.get_parameter("3.conv2.weight")
    assert pruner._mask.units is not None
    removed = torch.from_numpy(pruner._mask.units[1])
    assert len(removed) and not weight[:, removed].any() and weight.any()
    lifted = copy.deepcopy(pruner.network)
    pruner._mask.lift([ema.module])
    assert not lifted.get_parameter("3.conv2.weight")[:, removed].any()
    assert weight[:, removed].any()
    own = pruner.network.get_parameter("3.conv2.weight")
    assert torch.equal(weight[:, removed], own[:, removed])


def test_a_moving_average_of_scores_leaves_masked_units_out() -> None:
    pruner = _soft(smoothing=0.5)
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.01)
    ema = AveragedModel(pruner.network)
    _train(pruner, optimizer, batches(3), ema)
    hidden, scores = pruner._mask.units, pruner._scores
    assert hidden is not None and any(len(own) for own in hidden)

    def averages() -> list[np.ndarray[Any, Any]]:
        return [(t / w).numpy() for t, w in zip(scores.totals, scores.weights, strict=True)]

    before = averages()
    again = _soft(smoothing=0.5)
    again.load_state_dict(pruner.state_dict())
    _train(pruner, optimizer, batches(2, seed=4), ema)
    for own, old, new in zip(hidden, before, averages(), strict=True):
        assert old[own].all() or not len(own)
        np.testing.assert_allclose(new[own], old[own], rtol=1e-6)
        shown = np.delete(np.arange(len(old)), own)
        assert (new[shown] != old[shown]).any()
    scores = again._scores
    _train(again, torch.optim.SGD(again.model.parameters(), 0.01), batches(2, seed=4), ema)
    for own, old, new in zip(hidden, before, averages(), strict=True):
        np.testing.assert_allclose(new[own], old[own], rtol=1e-6)


def test_weights_of_which_nothing_is_left_get_no_gradient() -> None:
    """A batch norm after them would make it hundreds of times too large."""
    dense = Dense.of(network(), example(), include=None, exclude=None, exact=False)
    net = dense.build(dense.whole())
    groups = dense.groups
    (inner,) = [g for g, found in enumerate(groups.groups) if found.name == "3.conv1"]
    removed = [
        np.arange(n) if g == inner else np.arange(0) for g, n in enumerate(groups.dense_units)
    ]
    images, classes = batches(1)[0]
    plain = copy.deepcopy(net)
    nn.functional.cross_entropy(plain(images), classes).backward()
    usual = float(plain.get_parameter("3.conv2.weight").grad.norm())  # type: ignore[union-attr]
    mask = Mask(groups)
    mask.put(net, removed)
    kept = mask.state()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    weight = net.get_parameter("3.conv2.weight")
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), classes).backward()
        total = torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9)
        assert weight.grad is not None and not weight.grad.any()
        assert float(total) < 100 * usual
        optimizer.step()
        mask.absorb()
    for before, after in zip(kept, mask.state(), strict=True):
        torch.testing.assert_close(after, before)
    mask.lift()
    nn.functional.cross_entropy(net(images), classes).backward()
    assert weight.grad is not None and weight.grad.any()  # it is trained again


def test_soft_pruning_with_whole_branches_gone_keeps_gradients_small() -> None:
    torch.manual_seed(0)
    pruner = GradualPruner(
        network(), 0.12, example(), steps=3, every=3, latency="analytic", soft=True, min_share=0.3
    )
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.01, momentum=0.9)
    norms, dropped = [], False
    for images, classes in batches(9):
        optimizer.zero_grad()
        nn.functional.cross_entropy(pruner.model(images), classes).backward()
        norms.append(
            float(
                torch.nn.utils.get_total_norm(
                    [p.grad for p in pruner.model.parameters() if p.grad is not None]
                )
            )
        )
        pruner.after_backward()
        optimizer.step()
        pruner.step(optimizer)
        dropped = dropped or any(not len(own) for own in pruner.plan.units)
    assert dropped, "no branch was dropped: the budget is too large for this test"
    assert max(norms) < 10 * norms[0]


def test_going_back_lifts_the_mask_that_was_put_since() -> None:
    torch.manual_seed(0)
    pruner = GradualPruner(
        network(), 0.12, example(), steps=20, every=1, latency="analytic", soft=True, min_share=0.3
    )
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.01)
    start = copy.deepcopy(pruner.state_dict())
    for images, classes in batches(19):
        nn.functional.cross_entropy(pruner.model(images), classes).backward()
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(optimizer)
    assert any(not len(own) for own in pruner.plan.units), "no branch is masked by then"
    pruner.load_state_dict(start)
    images, classes = batches(1)[0]
    nn.functional.cross_entropy(pruner.model(images), classes).backward()
    for name, parameter in pruner.network.named_parameters():
        if parameter.ndim > 1:
            assert parameter.grad is not None and parameter.grad.any(), name
