"""saliency: what each unit of each group is worth.

Requires: `ChannelGroups`; data for scores by gradients, and a loss or outputs that have a gradient.
Ensures: one finite score of at least 0 a unit, above 0 for some of each group of more than a few;
the model, its
gradients, its modes and the global random state are as before.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from halp_fx.errors import InputError, SaliencyError
from halp_fx.minibatches import device_of, float_tensors, inputs_of, target_of
from halp_fx.passes.rules.scored import ScoredMembers, is_gone, places_of, sums_of_products
from halp_fx.passes.rules.structure import named_tensors
from halp_fx.types import ChannelGroups, FloatArray, Plan, Saliency

__all__ = [
    "BY_BOTH",
    "BY_DATA",
    "BY_LOSS",
    "BY_OUTPUTS",
    "DEFAULT",
    "score",
    "score_survivors",
]

# Method -> the exponent of a minibatch's first-order change of the loss.
BY_LOSS = {"fisher": 2.0, "taylor1.5": 1.5, "taylor": 1.0}
# Method -> the exponent of that of the outputs.
BY_OUTPUTS = {"output": 2.0, "output1.75": 1.75, "output1.5": 1.5, "output1": 1.0}
# Method -> the exponent of the geometric mean of the two.
BY_BOTH = {"both": 2.0, "both1.75": 1.75, "both1.5": 1.5}
DEFAULT = "both"  # with data and a loss
BY_DATA = (*BY_BOTH, *BY_OUTPUTS, *BY_LOSS)
_METHODS = (*BY_DATA, "magnitude")
# In this order they are tried as candidates.
_OTHERS = (
    "both", "output1.5", "both1.5", "output", "taylor1.5", "output1.75", "fisher", "both1.75",
    "taylor", "output1",
)  # fmt: skip
_SIGNS = 4  # random projections of the outputs of a minibatch

_FEW = 4  # units below which a group may be worth nothing: a few dead channels are common
Loss = Callable[[Any, Any], torch.Tensor]
Progress = Callable[[int, int], None]
_Sources = list[tuple[str, int, Any]]  # (parameter, dim, index (units, width)) of a group


def score(
    groups: ChannelGroups,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    method: Callable[[ChannelGroups], Any] | str | None = None,
    progress: Progress | None = None,
    *,
    both: bool = False,
    within: nn.Module | None = None,
) -> Saliency:
    """Score every unit.

    With data, a first-order change `t` is taken for each minibatch when a unit goes: `t = sum over
    the coupled layers of gamma * dgamma + beta * dbeta` on batch, instance and group norm, or
    `t = sum of W * dW` over the filters that make the channel where there is none; of a norm
    without gamma, over the weights that read the channel.

    Of the loss:

    - "fisher": the mean of `t ** 2` (Molchanov et al., CVPR 2019, equation 8; of coupled channels
      Liu et al., *Group Fisher Pruning*, ICML 2021). Half of it is the second-order change near a
      minimum, with the Fisher information of minibatches for the Hessian.
    - "taylor", HALP's (NeurIPS 2022, section 3.1): the mean of `|t|`.
    - "taylor1.5": the mean of `|t| ** 1.5`, between the two.

    Of the outputs, which needs neither targets nor loss:

    - "output", the default without a loss: the mean of `t ** 2`, `t` being the change of a
      projection of all outputs on random signs, drawn anew for each image. Its expectation is the
      squared change of the outputs (Hutchinson, 1990). Several outputs count alike, each relative
      to its root mean square. Of a network that has learnt its training images by heart, the loss
      has hardly a gradient left there; its outputs do.
    - "output1.75", "output1.5", "output1": those means to the power of 0.875, 0.75, 0.5.

    Of both:

    - "both", the default with a loss: the geometric mean of "fisher" and "output".
    - "both1.75", "both1.5": it to the power of 0.875, 0.75.

    All rank the channels of a group much alike. The exponent says how much many small channels
    count against a few large ones of another group, and which is best differs between networks.
    `Saliency.others` has the same minibatches by other exponents, and with `both` (where there is a
    loss) of the other change too.

    Minibatches whose scores are not finite are left out, group by group.

    Without data: the L2 norm of the filters, scaled by the batch norm that follows, relative to
    the mean of the layer, and summed over the layers that give the channel. It is the weaker
    score.

    Args:
        data: minibatches `(inputs, target)`, inputs a tensor or a tuple; or, where there is no
            loss, a tensor alone.
        loss: `loss(output, target)` -> scalar tensor.
        both: score by the loss and by the outputs, as others besides `method`.
        within: a model that has the tensors of the graph under the same names, and is run in its
            place.
        method: one of these names, "magnitude", or a callable that takes the groups and returns
            a dict (group name -> scores) or a list of arrays, one (units,) a group. None: "both"
            with a loss, "output" with data alone, else "magnitude".

    Raises:
        InputError: a loss that is missing or gives no gradient, a wrong batch.
        SaliencyError: scores that are not finite, or all zero in a group.
    """
    if callable(method):
        name = getattr(method, "__name__", type(method).__name__)
        return _checked(groups, _of_callable(groups, method(groups), name), name, data is None)
    if method is not None and method not in _METHODS:
        raise InputError(
            f"saliency={method!r} is not known: pass {', '.join(map(repr, _METHODS))}, a callable "
            "or None"
        )
    if method in BY_DATA and data is None:
        needs = "data" if method in BY_OUTPUTS else "data and loss"
        raise InputError(f"the saliency {method!r} needs {needs}: pass them, or 'magnitude'")
    if (method in BY_LOSS or method in BY_BOTH) and loss is None:
        raise InputError(
            f"the saliency {method!r} needs a loss: pass loss=callable(output, target), or "
            "saliency='output', which needs none"
        )
    if data is None or method == "magnitude":
        return _checked(groups, _magnitude(groups), "magnitude", True)
    module = _private_copy(groups.traced.module if within is None else within)
    scored = ScoredMembers(groups)
    sources = [
        [(m.name, m.dim, m.index) for m in scored.of(number)]
        for number in range(len(groups.groups))
    ]
    optional = method is None or method in BY_LOSS
    probes = _probes(method or _default(loss), loss, both, optional=optional)
    found = _by_gradients(groups, module, sources, data, probes, progress)
    if method is None:
        method = _default(loss) if _default(loss) in found else "fisher"
    chosen = _checked(groups, found[method], method, False)
    others = {name: tuple(found[name]) for name in _OTHERS if name in found and name != method}
    return replace(chosen, others=others)


def score_survivors(
    network: fx.GraphModule,
    plan: Plan,
    data: Iterable[Any],
    loss: Loss | None,
    method: str | None = None,
) -> Saliency:
    """Score the units that are left in a pruned network, as `score` does with data.

    Args:
        network: what the plan was rewritten to; it is left as it is.
        plan: its groups are those of the dense network.
        method: one of those by data; None: as for `score`.

    Returns:
        One array a group over the units of the dense network: 0 for those that are gone.

    Raises:
        SaliencyError: scores that are not finite in any minibatch, or all zero.
    """
    groups = plan.groups
    module = _private_copy(network)
    scored = ScoredMembers(groups)
    sources: list[_Sources] = []
    for number, (group, units) in enumerate(zip(groups.groups, plan.units, strict=True)):
        members: _Sources = []
        # Of branches that were dropped nothing is left.
        left = [m for m in group.members if not is_gone(plan.kept[m.name])]
        for member in scored.of(number, left):
            place = places_of(member, units, plan.kept[member.name])
            members.append((member.name, member.dim, place))
        sources.append(members)
    counts = [len(units) for units in plan.units]
    method = method or _default(loss)
    probes = _probes(method, loss, both=False, optional=False)
    found = _by_gradients(groups, module, sources, data, probes, None, counts)

    def of_all(scores: Sequence[FloatArray]) -> tuple[FloatArray, ...]:
        whole = tuple(np.zeros(n) for n in groups.dense_units)
        for full, units, own in zip(whole, plan.units, scores, strict=True):
            full[units] = own
        return whole

    scores = of_all(found[method])
    if not any(full.any() for full in scores):
        raise SaliencyError("the saliency of the pruned network is zero for every unit")
    others = {name: of_all(found[name]) for name in _OTHERS if name in found and name != method}
    return Saliency(scores, method, False, others)


def _default(loss: Loss | None) -> str:
    return "output" if loss is None else DEFAULT


@dataclass(frozen=True)
class _Probe:
    """What is differentiated, and what is made of its first-order changes."""

    scalars: Callable[[Any, Any], list[torch.Tensor]]  # of output and target
    power: float | None  # of changes, before the mean; None: that of each method
    powers: Mapping[str, float]  # method -> exponent in all
    needs_target: bool
    optional: bool  # whether it may be left out where it has no scalars


def _probes(method: str, loss: Loss | None, both: bool, *, optional: bool) -> list[_Probe]:
    """By the loss, the outputs or both; with `optional`, without the outputs if need be."""
    found = []
    both = both or method in BY_BOTH
    if method in BY_LOSS or (both and loss is not None):
        assert loss is not None
        found.append(_Probe(_of_loss(loss), None, BY_LOSS, needs_target=True, optional=False))
    if method in BY_OUTPUTS or both:
        # Signs are random: only the mean squares of their projections say something.
        optional = optional and loss is not None
        scalars = _projections(optional)
        found.append(_Probe(scalars, 2.0, BY_OUTPUTS, needs_target=False, optional=optional))
    return found


def _by_gradients(
    groups: ChannelGroups,
    module: nn.Module,
    sources: Sequence[_Sources],
    data: Iterable[Any],
    probes: Sequence[_Probe],
    progress: Progress | None,
    units: Sequence[int] | None = None,
) -> dict[str, list[FloatArray]]:
    """Method -> means over minibatches, one array (units,) a group; see `score`."""
    tensors = dict(named_tensors(module))
    units = groups.dense_units if units is None else units
    # By identity: a tensor may go by several names.
    wanted = {id(tensors[name]) for members in sources for name, *_ in members}
    for tensor in tensors.values():
        tensor.requires_grad_(id(tensor) in wanted and tensor.is_floating_point())
    sums = [_Sums(probe, units) for probe in probes]
    batches = 0
    if not isinstance(data, Iterable):
        raise InputError(f"data must be an iterable of (inputs, target), not {type(data).__name__}")
    total = operator.length_hint(data)  # loaders of streams have a len() that fails
    for batch in data:
        values = _forward(module, batch, probes)
        for left, (which, value) in zip(range(len(values) - 1, -1, -1), values, strict=True):
            value.backward(retain_graph=left > 0)
            for i, members in enumerate(sources):
                change = np.zeros(units[i])
                for name, dim, index in members:
                    products = sums_of_products(tensors[name], dim, torch.from_numpy(index))
                    change += products.cpu().double().numpy()
                sums[which].add(i, np.abs(change))
            for tensor in tensors.values():
                tensor.grad = None
        batches += 1
        if progress is not None:
            progress(batches, max(total, batches))
    if batches == 0:
        raise InputError("data has no batches: pass at least one (inputs, target)")
    means: dict[str, list[FloatArray]] = {}
    for each in sums:
        if each.probe.optional and not each.seen:
            continue
        for group, count in zip(groups.groups, each.used, strict=True):
            if count == 0:
                raise SaliencyError(
                    f"the saliency of group {group.name!r} is not finite in any of {batches} "
                    "batches: check the data and the loss for NaN or infinity"
                )
        means |= each.means()
    if "fisher" in means and "output" in means:
        pairs = zip(means["fisher"], means["output"], strict=True)
        middle = [np.sqrt(by_loss) * np.sqrt(by_outputs) for by_loss, by_outputs in pairs]
        means |= {method: [m ** (power / 2) for m in middle] for method, power in BY_BOTH.items()}
    return means


class _Sums:
    """Changes to the powers of a probe, summed group by group where they are finite."""

    def __init__(self, probe: _Probe, units: Sequence[int]) -> None:
        self.probe = probe
        powers = probe.powers.values() if probe.power is None else (probe.power,)
        self.totals = {power: [np.zeros(n) for n in units] for power in powers}
        self.used = [0] * len(units)
        self.seen = False

    def add(self, group: int, change: FloatArray) -> None:
        self.seen = True
        if np.isfinite(change**2).all():
            for power, totals in self.totals.items():
                totals[group] += change**power
            self.used[group] += 1

    def means(self) -> dict[str, list[FloatArray]]:
        """Method -> one array a group."""
        base = self.probe.power
        found = {}
        for method, power in self.probe.powers.items():
            totals = self.totals[power if base is None else base]
            means = [t / n for t, n in zip(totals, self.used, strict=True)]
            found[method] = means if base is None else [mean ** (power / base) for mean in means]
        return found


def _private_copy(module: nn.Module) -> nn.Module:
    """A copy with tensors of its own, in eval mode: running statistics, no dropout."""
    memo: dict[int, Any] = {}
    for _, tensor in named_tensors(module):
        if id(tensor) not in memo:
            fresh = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(fresh) if isinstance(tensor, nn.Parameter) and (
                fresh.is_floating_point()) else fresh  # fmt: skip
    private = copy.deepcopy(module, memo)
    return private.eval()


def _forward(
    module: nn.Module, batch: Any, probes: Sequence[_Probe]
) -> list[tuple[int, torch.Tensor]]:
    """The scalars of each probe, by its position, for one minibatch."""
    several = isinstance(batch, (tuple, list))
    pair = several and len(batch) == 2
    if not pair and any(probe.needs_target for probe in probes):
        raise InputError(
            f"a batch of data must be a pair (inputs, target), not {type(batch).__name__}"
        )
    if several and len(batch) not in (1, 2):
        raise InputError(
            "a batch of data must be a pair (inputs, target) or inputs alone, not "
            f"{len(batch)} things: put several inputs in a tuple, ((a, b), target)"
        )
    device = device_of(module)
    target = target_of(batch, device)
    with torch.enable_grad():
        try:
            output = module(*inputs_of(batch, device))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[:1]
            raise InputError(
                "the network can't be run on a batch of data: "
                f"{type(error).__name__}: {''.join(reason)}"
            ) from error
        return [
            (which, value)
            for which, probe in enumerate(probes)
            for value in probe.scalars(output, target)
        ]


def _of_loss(loss: Loss) -> Callable[[Any, Any], list[torch.Tensor]]:
    def scalars(output: Any, target: Any) -> list[torch.Tensor]:
        value = loss(output, target)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(f"loss must return a scalar tensor, not {shape}")
        if not value.requires_grad:
            raise InputError(
                "the loss gives no gradient: it must depend on the network's output through "
                "differentiable operations (no argmax, no .detach(), no .item())"
            )
        return [value]

    return scalars


def _projections(optional: bool) -> Callable[[Any, Any], list[torch.Tensor]]:
    """The outputs on random signs, which are the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def scalars(output: Any, target: Any) -> list[torch.Tensor]:
        del target
        tensors = [t for t in float_tensors(output) if t.requires_grad and t.numel()]
        if not tensors and optional:
            return []
        if not tensors:
            raise InputError(
                "no output of the network has a gradient: pass a loss and saliency='fisher', or "
                "saliency='magnitude'"
            )
        values = []
        for _ in range(_SIGNS):
            value = torch.zeros((), device=tensors[0].device)
            for tensor in tensors:
                signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
                scale = tensor.detach().float().square().mean().sqrt() * tensor.numel() ** 0.5
                signed = (tensor.float() * signs.to(tensor.device)).sum()
                value = value + signed.to(value.device) / scale.clamp_min(1e-12).to(value.device)
            values.append(value)
        return values

    return scalars


