"""The pipeline: from a trained network and a budget to a smaller network."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from halp_fx.budget import Budget, parse_budget
from halp_fx.candidates import best_of
from halp_fx.errors import HalpError, InputError, NothingToPruneError
from halp_fx.latency import Source, Stored, measure_paired, resolve_backend
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price, refine
from halp_fx.passes.rewrite import rewrite
from halp_fx.passes.rules.counts import mac_counts, parameter_counts, total
from halp_fx.passes.rules.scope import Scope, Selection, scope_of
from halp_fx.passes.rules.widths import Widths
from halp_fx.passes.rules.wrappers import unwrapped
from halp_fx.passes.saliency import score
from halp_fx.passes.select import check_solver, select
from halp_fx.passes.trace import trace
from halp_fx.types import ChannelGroups, LatencyModel, Plan, Saliency

__all__ = ["compile", "plan_of"]

Progress = Callable[[str, int, int], None]
_MIN_SHARE = 0.1
_ROUNDS = 4  # how often a network that misses its budget is selected again
_REFINEMENTS = 3  # how often the chosen widths are measured and chosen again
_TOLERANCE = 0.02  # by how much a measured latency may pass the budget: repeatability of timers


def compile(
    model: nn.Module,
    budget: float | str | Budget,
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
    min_share: float | Mapping[str, float] = _MIN_SHARE,
    min_width: int | Mapping[str, int] = 0,
    round_to: int | Mapping[str, int] | None = None,
    candidates: int = 1,
    also: Sequence[tuple[Any, float | str | Budget]] = (),
    verify: bool = True,
    progress: Progress | None = None,
) -> fx.GraphModule:
    """Prune `model` to a latency budget.

    Args:
        model: a trained network; it is left as it is. Of a model in DataParallel,
            DistributedDataParallel or `torch.compile`, what is inside is pruned, with a warning.
        budget: share of the dense latency (0.5), a time ("4ms"), or a `Budget`, which may limit
            parameters and multiply-adds besides.
        example_inputs: a tensor or a tuple, the model's positional arguments, at the batch size
            that the latency is meant for. None: one image of the size the model expects.
        data: minibatches `(inputs, target)` to score channels by (HALP's Taylor saliency). None:
            channels are scored by their weights alone, which is the weaker score.
        loss: `loss(output, target)`, needed with `data`.
        latency: what a width costs. None measures this device with PyTorch, keeping the table;
            "torch", "onnxruntime" or "analytic" name a back-end; a back-end with options, as
            `halp_fx.latency.OnnxRuntime(threads=1)`; the path of a table; a `LatencyTable`.
        saliency: "taylor", "magnitude", or a callable that takes the `ChannelGroups` and returns
            group name -> scores (units,).
        include: only the output channels of these modules and parameters may go: a glob over
            names ("layer1" takes in all below it, "*.conv2"), several, or a callable
            `(parameter name, dim) -> bool`. Norms, biases and depthwise convolutions follow the
            channels that come in. Channels stay where they are coupled with others that stay.
        exclude: the output channels of these stay whole, whatever `include` says. A callable is
            asked about each dim of each parameter.
        exact: pin the channels that LayerNorm and the like take statistics over. Otherwise they
            may go, and such norms take their statistics over the survivors.
        solver: "joint", proven to be near the best choice; or, to compare with, "halp" (the
            paper's own), "greedy" or "uniform".
        drop_blocks: residual branches may go whole where that pays; the constant that such a
            branch still adds is kept, in the state dict under "_constants.".
        min_share: each group of coupled channels keeps at least this share (a residual branch may
            still go whole). Sums of saliencies say little about what is left of a layer of which
            nearly all goes.
        min_width: each group keeps at least so many channels, or all that it has.
        round_to: each group keeps a multiple of so many channels, or all. None: multiples that
            grow with the group, 8 from 64 units on.

            These three may be dicts from a glob, over the modules and parameters that give a
            group's channels and over the group's name, to a value. The pattern with the most
            characters besides wildcards counts, among equals the largest value; where none
            matches, the default holds.
        candidates: try so many near-optimal plans on a few batches of `data` (loss after batch
            norm recalibration) and keep the best.
        also: further devices or back-ends whose latency is limited too: pairs (latency, budget) as
            the arguments of these names.
        verify: measure the result beside the dense network, and choose again while it misses the
            budget. Only with a back-end that measures.
        progress: called as `progress(stage, done, total)`.

    Returns:
        The smaller network: same call signature, same keys in its `state_dict()`, same modes.
        `plan_of` tells what was kept.

    Raises:
        InputError: an argument is wrong (`BudgetError` for the budget).
        InfeasibleError: the budget can't be met; `.least` is the least latency in milliseconds.
        NothingToPruneError: every channel is pinned; the message says by what.
        HalpError: any other error of ours, see `halp_fx.errors`.

    Example:
        >>> import torch, halp_fx
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3))
        >>> small = halp_fx.compile(net, 0.5, torch.rand(1, 3, 32, 32), latency="analytic")
        >>> small(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 8, 28, 28])
    """
    model = unwrapped(model, stacklevel=3)
    limit = parse_budget(budget)
    check_solver(solver, limit.further)
    if isinstance(min_share, Mapping):
        min_share = {"*": _MIN_SHARE, **min_share}
    allowed = Widths(min_share=min_share, min_width=min_width, round_to=round_to)
    if data is not None and loss is None:
        raise InputError("data was given without loss: pass loss=callable(output, target)")
    if candidates != 1 and (not isinstance(candidates, int) or candidates < 1 or data is None):
        raise InputError(
            f"candidates={candidates!r}: pass a whole number of at least 1; above 1 it needs data "
            "and loss to try the plans on"
        )
    tell = progress if progress is not None else _silent
    no_inference = torch.inference_mode(False)  # saliency needs gradients
    with no_inference, _same_random_state(), _named_stage(model, tell) as stage:
        stage("trace")
        traced = trace(model, example_inputs)
        source = resolve_backend(latency, device=_device_of(model))
        if isinstance(source.backend, Stored):
            warnings.warn(
                "the latency table was made on another device: times are looked up in it, and the "
                "result is not measured here",
                stacklevel=2,
            )
        others = [
            (resolve_backend(where, device=_device_of(model)), parse_budget(most))
            for where, most in also
        ]
        stage("groups")
        scope = scope_of(traced.root, include, exclude)
        groups = _in_scope(find_groups(traced, exact=exact, scope=scope), scope)
        if not groups.groups:
            raise NothingToPruneError(_why_nothing(groups))
        stage("saliency")
        scores = score(
            groups, data, loss, saliency, lambda done, total: tell("saliency", done, total)
        )
        stage("latency")
        costs = price(groups, source, progress=lambda done, total: tell("latency", done, total))
        stage("select")
        budget_ms = limit.in_ms(costs.dense_ms)
        choose = partial(
            select,
            solver=solver,
            limits=_limits(limit, groups),
            also=[
                (other, most.in_ms(other.dense_ms))
                for other, most in (
                    (price(groups, elsewhere, progress=None), most) for elsewhere, most in others
                )
            ],
            drop_blocks=drop_blocks,
            allowed=allowed,
        )
        plan = choose(groups, scores, costs, budget_ms)
        if _can_measure(source):
            stage("refine")
            costs, plan = _refined(plan, scores, costs, source, tell, choose)
        if candidates > 1 and data is not None and loss is not None:
            stage("candidates")
            plan = best_of(
                candidates, plan, scores, costs, choose, data, loss,
                lambda done, total: tell("candidates", done, total),
            )  # fmt: skip
        stage("rewrite")
        pruned = rewrite(_annotated(plan, scores, costs))
        if verify and _can_measure(source):
            stage("verify")
            pruned = _verified(pruned, limit, scores, costs, source, tell, choose)
    plan = plan_of(pruned)  # the network should not keep the dense one alive
    pruned.meta["halp_fx"] = replace(plan, groups=plan.groups.without_network())
    return pruned


def plan_of(pruned: nn.Module) -> Plan:
    """The plan by which a network was pruned: what was kept, and what it costs.

    Raises:
        InputError: the module is not one that `compile` or `load` returned.
    """
    plan = getattr(pruned, "meta", {}).get("halp_fx") if isinstance(pruned, nn.Module) else None
    if plan is None:
        raise InputError(
            f"{type(pruned).__name__} has no plan: pass what halp_fx.compile or halp_fx.load gave"
        )
    return cast(Plan, plan)


def _refined(
    plan: Plan,
    scores: Saliency,
    costs: LatencyModel,
    source: Source,
    tell: Progress,
    choose: Callable[[ChannelGroups, Saliency, LatencyModel, float], Plan],
) -> tuple[LatencyModel, Plan]:
    """Measure the kernels at the widths that were chosen, and choose again by what they take."""
    for done in range(1, _REFINEMENTS + 1):
        kept = [len(units) for units in plan.units]
        costs = refine(plan.groups, source, costs, kept)
        plan = choose(plan.groups, scores, costs, plan.budget_ms)
        tell("refine", done, _REFINEMENTS)
        if kept == [len(units) for units in plan.units]:
            break
    return costs, plan


def _can_measure(source: Source) -> bool:
    return source.backend.measured and not isinstance(source.backend, Stored)


def _silent(stage: str, done: int, total: int) -> None:
    return None


def _device_of(model: Any) -> str | torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Give the global random generators back as they were, also after an error."""
    python, numpy = random.getstate(), np.random.get_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


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


