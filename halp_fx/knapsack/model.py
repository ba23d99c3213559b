"""What the knapsack solver is given, and its normal form.

The normal form is a set of *nodes*: the variables, and after them the *sum nodes*, each of which
is the sum of one earlier node and one variable. Every cost is then a plain table over nodes, so
that a kernel fed by a concat (whose input width is a sum of widths) needs no special case later.
Concats that nest share their chain of sum nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InputError

__all__ = [
    "BoolArray",
    "FloatArray",
    "IntArray",
    "Problem",
    "RawAxis",
    "RawProblem",
    "Sum",
    "SumNode",
    "SumTerm",
    "Term",
    "check_cost",
    "cost_of",
    "value_of",
]

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

TABLE_LIMIT = 30_000_000  # entries of one cost table: above it, memory is the problem


@dataclass(frozen=True)
class Sum:
    """A width that is a sum: `fixed + sum over i of sizes[i][level of variables[i]]`."""

    variables: tuple[int, ...]
    sizes: tuple[npt.NDArray[Any], ...]  # integers, one array (levels,) a variable
    fixed: int = 0


@dataclass(frozen=True)
class SumTerm:
    """A cost that depends on sums of widths: that of a kernel fed by a concat.

    `table(s_1, ..., s_k)` takes one integer array an axis (they broadcast) and returns the costs
    as an array of the broadcast shape; an array is indexed by the sums themselves.
    """

    axes: tuple[Sum, ...]
    table: Callable[..., Any] | npt.NDArray[Any]


Term: TypeAlias = tuple[tuple[int, ...], npt.ArrayLike] | SumTerm


def value_of(levels: Sequence[int], values: Sequence[npt.ArrayLike]) -> float:
    """Sum of the values of the chosen levels, correctly rounded."""
    return math.fsum(
        float(np.asarray(v, dtype=np.float64)[k]) for v, k in zip(values, levels, strict=True)
    )


def cost_of(levels: Sequence[int], terms: Sequence[Term]) -> float:
    """Sum of the costs of the chosen levels, correctly rounded; infinite if forbidden."""
    costs: list[float] = []
    for term in terms:
        if isinstance(term, SumTerm):
            sums = [
                axis.fixed
                + sum(int(s[levels[v]]) for v, s in zip(axis.variables, axis.sizes, strict=True))
                for axis in term.axes
            ]
            if callable(term.table):
                cost = term.table(*(np.asarray([s], dtype=np.int64) for s in sums))
            else:
                cost = np.asarray(term.table)[tuple(sums)]
            costs.append(float(np.asarray(cost, dtype=np.float64).reshape(-1)[0]))
        else:
            variables, table = term
            costs.append(float(np.asarray(table)[tuple(levels[v] for v in variables)]))
    return math.inf if math.inf in costs else math.fsum(costs)


@dataclass(frozen=True)
class RawAxis:
    """An axis of a sum cost: `fixed` plus one size array (levels,) a variable."""

    fixed: int
    parts: tuple[tuple[int, IntArray], ...]


@dataclass(frozen=True)
class RawProblem:
    """The checked input. `tables`: variables in ascending order -> cost, one axis a variable."""

    values: tuple[FloatArray, ...]
    tables: dict[tuple[int, ...], FloatArray]
    sums: tuple[tuple[tuple[RawAxis, ...], Callable[..., Any], str], ...]  # axes, table, name

    def restrict(self, keep: Sequence[IntArray]) -> RawProblem:
        """The same problem with only the levels `keep[v]` of each variable v."""
        return RawProblem(
            tuple(v[k] for v, k in zip(self.values, keep, strict=True)),
            {scope: t[np.ix_(*(keep[v] for v in scope))] for scope, t in self.tables.items()},
            tuple(
                (
                    tuple(
                        RawAxis(a.fixed, tuple((v, s[keep[v]]) for v, s in a.parts)) for a in axes
                    ),
                    table,
                    name,
                )
                for axes, table, name in self.sums
            ),
        )


@dataclass(frozen=True)
class SumNode:
    """Node whose state is a function of the states of two others: a running sum."""

    left: int  # an earlier sum node or a variable
    right: int  # a variable
    states: IntArray  # (states,): the distinct sums, ascending
    index: IntArray  # (states of left, levels of right) -> state

    @property
    def nodes(self) -> tuple[int, int]:
        return self.left, self.right


@dataclass
class Problem:
    """Normal form: nodes, plain tables over nodes, unary values."""

    raw: RawProblem
    values: tuple[FloatArray, ...] = field(init=False)
    sums: list[SumNode] = field(init=False, default_factory=list)
    tables: list[tuple[tuple[int, ...], FloatArray]] = field(init=False)  # no node of one state
    constant: float = field(init=False, default=0.0)  # cost that no level changes

    def __post_init__(self) -> None:
        self.values = self.raw.values
        self.work = 0.0  # table entries computed so far: a clock that is the same everywhere
        # Number of states of each node; grows with the sum nodes.
        self.sizes = [v.size for v in self.values]
        self._chains: dict[frozenset[tuple[int, bytes]], int] = {}
        merged: dict[tuple[int, ...], FloatArray] = {}
        for scope, table in self.raw.tables.items():
            self._merge(merged, scope, table)
        for axes, call, name in self.raw.sums:
            self._merge(merged, *self._tabulate(axes, call, name))
        self.constant = float(merged.pop((), np.zeros(())))
        self.tables = sorted(merged.items())
        self.offsets = np.concatenate([[0], np.cumsum([v.size for v in self.values])])

    @property
    def most(self) -> float:
        """More than any choice that is not forbidden can cost."""
        highest = [float(t[np.isfinite(t)].max(initial=0.0)) for _, t in self.tables]
        total = self.constant + math.fsum(highest)
        return total + 1e-6 * (abs(self.constant) + math.fsum(highest)) + 1e-300

    def costs(self, levels: IntArray) -> FloatArray:
        """Cost (batch,) of levels (batch, variables)."""
        return self.constant + self.table_costs(self.states(levels), range(len(self.tables)))

    def states(self, levels: IntArray) -> IntArray:
        """States (nodes, batch) that go with levels (batch, variables)."""
        states = np.empty((len(self.sizes), levels.shape[0]), dtype=np.int64)
        states[: levels.shape[1]] = levels.T
        for k, node in enumerate(self.sums, start=levels.shape[1]):
            states[k] = node.index[states[node.left], states[node.right]]
        return states

    def table_costs(self, states: IntArray, tables: Iterable[int]) -> FloatArray:
        """Cost (batch,) of some tables, from states (nodes, batch)."""
        total = np.zeros(states.shape[1])
        for k in tables:
            self.work += 4 * total.size + 1000
            scope, table = self.tables[k]
            total += table[tuple(states[n] for n in scope)]
        return total

    def value(self, levels: IntArray) -> FloatArray:
        """Value (batch,) of levels (batch, variables)."""
        flat = np.concatenate(self.values)
        total: FloatArray = flat[levels + self.offsets[:-1]].sum(axis=1)
        return total

    def _merge(
        self, into: dict[tuple[int, ...], FloatArray], scope: tuple[int, ...], table: FloatArray
    ) -> None:
        varying = tuple(k for k, n in enumerate(table.shape) if n > 1)
        scope = tuple(scope[k] for k in varying)
        table = table.reshape([table.shape[k] for k in varying])
        into[scope] = into[scope] + table if scope in into else table

    def _tabulate(
        self, axes: tuple[RawAxis, ...], call: Callable[..., Any], name: str
    ) -> tuple[tuple[int, ...], FloatArray]:
        found = [self._axis(axis) for axis in axes]
        scope = tuple(sorted({node for node, _ in found if node >= 0}))
        shape = tuple(self.sizes[n] for n in scope)
        if math.prod(shape) > TABLE_LIMIT:
            raise InputError(f"{name} can take {shape} sums: use coarser levels")
        coordinates = []
        for node, sums in found:
            place = [1] * len(scope)
            if node >= 0:
                place[scope.index(node)] = sums.size
            coordinates.append(sums.reshape(place))
        cost = np.asarray(call(*coordinates), dtype=np.float64)
        try:
            cost = np.broadcast_to(cost, shape)
        except ValueError:
            raise InputError(
                f"{name}: table(...) returned shape {cost.shape}, expected {shape}: "
                "return one cost for each combination of the broadcast sums"
            ) from None
        check_cost(cost, name)
        return scope, cost

    def _axis(self, axis: RawAxis) -> tuple[int, IntArray]:
        """Node of an axis (-1: constant) and the sum in each of its states."""
        fixed = axis.fixed
        sizes: dict[int, IntArray] = {}
        for v, s in axis.parts:
            sizes[v] = sizes[v] + s if v in sizes else s
        for v, s in list(sizes.items()):
            if np.all(s == s[0]):
                fixed += int(s[0])
                del sizes[v]
        if not sizes:
            return -1, np.asarray([fixed], dtype=np.int64)
        if len(sizes) == 1:
            ((v, s),) = sizes.items()
            return v, s + fixed
        # Longest chain that is part of this sum, then the rest one by one.
        items = {(v, s.tobytes()): (v, s) for v, s in sizes.items()}
        prefix: frozenset[tuple[int, bytes]] = max(
            (k for k in self._chains if k <= items.keys()), key=len, default=frozenset()
        )
        rest = [key for key in items if key not in prefix]
        if prefix:
            node = self._chains[prefix]
            coordinates = self.sums[node - len(self.values)].states
        else:
            first = rest.pop(0)
            node, coordinates = items[first]
            prefix = frozenset([first])
        for key in rest:
            v, s = items[key]
            both = coordinates[:, None] + s[None, :]
            states = np.unique(both)
            self.sums.append(SumNode(node, v, states, np.searchsorted(states, both)))
            self.sizes.append(states.size)
            node, coordinates, prefix = len(self.sizes) - 1, states, prefix | {key}
            self._chains[prefix] = node
        return node, coordinates + fixed


def check_cost(cost: FloatArray, name: str) -> None:
    """Refuse costs that are neither a number nor inf.

    Raises:
        InputError: NaN or -inf.
    """
    if np.isnan(cost).any() or np.isneginf(cost).any():
        raise InputError(f"{name} has a cost of NaN or -inf: only numbers and inf (forbidden)")
