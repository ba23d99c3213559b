"""Batch norm statistics of a pruned network, taken afresh from data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from halp_fx.errors import InputError
from halp_fx.minibatches import device_of, inputs_of

__all__ = ["recalibrate"]


def recalibrate(network: nn.Module, data: Iterable[Any], batches: int | None = None) -> int:
    """Take the running statistics of all batch norms afresh, as averages over `data`.

    Channels that were removed upstream shift the means and variances that batch norms remember;
    this sets them right without training. Weights, modes and gradients stay as they were.

    Args:
        network: the network, changed in place: only `running_mean`, `running_var` and
            `num_batches_tracked` of its batch norms.
        data: minibatches, `(inputs, target)` or inputs alone; inputs a tensor or a tuple.
        batches: use at most so many; None: all.

    Returns:
        How many batches were used.

    Raises:
        InputError: `data` has no batches.
    """
    norms = [
        m
        for m in network.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    modes = {m: m.training for m in network.modules()}
    momenta = [m.momentum for m in norms]
    saved = [{k: v.clone() for k, v in m.state_dict().items()} for m in norms]
    device = device_of(network)
    used = 0
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        with torch.no_grad():
            for batch in data:
                if batches is not None and used >= batches:
                    break
                network(*inputs_of(batch, device))
                used += 1
        if used == 0:
            raise InputError("data has no batches: pass at least one (inputs, target)")
    except BaseException:
        for norm, state in zip(norms, saved, strict=True):
            norm.load_state_dict(state)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return used
