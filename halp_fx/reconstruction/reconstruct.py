"""Fit the weights of a pruned network, layer by layer, to what the dense network computes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from halp_fx.errors import InputError
from halp_fx.minibatches import device_of, inputs_of
from halp_fx.passes.rules.structure import named_tensors, substitute_copy
from halp_fx.reconstruction.fit import Fit, Moments, error, solve
from halp_fx.reconstruction.layers import BATCH_NORMS, Index, Layer, layers_of, rows_of
from halp_fx.reconstruction.walk import Walk

__all__ = ["MINIBATCHES", "refit"]

MINIBATCHES = 32  # of the data, at most
_MEMORY = 1 << 30  # bytes of activations of both networks, above which no minibatch joins
_ROWS = 16384  # positions that a layer is fitted on, at least and at most,
_MOST_ROWS = 65536
_ROWS_EACH = 64  # and in between so many for each input that an output is computed from
_CHECKED = 4  # one position in so many is kept for checking
_SAME = 1e-6  # relative squared error up to which a layer has nothing to make up for


@torch.no_grad()
def refit(
    network: fx.GraphModule,
    dense: fx.GraphModule,
    kept: Mapping[str, tuple[Index, ...]],
    data: Iterable[Any],
    *,
    minibatches: int | None = None,
    ridge: float = 1e-3,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, Fit]:
    """See `halp_fx.reconstruct`.

    Args:
        network: changed in place, or left as it was where this raises.
        dense: a graph with the same names of nodes; it is left as it is.
        kept: of the plan.

    Raises:
        InputError: `data` has no minibatches.
    """
    most = MINIBATCHES if minibatches is None else minibatches
    device = device_of(network)
    batches = [inputs_of(batch, device) for batch in itertools.islice(data, most)]
    if not batches:
        raise InputError("data has no batches: pass at least one (inputs, target)")
    # Shares the tensors, not the modes; buffers are its own, for what is stateful in eval mode.
    reference = substitute_copy(dense, {id(p): p for p in dense.parameters()}).eval()
    modes = {module: module.training for module in network.modules()}
    saved = {id(t): (t, t.clone()) for _, t in named_tensors(network)}
    try:
        network.eval()
        return _Reconstruction(network, reference, kept, batches, ridge).run(tell)
    except BaseException:
        for tensor, before in saved.values():
            tensor.copy_(before)
        raise
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass(frozen=True)
class _Spread:
    """Mean and variance (channels,) of what a batch norm reads."""

    mean: torch.Tensor
    var: torch.Tensor


class _Reconstruction:
    """The pruned and the dense network side by side, from node to node."""

    def __init__(
        self,
        network: fx.GraphModule,
        dense: fx.GraphModule,
        kept: Mapping[str, tuple[Index, ...]],
        batches: Sequence[tuple[Any, ...]],
        ridge: float,
    ) -> None:
        self.network, self.dense, self.kept, self.ridge = network, dense, kept, ridge
        self.own, self.other = Walk(network), Walk(dense, self._watch)
        self.waiting = list(batches)
        self.other_device = device_of(dense)
        self.layers = layers_of(network, dense, kept)
        self.calls = Counter(n.target for n in network.graph.nodes if n.op == "call_module")
        self.generator = torch.Generator().manual_seed(0)
        self.read: dict[str, _Spread] = {}  # batch norm -> what the dense one reads
        # Batch norm of a layer that ends in a sum -> slope and offset of the two together.
        self.lines: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, tell: Callable[[int, int], None] | None) -> dict[str, Fit]:
        """Each layer once, in the order in which they run."""
        own = self.own.peaks(self.waiting[0])
        other = self.other.peaks(self._there(self.waiting[0]))
        self._join(own[0] + other[0])
        found: dict[str, Fit] = {}
        layers = {layer.node: layer for layer in self.layers}
        for i, node in enumerate(self.own.nodes):
            if node in layers:
                self._join(own[self.own.at] + other[self.other.at])
                layer = layers[node]
                self.other.run(self.other.index[layer.aim.name] + 1)
                fit = self._fit(layer)
                if fit is not None:
                    found[layer.name] = fit
                if tell is not None:
                    tell(self.layers.index(layer) + 1, len(self.layers))
            norm = self._norm_at(node)
            if norm is not None:
                self.other.run(self.other.index[node.name] + 1)
                values = self.own.values(node.all_input_nodes[0])
                self._settle(str(node.target), norm, _spread(values))
            self.own.run(i + 1)
        return found

    def _join(self, size: int) -> None:
        """As many more minibatches as memory holds from here on, where each needs this many bytes.

        The first comes in any case. Later nodes often need less, so that more can join there.
        """
        while self.waiting and (not len(self.own) or (len(self.own) + 1) * size <= _MEMORY):
            inputs = self.waiting.pop(0)
            self.own.join(inputs)
            self.other.join(self._there(inputs))

    def _there(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs_of((inputs, None), self.other_device)

    def _norm_at(self, node: fx.Node) -> Any:
        """The batch norm that a node of either network calls, where its statistics can be set."""
        if node.op != "call_module" or node.name not in self.other.index:
            return None
        module = self.network.get_submodule(str(node.target))
        twin = self.other.nodes[self.other.index[node.name]]
        alone = twin.target == node.target and self.calls[node.target] == 1
        known = isinstance(module, BATCH_NORMS) and module.running_mean is not None
        return module if alone and known else None

    def _watch(self, node: fx.Node, values: list[Any]) -> None:
        """Note what a batch norm of the dense network reads."""
        if node.op == "call_module":
            module = self.dense.get_submodule(str(node.target))
            if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
                self.read[str(node.target)] = _spread(values)

    def _fit(self, layer: Layer) -> Fit | None:
        """Fit one layer; None where it has nothing to make up for, or can't be fitted."""
        scale, offset = _line(layer)
        moments = self._moments(layer)
        if moments is None:
            return None
        used, checked = moments
        free = layer.module.bias is not None or layer.shifted
        groups = getattr(layer.module, "groups", 1)
        weight = layer.module.weight.detach().double().cpu()
        shape = (groups, len(weight) // groups, -1)
        present = (weight.flatten(1) * scale[:, None]).reshape(shape)
        bias = offset.reshape(shape[:2])
        if error(checked, present, bias) < _SAME:
            return None
        before = error(checked, present, bias, centred=free)
        new = solve(used, present, centred=free, ridge=self.ridge)
        after = before if new is None else error(checked, new, None, centred=free)
        if new is None or not after < before:
            new, after = present, before
        x, y = used.means
        bias = (y - (new @ x[..., None])[..., 0]).flatten() if free else offset
        self._write(layer, new.reshape(len(weight), -1), bias, scale)
        return Fit(before, after)

    def _write(
        self, layer: Layer, new: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor
    ) -> None:
        module = layer.module
        weight = module.weight
        # A batch norm that nearly switches a channel off leaves no weights that could be told.
        told = scale.abs() > 1e-6 * scale.abs().max()
        rows = new / torch.where(told, scale, torch.ones_like(scale))[:, None]
        rows = torch.where(told[:, None], rows, weight.detach().double().cpu().flatten(1))
        weight.copy_(rows.reshape(weight.shape))
        if layer.norm is not None:
            slope = torch.where(told, scale, torch.full_like(scale, torch.nan))
            if module.bias is not None:  # the norm takes it up
                bias = bias - scale * module.bias.detach().double().cpu()
            self.lines[_target_of_norm(layer)] = (slope, bias)
        elif module.bias is not None:
            module.bias.copy_(bias)

    def _moments(self, layer: Layer) -> tuple[Moments, Moments] | None:
        """Of the rows that count, and of those kept for checking."""
        inputs = self.own.values(layer.node.all_input_nodes[0])
        aims = self.other.values(layer.aim)
        addends: list[Any] = [None] * len(aims)
        if layer.addend is not None:
            addends = self.own.values(layer.addend)
        groups = getattr(layer.module, "groups", 1)
        size = layer.module.weight[0].numel()
        rows = min(max(_ROWS, _ROWS_EACH * size), _MOST_ROWS) if groups == 1 else _ROWS
        each = -(-rows // len(inputs))
        used, checked = Moments(), Moments()
        for x, aim, addend in zip(inputs, aims, addends, strict=True):
            if not isinstance(aim, torch.Tensor) or not isinstance(x, torch.Tensor):
                return None
            aim = aim.to(x.device)
            if layer.kept is not None:
                aim = aim.index_select(layer.channel_dim, layer.kept.to(x.device))
            if addend is not None:
                if addend.shape != aim.shape:
                    return None
                aim = aim - addend
            found = rows_of(layer, x, aim, each, self.generator)
            if found is None:
                return None
            part = max(len(found[0]) // _CHECKED, 1)
            checked.add(*(rows[:part] for rows in found))
            if len(found[0]) > part:
                used.add(*(rows[part:] for rows in found))
        return (used, checked) if used.count else None

    def _settle(self, name: str, norm: Any, own: _Spread) -> None:
        """Set a batch norm so that it gives each channel the mean and the variance of the dense.

        That of a layer that ends in a sum gives what the two were fitted to instead.
        """
        dense: Any = self.dense.get_submodule(name)
        index = self.kept[f"{name}.running_mean"][0]
        read = self.read[name]
        there = [read.mean, read.var, dense.running_mean, dense.running_var]
        there = [t.to(own.mean.device, torch.float64) for t in there]
        if index is not None:
            there = [t.index_select(0, index.to(t.device)) for t in there]
        mean, var, usual_mean, usual_var = there
        same = torch.allclose(own.mean, mean, 1e-5, 1e-6) and torch.allclose(own.var, var, 1e-5)
        if same and name not in self.lines:
            return
        stretch = ((own.var + norm.eps) / (var + norm.eps)).sqrt()
        norm.running_mean.copy_(own.mean + (usual_mean - mean) * stretch)
        deviation = (usual_var + norm.eps).sqrt() * stretch
        norm.running_var.copy_((deviation.square() - norm.eps).clamp_min(0))
        if name in self.lines:
            slope, offset = (t.to(own.mean.device) for t in self.lines.pop(name))
            told = slope.isfinite()
            weight = slope * (norm.running_var.double() + norm.eps).sqrt()
            norm.weight.copy_(torch.where(told, weight, norm.weight.double()))
            shift = offset + slope * norm.running_mean.double()
            norm.bias.copy_(torch.where(told, shift, norm.bias.double()))


def _line(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Slope and offset, one a channel, from what the layer gives without bias to its aim."""
    count = len(layer.module.weight)
    offset = torch.zeros(count, dtype=torch.float64)
    if layer.module.bias is not None:
        offset = layer.module.bias.detach().double().cpu()
    scale = torch.ones(count, dtype=torch.float64)
    if layer.norm is not None:
        parts = [layer.norm.weight, layer.norm.bias, layer.norm.running_mean]
        gain, shift, mean = (part.detach().double().cpu() for part in parts)
        scale = gain / (layer.norm.running_var.detach().double().cpu() + layer.norm.eps).sqrt()
        offset = shift + scale * (offset - mean)
    return scale, offset


def _target_of_norm(layer: Layer) -> str:
    return str(next(iter(layer.node.users)).target)


def _spread(values: Sequence[torch.Tensor]) -> _Spread:
    """Over all but the channels, dim 1."""
    count = 0
    total = square = torch.zeros(())
    about: torch.Tensor | None = None
    for value in values:
        flat = value.detach().transpose(0, 1).flatten(1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        if about is None:
            about = flat.mean(1, keepdim=True)
            total = square = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
        near = flat - about
        total = total + near.sum(1).double()
        square = square + near.square().sum(1).double()
        count += flat.shape[1]
    assert about is not None
    mean = total / count
    return _Spread(about[:, 0].double() + mean, (square / count - mean.square()).clamp_min(0))