def _in_scope(groups: ChannelGroups, scope: Scope | None) -> ChannelGroups:
    """A branch with channels that the caller wants whole is not dropped."""
    if scope is None:
        return groups
    return replace(groups, branches=tuple(b for b in groups.branches if not scope.holds(b.tensors)))


def _limits(limit: Budget, groups: ChannelGroups) -> dict[str, float]:
    """What is limited besides the latency, as counts."""
    if not limit.further:
        return {}
    dense = groups.dense_units
    return limit.counts(total(parameter_counts(groups), dense), total(mac_counts(groups), dense))


def _annotated(plan: Plan, scores: Saliency, costs: LatencyModel, **facts: Any) -> Plan:
    report = {
        **plan.report,
        "model": plan.groups.traced.model_name,
        "saliency": scores.method,
        "data_free": scores.data_free,
        "backend": costs.backend,
        "device": costs.device,
        **facts,
    }
    return replace(plan, report=report)


def _verified(
    pruned: fx.GraphModule,
    limit: Budget,
    scores: Saliency,
    costs: LatencyModel,
    source: Source,
    tell: Progress,
    choose: Callable[[ChannelGroups, Saliency, LatencyModel, float], Plan],
) -> fx.GraphModule:
    """Measure dense and pruned network in turn; while the pruned one is too slow, ask for less."""
    plan = plan_of(pruned)
    groups, traced = plan.groups, plan.groups.traced
    inputs = traced.example_inputs
    target_ms = plan.budget_ms
    asked_ms = target_ms
    bound = plan.value / max(1.0 - plan.gap, 1e-12)  # proven for the budget that was asked for
    for attempt in range(1, _ROUNDS + 1):
        dense, small = measure_paired(
            traced.module, pruned, source.backend, inputs, inputs, rounds=9
        )
        tell("verify", attempt, _ROUNDS)
        allowed_ms = limit.in_ms(dense.median_ms)
        facts = {
            "measured_dense_ms": dense.median_ms,
            "measured_ms": small.median_ms,
            "measured_spread_ms": small.spread_ms,
            "measured_budget_ms": allowed_ms,
            "measured_rounds": attempt,
            "met": small.median_ms <= allowed_ms * (1 + _TOLERANCE),
        }
        pruned.meta["halp_fx"] = _annotated(plan, scores, costs, **facts)
        if facts["met"] or attempt == _ROUNDS:
            return pruned
        asked_ms *= min(allowed_ms / small.median_ms, 0.98)
        try:
            tighter = choose(groups, scores, costs, asked_ms)
        except HalpError:
            return pruned  # nothing faster is left; the report says that the budget is missed
        gap = max(0.0, (bound - tighter.value) / max(bound, 1e-300))
        plan = replace(tighter, budget_ms=target_ms, gap=gap)
        pruned = rewrite(_annotated(plan, scores, costs))
    return pruned
