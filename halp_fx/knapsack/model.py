"""What the knapsack solver is given, checked, and its normal form.

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

from halp_fx.errors import InfeasibleError, InputError

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
    "cost_of",
    "read",
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

    def costs(self, levels: IntArray) -> FloatArray:
        """Cost (batch,) of levels (batch, variables)."""
        states = np.empty((len(self.sizes), levels.shape[0]), dtype=np.int64)
        states[: levels.shape[1]] = levels.T
        for k, node in enumerate(self.sums, start=levels.shape[1]):
            states[k] = node.index[states[node.left], states[node.right]]
        return self.constant + self.table_costs(states, range(len(self.tables)))

    def table_costs(self, states: IntArray, tables: Iterable[int]) -> FloatArray:
        """Cost (batch,) of some tables, from states (nodes, batch)."""
        total = np.zeros(states.shape[1])
        for k in tables:
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
        _check_cost(cost, name)
        return scope, cost

    def _axis(self, axis: RawAxis) -> tuple[int, IntArray]:
        """Node of an axis (-1: constant) and the sum in each of its states."""
        fixed, sizes = axis.fixed, {}
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


def read(
    values: Sequence[npt.ArrayLike], terms: Sequence[Term]
) -> tuple[RawProblem, list[BoolArray]]:
    """Check the input; return it with the levels of each variable that are not forbidden.

    Raises:
        InputError: NaN, wrong shapes or indices, a variable without levels.
        InfeasibleError: the forbidden levels and combinations leave nothing.
    """
    arrays = tuple(_read_values(k, v) for k, v in enumerate(values))
    tables: dict[tuple[int, ...], FloatArray] = {}
    sums: list[tuple[tuple[RawAxis, ...], Callable[..., Any], str]] = []
    for k, term in enumerate(terms):
        if isinstance(term, SumTerm):
            sums.append(_read_sum(k, term, arrays))
            continue
        scope, table = _read_table(k, term, arrays)
        tables[scope] = tables[scope] + table if scope in tables else table
    allowed = [np.asarray(v > -np.inf) for v in arrays]
    raw = RawProblem(arrays, tables, tuple(sums))
    _propagate(raw, allowed)
    return raw, allowed


def _propagate(raw: RawProblem, allowed: list[BoolArray]) -> None:
    """Forbid, in place, levels all of whose combinations in some table are forbidden."""
    tables = [(scope, np.isfinite(t)) for scope, t in raw.tables.items()]
    tables = [(scope, finite) for scope, finite in tables if not finite.all()]
    changed = True
    while changed:
        changed = False
        for scope, finite in tables:
            for axis, v in enumerate(scope):
                others = tuple(k for k in range(len(scope)) if k != axis)
                live = finite
                for k in others:
                    shape = [1] * len(scope)
                    shape[k] = -1
                    live = live & allowed[scope[k]].reshape(shape)
                left = allowed[v] & live.any(axis=others)
                if left.sum() < allowed[v].sum():
                    allowed[v], changed = left, True
    for v, left in enumerate(allowed):
        if not left.any():
            raise InfeasibleError(
                f"every level of variable {v} is forbidden, by a value of -inf or by costs of inf "
                "in every combination: allow at least one",
                least=math.inf,
            )


def _read_values(k: int, value: npt.ArrayLike) -> FloatArray:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"values[{k}] is not an array of numbers: {error}") from error
    if array.ndim != 1 or array.size == 0:
        raise InputError(
            f"values[{k}] has shape {array.shape}: pass a 1-D array with at least one level"
        )
    if np.isnan(array).any() or np.isposinf(array).any():
        raise InputError(f"values[{k}] contains NaN or +inf: only numbers and -inf (forbidden)")
    return array


def _check_index(name: str, v: Any, count: int) -> int:
    if isinstance(v, bool) or not isinstance(v, (int, np.integer)):
        raise InputError(f"{name} names variable {v!r}: pass an integer index into values")
    if not 0 <= v < count:
        raise InputError(f"{name} names variable {v}, but there are {count} (0 to {count - 1})")
    return int(v)


def _check_cost(cost: FloatArray, name: str) -> None:
    if np.isnan(cost).any() or np.isneginf(cost).any():
        raise InputError(f"{name} has a cost of NaN or -inf: only numbers and inf (forbidden)")


def _read_table(
    k: int, term: tuple[tuple[int, ...], npt.ArrayLike], values: tuple[FloatArray, ...]
) -> tuple[tuple[int, ...], FloatArray]:
    name = f"terms[{k}]"
    try:
        given, costs = term
        variables = tuple(_check_index(name, v, len(values)) for v in given)
        table = np.array(costs, dtype=np.float64)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} is not a pair (variables, table) nor a SumTerm: {error}"
        ) from error
    shape = tuple(values[v].size for v in variables)
    if table.shape != shape:
        raise InputError(
            f"{name} has a table of shape {table.shape}, but variables {variables} have "
            f"{shape} levels: pass one axis a variable, in that order"
        )
    _check_cost(table, name)
    scope = tuple(sorted(set(variables)))
    letters = [scope.index(v) for v in variables]
    # einsum with a repeated letter is the diagonal; it only moves entries here.
    return scope, np.array(np.einsum(table, letters, list(range(len(scope)))))


def _read_sum(
    k: int, term: SumTerm, values: tuple[FloatArray, ...]
) -> tuple[tuple[RawAxis, ...], Callable[..., Any], str]:
    name = f"terms[{k}]"
    axes, highest = [], []
    for a, axis in enumerate(term.axes):
        where = f"{name}.axes[{a}]"
        if len(axis.variables) != len(axis.sizes):
            raise InputError(
                f"{where} has {len(axis.variables)} variables and {len(axis.sizes)} size arrays: "
                "pass one array a variable"
            )
        parts = []
        low = high = int(axis.fixed)
        for v, given in zip(axis.variables, axis.sizes, strict=True):
            v = _check_index(where, v, len(values))
            sizes = np.asarray(given)
            if sizes.shape != (values[v].size,) or sizes.dtype.kind not in "iu":
                raise InputError(
                    f"{where} has sizes of shape {sizes.shape} and dtype {sizes.dtype} for "
                    f"variable {v}: pass {values[v].size} integers, one a level"
                )
            parts.append((v, sizes.astype(np.int64)))
            low, high = low + int(sizes.min()), high + int(sizes.max())
        axes.append(RawAxis(int(axis.fixed), tuple(parts)))
        highest.append((low, high))
    if callable(term.table):
        return tuple(axes), term.table, name
    array = np.array(term.table, dtype=np.float64)
    if array.ndim != len(axes):
        raise InputError(f"{name} has {len(axes)} axes and a table of {array.ndim} dims")
    for a, (low, high) in enumerate(highest):
        if low < 0 or high >= array.shape[a]:
            raise InputError(
                f"{name}.axes[{a}] reaches sums from {low} to {high}, but the table has "
                f"{array.shape[a]} entries there: index 0 to {high} must exist"
            )
    return tuple(axes), _Lookup(array), name


class _Lookup:
    """A table indexed by sums, as a callable."""

    def __init__(self, array: FloatArray) -> None:
        self.array = array

    def __call__(self, *sums: IntArray) -> FloatArray:
        found: FloatArray = self.array[tuple(sums)] if sums else self.array
        return found