def _magnitude(groups: ChannelGroups) -> list[FloatArray]:
    """Shares of what each layer gives, summed over the layers that give a group's channels.

    A channel of a residual stream, which many layers write, so counts as often: what the stream
    loses is lost to all of them.
    """
    tensors = dict(named_tensors(groups.traced.module))
    scale = _folded_scales(groups.traced.module)
    scores: list[FloatArray] = []
    for group in groups.groups:
        weights = [m for m in group.members if m.dim == 0 and tensors[m.name].ndim > 1]
        total = np.zeros(group.units)
        for member in weights or group.members:
            tensor = tensors[member.name].detach()
            if not tensor.is_floating_point():
                continue
            rows = tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1)
            wide = rows if rows.dtype == torch.float64 else rows.float()
            squares = torch.linalg.vector_norm(wide, dim=1).double().cpu().numpy() ** 2
            factor = scale.get(member.name)
            if factor is not None and member.dim == 0 and factor.shape == squares.shape:
                squares = squares * factor**2
            norms = np.sqrt(squares[member.index].sum(axis=1))
            mean = norms.mean()
            total += norms / mean if np.isfinite(mean) and mean > 0 else norms
        scores.append(total)
    return scores


def _folded_scales(module: fx.GraphModule) -> dict[str, FloatArray]:
    """Weight of a convolution or linear layer -> factor of each row by the batch norm after it."""
    scales: dict[str, FloatArray] = {}
    for node in module.graph.nodes:
        if node.op != "call_module" or not node.all_input_nodes:
            continue
        norm = module.get_submodule(str(node.target))
        before = node.all_input_nodes[0]
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or before.op != "call_module":
            continue
        if norm.running_var is None or len(before.users) != 1:
            continue
        factor = 1.0 / np.sqrt(norm.running_var.detach().double().cpu().numpy() + norm.eps)
        if norm.weight is not None:
            factor = factor * np.abs(norm.weight.detach().double().cpu().numpy())
        scales[f"{before.target}.weight"] = factor
    return scales


