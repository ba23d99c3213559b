r"""The knapsack of the paper: Hardware-Aware Latency Pruning, one layer's width at a time.

Source: M. Shen, H. Yin, P. Molchanov, L. Mao, J. Liu, J. M. Alvarez, "Structural Pruning via
Latency-Saliency Knapsack", NeurIPS 2022, arXiv 2210.06659, section 3.

With the channels of each layer l sorted by importance, I_l^1 >= I_l^2 >= ..., and p_l of them
kept, the paper asks for

    max  sum_l sum_{j <= p_l} I_l^j     s.t.  sum_l T_l(p_{l-1}, p_l) <= C.

The latency T_l depends on two widths; the paper freezes the *input* width at the present one and
charges each channel with what it adds to its own layer:

    c_l^j = T_l(p_{l-1}, j) - T_l(p_{l-1}, j - 1).

Latency is a staircase in j, so the channels of one step are one item of the knapsack (here: one
level of the variable). An item may be kept only if all more important ones of its layer are: the
paper's augmented knapsack, by dynamic programming over the discretised budget. Since what is left
out narrows the inputs of other layers, this is repeated over k steps (30 in the paper) with a
target that falls exponentially from the dense latency L_0 to the budget C:

    C_t = L_0 (C / L_0)^(t / k),   t = 1 ... k.

Frozen inputs overstate the cost of what is kept, so the true cost may end far below the budget:
that is the method's weakness, and is reported as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InputError
from halp_fx.knapsack.model import FloatArray, IntArray, SumTerm, Term
from halp_fx.knapsack.settle import Ground
from halp_fx.knapsack.solver import Solution

__all__ = ["augmented_knapsack", "solve_halp"]

RESOLUTION = 5000  # parts that what is left of the budget is cut into
EXTRA_STEPS = 30  # steps at the final target, where the true cost is still above the budget


def solve_halp(
    values: Sequence[npt.ArrayLike],
    terms: Sequence[Term],
    budget: float,
    *,
    outputs: Sequence[int] | None = None,
    steps: int = 30,
) -> Solution:
    """Choose levels as the paper does: a knapsack over output widths, repeated `steps` times.

    Args:
        values: as for `solve`; levels ascend in width, the last is the dense one.
        terms: as for `solve`.
        budget: highest sum of costs, in the unit of the tables.
        outputs: for each term, the axis of the layer's own (output) width, or -1 if it has none
            that can change; the other axes are frozen within a step. None: axis 0 of each.
        steps: how many steps the target takes from the dense cost to the budget.

    Returns:
        The levels with their value and their *true* cost. `bound` is no more than the value of
        everything: this solver proves nothing.

    Raises:
        InputError: as `solve`; or `outputs` or `steps` is wrong.
        InfeasibleError: no choice within the budget was found.

    Example:
        >>> table = [[0, 1, 2], [0, 2, 4], [0, 3, 9]]  # (out, in)
        >>> solve_halp([[0, 3, 5], [0, 4, 6]], [((0, 1), table)], 4.0).levels
        (1, 2)
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps!r}: pass a whole number of at least 1")
    ground = Ground(values, terms, budget)
    layers = _layers(ground, terms, outputs)
    levels = ground.dense
    cost = dense_cost = ground.cost(levels)
    step = 0
    while cost > budget and step < steps + EXTRA_STEPS:
        step += 1
        share = max(budget, 0.0) / dense_cost
        target = dense_cost * share ** (min(step, steps) / steps)
        if step > steps:  # the linearisation was below the truth: aim below the budget
            target -= (cost - budget) * (step - steps)
        lower = ground.settle(_step(ground, layers, levels, cost, target))
        if lower is None:
            break
        levels, cost = lower, ground.cost(lower)
    if cost > budget:
        lowest = ground.lowest()
        if lowest is not None and (least := ground.cost(lowest)) < cost:
            levels, cost = lowest, least
        if cost > budget:
            raise ground.too_dear("halp", cost)
    return Solution(tuple(int(k) for k in levels), ground.value(levels), cost, ground.most)


@dataclass(frozen=True)
class _Layer:
    """A term and the variables along its output axis."""

    term: Term
    axis: int
    variables: tuple[int, ...]


def _layers(ground: Ground, terms: Sequence[Term], outputs: Sequence[int] | None) -> list[_Layer]:
    counts = [len(t.axes) if isinstance(t, SumTerm) else len(t[0]) for t in terms]
    if outputs is None:
        outputs = [0 if n else -1 for n in counts]
    if len(outputs) != len(terms):
        raise InputError(
            f"outputs has {len(outputs)} entries for {len(terms)} terms: pass one each"
        )
    found = []
    for k, (term, axis, count) in enumerate(zip(terms, outputs, counts, strict=True)):
        if not -1 <= axis < count:
            raise InputError(
                f"outputs[{k}] is {axis}, but terms[{k}] has {count} axes: pass -1 to {count - 1}"
            )
        if axis < 0:
            continue
        variables = term.axes[axis].variables if isinstance(term, SumTerm) else (term[0][axis],)
        moving = tuple(sorted({v for v in variables if ground.values[v].size > 1}))
        if moving:
            found.append(_Layer(term, axis, moving))
    return found


