"""The input of the knapsack solver, checked."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from halp_fx.errors import InfeasibleError, InputError
from halp_fx.knapsack.model import (
    BoolArray,
    FloatArray,
    IntArray,
    RawAxis,
    RawProblem,
    SumTerm,
    Term,
    check_cost,
)

__all__ = ["read"]


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
    check_cost(table, name)
    scope = tuple(sorted(set(variables)))
    if len(variables) > len(string.ascii_letters):
        raise InputError(f"{name} has {len(variables)} variables: too many for one table")
    given_as = "".join(string.ascii_letters[scope.index(v)] for v in variables)
    # A repeated letter is the diagonal; nothing is added up here.
    ordered = np.einsum(f"{given_as}->{string.ascii_letters[: len(scope)]}", table)
    return scope, np.array(ordered, dtype=np.float64)


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
