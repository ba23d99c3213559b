"""The knapsack of widths, solved: for a limit on latency, and for several limits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from halp_fx.errors import InfeasibleError
from halp_fx.knapsack import (
    Sum,
    SumTerm,
    Term,
    solve,
    solve_greedy,
    solve_halp,
    solve_several,
    solve_uniform,
)
from halp_fx.passes.rules.memory import Moment, peak
from halp_fx.types import ChannelGroups, Extent, FloatArray, IntArray, LatencyModel

__all__ = ["Knapsack", "Limit", "Priced", "solve_within", "terms_of"]

_LATENCY_GAP = 1e-3  # at which the joint solver stops
_BOUND_GAP = 0.02  # the same, where only its bound is wanted


@dataclass(frozen=True)
class Knapsack:
    """The choice of widths as `halp_fx.knapsack` takes it."""

    values: tuple[FloatArray, ...]  # for each group, the saliency kept at each level
    terms: tuple[Term, ...]  # latency
    sizes: tuple[IntArray, ...]  # for each group, the units kept at each level
    orders: tuple[IntArray, ...]  # for each group, its units, the most salient first
    outputs: tuple[int, ...]  # for each term, the axis of the kernel's own width; -1: none


class Priced(Protocol):
    """A `Kernel` or a `Count`: a cost that depends on some sizes."""

    @property
    def axes(self) -> tuple[Extent, ...]: ...
    @property
    def cost(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class Limit:
    """A limit besides the latency."""

    name: str  # of what is limited, as "params"
    priced: Sequence[Priced]
    most: float
    dense: float  # what the dense network has


def solve_within(
    groups: ChannelGroups,
    latency: LatencyModel,
    problem: Knapsack,
    budget_ms: float,
    solver: str,
    further: list[Limit],
    moments: Sequence[Moment],
    memory: float | None,
) -> tuple[tuple[int, ...], float, float]:
    """Levels, their value and a proven bound, for all limits.

    Memory is limited at every moment. Few moments matter, so they become limits of their own when
    a solution exceeds the memory at them; bounds proven with fewer limits hold with more.
    """
    dense_peak = peak(moments, groups.dense_units)[0]
    for _ in range(len(moments) + 1):
        if further:
            found = _within_all(groups, latency, problem, budget_ms, further)
        else:
            found = _within_time(groups, latency, problem, budget_ms, solver)
        if memory is None:
            break
        kept = [int(size[level]) for size, level in zip(problem.sizes, found[0], strict=True)]
        most, at = peak(moments, kept)
        if most <= memory:
            break
        further = [*further, Limit("bytes of memory", moments[at], memory, dense_peak)]
    return found


def _within_time(
    groups: ChannelGroups, latency: LatencyModel, problem: Knapsack, budget_ms: float, solver: str
) -> tuple[tuple[int, ...], float, float]:
    """Levels, their value and a proven bound, for a limit on latency alone."""
    values, terms = problem.values, problem.terms
    try:
        if solver == "joint":
            solution = solve(values, terms, budget_ms, gap=_LATENCY_GAP)
            return solution.levels, solution.value, solution.bound
        bound = solve(values, terms, budget_ms, gap=_BOUND_GAP).bound
    except InfeasibleError as error:
        raise _unreachable(groups, latency, budget_ms, error.least) from error
    if solver == "halp":
        solution = solve_halp(values, terms, budget_ms, outputs=problem.outputs)
    elif solver == "greedy":
        solution = solve_greedy(values, terms, budget_ms)
    else:
        solution = solve_uniform(values, terms, budget_ms, sizes=problem.sizes)
    return solution.levels, solution.value, bound


def _within_all(
    groups: ChannelGroups,
    latency: LatencyModel,
    problem: Knapsack,
    budget_ms: float,
    further: Sequence[Limit],
) -> tuple[tuple[int, ...], float, float]:
    """The same for limits on parameters, multiply-adds or another device's latency besides."""
    priced = [(limit, terms_of(limit.priced, problem.sizes)) for limit in further]
    constraints = [
        (problem.terms, budget_ms),
        *((terms, limit.most) for limit, terms in priced),
    ]
    try:
        solution = solve_several(problem.values, constraints, gap=_LATENCY_GAP)
    except InfeasibleError as error:
        model = groups.traced.model_name
        for limit, terms in priced:
            try:
                solve(problem.values, terms, limit.most, gap=_BOUND_GAP)
            except InfeasibleError as alone:
                raise InfeasibleError(
                    f"the limit of {limit.most:.6g} {limit.name} can't be met: the fewest that "
                    f"{model} can be pruned to are {alone.least:.6g} of {limit.dense}",
                    alone.least,
                ) from error
        try:
            solve(problem.values, problem.terms, budget_ms, gap=_BOUND_GAP)
        except InfeasibleError as alone:
            raise _unreachable(groups, latency, budget_ms, alone.least) from error
        raise InfeasibleError(
            f"{model} can be pruned to {budget_ms:.4g} ms and to each of "
            f"{', '.join(f'{limit.most:.6g} {limit.name}' for limit in further)}, but no choice "
            "within all of them was found: raise one",
            error.least,
        ) from error
    return solution.levels, solution.value, solution.bound


def _unreachable(
    groups: ChannelGroups, latency: LatencyModel, budget_ms: float, least: float
) -> InfeasibleError:
    return InfeasibleError(
        f"the budget of {budget_ms:.4g} ms can't be met: the least latency that "
        f"{groups.traced.model_name} can be pruned to is {least:.4g} ms "
        f"({least / latency.dense_ms:.1%} of the dense {latency.dense_ms:.4g} ms) while each "
        "group keeps its least share (min_share, min_width)",
        least,
    )


def terms_of(priced: Iterable[Priced], sizes: Sequence[IntArray]) -> list[Term]:
    """One term for each cost that can change, and last one for all that can't."""
    fixed = 0.0
    terms: list[Term] = []
    for item in priced:
        if not item.axes:
            fixed += float(item.cost())
            continue
        axes = tuple(
            Sum(
                tuple(g for g, _ in axis.parts),
                tuple(c * sizes[g] for g, c in axis.parts),
                axis.fixed,
            )
            for axis in item.axes
        )
        terms.append(SumTerm(axes, item.cost))
    return [*terms, ((), fixed)]
