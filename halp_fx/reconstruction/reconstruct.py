"""Fit the weights of a pruned network, layer by layer, to what the dense network computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from halp_fx.errors import InputError
from halp_fx.minibatches import device_of, each_of, float_tensors, inputs_of
from halp_fx.modes import in_eval
from halp_fx.passes.rules.structure import named_tensors, substitute_copy
from halp_fx.reconstruction.checking import held_rows, keep_nearer, restore
from halp_fx.reconstruction.fit import Fit, Moments, error, solve
from halp_fx.reconstruction.layers import Index, Layer, layers_of, rows_of
from halp_fx.reconstruction.norms import Norm, Spread, Tensors, main_input, spread_of
from halp_fx.reconstruction.walk import Walk

__all__ = ["MINIBATCHES", "first_minibatches", "refit"]

MINIBATCHES = 32  # of the data, at most
_MEMORY = 1 << 30  # bytes of activations of both networks, above which no minibatch joins
_ROWS = 16384  # positions that a layer is fitted on, at least and at most,
_MOST_ROWS = 65536
_ROWS_EACH = 64  # and in between so many for each input that an output is computed from
_RIDGES = (1e4, 1e3, 100.0, 10.0, 1.0)  # times the ridge, which are tried: the largest first
_SLACK = 0.02  # of the least error: fits within so much of it are level
_NEAR = 0.05  # running statistics so near to those of the data, in deviations, are the same

_SAME = 1e-5  # relative squared error up to which a layer has nothing to make up for


def refit(
    network: fx.GraphModule,
    dense: fx.GraphModule,
    kept: Mapping[str, tuple[Index, ...]],
    minibatches: Sequence[Any],
    *,
    ridge: float = 1e-3,
    tell: Callable[[int, int], None] | None = None,
) -> dict[str, Fit]:
    """See `halp_fx.reconstruct`.

    Args:
        network: changed in place, or left as it was where this raises.
        dense: a graph with the same names of nodes; it is left as it is.
        kept: of the plan.
        minibatches: `(inputs, target)` or inputs alone, at least one.

    Raises:
        InputError: the networks can't be run on one of the minibatches.
    """
    device = device_of(network)
    given = [inputs_of(batch, device) for batch in minibatches]
    batches = [_after_hooks(network, inputs) for inputs in given]
    for i, inputs in enumerate(batches):
        if not all(bool(t.isfinite().all()) for t in float_tensors(inputs)):
            raise InputError(f"minibatch {i} of data has inputs that are NaN or infinite")
        if any(t.numel() == 0 for t in float_tensors(inputs)[:1]):
            raise InputError(f"minibatch {i} of data is empty")
    # Shares the parameters, not the modes; buffers are its own, for what is stateful in eval mode.
    reference = substitute_copy(dense, {id(p): p for p in dense.parameters()}).eval()
    saved = {id(t): (t, t.detach().clone()) for _, t in named_tensors(network)}
    with (
        torch.no_grad(),
        in_eval(network),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            fits = _Reconstruction(network, reference, kept, batches, ridge).run(tell)
            written = any(not torch.equal(t, before) for t, before in saved.values())
            if written and not keep_nearer(network, reference, given, batches, saved):
                return {}
            return fits
        except BaseException:
            restore(saved)
            raise


def _after_hooks(network: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the graph gets of these inputs: hooks of the whole network may change them."""
    for key, hook in network._forward_pre_hooks.items():
        if key not in network._forward_pre_hooks_with_kwargs:
            result: Any = hook(network, inputs)
            if result is not None:
                inputs = result if isinstance(result, tuple) else (result,)
    return inputs


def first_minibatches(data: Any, most: int | None) -> list[Any]:
    """So many minibatches of the data, or what is there.

    Raises:
        InputError: there are none, or `data` can't hold any.
    """
    found = list(itertools.islice(each_of(data), MINIBATCHES if most is None else most))
    if not found:
        raise InputError("data has no batches: pass at least one (inputs, target)")
    return found


