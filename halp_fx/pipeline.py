"""The pipeline: a network made ready for any budget, and pruned to one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from halp_fx.budget import Budget, parse_budget
from halp_fx.candidates import Draft, Evaluate, Maker, best_of, variants
from halp_fx.errors import InfeasibleError, InputError, NothingToPruneError, SaliencyError
from halp_fx.latency import Source, measure_network, resolve_backend, tell_foreign
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price, refine
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.rules.limits import dense_counts
from halp_fx.passes.rules.scope import Selection, scope_of
from halp_fx.passes.rules.widths import MIN_SHARE, Widths
from halp_fx.passes.saliency import BY_DATA, score
from halp_fx.passes.select import check_solver, select
from halp_fx.passes.trace import trace
from halp_fx.random_state import same_random_state
from halp_fx.reconstruction import Fit, first_minibatches, refit
from halp_fx.stepwise import check_steps, narrowed, target_at
from halp_fx.types import ChannelGroups, IntArray, LatencyModel, Plan, Saliency, Traced
from halp_fx.verification import Check, can_measure, verified

__all__ = ["Prepared", "Progress", "prepare"]

Progress = Callable[[str, int, int], None]
Choose = Callable[[ChannelGroups, Saliency, LatencyModel, float], Plan]

_REFINEMENTS = 3  # how often the chosen widths are measured and chosen again


def _silent(stage: str, done: int, total: int) -> None:
    return None


def _ignored(stage: str) -> None:
    return None


@dataclass(frozen=True)
class Further:
    """A latency that is limited besides the budget's."""

    source: Source
    costs: LatencyModel
    budget: Budget
    planned: Budget  # the same, see `_planned`

    @property
    def most_ms(self) -> float:
        """The limit, by the table."""
        return self.planned.in_ms(self.costs.dense_ms)