def _of_callable(groups: ChannelGroups, given: Any, name: str) -> list[FloatArray]:
    if isinstance(given, Mapping):
        missing = [g.name for g in groups.groups if g.name not in given]
        if missing:
            raise SaliencyError(f"the saliency {name!r} has no scores for the groups {missing[:5]}")
        given = [given[g.name] for g in groups.groups]
    try:
        arrays = [
            np.asarray(v.detach().cpu() if isinstance(v, torch.Tensor) else v, dtype=np.float64)
            for v in given
        ]
    except (TypeError, ValueError) as error:
        raise SaliencyError(
            f"the saliency {name!r} gave {type(given).__name__}: return a dict of group name -> "
            "scores, or a list of arrays, one (units,) a group"
        ) from error
    if len(arrays) != len(groups.groups):
        raise SaliencyError(
            f"the saliency {name!r} has {len(arrays)} arrays for {len(groups.groups)} groups"
        )
    return arrays


def _checked(
    groups: ChannelGroups, scores: list[FloatArray], method: str, data_free: bool
) -> Saliency:
    for group, values in zip(groups.groups, scores, strict=True):
        if values.shape != (group.units,):
            raise SaliencyError(
                f"the saliency of group {group.name!r} has shape {values.shape}, "
                f"expected ({group.units},)"
            )
        if not np.isfinite(values).all():
            raise SaliencyError(
                f"the saliency of group {group.name!r} has values that are not finite: check its "
                "weights and the data for NaN or infinity"
            )
        if (values < 0).any():
            raise SaliencyError(f"the saliency of group {group.name!r} has negative values")
        if not values.any() and group.units >= _FEW:
            raise SaliencyError(
                f"the saliency of group {group.name!r} is zero for all its {group.units} units: "
                "check that data and loss reach it (zero weights, dead units, zero gradients)"
            )
    if not any(values.any() for values in scores):
        raise SaliencyError("the saliency is zero for every unit of every group")
    return Saliency(tuple(scores), method, data_free)
