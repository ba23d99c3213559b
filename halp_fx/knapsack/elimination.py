"""Variable elimination: the exact optimum of `sum value - price * sum cost`, for many prices.

The order of elimination is found once. Then one evaluation is a few numpy operations a variable,
for a whole batch of (price, allowed levels) at a time. A sum node is eliminated by its equation
(a gather), which spares the axis that maximising over it would need.

Source: R. Dechter, "Bucket elimination: a unifying framework for reasoning", 1999.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from halp_fx.knapsack.model import FloatArray, IntArray, Problem

__all__ = ["Elimination", "TooWideError"]

NEG_INF = -np.inf


class TooWideError(Exception):
    """No order was found whose intermediate tables stay within the limit."""


@dataclass
class _Gather:
    """Elimination by an equation: the others in `out` determine the node."""

    flat: IntArray  # (prod out,): where in the joined table (node, *rest)
    invalid: IntArray | None  # flat positions of out that no state reaches
    inverse: IntArray  # (states of a, states of b) -> state of the node, -1: none
    others: tuple[int, int]  # a, b
    order: IntArray  # valid positions of out, sorted by where they come from
    starts: IntArray  # first of each run in `order`
    sources: IntArray  # joined position of each run


@dataclass
class _Step:
    """Join all that mentions `node`, then eliminate it."""

    node: int
    rest: tuple[int, ...]  # other nodes of the joined table, in order of elimination
    out: tuple[int, ...]  # nodes of the message
    shape: tuple[int, ...]  # of the joined table (node, *rest)
    inputs: list[tuple[int, tuple[int, ...]]]  # step whose message joins, its broadcast shape
    cost: FloatArray | None = None  # static costs, broadcastable to `shape`; finite
    forbid: FloatArray | None = None  # 0 or -inf, broadcastable to `shape`
    gather: _Gather | None = None
    parent: int = -1  # step that the message joins; -1: none, it is a number
    drop: tuple[int, ...] = ()  # axes of the parent's joined table that are not in `out`


@dataclass
class Trace:
    """Everything that an upward pass leaves: for decoding and for max-marginals."""

    total: FloatArray  # (batch,): the optimum; -inf: nothing is allowed
    joined: list[FloatArray]
    messages: list[FloatArray]


@dataclass
class _Plan:
    node: int
    by_equation: int | None  # index of the sum node whose equation eliminates it
    dense: list[int]  # equations to be joined as tables
    factors: list[int]  # factors that join; tables first, then messages
    rest: set[int]
    out: set[int]


@dataclass
class Elimination:
    """Schedule for some tables of a problem. Variables without a table are included if asked."""

    problem: Problem
    tables: Sequence[int]
    variables: Iterable[int]  # variables to include besides those of the tables
    limit: int  # entries of the largest intermediate table
    total_limit: int  # entries of all intermediate tables
    steps: list[_Step] = field(init=False, default_factory=list)
    total_size: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._sizes = self.problem.sizes
        self._count = len(self.problem.values)
        nodes, self._equations = self._closure()
        self.own_variables = tuple(sorted(n for n in nodes if n < self._count))
        plans = self._order(nodes)
        self._compile(plans)

    def _closure(self) -> tuple[set[int], list[int]]:
        nodes = {v for v in self.variables if self._sizes[v] > 1}
        for k in self.tables:
            nodes.update(self.problem.tables[k][0])
        equations = []
        for s in reversed(range(len(self.problem.sums))):
            if self._count + s in nodes:
                nodes.update(self.problem.sums[s].nodes)
                equations.append(s)
        return nodes, equations

    def _equation_nodes(self, s: int) -> tuple[int, int, int]:
        node = self.problem.sums[s]
        return node.left, node.right, self._count + s

    def _solvable(self, s: int, node: int) -> bool:
        """Whether the other two nodes of the equation determine this one."""
        equation = self.problem.sums[s]
        if node == self._count + s:
            return True
        axis = 0 if node == equation.left else 1
        ordered = np.sort(equation.index, axis=axis)
        return bool((np.diff(ordered, axis=axis) > 0).all())

    def _order(self, nodes: set[int]) -> list[_Plan]:
        """Greedy: next the node whose joined table or message is the smallest."""
        factors: dict[int, frozenset[int]] = {
            k: frozenset(self.problem.tables[t][0]) for k, t in enumerate(self.tables)
        }
        at: dict[int, set[int]] = {n: set() for n in nodes}
        for k, scope in factors.items():
            for n in scope:
                at[n].add(k)
        equations_at: dict[int, set[int]] = {n: set() for n in nodes}
        for s in self._equations:
            for n in self._equation_nodes(s):
                equations_at[n].add(s)
        solvable = {
            (s, n): self._solvable(s, n) for s in self._equations for n in self._equation_nodes(s)
        }

        def product(scope: Iterable[int]) -> int:
            return math.prod(self._sizes[n] for n in scope)

        def plan(n: int) -> tuple[int, _Plan]:
            joined = set().union(*(factors[k] for k in at[n])) - {n}
            equations = sorted(equations_at[n])
            if len(equations) == 1 and solvable[equations[0], n]:
                s = equations[0]
                out = joined | set(self._equation_nodes(s)) - {n}
                size = max(product(joined) * self._sizes[n], product(out))
                return size, _Plan(n, s, [], sorted(at[n]), joined, out)
            for s in equations:
                joined |= set(self._equation_nodes(s)) - {n}
            size = product(joined) * self._sizes[n]
            return size, _Plan(n, None, equations, sorted(at[n]), joined, joined)

        options = {n: plan(n) for n in sorted(nodes)}
        plans: list[_Plan] = []
        fresh, total = len(factors), 0
        while options:
            n = min(options, key=lambda m: (options[m][0], m))
            size, chosen = options.pop(n)
            total += size
            if size > self.limit or total > self.total_limit:
                raise TooWideError
            plans.append(chosen)
            for k in chosen.factors:
                for m in factors.pop(k):
                    at[m].discard(k)
            used = chosen.dense if chosen.by_equation is None else [chosen.by_equation]
            for s in used:
                for m in self._equation_nodes(s):
                    equations_at[m].discard(s)
            # Message number: tables come first, then one a step.
            factors[fresh] = frozenset(chosen.out)
            for m in chosen.out:
                at[m].add(fresh)
            fresh += 1
            for m in chosen.out | chosen.rest:
                options[m] = plan(m)
        return plans

    def _compile(self, plans: list[_Plan]) -> None:
        position = {p.node: k for k, p in enumerate(plans)}

        def ordered(scope: Iterable[int]) -> tuple[int, ...]:
            return tuple(sorted(scope, key=position.__getitem__))

        def shape_in(scope: Iterable[int], joined: tuple[int, ...]) -> tuple[int, ...]:
            inside = set(scope)
            return tuple(self._sizes[n] if n in inside else 1 for n in joined)

        tables = len(self.tables)
        for p in plans:
            rest, out = ordered(p.rest), ordered(p.out)
            joined = (p.node, *rest)
            step = _Step(p.node, rest, out, tuple(self._sizes[n] for n in joined), [])
            for k in p.factors:
                if k >= tables:
                    child = self.steps[k - tables]
                    step.inputs.append((k - tables, shape_in(child.out, joined)))
                    child.parent = len(self.steps)
                    child.drop = tuple(
                        1 + a for a, n in enumerate(joined) if n not in set(child.out)
                    )
                    continue
                scope, table = self.problem.tables[self.tables[k]]
                axes = sorted(range(len(scope)), key=lambda a: position[scope[a]])
                table = table.transpose(axes).reshape(shape_in(scope, joined))
                step.cost = table if step.cost is None else step.cost + table
            if step.cost is not None and not np.isfinite(step.cost).all():
                step.forbid = np.where(np.isinf(step.cost), NEG_INF, 0.0)
                step.cost = np.where(np.isinf(step.cost), 0.0, step.cost)
            for s in p.dense:
                dense = self._dense(s, joined)
                step.forbid = dense if step.forbid is None else step.forbid + dense
            if p.by_equation is not None:
                step.gather = self._gather(p.by_equation, step)
            self.total_size += math.prod(step.shape) + math.prod(self._sizes[n] for n in out)
            self.steps.append(step)

    def _dense(self, s: int, joined: tuple[int, ...]) -> FloatArray:
        left, right, node = self._equation_nodes(s)
        index = self.problem.sums[s].index
        table = np.full((*index.shape, self._sizes[node]), NEG_INF)
        np.put_along_axis(table, index[..., None], 0.0, axis=2)
        scope = (left, right, node)
        axes = sorted(range(3), key=lambda a: joined.index(scope[a]))
        shape = [self._sizes[n] if n in scope else 1 for n in joined]
        return table.transpose(axes).reshape(shape)

    def _gather(self, s: int, step: _Step) -> _Gather:
        left, right, total = self._equation_nodes(s)
        index = self.problem.sums[s].index
        i, j = np.indices(index.shape)
        if step.node == total:
            a, b, inverse = left, right, index
        elif step.node == left:
            a, b = total, right
            inverse = np.full((self._sizes[total], self._sizes[right]), -1)
            inverse[index, j] = i
        else:
            a, b = left, total
            inverse = np.full((self._sizes[left], self._sizes[total]), -1)
            inverse[i, index] = j
        shape = tuple(self._sizes[n] for n in step.out)
        coordinates = dict(zip(step.out, np.indices(shape, sparse=True), strict=True))
        state = inverse[coordinates[a], coordinates[b]]
        where: IntArray = np.asarray(state)
        for n, size in zip(step.rest, step.shape[1:], strict=True):
            where = where * size + coordinates[n]
        flat = np.broadcast_to(where, shape).reshape(-1)
        bad = np.broadcast_to(state < 0, shape).reshape(-1)
        good = np.flatnonzero(~bad)
        order = good[np.argsort(flat[good], kind="stable")]
        sources, starts = np.unique(flat[order], return_index=True)
        return _Gather(
            np.where(bad, 0, flat),
            np.flatnonzero(bad) if bad.any() else None,
            inverse,
            (a, b),
            order,
            starts,
            sources,
        )

    def upward(self, prices: FloatArray, values: Sequence[FloatArray]) -> Trace:
        """Optimum for each price (batch,); values[v]: (batch or 1, levels), -inf: not allowed."""
        batch = prices.size
        total = np.zeros(batch)
        joined: list[FloatArray] = []
        messages: list[FloatArray] = []
        for step in self.steps:
            dims = len(step.shape)
            # Small parts first: most additions then run on small arrays.
            small: FloatArray | None = None
            if step.node < self._count:
                own = values[step.node]
                small = own.reshape(own.shape[0], -1, *([1] * (dims - 1)))
            for k, shape in step.inputs:
                part = messages[k].reshape(-1, *shape)
                small = part if small is None else small + part
            table: FloatArray
            if step.cost is not None:
                table = prices.reshape(-1, *([1] * dims)) * step.cost
                np.negative(table, out=table)
                if step.forbid is not None:
                    table = table + step.forbid
                if small is not None:
                    table = table + small
            elif step.forbid is not None:
                table = step.forbid[None] + (0.0 if small is None else small)
            else:
                table = np.zeros((1, *step.shape)) if small is None else small
            if table.shape != (batch, *step.shape):
                table = np.broadcast_to(table, (batch, *step.shape))
            joined.append(table)
            if step.gather is None:
                message = table.max(axis=1)
            else:
                message = table.reshape(batch, -1).take(step.gather.flat, axis=1)
                if step.gather.invalid is not None:
                    message[:, step.gather.invalid] = NEG_INF
                message = message.reshape(batch, *(self._sizes[n] for n in step.out))
            messages.append(message)
            if not step.out:
                total = total + message
        return Trace(total, joined, messages)

    def decode(self, trace: Trace) -> IntArray:
        """States (nodes, batch) of the optimum; nodes that are not here stay at 0."""
        batch = trace.total.size
        states = np.zeros((len(self._sizes), batch), dtype=np.int64)
        rows = np.arange(batch)
        for step, table in zip(reversed(self.steps), reversed(trace.joined), strict=True):
            if step.gather is not None:
                a, b = step.gather.others
                states[step.node] = step.gather.inverse[states[a], states[b]]
            else:
                here = table[(rows, slice(None), *(states[n] for n in step.rest))]
                states[step.node] = here.argmax(axis=1)
        return states

    def marginals(self, trace: Trace) -> dict[int, FloatArray]:
        """For each variable, the optimum (batch, levels) if it is held at that level."""
        batch = trace.total.size
        beliefs: list[FloatArray | None] = [None] * len(self.steps)
        found: dict[int, FloatArray] = {}
        for k in reversed(range(len(self.steps))):
            step = self.steps[k]
            if step.parent < 0:
                above = trace.total
            else:
                parent = beliefs[step.parent]
                assert parent is not None
                above = parent.max(axis=step.drop) if step.drop else parent
            if step.gather is not None:
                g = step.gather
                belief = np.full((batch, math.prod(step.shape)), NEG_INF)
                runs = above.reshape(batch, -1)[:, g.order]
                belief[:, g.sources] = np.maximum.reduceat(runs, g.starts, axis=1)
                belief = belief.reshape(batch, *step.shape)
            else:
                message = trace.messages[k]
                message = np.where(np.isneginf(message), 0.0, message)
                belief = trace.joined[k] + (above - message)[:, None]
            beliefs[k] = belief
            if step.node < self._count:
                found[step.node] = belief.reshape(batch, step.shape[0], -1).max(axis=2)
        return found
