"""Soft masks: the network computes as without the units, which are trained on aside."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

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