@dataclass(frozen=True)
class Prepared:
    """A network that is traced, grouped, scored and priced: ready for any budget."""

    model: nn.Module  # the caller's
    groups: ChannelGroups
    scores: Saliency
    costs: LatencyModel
    source: Source
    also: Sequence[Further]
    options: Mapping[str, Any]  # further arguments of `select`
    data: Iterable[Any] | None
    loss: Callable[[Any, Any], torch.Tensor] | None
    candidates: int
    evaluate: Evaluate | None
    steps: int
    reconstruct: bool
    verify: bool
    tell: Progress

    def prune(self, limit: Budget) -> fx.GraphModule:
        """The network within a budget; see `halp_fx.compile`.

        Raises:
            InfeasibleError: the budget can't be met.
            HalpError: any other error of ours.
        """
        with _guarded(self.model, self.tell) as stage:
            stage("select")
            planned = _planned(limit, self.groups.traced, self.source) if self.verify else limit
            costs, draft = self._first_draft(limit, planned, stage)
            facts: Mapping[str, Any] = {}
            if self.candidates > 1:
                stage("candidates")
                best = best_of(
                    draft, self._others(planned), costs, self.data, self.loss,
                    partial(self.tell, "candidates"), self.evaluate, reconstruct=self.reconstruct,
                )  # fmt: skip
                draft, costs, facts = best.draft, best.costs, best.facts
            facts = {"steps": draft.steps, **facts}
            plan = self._annotated(draft.plan, draft.scores, costs, facts)
            if self.verify and any(
                can_measure(s) for s in (self.source, *(o.source for o in self.also))
            ):
                stage("verify")
                pruned = self._verified(plan, limit, draft, costs, facts)
            else:
                stage("rewrite")
                pruned = rewrite(plan)
            if self.reconstruct:
                stage("reconstruct")
                self._reconstruct(pruned)
        plan = pruned.meta["halp_fx"]  # the network should not keep the dense one alive
        pruned.meta["halp_fx"] = replace(plan, groups=plan.groups.without_network())
        return pruned

    def _first_draft(
        self, limit: Budget, planned: Budget, stage: Callable[[str], None]
    ) -> tuple[LatencyModel, Draft]:
        try:
            return self._draft(self.scores, self.costs, planned, self.steps, stage, self.tell)
        except InfeasibleError as error:
            if planned == limit or limit.further or self.also:  # it may be of those
                raise
            table_ms, share = self.costs.dense_ms, planned.share or 1.0
            dense_ms = float(limit.latency_ms or 0.0) / share
            raise InfeasibleError(
                f"{error}. Those are times by the table, where the dense network takes "
                f"{table_ms:.4g} ms; it takes {dense_ms:.4g} ms as measured now",
                error.least * dense_ms / table_ms,
            ) from error

    def _draft(
        self,
        scores: Saliency,
        costs: LatencyModel,
        limit: Budget,
        steps: int,
        stage: Callable[[str], None] = _ignored,
        tell: Progress = _silent,
    ) -> tuple[LatencyModel, Draft]:
        """A plan by these scores, and costs that were measured near its widths."""
        choose = self._chooser(limit)
        plan = choose(self.groups, scores, costs, limit.in_ms(costs.dense_ms))
        draft = at_once = Draft(plan, scores)
        if steps > 1 and scores.method in BY_DATA and _removes(plan):
            stage("steps")
            draft = self._stepwise(at_once, costs, limit, tell)
        if not can_measure(self.source):
            return costs, draft
        stage("refine")
        try:
            return self._refined(draft, costs, limit, tell)
        except InfeasibleError:
            if draft.among is None:
                raise
            # What the steps left misses the budget by the costs as they are now.
            return self._refined(at_once, costs, limit, tell)

    def _refined(
        self, draft: Draft, costs: LatencyModel, limit: Budget, tell: Progress
    ) -> tuple[LatencyModel, Draft]:
        """Measure the kernels at the widths that were chosen, and choose again by what they take.

        Until the widths stay, or `_REFINEMENTS` times.
        """
        choose, plan = self._chooser(limit, among=draft.among), draft.plan
        for done in range(1, _REFINEMENTS + 1):
            kept = [len(units) for units in plan.units]
            costs = refine(plan.groups, self.source, costs, kept)
            plan = choose(plan.groups, draft.scores, costs, plan.budget_ms)
            tell("refine", done, _REFINEMENTS)
            if kept == [len(units) for units in plan.units]:
                break
        return costs, replace(draft, plan=plan)

    def _others(self, limit: Budget) -> Iterator[Maker]:
        """What is tried besides the first draft; in steps, each score also at once."""
        tried = [(by, self.steps) for by in variants(self.scores, self.candidates - 1)]
        if self.steps > 1:
            of_data = [self.scores, *(by for by, _ in tried if by.method in BY_DATA)]
            half = tried[: (self.candidates - 1) // 2]
            tried = [*half, *((by, 1) for by in of_data), *tried[len(half) :]]
        for by, steps in tried[: self.candidates - 1]:
            yield partial(self._draft, by, limit=limit, steps=steps)

    def _verified(
        self,
        plan: Plan,
        limit: Budget,
        draft: Draft,
        costs: LatencyModel,
        facts: Mapping[str, Any],
    ) -> fx.GraphModule:
        checks = [
            Check(self.source, limit, plan.budget_ms),
            *(Check(other.source, other.budget, other.most_ms) for other in self.also),
        ]

        def choose(asked_ms: Sequence[float]) -> Plan:
            within = self._chooser(limit, among=draft.among, also_ms=asked_ms[1:])
            again = within(self.groups, draft.scores, costs, asked_ms[0])
            return self._annotated(again, draft.scores, costs, facts)

        return verified(plan, checks, choose, partial(self.tell, "verify"))

    def _reconstruct(self, pruned: fx.GraphModule) -> None:
        plan: Plan = pruned.meta["halp_fx"]
        assert self.data is not None
        fits = refit(
            pruned, self.groups.traced.module, plan.kept, first_minibatches(self.data, None),
            tell=partial(self.tell, "reconstruct"),
        )  # fmt: skip
        pruned.meta["halp_fx"] = replace(plan, report={**plan.report, **_facts_of(fits)})

    def _annotated(
        self,
        plan: Plan,
        scores: Saliency,
        costs: LatencyModel,
        facts: Mapping[str, Any],
    ) -> Plan:
        report = {
            **plan.report,
            **facts,
            "model": plan.groups.traced.model_name,
            "saliency": scores.method,
            "data_free": scores.data_free,
            "backend": costs.backend,
            "device": costs.device,
        }
        return replace(plan, report=report)

    def _chooser(
        self,
        limit: Budget,
        done: float = 1.0,
        among: Sequence[IntArray] | None = None,
        also_ms: Sequence[float] | None = None,
    ) -> Choose:
        """Chooses units within all limits, or what they are when a share of the steps is done.

        Args:
            among: units to choose from.
            also_ms: most of the further latencies, where it is not what was asked for at first.
        """
        dense = dense_counts(self.groups) if limit.further else {}
        counts = limit.counts(*dense.values()) if dense else {}
        limits = {name: target_at(dense[name], most, done) for name, most in counts.items()}
        most_ms = also_ms if also_ms is not None else [other.most_ms for other in self.also]
        also = [
            (other.costs, target_at(other.costs.dense_ms, most, done))
            for other, most in zip(self.also, most_ms, strict=True)
        ]

        def choose(
            groups: ChannelGroups, scores: Saliency, costs: LatencyModel, budget_ms: float
        ) -> Plan:
            return select(
                groups, scores, costs, budget_ms,
                limits=limits, also=also, among=among, **self.options,
            )  # fmt: skip

        return choose

    def _stepwise(
        self, at_once: Draft, costs: LatencyModel, limit: Budget, tell: Progress
    ) -> Draft:
        """The plan of the last step, the scores that it is by, and the units that were left."""
        assert self.data is not None
        budget_ms = at_once.plan.budget_ms

        def step(
            scores: Saliency, budget_ms: float, done: float, among: Sequence[IntArray] | None
        ) -> Plan:
            return self._chooser(limit, done, among)(self.groups, scores, costs, budget_ms)

        try:
            among, scores = narrowed(
                self.steps, self.groups, at_once.scores, costs, budget_ms, step,
                self.data, self.loss, partial(tell, "steps"),
            )  # fmt: skip
            last = self._chooser(limit, among=among)
            plan = last(self.groups, scores, costs, budget_ms)
            return Draft(plan, scores, among, self.steps)
        except (InfeasibleError, SaliencyError):
            # Costs need not fall with the width: what is left may miss a budget that can be met.
            # Or nothing can be learnt from gradients once so much is gone.
            return at_once


def prepare(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    latency: Any = None,
    saliency: Callable[[ChannelGroups], Any] | str | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    exact: bool = False,
    solver: str = "joint",
    drop_blocks: bool = True,
    min_share: float | Mapping[str, float] = MIN_SHARE,
    min_width: int | Mapping[str, int] = 0,
    round_to: int | Mapping[str, int] | None = None,
    candidates: int = 1,
    evaluate: Evaluate | None = None,
    steps: int = 1,
    reconstruct: bool = False,
    also: Sequence[tuple[Any, float | str | Budget]] = (),
    verify: bool = True,
    progress: Progress | None = None,
) -> Prepared:
    """All that does not depend on the budget; the arguments are those of `halp_fx.compile`.

    Raises:
        HalpError: as `halp_fx.compile`.
    """
    if isinstance(min_share, Mapping):
        min_share = {"*": MIN_SHARE, **min_share}
    allowed = Widths(min_share=min_share, min_width=min_width, round_to=round_to)
    _check_loss(loss, data)
    _check_flags(drop_blocks=drop_blocks, exact=exact, verify=verify, reconstruct=reconstruct)
    if progress is not None and not callable(progress):
        raise InputError(f"progress must be a callable, not {type(progress).__name__}")
    _check_candidates(candidates, evaluate, data)
    check_steps(steps, data, saliency)
    _check_reconstruct(reconstruct, data)
    further = _latency_limits(also)
    check_solver(solver, also=further)
    tell = progress if progress is not None else _silent
    with _guarded(model, tell) as stage:
        stage("trace")
        _check_data_of(model)
        traced = trace(model, example_inputs)
        source = resolve_backend(latency, device=_device_of(model))
        others = [
            (resolve_backend(where, device=_device_of(model)), most) for where, most in further
        ]
        for each in (source, *(elsewhere for elsewhere, _ in others)):
            tell_foreign(each)
        stage("groups")
        scope = scope_of(traced.root, include, exclude)
        groups = find_groups(traced, exact=exact, scope=scope)
        if not groups.groups:
            raise NothingToPruneError(_why_nothing(groups))
        stage("saliency")
        scores = score(groups, data, loss, saliency, partial(tell, "saliency"), both=candidates > 1)
        stage("latency")
        costs = price(groups, source, progress=partial(tell, "latency"))
        priced = [
            Further(
                elsewhere,
                price(groups, elsewhere, progress=partial(tell, "latency")),
                most,
                _planned(most, traced, elsewhere) if verify else most,
            )
            for elsewhere, most in others
        ]
    return Prepared(
        model=model,
        groups=groups,
        scores=scores,
        costs=costs,
        source=source,
        also=priced,
        options={"solver": solver, "drop_blocks": drop_blocks, "allowed": allowed},
        data=data,
        loss=loss,
        candidates=candidates,
        evaluate=evaluate,
        steps=steps,
        reconstruct=reconstruct,
        verify=verify,
        tell=tell,
    )


def _planned(limit: Budget, traced: Traced, source: Source) -> Budget:
    """A budget in milliseconds as a share of what the dense network takes as measured now.

    Sums of kernels, which were measured on another day maybe, are off by a factor more than by
    anything else. Other budgets stay.
    """
    if limit.latency_ms is None or not can_measure(source):
        return limit
    dense = measure_network(traced.module, traced.example_inputs, source.backend)
    return replace(limit, latency_ms=None, share=min(limit.latency_ms / dense.median_ms, 1.0))


def _check_data_of(model: Any) -> None:
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    if any(tensor.is_meta for tensor in tensors):
        raise InputError(
            f"{type(model).__name__} has parameters without data (on the device 'meta'): "
            "load its weights first"
        )


def _check_loss(loss: Any, data: Any) -> None:
    if loss is None:
        return
    if not callable(loss):
        raise InputError(f"loss must be a callable, not {type(loss).__name__}")
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise InputError(f"loss is the class {loss.__name__}: pass an instance, {loss.__name__}()")
    if data is None:
        raise InputError(
            "loss scores channels on data, and there is none: pass data, or leave loss out to "
            "score by the weights alone"
        )


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise InputError(f"{name} is {value!r}: pass True or False")


def _check_candidates(candidates: Any, evaluate: Any, data: Any) -> None:
    whole = isinstance(candidates, int) and not isinstance(candidates, bool)
    if not whole or candidates < 1 or (candidates > 1 and data is None and evaluate is None):
        raise InputError(
            f"candidates={candidates!r}: pass a whole number of at least 1; above 1 it needs data "
            "to try the plans on, or evaluate"
        )
    if evaluate is not None and not callable(evaluate):
        raise InputError(f"evaluate must be a callable, not {type(evaluate).__name__}")
    if evaluate is not None and candidates == 1:
        raise InputError("evaluate compares candidates: pass candidates=3 or so as well")


def _check_reconstruct(reconstruct: Any, data: Any) -> None:
    if reconstruct and (data is None or isinstance(data, Iterator)):
        what = "no data" if data is None else "an iterator, which is used up after one look"
        raise InputError(
            f"reconstruct=True fits weights to what the network computes on data, and there is "
            f"{what}: pass a list of minibatches or a loader"
        )


def _facts_of(fits: Mapping[str, Fit]) -> dict[str, Any]:
    """For the report: layers that were fitted, and the median error before and after."""
    facts: dict[str, Any] = {"reconstructed_layers": len(fits)}
    if fits:
        facts["reconstruction_error_before"] = float(np.median([f.before for f in fits.values()]))
        facts["reconstruction_error"] = float(np.median([f.after for f in fits.values()]))
    return facts


def _latency_limits(also: Any) -> list[tuple[Any, Budget]]:
    """The pairs of `also`, each with a budget that limits latency alone."""
    pairs = list(also) if isinstance(also, Iterable) and not isinstance(also, str) else [also]
    found = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(
                f"also has {pair!r}: pass a list of pairs (latency, budget), as "
                '[("onnxruntime", "4ms")]'
            )
        most = parse_budget(pair[1])
        if most.further:
            raise InputError(
                f"the budget for {pair[0]!r} in also limits {' and '.join(most.further)} too: "
                "limit those in the budget itself"
            )
        found.append((pair[0], most))
    return found


@contextmanager
def _guarded(model: nn.Module, tell: Progress) -> Iterator[Callable[[str], None]]:
    """Stages that can be told, with gradients, that leave the random state as it was."""
    # Saliency needs gradients.
    with torch.inference_mode(False), same_random_state(), _named_stage(model, tell) as stage:
        yield stage


def _removes(plan: Plan) -> bool:
    return any(
        len(own) < dense for own, dense in zip(plan.units, plan.groups.dense_units, strict=True)
    )


def _device_of(model: Any) -> str | torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


@contextmanager
def _named_stage(model: Any, tell: Progress) -> Iterator[Callable[[str], None]]:
    """Errors say in which stage, and for which model, they arose."""
    current = ""

    def enter(stage: str) -> None:
        nonlocal current
        if current:
            tell(current, 1, 1)
        current = stage
        tell(stage, 0, 1)

    try:
        yield enter
        tell(current, 1, 1)
    except Exception as error:
        error.add_note(f"halp_fx: in the stage {current!r} for {type(model).__name__}")
        raise


def _why_nothing(groups: ChannelGroups) -> str:
    lines = [
        f"  {pin.name} dim {pin.dim}: {len(pin.index)} channels pinned"
        f"{' by ' + pin.node if pin.node else ''} ({pin.reason})"
        f"{' at ' + pin.source if pin.source else ''}"
        for pin in groups.pins
    ]
    shown = lines[:20] + ([f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else [])
    name = groups.traced.model_name
    return "\n".join([f"{name} has no channel that can be removed:", *shown])
