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
from halp_fx.modes import in_eval

__all__ = ["recalibrate"]

Pair = tuple[torch.Tensor, torch.Tensor]  # running mean and variance


def recalibrate(network: nn.Module, data: Iterable[Any], batches: int | None = None) -> int:
    """Take the running statistics of all batch norms afresh, as averages over `data`.

    Channels that were removed upstream shift the means and variances that batch norms remember;
    this sets them right without training. Weights, modes and gradients stay as they were, and so do
    the statistics of batch norms that do not run or read a single value a channel each time.

    Args:
        network: the network, changed in place: only `running_mean`, `running_var` and
            `num_batches_tracked` of its batch norms.
        data: minibatches, `(inputs, target)`, inputs a tensor or a tuple; or a tensor alone.
        batches: use at most so many; None: all.

    Returns:
        How many batches were used.

    Raises:
        InputError: `data` has no batches, or one that is NaN or that the network can't be run on,
            or statistics of it are not finite. The network is as it was then.
    """
    each = each_of(data)
    norms = {
        name: m
        for name, m in network.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    }
    # Those of modules too: what was put back into a model may hold a norm that a graph calls.
    pairs = [*_statistics_of_functions(network), *map(_statistics_of, norms.items())]
    momenta = [m.momentum for m in norms.values()]
    saved = [{k: v.clone() for k, v in m.state_dict().items()} for m in norms.values()]
    saved_pairs = [(mean.clone(), variance.clone()) for _, (mean, variance) in pairs]
    device = device_of(network)
    used = 0
    try:
        averaged = _Averaged([pair for _, pair in pairs], saved_pairs)
        with in_eval(network), torch.no_grad(), averaged:
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches
                norm.train()
            for batch in each:
                if batches is not None and used >= batches:
                    break
                _run(network, inputs_of(batch, device), used)
                used += 1
        if used == 0:
            raise InputError("data has no batches: pass at least one (inputs, target)")
        for norm, state in zip(norms.values(), saved, strict=True):
            if averaged.is_idle(norm):
                norm.load_state_dict(state)
        for name, pair in pairs:
            _check_finite(name, pair)
    except BaseException:
        for norm, state in zip(norms.values(), saved, strict=True):
            norm.load_state_dict(state)
        for (_, pair), before in zip(pairs, saved_pairs, strict=True):
            for tensor, value in zip(pair, before, strict=True):
                tensor.copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms.values(), momenta, strict=True):
            norm.momentum = momentum
    return used


def _check_finite(name: str, statistics: Pair) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in statistics):
        raise InputError(
            f"what the batch norm {name} reads has a mean or variance that is not finite on data: "
            "check the inputs; in half precision, recalibrate before the network is converted"
        )


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


def _statistics_of(named: tuple[str, nn.Module]) -> tuple[str, Pair]:
    name, norm = named
    assert isinstance(norm.running_mean, torch.Tensor)
    assert isinstance(norm.running_var, torch.Tensor)
    return name, (norm.running_mean, norm.running_var)


def _statistics_of_functions(network: nn.Module) -> list[tuple[str, Pair]]:
    """Running means and variances of the batch norms that graphs call as functions.

    Those of a library's own modules, as batch norms with an activation, are traced so.
    """
    found: dict[int, tuple[str, Pair]] = {}
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
                    found[id(mean)] = node.name, (mean, var)
    return list(found.values())


_SIGNATURE = inspect.signature(F.batch_norm)


class _Averaged(TorchFunctionMode):
    """Batch norms called as functions, as modules do too, average statistics over the batches.

    One that reads a single value a channel, whose variance says nothing, takes the average so far,
    or what it had before.

    Args:
        statistics: running mean and variance of each; the calls are averaged into them.
        before: what was in them.
    """

    def __init__(self, statistics: Sequence[Pair], before: Sequence[Pair]) -> None:
        super().__init__()
        self._calls = {id(mean): 0 for mean, _ in statistics}  # that were averaged
        self._passed: set[int] = set()  # those that read a single value a channel
        self._before = {id(mean): own for (mean, _), own in zip(statistics, before, strict=True)}

    def is_idle(self, norm: nn.Module) -> bool:
        """Whether nothing was averaged into the statistics of a module."""
        key = id(norm.running_mean)
        # One that synchronises processes is no function, but counts.
        return not self._calls[key] and (key in self._passed or not norm.num_batches_tracked)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            given = _SIGNATURE.bind(*args, **kwargs)
            key = id(given.arguments["running_mean"])
            if key in self._calls:
                given.arguments |= self._statistics(key, given.arguments["input"])
                args, kwargs = given.args, given.kwargs
        return func(*args, **kwargs)

    def _statistics(self, key: int, values: torch.Tensor) -> dict[str, Any]:
        if values.ndim < 2 or values.numel() != values.shape[1]:
            self._calls[key] += 1
            return {"training": True, "momentum": 1 / self._calls[key]}
        self._passed.add(key)
        if self._calls[key]:
            return {"training": False}
        mean, variance = self._before[key]
        return {"training": False, "running_mean": mean, "running_var": variance}
