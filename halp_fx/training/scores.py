"""Scores from the gradients that a training loop computes anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from halp_fx.errors import InputError, SaliencyError
from halp_fx.passes.rules.scored import (
    ScoredMembers,
    finest_dtype,
    is_gone,
    places_of,
    sums_of_products,
)
from halp_fx.passes.rules.structure import tensor_at
from halp_fx.passes.saliency import BY_LOSS, score
from halp_fx.training.processes import sum_up
from halp_fx.types import ChannelGroups, FloatArray, IntArray, Member, Saliency

__all__ = ["GradientScores", "NotFiniteError"]

_Kept = Mapping[str, tuple[torch.Tensor | None, ...]]


class NotFiniteError(SaliencyError):
    """No minibatch gave a group a score that is finite."""


@dataclass(frozen=True)
class _Part:
    """Slices of one parameter that belong to the units of a group."""

    parameter: nn.Parameter
    dim: int
    index: torch.Tensor  # (units alive, width) int64: positions along `dim`


class GradientScores:
    """Scores of all units, gathered minibatch by minibatch.

    They are those of `halp_fx.passes.saliency.score`, by the gradients as they are. Minibatches
    with scores that are not finite are skipped, group by group.

    Args:
        groups: of the dense network.
        method: "fisher", "taylor1.5" or "taylor".
        smoothing: None averages the minibatches since the last choice; a number from 0 to below
            1 is the weight of the past in a moving average that goes on over choices.
    """

    def __init__(self, groups: ChannelGroups, method: str, smoothing: float | None) -> None:
        self.groups = groups
        self.method = method
        self.smoothing = smoothing
        self._members = ScoredMembers(groups)
        self._reached = [False] * len(groups.groups)  # by a gradient since the last choice
        self._parts: list[list[_Part]] = []
        self._alive: list[torch.Tensor] = []
        self._shown: list[torch.Tensor] | None = None  # bool, like `_alive`; None: all
        self.totals: list[torch.Tensor] = []  # (units of the dense group,) each
        self.weights: list[torch.Tensor] = []  # () each
        self.batches = 0
        # Scores at the last choice, relative to the mean of all units: (units,) a group.
        self.relative: list[FloatArray] = [np.zeros(n) for n in groups.dense_units]

    def follow(self, network: fx.GraphModule, units: Sequence[IntArray], kept: _Kept) -> None:
        """Read the gradients of this network from now on; units that are gone are forgotten."""
        device = next(network.parameters()).device
        self._shown = None
        self._alive = [torch.from_numpy(u).to(device) for u in units]
        self._parts = []
        for number, (group, own) in enumerate(zip(self.groups.groups, units, strict=True)):
            left = [m for m in group.members if len(own) and not is_gone(kept[m.name])]
            members = self._members.of(
                number, left, lambda name: tensor_at(network, name).requires_grad
            )
            self._parts.append([_part(network, m, own, kept) for m in members])
        if not self.totals:
            self.totals = [
                torch.zeros(n, dtype=finest_dtype(device), device=device)
                for n in self.groups.dense_units
            ]
            self.weights = [
                torch.zeros((), dtype=finest_dtype(device), device=device) for _ in self.totals
            ]
        self._move(device)
        for total, alive in zip(self.totals, self._alive, strict=True):
            remaining = total[alive]
            total.zero_()
            total[alive] = remaining

    def hide(self, masked: Sequence[IntArray]) -> None:
        """Leave the averages of these units as they are: their gradients say nothing."""
        self._shown = [torch.ones_like(alive, dtype=torch.bool) for alive in self._alive]
        for shown, own in zip(self._shown, masked, strict=True):
            # Nothing is cut while there is a mask: units are positions.
            shown[torch.from_numpy(own).to(shown.device)] = False

    def add(self, scale: float) -> None:
        """Take the gradients of one minibatch in; they are `scale` times the loss's.

        Raises:
            InputError: there are no gradients at all.
            SaliencyError: a group gets none.
        """
        self._check_gradients()
        keep = 1.0 if self.smoothing is None else self.smoothing
        gain = 1.0 if self.smoothing is None else 1.0 - self.smoothing
        present = next((part.parameter for parts in self._parts for part in parts), None)
        if present is not None:  # None: all channels that can go are gone
            self._move(present.device)
        shown_units: Sequence[torch.Tensor | None] = self._shown or [None] * len(self._parts)
        each = zip(self._parts, self._alive, shown_units, self.totals, self.weights, strict=True)
        for g, (parts, alive, shown, total, weight) in enumerate(each):
            # A loss that leaves out a head says nothing of it.
            if all(part.parameter.grad is None for part in parts):
                continue
            self._reached[g] = True
            products = [sums_of_products(p.parameter, p.dim, p.index) for p in parts]
            value = torch.stack(products).sum(0) / scale
            value = value.abs() ** BY_LOSS[self.method]
            # No branch on the values: that would wait for the device in every step.
            fine = torch.isfinite(value).all()
            old, weight_now = total.index_select(0, alive), weight * keep + gain
            new = old * keep + value * gain
            if shown is not None:
                # The same average: totals are divided by the group's weight, which moves on.
                still = old * torch.where(weight > 0, weight_now / weight, 0.0)
                new = torch.where(shown, new, still)
            total[alive] = torch.where(fine, new, old)
            weight.copy_(torch.where(fine, weight_now, weight))
        self.batches += 1

    def saliency(
        self,
        units: Sequence[IntArray],
        masked: Sequence[IntArray] | None = None,
        *,
        recall: bool = False,
    ) -> Saliency:
        """The scores of these units, one array a group, averaged over all processes.

        Args:
            masked: units of each group whose gradients say nothing, since they have no effect now.
                They keep the score that they had last, relative to the mean of all others.
            recall: without a minibatch since the last choice, take the scores of that choice.

        Raises:
            InputError: no minibatch was taken in since the last choice.
            NotFiniteError: those of a group are not finite in any minibatch.
            SaliencyError: they are all zero.
        """
        totals, weights = [t.clone() for t in self.totals], [w.clone() for w in self.weights]
        batches = torch.full_like(weights[0], self.batches)
        sum_up([*totals, *weights, batches])
        if not float(batches):
            if recall and any(r.any() for r in self.relative):
                last = [r[own] for r, own in zip(self.relative, units, strict=True)]
                return self._scored(last, units)
            raise InputError(
                "no gradients were scored since the last milestone: call pruner.after_backward() "
                "after loss.backward()"
            )
        scores: list[FloatArray] = []
        each = zip(self.groups.groups, units, self._parts, totals, weights, strict=True)
        for g, (group, own, parts, total, weight) in enumerate(each):
            unknown = len(own) and parts and not float(weight)
            if unknown and not self._reached[g]:
                raise _unreached(group.name)
            if unknown:
                raise NotFiniteError(
                    f"the saliency of group {group.name!r} is not finite in any of "
                    f"{self.batches} minibatches: check the loss for NaN or infinity"
                )
            scores.append(total.cpu().double().numpy()[own] / max(float(weight), 1e-300))
        if not any(own.any() for own in scores):
            raise SaliencyError(
                "all gradients were zero since the last milestone: call pruner.after_backward() "
                "before optimizer.zero_grad(), with a loss that depends on the network's output"
            )
        self._recall(scores, units, masked)
        return self._scored(scores, units)

    def _scored(self, scores: list[FloatArray], units: Sequence[IntArray]) -> Saliency:
        def given(_: ChannelGroups) -> list[FloatArray]:
            return scores

        found = score(_alive_groups(self.groups, units), method=given)
        return replace(found, method=self.method, data_free=False)

    def _recall(
        self,
        scores: list[FloatArray],
        units: Sequence[IntArray],
        masked: Sequence[IntArray] | None,
    ) -> None:
        """Give masked units their last score, and note what all have now; both relative."""
        effective = [np.ones(len(s), dtype=bool) for s in scores]
        for own, hidden in zip(effective, masked or (), strict=masked is not None):
            own[hidden] = False  # nothing is cut while there is a mask: units are positions
        seen = np.concatenate([s[own] for s, own in zip(scores, effective, strict=True)])
        mean = float(seen.mean()) if len(seen) else 0.0
        for g, (score_, own, alive) in enumerate(zip(scores, effective, units, strict=True)):
            score_[~own] = self.relative[g][alive][~own] * mean
            if mean > 0:
                self.relative[g][alive] = score_ / mean

    def start_again(self) -> None:
        """Forget the minibatches that a plain average has seen; a moving one goes on."""
        if self.smoothing is None:
            for tensor in (*self.totals, *self.weights):
                tensor.zero_()
            self._reached = [False] * len(self._reached)
        self.batches = 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "totals": [t.detach().cpu().clone() for t in self.totals],
            "weights": [w.detach().cpu().clone() for w in self.weights],
            "batches": self.batches,
            "relative": [torch.from_numpy(r.copy()) for r in self.relative],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, for the same groups."""
        for own, saved in zip(self.totals, state["totals"], strict=True):
            own.copy_(saved)
        for own, saved in zip(self.weights, state["weights"], strict=True):
            own.copy_(saved)
        self.batches = int(state["batches"])
        self.relative = [r.cpu().numpy().copy() for r in state["relative"]]

    def _move(self, device: torch.device) -> None:
        """Follow a network that was moved to another device."""
        if all(t.device == device for t in (*self.totals, *self._alive)):
            return
        self.totals = [t.to(device, finest_dtype(device)) for t in self.totals]
        self.weights = [w.to(device, finest_dtype(device)) for w in self.weights]
        self._alive = [own.to(device) for own in self._alive]
        if self._shown is not None:
            self._shown = [own.to(device) for own in self._shown]
        self._parts = [
            [replace(part, index=part.index.to(device)) for part in parts] for parts in self._parts
        ]

    def _check_gradients(self) -> None:
        present = [part.parameter for parts in self._parts for part in parts]
        if present and all(parameter.grad is None for parameter in present):
            raise InputError(
                "no gradients: call after_backward() after loss.backward() and before "
                "optimizer.zero_grad(), with a loss of pruner.model's output"
            )
        for group, parts in zip(self.groups.groups, self._parts, strict=True):
            if parts and not any(part.parameter.requires_grad for part in parts):
                raise _unreached(group.name)


def _unreached(name: str) -> SaliencyError:
    return SaliencyError(
        f"no gradient reaches the group {name!r}: its layers are frozen, or the loss does not "
        f"depend on them. Leave it whole with exclude=[{name!r}], or train it"
    )


def _alive_groups(groups: ChannelGroups, units: Sequence[IntArray]) -> ChannelGroups:
    """The groups with only these units, to choose from; their numbers count from 0 anew."""
    return replace(
        groups,
        groups=tuple(
            replace(g, units=len(own)) for g, own in zip(groups.groups, units, strict=True)
        ),
        unit_components=tuple(c[own] for c, own in zip(groups.unit_components, units, strict=True)),
    )


def _part(network: fx.GraphModule, member: Member, units: IntArray, kept: _Kept) -> _Part:
    parameter = tensor_at(network, member.name)
    assert isinstance(parameter, nn.Parameter)
    index = places_of(member, units, kept[member.name])
    return _Part(parameter, member.dim, torch.from_numpy(index).to(parameter.device))
