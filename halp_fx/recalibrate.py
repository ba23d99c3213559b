"""Batch norm statistics of a pruned network, taken afresh from data."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from halp_fx.errors import HalpError, InputError
from halp_fx.minibatches import device_of, each_of, float_tensors, inputs_of

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
        InputError: `data` has no batches, or one that is not finite or that the network can't be
            run on. The network is as it was then.
    """
    each = each_of(data)
    norms = [
        m
        for m in network.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    functions = _statistics_of_functions(network)
    modes = {m: m.training for m in network.modules()}
    momenta = [m.momentum for m in norms]
    saved = [{k: v.clone() for k, v in m.state_dict().items()} for m in norms]
    saved_functions = [(t, t.clone()) for pair in functions for t in pair]
    device = device_of(network)
    used = 0
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        for mean, variance in functions:
            mean.zero_()
            variance.fill_(1)
        # Those of modules too: what was put back into a model may hold a norm that a graph calls.
        modules = [(m.running_mean, m.running_var) for m in norms]
        with torch.no_grad(), _Averaged([*functions, *modules]):
            for batch in each:
                if batches is not None and used >= batches:
                    break
                _run(network, inputs_of(batch, device), used)
                used += 1
        if used == 0:
            raise InputError("data has no batches: pass at least one (inputs, target)")
    except BaseException:
        for norm, state in zip(norms, saved, strict=True):
            norm.load_state_dict(state)
        for tensor, before in saved_functions:
            tensor.copy_(before)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return used


def _run(network: nn.Module, inputs: tuple[Any, ...], number: int) -> None:
    if any(bool(t.isnan().any()) for t in float_tensors(inputs)):
        raise InputError(f"minibatch {number} of data has inputs that are NaN")
    try:
        network(*inputs)
    except (HalpError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(
            f"minibatch {number} of data can't be run on the network: "
            f"{type(error).__name__}: {first}"
        ) from error


def _statistics_of_functions(network: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Running means and variances of the batch norms that graphs call as functions.

    Those of a library's own modules, as batch norms with an activation, are traced so.
    """
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for graph in network.modules():
        if not isinstance(graph, fx.GraphModule):
            continue
        tensors = dict(graph.named_buffers(remove_duplicate=False))
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target is F.batch_norm:
                given = _SIGNATURE.bind(*node.args, **node.kwargs).arguments
                pair = [given["running_mean"], given["running_var"]]
                names = [n.target for n in pair if isinstance(n, fx.Node) and n.op == "get_attr"]
                if len(names) == 2 and all(name in tensors for name in names):
                    mean, var = (tensors[str(name)] for name in names)
                    found[id(mean)] = (mean, var)
    return list(found.values())


_SIGNATURE = inspect.signature(F.batch_norm)


class _Averaged(TorchFunctionMode):
    """Batch norms called as functions average these statistics over the batches."""

    def __init__(self, statistics: Sequence[tuple[Any, Any]]) -> None:
        super().__init__()
        self._calls = {id(mean): 0 for mean, _ in statistics}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            given = _SIGNATURE.bind(*args, **kwargs)
            key = id(given.arguments["running_mean"])
            if key in self._calls:
                self._calls[key] += 1
                given.arguments |= {"training": True, "momentum": 1 / self._calls[key]}
                args, kwargs = given.args, given.kwargs
        return func(*args, **kwargs)
