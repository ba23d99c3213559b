"""Pruning while training: the network shrinks at milestones of the caller's own loop."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from halp_fx.budget import Budget, parse_budget
from halp_fx.errors import InputError
from halp_fx.latency import resolve_backend, tell_foreign
from halp_fx.passes.latency import price
from halp_fx.passes.rules.scope import Selection
from halp_fx.passes.rules.widths import MIN_SHARE, Widths
from halp_fx.passes.rules.wrappers import unwrapped
from halp_fx.passes.select import check_solver
from halp_fx.random_state import same_random_state
from halp_fx.training.arguments import (
    Optimizers,
    check_count,
    check_forward,
    check_model,
    check_saliency,
    check_scale,
    check_smoothing,
    listed,
    optimizers_in,
)
from halp_fx.training.choice import Chooser, plan_from_text, plan_to_text
from halp_fx.training.dense import Dense
from halp_fx.training.masking import Mask, complement
from halp_fx.training.processes import agreed, check_same
from halp_fx.training.schedule import Schedule, check_schedule, shares
from halp_fx.training.scores import GradientScores, NotFiniteError
from halp_fx.training.state import check_state, one_or_all, same_widths
from halp_fx.training.surgery import (
    adopt,
    carry_optimizer,
    check_optimizer,
    copy_inside,
    load_values,
    synchronise_like,
)
from halp_fx.training.wrapping import Wrap, retire, wrapping_of
from halp_fx.types import Plan

__all__ = ["GradualPruner"]

_HALVINGS = 16  # of GradScaler, from 2**16: so many steps may overflow at first


class GradualPruner:
    """Prunes a network to a latency budget while a loop of your own trains it.

    At each of `steps` milestones, `every` optimiser steps apart, the channels that matter least by
    the gradients seen since the last one are cut out of the network, of the optimiser's state
    and of averaged copies. After the last milestone the network is within the budget; where
    latency is measured, `plan.report` has "met" where the last one cut something.

    Args:
        model: a trained network; it is left as it is, and `pruner.model` is what to train. A
            network in DistributedDataParallel is wrapped again, in the same way, after each cut.
        budget: as in `halp_fx.compile`.
        example_inputs: as in `halp_fx.compile`.
        steps: number of milestones.
        every: optimiser steps from one milestone to the next.
        schedule: how the budget tightens: "exponential" (the paper's), "linear", or a callable,
            see `halp_fx.training.limit_at`.
        soft: before the last milestone, channels are not cut but masked, and may come back: the
            weights that read them are zero whenever the network runs, and trained on aside. All
            is cut at the last.
        saliency: "fisher", mean squares of the first-order change of the loss; "taylor", HALP's
            mean absolute values; or "taylor1.5", between the two.
        smoothing: None averages the scores of all minibatches since the last milestone; 0.9 is
            a moving average over minibatches in which the past weighs 0.9.
        wrap: what to put around the network, called after each cut: `lambda net: DDP(net, ...)`.
        latency, include, exclude, exact, solver, drop_blocks, min_share, min_width, round_to,
            verify: as in `halp_fx.compile`. The latencies are priced once, for the dense network.

    Raises:
        InputError: an argument is wrong (`BudgetError` for the budget).
        InfeasibleError: the budget can't be met, whatever the scores will be.
        NothingToPruneError: every channel is pinned.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
        >>> pruner = GradualPruner(net, 0.5, torch.rand(1, 3, 16, 16), steps=2, every=1,
        ...                        latency="analytic")
        >>> optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.01, momentum=0.9)
        >>> for _ in range(2):
        ...     pruner.model(torch.rand(4, 3, 16, 16)).square().mean().backward()
        ...     pruner.after_backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     cut = pruner.step(optimizer)
        >>> pruner.done, pruner.plan.predicted_ms <= 0.5 * pruner.plan.dense_ms
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float | str | Budget,
        example_inputs: Any = None,
        *,
        steps: int = 30,
        every: int = 100,
        schedule: Schedule = "exponential",
        latency: Any = None,
        include: Selection | None = None,
        exclude: Selection | None = None,
        exact: bool = False,
        solver: str = "joint",
        drop_blocks: bool = True,
        min_share: float | Mapping[str, float] = MIN_SHARE,
        min_width: int | Mapping[str, int] = 0,
        round_to: int | Mapping[str, int] | None = None,
        soft: bool = False,
        saliency: str = "fisher",
        smoothing: float | None = None,
        verify: bool = True,
        wrap: Wrap | None = None,
    ) -> None:
        check_model(model)
        check_count("steps", steps)
        check_count("every", every)
        check_smoothing(smoothing)
        check_saliency(saliency)
        check_schedule(schedule, steps)
        limit = parse_budget(budget)
        check_solver(solver, limit.further)
        if isinstance(min_share, Mapping):
            min_share = {"*": MIN_SHARE, **min_share}
        allowed = Widths(min_share=min_share, min_width=min_width, round_to=round_to)
        model, self._wrap = wrapping_of(model, wrap)
        model = unwrapped(model, stacklevel=3)

        self.steps, self.every, self.soft = steps, every, soft
        self.milestone = 0  # milestones that were passed
        self._count = 0  # optimiser steps
        self._put_off = 0  # how often the next milestone was put off
        self._scored = False  # whether this optimiser step's gradients were taken in
        with torch.inference_mode(False), same_random_state():
            self._dense = Dense.of(
                model, example_inputs, include=include, exclude=exclude, exact=exact
            )
            groups = self._dense.groups
            widths = allowed.resolve(groups)
            device = next(groups.traced.root.parameters()).device
            self._chooser: Chooser | None = None  # in the first process alone

            def prepare() -> str:
                source = resolve_backend(latency, device=device)
                tell_foreign(source)
                self._chooser = Chooser(
                    groups, price(groups, source), source, limit, schedule, steps, widths, solver,
                    drop_blocks, verify,
                )  # fmt: skip
                self._chooser.check()
                costs = self._chooser.costs
                return json.dumps({"latency": costs.device, "dense_ms": costs.dense_ms})

            self._settings = {
                "budget": str(limit),
                "steps": steps,
                "every": every,
                "soft": soft,
                "solver": solver,
                "saliency": saliency,
                "smoothing": smoothing,
                "schedule": shares(schedule, steps),
                "exact": exact,
                "drop_blocks": drop_blocks,
                "min_share": one_or_all([own.min_share for own in widths]),
                "min_width": one_or_all([own.min_width for own in widths]),
                "round_to": one_or_all([own.round_to for own in widths]),
                **json.loads(agreed(prepare, device)),
            }
            whole = self._dense.whole()
            self.network: fx.GraphModule = self._dense.build(whole)
            self._built = self._chosen = self._dense.with_sizes(whole, self.network)
            self._scores = GradientScores(groups, saliency, smoothing)
            self._scores.follow(self.network, self._built.units, self._built.kept)
            self._mask = Mask(groups)
            self.model: nn.Module = self._wrapped()

    @property
    def plan(self) -> Plan:
        """What the last milestone chose: kept channels, latencies, report."""
        return self._chosen

    @property
    def done(self) -> bool:
        """Whether the last milestone was passed: the network is final."""
        return self.milestone >= self.steps

    def after_backward(self, scale: float = 1.0) -> None:
        """Take in the scores of this optimiser step's gradients; no extra pass.

        Call it once an optimiser step, after the last `backward()` and before `zero_grad()`,
        best before gradients are clipped. It may be left out in some steps to save time.

        Args:
            scale: what the loss was multiplied by: `scaler.get_scale()` for gradients that a
                `torch.amp.GradScaler` has not unscaled yet.

        Raises:
            InputError: there are no gradients, or it was called twice in an optimiser step.
            SaliencyError: no gradient reaches a group of channels.
        """
        if self.done:
            return
        if self._scored:
            raise InputError(
                "after_backward() was called twice without pruner.step() in between: call both "
                "once an optimiser step; with gradient accumulation, after the last micro-batch"
            )
        self._scores.add(check_scale(scale))
        self._scored = True

    def step(self, optimizer: Optimizers, *, ema: Any = None) -> bool:
        """Count an optimiser step, and at a milestone cut the network.

        Call it after each `optimizer.step()` and `zero_grad()`. `pruner.network` stays the same
        object; its layers and parameters are new ones after a cut, and so is `pruner.model` where
        the network is wrapped. A milestone for which no minibatch gave finite scores is tried
        again at each step that follows, for one more interval. After an error, the next call
        counts as the same step.

        Args:
            optimizer: the optimiser, or all of them: states of the parameters that stay are cut.
                An empty list if there is none.
            ema: averaged copies to cut as well: a `torch.optim.swa_utils.AveragedModel` of
                `pruner.network`, any module that has a copy in `.module`, a copy, or several.
                With `soft` they are masked too: pass them at every step.

        Returns:
            Whether the network was cut just now.

        Raises:
            InputError: the optimiser has not the network's parameters, or a state that can't be
                cut; there are no scores yet; the copy is not one of the network.
            InfeasibleError, SaliencyError: see `halp_fx.compile`. Nothing was changed then.
        """
        optimizers_in(optimizer)
        self._scored = False
        self._absorb(ema)
        cut, count = False, self._count + 1
        if not self.done and count >= self.every * (self.milestone + 1):
            try:
                cut = self._advance(self.milestone + 1, optimizer, ema)
            except NotFiniteError:
                if self._put_off >= max(self.every, _HALVINGS):
                    raise
                self._put_off += 1
        self._count = count
        return cut

    def finish(self, optimizer: Optimizers, *, ema: Any = None) -> bool:
        """Go to the final budget now, whatever milestones are left.

        Args and errors are those of `step`. Right after a milestone, before any `after_backward`,
        the scores of that milestone decide.

        Returns:
            Whether the network was cut just now.
        """
        self._scored = False
        self._absorb(ema)
        return False if self.done else self._advance(self.steps, optimizer, ema, recall=True)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on, the network's weights included.

        Tensors and plain values only: `torch.load(..., weights_only=True)` reads it back.
        """
        return {
            "version": 1,
            "settings": dict(self._settings),
            "groups": self._group_names(),
            "count": self._count,
            "milestone": self.milestone,
            "put_off": self._put_off,
            "built": plan_to_text(self._built),
            "chosen": plan_to_text(self._chosen),
            "scores": self._scores.state_dict(),
            "masked": self._mask.state(),
            "network": {k: v.detach().clone() for k, v in self.network.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; build the optimiser after this.

        A network that has the widths of the state keeps its parameters.

        Raises:
            InputError: it is of another network, or of a pruner with other arguments.
        """
        check_state(state, self._settings, self._group_names())
        check_forward(self.network)
        built = plan_from_text(state["built"], self._dense.groups)
        present = self.network
        self._mask.lift()
        if same_widths(self._built, built, present, state["network"]):
            present.load_state_dict(state["network"])
            built = self._dense.with_sizes(built, present)
            present.meta["halp_fx"] = self._dense.without_network(built)
        else:
            with torch.inference_mode(False), same_random_state():
                fresh = self._dense.build(built)
            built = self._dense.with_sizes(built, fresh)
            load_values(fresh, present, state["network"])
            synchronise_like(fresh, present)
            adopt(present, fresh)
            self.model = self._wrapped()
        self._built = built
        self._chosen = plan_from_text(state["chosen"], self._dense.groups)
        self._count, self.milestone = int(state["count"]), int(state["milestone"])
        self._put_off = int(state.get("put_off", 0))
        self._scored = False
        self._scores.follow(present, built.units, built.kept)
        self._scores.load_state_dict(state["scores"])
        self._mask = Mask(self._dense.groups)
        hidden = complement(built.units, self._chosen.units)
        if any(len(own) for own in hidden):
            self._mask.put(present, hidden)
            self._mask.load_state(state["masked"])
            self._scores.hide(hidden)

    def _absorb(self, ema: Any) -> None:
        """Keep masked weights at zero, in averaged copies too."""
        if self._mask.units is not None:
            self._mask.absorb([copy_inside(each, self.network) for each in listed(ema)])

    def _advance(
        self, milestone: int, optimizer: Optimizers, ema: Any, recall: bool = False
    ) -> bool:
        check_forward(self.network)
        optimizers = optimizers_in(optimizer)
        copies = [copy_inside(each, self.network) for each in listed(ema)]
        for each in optimizers:
            check_optimizer(each, self.network)
        device = next(self.network.parameters()).device
        check_same(self._group_names() + plan_to_text(self._built), "networks", device)
        with torch.inference_mode(False), same_random_state():
            alive = self._built.units
            left = any(len(own) for own in alive)
            saliency = (
                self._scores.saliency(alive, self._mask.units, recall=recall) if left else None
            )

            def decide() -> str:
                assert self._chooser is not None
                if saliency is None:
                    return plan_to_text(self._chooser.keep(milestone, self._built))
                return plan_to_text(self._chooser.choose(milestone, alive, saliency))

            chosen = plan_from_text(agreed(decide, device), self._dense.groups)
            cut = self._carry_out(chosen, optimizers, copies, final=milestone >= self.steps)
        self.milestone, self._put_off = milestone, 0
        self._scores.start_again()
        return cut

    def _carry_out(
        self,
        chosen: Plan,
        optimizers: Sequence[torch.optim.Optimizer],
        copies: Sequence[fx.GraphModule],
        final: bool,
    ) -> bool:
        """Mask or cut the network; whether it was cut."""
        network, before, dense = self.network, self._built, self._dense
        self._chosen = chosen
        if self.soft and not final:
            hidden = complement(before.units, chosen.units)
            self._mask.put(network, hidden, copies)
            self._scores.hide(hidden)
            return False
        self._mask.lift(copies)
        pairs = zip(before.units, chosen.units, strict=True)
        if all(len(old) == len(new) for old, new in pairs):
            self._chosen = chosen = dense.with_sizes(chosen, network)
            network.meta["halp_fx"] = dense.without_network(chosen)
            self._built = chosen
            return False
        shrunk = [dense.shrink(copy, before, chosen) for copy in copies]
        fresh = dense.shrink(network, before, chosen)
        self._chosen = chosen = dense.with_sizes(chosen, fresh)
        cuts = dense.cuts(network, before, chosen)
        commits = [carry_optimizer(each, network, cuts) for each in optimizers]
        for copy, new in zip(copies, shrunk, strict=True):
            adopt(copy, new)
        adopt(network, fresh)
        for commit in commits:
            commit(network)
        self._built = chosen
        self._scores.follow(network, chosen.units, chosen.kept)
        self.model = self._wrapped()
        return True

    def _wrapped(self) -> nn.Module:
        if hasattr(self, "model"):
            retire(self.model)
        wrapped = self._wrap(self.network)
        check_forward(self.network)
        return wrapped

    def _group_names(self) -> str:
        return ", ".join(f"{g.name}: {g.units}" for g in self._dense.groups.groups)