def _step(
    ground: Ground, layers: Sequence[_Layer], levels: IntArray, cost: float, target: float
) -> IntArray:
    """One knapsack: levels at most the present ones, by their linearised cost."""
    # (levels up to the present one,) a variable: its layers' cost at each level, inputs frozen.
    prefix = [np.zeros(k + 1) for k in levels]
    for layer in layers:
        for v in layer.variables:
            prefix[v] += _along(layer, v, levels)
    gains = [
        np.where(a[: k + 1], v[: k + 1], -np.inf)
        for v, a, k in zip(ground.values, ground.allowed, levels, strict=True)
    ]
    prefix = [np.where(np.isneginf(g), np.inf, p) for g, p in zip(gains, prefix, strict=True)]
    # Linearised total: the present cost, and the change of each variable's prefix.
    least = [float(p.min()) for p in prefix]
    floor = cost + sum(low - float(p[-1]) for low, p in zip(least, prefix, strict=True))
    room = max(target, floor + 0.5 * (cost - floor) if floor >= target else target) - floor
    return augmented_knapsack(
        gains, [p - low for p, low in zip(prefix, least, strict=True)], max(room, 0.0)
    )


def _along(layer: _Layer, variable: int, levels: IntArray) -> FloatArray:
    """Cost (levels,) of a layer while one variable of its output axis moves, all else frozen."""
    moving = np.arange(levels[variable] + 1)
    term, axis = layer.term, layer.axis
    if isinstance(term, SumTerm):
        sizes = []
        for k, width in enumerate(term.axes):
            total = np.full(moving.size, width.fixed, dtype=np.int64)
            for v, size in zip(width.variables, width.sizes, strict=True):
                total += size[moving if v == variable and k == axis else levels[v]]
            sizes.append(total)
        found = term.table(*sizes) if callable(term.table) else np.asarray(term.table)[tuple(sizes)]
        return np.array(np.broadcast_to(np.asarray(found, dtype=np.float64), moving.shape))
    variables, table = term
    table = np.asarray(table, dtype=np.float64)
    here = np.array(
        table[tuple(moving if k == axis else levels[v] for k, v in enumerate(variables))]
    )
    if np.isinf(here).any():
        # Forbidden beside the present inputs, though not beside lower ones: those follow later.
        inside = tuple(slice(int(levels[v]) + 1) for v in variables)
        others = tuple(k for k in range(table.ndim) if k != axis)
        lower = table[inside].min(axis=others) if others else table[inside]
        here = np.where(np.isinf(here), lower, here)
    return here


def augmented_knapsack(
    gains: Sequence[FloatArray], costs: Sequence[FloatArray], room: float
) -> IntArray:
    """The best prefix of each layer: most gain within `room`, by dynamic programming.

    Deciding on prefixes is what keeps the order: item j comes with all more important ones.

    Args:
        gains: for each layer (prefixes,) the importance kept by each prefix; -inf: not allowed.
        costs: for each layer (prefixes,) its cost, at least 0, with a 0 in each; inf: not allowed.
        room: highest sum of costs; discretised to `RESOLUTION` parts, costs to the nearest part.

    Returns:
        The chosen prefix of each layer.
    """
    part = room / RESOLUTION
    best = np.zeros(RESOLUTION + 1)  # by parts spent at most
    choices: list[npt.NDArray[np.int32]] = []
    weights: list[IntArray] = []
    for gain, cost in zip(gains, costs, strict=True):
        usable = np.isfinite(gain) & np.isfinite(cost) & (cost <= room + part / 2)
        weight = np.zeros(cost.size, dtype=np.int64)
        if part > 0:
            weight[usable] = np.rint(cost[usable] / part).astype(np.int64)
        usable &= weight <= RESOLUTION
        after = np.full(RESOLUTION + 1, -np.inf)
        choice = np.zeros(RESOLUTION + 1, dtype=np.int32)
        for k in np.flatnonzero(usable):
            w = int(weight[k])
            reached = best[: RESOLUTION + 1 - w] + gain[k]
            here = after[w:]
            better = reached > here
            here[better] = reached[better]
            choice[w:][better] = k
        best = after
        choices.append(choice)
        weights.append(weight)
    levels = np.zeros(len(gains), dtype=np.int64)
    left = RESOLUTION
    for v in reversed(range(len(gains))):
        levels[v] = choices[v][left]
        left -= int(weights[v][levels[v]])
    return levels
