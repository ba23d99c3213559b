"""Soft pruning: channels without effect that are trained on, and may come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from halp_fx.passes.rules.scope import output_dims, owner_of
from halp_fx.passes.rules.structure import named_tensors, tensor_at
from halp_fx.types import ChannelGroups, IntArray, Member

__all__ = ["Mask", "complement"]


@dataclass(frozen=True)
class _Columns:
    """Weights that read masked units of one group."""

    name: str
    parameter: nn.Parameter
    dim: int
    positions: torch.Tensor  # (units * width,) int64, along `dim`
    kept: torch.Tensor  # what they would be without the mask
    hook: Any = None  # where nothing of the parameter is left

    def now(self) -> torch.Tensor:
        whole = self.parameter.detach()
        return whole.index_select(self.dim, self.positions.to(whole.device))

    def set(self, value: torch.Tensor, copies: Sequence[nn.Module] = ()) -> None:
        for own in (self.parameter, *(tensor_at(each, self.name) for each in copies)):
            whole = own.detach()
            whole.index_copy_(self.dim, self.positions.to(whole.device), value.to(whole))


class Mask:
    """Keeps the weights that read masked units at zero, and what they would be aside.

    The network then computes what it will compute without those units. A gradient still reaches
    the weights at zero; what the optimiser adds to them is added to those that are kept aside,
    so they are trained as if the mask let gradients through (Lin et al., Dynamic Model Pruning
    with Feedback, ICLR 2020). But weights of which all are at zero get none: a batch norm after
    them sees no variance, and makes gradients hundreds of times too large of it.

    Averaged copies are masked alike. An average over zeros says nothing about a unit that comes
    back, so it starts again at the network's weights.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        self.groups = groups
        self.units: list[IntArray] | None = None  # masked units of each group
        self._columns: list[_Columns] = []

    def put(
        self,
        network: fx.GraphModule,
        removed: Sequence[IntArray],
        copies: Sequence[nn.Module] = (),
    ) -> None:
        """Mask these units of a network with dense widths; those masked before come back first."""
        self.lift(copies)
        self.units = list(removed)
        with torch.no_grad():
            for g, own in enumerate(removed):
                for parameter, member in self._readers(network, g) if len(own) else ():
                    index = torch.from_numpy(member.index[own].reshape(-1)).to(parameter.device)
                    kept = parameter.detach().index_select(member.dim, index)
                    hook = None
                    if len(index) == parameter.shape[member.dim] and parameter.requires_grad:
                        hook = parameter.register_hook(torch.zeros_like)
                    columns = _Columns(member.name, parameter, member.dim, index, kept, hook)
                    columns.set(torch.zeros_like(kept), copies)
                    self._columns.append(columns)

    def absorb(self, copies: Sequence[nn.Module] = ()) -> None:
        """Take over what the optimiser did to the masked weights, and set them to zero again."""
        for columns in self._columns:
            change = columns.now()
            columns.kept.add_(change.to(columns.kept))
            columns.set(torch.zeros_like(change), copies)

    def lift(self, copies: Sequence[nn.Module] = ()) -> None:
        """Put all weights back where they belong."""
        for columns in reversed(self._columns):  # where two overlap, the first has the whole
            columns.set(columns.kept, copies)
            if columns.hook is not None:
                columns.hook.remove()
        self._columns, self.units = [], None

    def state(self) -> list[torch.Tensor]:
        """The weights kept aside."""
        return [columns.kept.detach().cpu().clone() for columns in self._columns]

    def load_state(self, state: Sequence[torch.Tensor]) -> None:
        """What `state` gave, for the same mask."""
        for columns, kept in zip(self._columns, state, strict=True):
            columns.kept.copy_(kept)

    def _readers(self, network: fx.GraphModule, g: int) -> Iterator[tuple[nn.Parameter, Member]]:
        """The parameters that read a group's channels, each once.

        Channels that no weight reads as an input (q and k of attention) have none.
        """
        tensors = dict(named_tensors(network))
        seen: set[tuple[int, int]] = set()
        for member in self.groups.groups[g].members:
            tensor = tensors[member.name]
            key = (id(tensor), member.dim)
            reads = member.dim not in output_dims(owner_of(network, member.name), tensor)
            if reads and isinstance(tensor, nn.Parameter) and key not in seen:
                seen.add(key)
                yield tensor, member


def complement(all_: Sequence[IntArray], kept: Sequence[IntArray]) -> list[IntArray]:
    """The units of each group that are not kept."""
    return [np.setdiff1d(own, left) for own, left in zip(all_, kept, strict=True)]