@dataclass(frozen=True)
class _Line:
    """What a layer and the batch norm after it are to give: `slope * layer + offset`."""

    slope: torch.Tensor  # (channels,), float64
    offset: torch.Tensor


@dataclass(frozen=True)
class _Aim:
    """What a layer is to give, one tensor a minibatch, on the channels that survive."""

    values: Sequence[torch.Tensor]
    absorbs: bool  # through the batch norm, which becomes part of the fit
    shifted: bool  # a batch norm follows that takes the mean away


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
        self.kept, self.ridge = kept, ridge
        self.own, self.other = Walk(network), Walk(dense, self._watch)
        self.waiting = list(batches)
        self.other_device = device_of(dense)
        self.layers = {layer.node: layer for layer in layers_of(network, dense, kept)}
        self.norms = _norms_of(network)
        self.dense_norms = _norms_of(dense)
        known = {norm.name for norm in self.dense_norms.values()}
        for node, layer in self.layers.items():
            if layer.norm is not None and layer.norm.name not in known:
                self.layers[node] = replace(layer, norm=None, sum=None)
        self.generator = torch.Generator().manual_seed(0)
        self.read: dict[str, Spread] = {}  # batch norm -> what the dense one reads
        self.lines: dict[str, _Line] = {}  # batch norm -> what it was fitted to with its layer

    def run(self, tell: Callable[[int, int], None] | None) -> dict[str, Fit]:
        """Each layer once, in the order in which they run."""
        own = self.own.peaks(self.waiting[0])
        other = self.other.peaks(self._there(self.waiting[0]))
        self._join(own[0] + other[0])
        found: dict[str, Fit] = {}
        for i, node in enumerate(self.own.nodes):
            layer, norm = self.layers.get(node), self.norms.get(node)
            if layer is not None:
                self._join(own[self.own.at] + other[self.other.at])
                fit = self._fit(layer)
                if fit is not None:
                    found[layer.name] = fit
                if tell is not None:
                    done = list(self.layers).index(node) + 1
                    tell(done, len(self.layers))
            twin = self.other.index.get(node.name)
            if norm is not None and twin is not None:
                self.other.run(twin + 1)
                if norm.name in self.read:
                    self._settle(norm, spread_of(self.own.values(main_input(node))))
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

    def _watch(self, node: fx.Node, walk: Walk) -> None:
        """Note what a batch norm of the dense network reads."""
        norm = self.dense_norms.get(node)
        if norm is not None:
            self.read[norm.name] = spread_of(walk.values(main_input(node)))

    def _aim(self, layer: Layer, inputs: Sequence[Any]) -> _Aim | None:
        """What the dense network has where the layer ends; None where that is no tensor."""
        self.other.run(self.other.index[layer.twin.name] + 1)
        device = inputs[0].device

        def survivors(value: torch.Tensor) -> torch.Tensor:
            value = value.to(device)
            if layer.kept is None:
                return value
            return value.index_select(layer.channel_dim, layer.kept.to(device))

        values = self.other.values(layer.twin)
        if not all(isinstance(value, torch.Tensor) for value in values):
            return None
        own = [survivors(value) for value in values]
        # The channels of a batch norm are dim 1; a linear layer's are the last.
        norm = layer.norm if layer.channel_dim % own[0].ndim == 1 else None
        absorbable = norm is not None and norm.weight is not None and norm.bias is not None
        if layer.sum is not None and (layer.norm is None or absorbable):
            addends = self.own.values(layer.sum.addend)
            if all(_fits(addend, value) for addend, value in zip(addends, own, strict=True)):
                self.other.run(self.other.index[layer.sum.node.name] + 1)
                sums = self.other.values(layer.sum.node)
                left = [survivors(s) - a for s, a in zip(sums, addends, strict=True)]
                return _Aim(left, absorbs=norm is not None, shifted=False)
        return _Aim(own, absorbs=False, shifted=norm is not None)

    def _fit(self, layer: Layer) -> Fit | None:
        """Fit one layer; None where it has nothing to make up for, or can't be made better."""
        inputs = self.own.values(main_input(layer.node))
        if not all(isinstance(x, torch.Tensor) for x in inputs):
            return None
        aim = self._aim(layer, inputs)
        rows = self._rows(layer, inputs, aim.values) if aim is not None else None
        if aim is None or rows is None:
            return None
        used, checked = rows
        if not used.finite() or not checked.finite():
            return None
        own = layer.map
        weight = own.weight.detach().double().cpu()
        shape = (own.groups, len(weight) // own.groups, -1)
        line = _line(layer, aim.absorbs)
        present = (weight.flatten(1) * line.slope[:, None]).reshape(shape)
        offset = line.offset.reshape(shape[:2])
        if error(checked, present, offset) < _SAME:
            return None
        free = aim.absorbs or aim.shifted or own.bias is not None
        ridges = [self.ridge * factor for factor in _RIDGES]
        x, y = used.means
        tried = [(present, offset)]  # and then from the nearest to it to the farthest
        behind: Any = {"dropout": layer.dropout, "window": math.prod(own.kernel)}
        fits = (solve(used, present, centred=free, ridge=ridge, **behind) for ridge in ridges)
        for new in (present, *fits):
            if new is not None:
                tried.append((new, y - (new @ x[..., None])[..., 0] if free else offset))
        found = [error(checked, *new, centred=aim.shifted) for new in tried]
        off = [value if math.isfinite(value) else math.inf for value in found]
        # Few samples don't tell level fits apart: the one nearest to what is there is the safest.
        level = min(off) * (1 + _SLACK)
        best = next(i for i, value in enumerate(off) if value <= level)
        if best == 0:
            return None
        filters, bias = tried[best]
        self._write(layer, aim, filters.reshape(len(weight), -1), bias.flatten())
        return Fit(off[0], off[best])

    def _write(self, layer: Layer, aim: _Aim, rows: torch.Tensor, bias: torch.Tensor) -> None:
        own = layer.map
        if not aim.absorbs and not aim.shifted:
            own.weight.copy_(rows.reshape(own.weight.shape))
            if own.bias is not None:
                own.bias.copy_(bias)
            return
        # A batch norm takes up any factor, so filters keep the size that they had: what they give
        # stays in the range of half precision, and training goes on at the same pace, which is the
        # learning rate over the square of the size (van Laarhoven, L2 Regularization versus Batch
        # and Weight Normalization, 2017).
        weight = own.weight.detach().double().cpu().flatten(1)
        size, usual = rows.norm(dim=1), weight.norm(dim=1)
        slope = torch.where((size > 0) & (usual > 0), size / usual, torch.ones_like(size))
        filters = torch.where((size > 0)[:, None], rows / slope[:, None], weight)
        slope = torch.where(size > 0, slope, torch.zeros_like(slope))
        own.weight.copy_(filters.reshape(own.weight.shape))
        if not aim.absorbs:
            return
        if own.bias is not None:
            bias = bias - slope * own.bias.detach().double().cpu()
        assert layer.norm is not None
        self.lines[layer.norm.name] = _Line(slope, bias)

    def _rows(
        self, layer: Layer, inputs: Sequence[torch.Tensor], aims: Sequence[torch.Tensor]
    ) -> tuple[Moments, Moments] | None:
        """Moments of the rows that count, and of those of samples kept for checking."""
        size = layer.map.inputs
        rows = min(max(_ROWS, _ROWS_EACH * size), _MOST_ROWS) if layer.map.groups == 1 else _ROWS
        each = -(-rows // len(inputs))
        used, checked = Moments(), Moments()
        sizes = [len(x) for x in inputs]
        for i, (x, y) in enumerate(zip(inputs, aims, strict=True)):
            found = rows_of(layer, x, y, each, self.generator)
            if found is None:
                return None
            held = held_rows(found.samples, sizes, i)
            for moments, part in ((used, found.where(~held)), (checked, found.where(held))):
                moments.add(part.read, part.given)
        return used, checked

    def _settle(self, norm: Norm, own: Spread) -> None:
        """Set a batch norm so that it gives each channel the mean and the variance of the dense.

        That of a layer that was fitted through it gives what the two were fitted to instead.
        Running statistics become those of the data, so that training, which sees batches, begins
        where the fit ended; where the dense network's were others, weight and bias take up the
        difference.
        """
        dense = next(n for n in self.dense_norms.values() if n.name == norm.name)
        index, read = self.kept[norm.name][0], self.read[norm.name]
        line = self.lines.pop(norm.name, None)
        if not own.finite() or not read.finite():
            self._affine(norm, line, None)
            return

        def survivors(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.detach().to(own.mean.device, torch.float64)
            return tensor if index is None else tensor.index_select(0, index.to(tensor.device))

        mean, var = survivors(read.mean), survivors(read.var)
        usual_mean, usual_var = survivors(dense.mean), survivors(dense.var)
        pairs = [(own.mean, mean), (own.var, var)]
        pairs += [(norm.mean.double(), usual_mean), (norm.var.double(), usual_var)]
        same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
        deviation = (usual_var + norm.eps).sqrt()
        usual = bool(((mean - usual_mean).abs() <= _NEAR * deviation).all()) and torch.allclose(
            var, usual_var, rtol=_NEAR, atol=_NEAR * norm.eps
        )
        if same and usual and line is None:
            return
        if norm.weight is None or norm.bias is None or dense.weight is None or dense.bias is None:
            stretch = ((own.var + norm.eps) / (var + norm.eps)).sqrt()
            norm.mean.copy_(own.mean + (usual_mean - mean) * stretch)
            norm.var.copy_(((deviation * stretch).square() - norm.eps).clamp_min(0))
            return
        norm.mean.copy_(own.mean)
        norm.var.copy_(own.var)
        slope = survivors(dense.weight) / deviation
        gain = slope * (var + norm.eps).sqrt()
        self._affine(norm, line, (gain, survivors(dense.bias) + slope * (mean - usual_mean)))

    def _affine(
        self, norm: Norm, line: _Line | None, affine: tuple[torch.Tensor, torch.Tensor] | None
    ) -> None:
        """Weight and bias: those of the line, if there is one."""
        if line is not None:
            slope, offset = line.slope.to(norm.mean.device), line.offset.to(norm.mean.device)
            gain = slope * (norm.var.double() + norm.eps).sqrt()
            affine = gain, offset + slope * norm.mean.double()
        if affine is not None:
            assert norm.weight is not None
            assert norm.bias is not None
            norm.weight.copy_(affine[0])
            norm.bias.copy_(affine[1])


def _norms_of(network: fx.GraphModule) -> dict[fx.Node, Norm]:
    tensors = Tensors(network)
    found = {node: tensors.norm_at(node) for node in network.graph.nodes}
    return {node: norm for node, norm in found.items() if norm is not None}


def _fits(addend: Any, value: torch.Tensor) -> bool:
    """Whether a sum of the two has the shape of `value`."""
    try:
        return bool(torch.broadcast_shapes(addend.shape, value.shape) == value.shape)
    except (AttributeError, RuntimeError):
        return False


def _line(layer: Layer, through: bool) -> _Line:
    """What the layer gives without bias -> what it gives, or `through` the batch norm."""
    own, norm = layer.map, layer.norm
    offset = torch.zeros(len(own.weight), dtype=torch.float64)
    if own.bias is not None:
        offset = own.bias.detach().double().cpu()
    slope = torch.ones_like(offset)
    if through:
        assert norm is not None
        assert norm.weight is not None
        assert norm.bias is not None
        parts = [norm.weight, norm.bias, norm.mean, norm.var]
        gain, shift, mean, var = (part.detach().double().cpu() for part in parts)
        slope = gain / (var + norm.eps).sqrt()
        offset = shift + slope * (offset - mean)
    return _Line(slope, offset)
