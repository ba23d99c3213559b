"""Which parameters a group's scores by gradients are read from, and what is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from halp_fx.passes.rules.scope import output_dims, owner_of
from halp_fx.passes.rules.structure import named_tensors
from halp_fx.types import ChannelGroups, IntArray, Member, TensorSpec

__all__ = ["ScoredMembers", "finest_dtype", "is_gone", "places_of", "sums_of_products"]

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
# Function -> position of its weight, which the bias follows.
_FUNCTIONS = {
    F.batch_norm: 3, torch.batch_norm: 1, F.instance_norm: 3, torch.instance_norm: 1,
    F.group_norm: 2, torch.group_norm: 2,
}  # fmt: skip
_OF_GROUPS = (F.group_norm, torch.group_norm)  # with one group they are no norm of few channels


class ScoredMembers:
    """The parameters whose products with their gradients are summed for a group.

    The affine parameters of the norms that follow, as the sum is then the first-order effect of
    the channel; where there are none, the filters that make it. But a norm that takes away the
    scale of its channels takes away what such a sum says of the filters too: where it has no
    affine parameters, or those are frozen, the weights that read the channel count.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        self.groups = groups
        module = groups.traced.module
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.tensors = dict(named_tensors(module))
        self.affine: set[str] = set()
        self.bare: set[int] = set()  # groups that go through a norm without affine parameters
        for node, names, has_affine in _norms(groups):
            self.affine.update(names)
            spec = groups.outputs.get(node.name)
            if not has_affine and isinstance(spec, TensorSpec):
                self.bare |= {g for extent in spec.extents for g, _ in extent.parts}

    def of(
        self,
        number: int,
        members: Sequence[Member] | None = None,
        trains: Callable[[str], bool] = lambda name: True,
    ) -> list[Member]:
        """Those of one group, each once.

        Args:
            number: of the group.
            members: that are left of it; None: all.
            trains: whether a parameter gets a gradient, by its name.
        """
        members = self.groups.groups[number].members if members is None else members
        rows = [m for m in members if m.dim == 0]
        weights = [m for m in rows if len(self.groups.parameters[m.name].extents) > 1]
        norms = [m for m in rows if m.name in self.affine and m.name in self.parameters]
        readers = [m for m in members if norms or number in self.bare if self._reads(m)]
        found = [self._once(c) for c in (norms, readers, weights, rows, members)]
        found = [choice for choice in found if choice]
        trained = [choice for choice in found if any(trains(m.name) for m in choice)]
        return (trained or found or [[]])[0]

    def _reads(self, member: Member) -> bool:
        owner = owner_of(self.groups.traced.root, member.name)
        return member.dim not in output_dims(owner, self.tensors[member.name])

    def _once(self, members: Sequence[Member]) -> list[Member]:
        known = [m for m in reversed(members) if m.name in self.parameters]
        return list(reversed({id(self.parameters[m.name]): m for m in known}.values()))


def is_gone(kept: Sequence[torch.Tensor | None]) -> bool:
    """Whether a parameter went with a branch that was dropped whole, by what is kept of it."""
    return any(index is not None and not len(index) for index in kept)


def places_of(member: Member, units: IntArray, kept: Sequence[torch.Tensor | None]) -> IntArray:
    """Where the slices of these units are in what is left of a parameter, (units, width)."""
    own = member.index[units]
    survivors = kept[member.dim]
    return own if survivors is None else np.searchsorted(survivors.numpy(), own)


def finest_dtype(device: torch.device) -> torch.dtype:
    """What scores are summed up in: float64, which Apple's GPUs have not."""
    return torch.float32 if device.type == "mps" else torch.float64


def sums_of_products(parameter: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Sum of `W * dW` over all that each unit owns, in the finest dtype.

    Args:
        parameter: with its gradient; without one all is 0.
        dim: along which units own slices.
        index: (units, width), the slices of each.

    Returns:
        (units,), on the device of the parameter.
    """
    gradient, finest = parameter.grad, finest_dtype(parameter.device)
    if gradient is None:
        return torch.zeros(len(index), dtype=finest, device=parameter.device)
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    weight = parameter.detach()
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    product = (weight * gradient.detach().to(weight.dtype)).movedim(dim, 0)
    rows = product.reshape(product.shape[0], -1).sum(1, dtype=finest)
    return rows[index.to(rows.device)].sum(1)


def _norms(groups: ChannelGroups) -> Iterator[tuple[fx.Node, list[str], bool]]:
    """Norms with statistics of one channel or a few: node, parameters, whether it has a weight."""
    root = groups.traced.root
    for node in groups.traced.module.graph.nodes:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if isinstance(module, _NORMS) and getattr(module, "num_groups", 2) > 1:
                names = [f"{node.target}.{leaf}" for leaf in ("weight", "bias")]
                yield node, names, getattr(module, "weight", None) is not None
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            if node.target in _OF_GROUPS and 1 in (*node.args[1:2], node.kwargs.get("num_groups")):
                continue
            place = _FUNCTIONS[node.target]
            given: dict[str, Any] = dict(zip(("weight", "bias"), node.args[place:], strict=False))
            own = [given.get(leaf, node.kwargs.get(leaf)) for leaf in ("weight", "bias")]
            names = [str(a.target) for a in own if isinstance(a, fx.Node) and a.op == "get_attr"]
            yield node, names, own[0] is not None
