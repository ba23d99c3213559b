"""groups: which channels of which parameters stand or fall together, and which must stay.

Requires: a `Traced` network.
Ensures: any choice of units, as long as `Group.least` of each group are kept, leaves a network
whose every tensor is rectangular; that was tried on two random choices, node by node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np

from halp_fx.passes.rules.branches import find_branches
from halp_fx.passes.rules.components import (
    connected_components,
    least_units,
    signatures,
    where_tied,
)
from halp_fx.passes.rules.core import FIXED, Block, LabelRun, PinRecord
from halp_fx.passes.rules.interpret import (
    LabelInterpreter,
    Snapshot,
    label_discovery,
    map_tensors,
    snapshots_in,
)
from halp_fx.passes.rules.scope import Scope
from halp_fx.passes.rules.shrink import Failure, Labelled, shrink
from halp_fx.passes.rules.source import source_of
from halp_fx.passes.rules.structure import named_tensors
from halp_fx.passes.rules.work import WorkLog
from halp_fx.types import (
    ChannelGroups,
    Extent,
    Group,
    IntArray,
    Member,
    Pin,
    TensorSpec,
    Traced,
)

__all__ = ["find_groups"]

_MAX_TRIALS = 8
_MAX_CHOICES = 2


def find_groups(
    traced: Traced, *, exact: bool = False, scope: Scope | None = None
) -> ChannelGroups:
    """Find the coupled channel groups by running the graph once on labels.

    Where a reshape leaves a choice which of its dims may shrink (heads or head_dim) and the first
    choice turns out to be pinned, the other is tried, and the better of the two kept.

    Args:
        exact: pin the channels that LayerNorm and the like take statistics over; otherwise they
            may go, and the groups concerned name those nodes in `inexact`.
        scope: channels that the caller excludes; a branch that has some is not dropped whole.
    """
    best = tried = _search(traced, exact, scope, {})
    prefer: dict[tuple[str, int], int] = {}
    for _ in range(_MAX_CHOICES):
        others = tried.other_choices()
        if not others:
            break
        prefer = {**prefer, **others}
        tried = _search(traced, exact, scope, prefer)
        if tried.prunable > best.prunable:
            best = tried
    groups = best.channel_groups()
    if scope is None:
        return groups
    free = tuple(branch for branch in groups.branches if not scope.holds(branch.tensors))
    return replace(groups, branches=free)


def _search(
    traced: Traced, exact: bool, scope: Scope | None, prefer: dict[tuple[str, int], int]
) -> _Found:
    """Run on labels, then pin around what can't be shrunk until all agrees."""
    run = LabelRun(exact=exact, prefer=prefer)
    work = WorkLog(run, traced)
    interpreter, own = label_discovery(traced, run)
    if scope is not None:
        run.pins.extend(scope.pins(run.blocks))
    for _ in range(_MAX_TRIALS):
        found = _Found(traced, work, interpreter, own)
        failures = found.trial()
        if not failures:
            return found
        for failure in failures:
            found.pin_around(failure)
    everything = np.arange(1, run.size, dtype=np.int64)
    reason = "the shrunk network could not be made to agree with the labels"
    run.pins.append(PinRecord(everything, "", "", reason))
    return _Found(traced, work, interpreter, own)


class _Found:
    """Components of the labels, and what follows from them."""

    def __init__(
        self,
        traced: Traced,
        work: WorkLog,
        interpreter: LabelInterpreter,
        own: dict[int, dict[int, IntArray]],
    ) -> None:
        run, snapshots = work.run, interpreter.snapshots
        self.traced, self.run, self.snapshots, self.own = traced, run, snapshots, own
        self.work, self.writes = work, interpreter.writes
        roots = connected_components(run.size, [(t.left, t.right) for t in run.ties])
        pinned = np.zeros(run.size, dtype=bool)
        for pin in run.pins:
            pinned[roots[pin.labels]] = True
        pinned[FIXED] = True
        self.roots = roots
        components = np.where(pinned[roots], FIXED, roots)
        self.vectors = [
            components[labels]
            for snap in snapshots_in(snapshots)
            for labels in snap.labels.values()
        ]
        blocks = [components[b.start : b.start + b.size] for b in run.blocks]
        group_of = signatures(components, blocks, self.vectors)  # by component; -1: none
        least = least_units(group_of, [*blocks, *self.vectors])
        # A group of which nothing can go is no group: its channels stay.
        sizes = np.bincount(group_of[group_of >= 0], minlength=len(least))
        self.alone = (sizes <= least) & (sizes > 0)
        stuck = np.zeros(run.size, dtype=bool)
        grouped = group_of >= 0
        stuck[grouped] = self.alone[group_of[grouped]]
        self.stuck = stuck
        components = np.where(stuck[components], FIXED, components)
        group_of = np.where(stuck, -1, group_of)
        order = np.unique(group_of[group_of >= 0])
        renumber = np.full(len(least) + 1, -1)
        renumber[order] = np.arange(len(order))
        self.group_of = renumber[group_of]
        self.least = least[order]
        self.components = components
        unrun = frozenset(interpreter.held), frozenset(interpreter.blind)
        self.labelled = Labelled(traced, snapshots, own, components, *unrun)
        self.units = [np.flatnonzero(self.group_of == g) for g in range(len(order))]

    def trial(self) -> list[Failure]:
        """Shrink every group by irregular choices; the nodes that can't follow."""
        failures: list[Failure] = []
        for seed in range(2 if self.units else 0):
            generator = np.random.default_rng(seed)
            alive = np.ones(self.run.size, dtype=bool)
            for units, least in zip(self.units, self.least, strict=True):
                # Shares differ, so that no two widths agree by chance.
                keep = round(len(units) * generator.uniform(0.3, 0.8))
                keep = min(max(keep, int(least), 1 if len(units) > 1 else 0), len(units))
                alive[generator.permutation(units)[keep:]] = False
            shrink(self.labelled, alive[self.components], failures)
            if failures:
                break
        return failures

    @property
    def prunable(self) -> int:
        """How many slices of parameters belong to a group."""
        return sum(
            int((self.group_of[self.components[b.start : b.start + b.size]] >= 0).sum())
            for b in self.run.blocks
        )

    def other_choices(self) -> dict[tuple[str, int], int]:
        """For reshapes whose free dim can't shrink: the next dim along which labels vary."""
        return {
            choice.key: choice.dims[(choice.dims.index(choice.free) + 1) % len(choice.dims)]
            for choice in self.run.choices
            if len(choice.dims) > 1 and (self.group_of[self.components[choice.labels]] < 0).all()
        }

    def pin_around(self, failure: Failure) -> None:
        """Pin every channel that goes into or comes out of a node."""
        graph = self.traced.module.graph
        node = next(n for n in graph.nodes if n.name == failure.node)
        labels: list[IntArray] = []
        around = [node, *node.all_input_nodes]
        while around and not labels:  # of a node of numbers: what they are the sizes of
            for near in around:
                for snap in snapshots_in(self.snapshots.get(near.name)):
                    labels.extend(snap.labels.values())
            around = list(dict.fromkeys(m for near in around for m in near.all_input_nodes))
        if node.op == "call_module":
            for _, tensor in named_tensors(self.traced.module.get_submodule(str(node.target))):
                labels.extend(self.own[id(tensor)].values())
        if labels:
            joined = np.unique(np.concatenate(labels))
            record = PinRecord(joined[joined != FIXED], node.name, str(node.target), failure.reason)
            self.run.pins.append(record)

    def channel_groups(self) -> ChannelGroups:
        names = _aliases(self.traced)
        members = [self._members(g, names) for g in range(len(self.units))]
        inexact = self._inexact()
        groups: list[Group] = []
        used: set[str] = set()
        for g, units in enumerate(self.units):
            producer = _producer(members[g])
            name, count = producer.name.rpartition(".")[0] or producer.name, 2
            unique = name
            while unique in used:
                unique, count = f"{name}#{count}", count + 1
            used.add(unique)
            groups.append(
                Group(
                    name=unique,
                    units=len(units),
                    width=producer.index.shape[1],
                    members=tuple(members[g]),
                    least=int(self.least[g]),
                    inexact=tuple(sorted(inexact.get(g, ()))),
                )
            )
        order = sorted(range(len(groups)), key=lambda g: int(self.units[g][0]))
        ordered = tuple(groups[g] for g in order)
        outputs = {
            name: map_tensors(value, lambda s: self._spec(s, order))
            for name, value in self.snapshots.items()
        }
        parameters = {
            name: self._spec(Snapshot(tuple(t.shape), t.dtype, self.own[id(t)]), order)
            for name, t in named_tensors(self.traced.module)
        }
        logged = tuple(self.work.specify(lambda s: self._spec(s, order)))
        return ChannelGroups(
            traced=self.traced,
            groups=ordered,
            pins=tuple(self._pins(names)),
            graph=self._graph(names),
            outputs=outputs,
            parameters=parameters,
            work=logged,
            branches=find_branches(
                self.traced.module, ordered, outputs, parameters, logged, self.writes
            ),
            labelled=self.labelled,
            unit_components=tuple(self.units[g] for g in order),
        )

    def _members(self, group: int, names: dict[str, list[str]]) -> list[Member]:
        units = self.units[group]
        found: list[Member] = []
        for block in self._blocks_of[group]:
            owner = self.components[block.start : block.start + block.size]
            positions = np.flatnonzero(self.group_of[owner] == group)
            unit = np.searchsorted(units, owner[positions])
            index = positions[np.argsort(unit, kind="stable")].reshape(len(units), -1)
            for name in names[block.name]:
                found.append(Member(name, block.dim, index.astype(np.int64)))
        return found

    @property
    def _blocks_of(self) -> dict[int, list[Block]]:
        cached = getattr(self, "_block_cache", None)
        if cached is None:
            cached = {g: [] for g in range(len(self.units))}
            for block in self.run.blocks:
                owner = self.components[block.start : block.start + block.size]
                for g in np.unique(self.group_of[owner]):
                    if g >= 0:
                        cached[int(g)].append(block)
            self._block_cache: dict[int, list[Block]] = cached
        return cached

    def _inexact(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for labels, node in self.run.inexact:
            for g in np.unique(self.group_of[self.components[labels]]):
                if g >= 0:
                    found.setdefault(int(g), set()).add(node)
        return found

    def _spec(self, snap: Snapshot, order: list[int]) -> TensorSpec:
        place = {g: i for i, g in enumerate(order)}
        extents: list[Extent] = []
        for dim, size in enumerate(snap.shape):
            labels = snap.labels.get(dim)
            if labels is None:
                extents.append(Extent(size, size))
                continue
            group = self.group_of[self.components[labels]]
            found, counts = np.unique(group[group >= 0], return_counts=True)
            parts = tuple(
                (place[int(g)], int(c) // len(self.units[int(g)]))
                for g, c in zip(found, counts, strict=True)
            )
            extents.append(Extent(size, int((group < 0).sum()), tuple(sorted(parts))))
        return TensorSpec(tuple(extents), snap.dtype)

    def _pins(self, names: dict[str, list[str]]) -> list[Pin]:
        """For every pinned channel of a parameter, the first pin that reached it."""
        nodes = {n.name: n for n in self.traced.module.graph.nodes}
        first = np.full(self.run.size, -1)
        for i, pin in reversed(list(enumerate(self.run.pins))):
            first[self.roots[pin.labels]] = i
        starts = np.array([b.start for b in self.run.blocks])
        alone = where_tied(self.stuck, self.roots, starts, self.run.ties)
        found: list[Pin] = []
        for block in self.run.blocks:
            roots = self.roots[block.start : block.start + block.size]
            # Each unit that is alone in its group comes after the pins.
            cause = np.where(self.stuck[roots], len(self.run.pins) + roots, first[roots])
            for i in np.unique(cause[cause >= 0]):
                index = np.flatnonzero(cause == i).astype(np.int64)
                if i >= len(self.run.pins):
                    node, reason = (
                        alone.get(int(i) - len(self.run.pins), ""),
                        _why_alone(len(index)),
                    )
                else:
                    node, reason = self.run.pins[i].node, self.run.pins[i].reason
                source = source_of(nodes[node]) if node in nodes else ""
                found.extend(
                    Pin(name, block.dim, index, node, reason, source) for name in names[block.name]
                )
        return found

    def _graph(self, names: dict[str, list[str]]) -> nx.MultiGraph[Any]:
        graph: nx.MultiGraph[Any] = nx.MultiGraph()
        nodes = {n.name: n for n in self.traced.module.graph.nodes}
        starts = np.array([b.start for b in self.run.blocks])
        sources = {t.node: source_of(nodes[t.node]) for t in self.run.ties if t.node in nodes}
        for block in self.run.blocks:
            graph.add_node((block.name, block.dim), size=block.size)
        for tie in self.run.ties:
            left = np.searchsorted(starts, tie.left, side="right") - 1
            right = np.searchsorted(starts, tie.right, side="right") - 1
            for a, b in np.unique(np.stack([left, right]), axis=1).T:
                one, two = self.run.blocks[a], self.run.blocks[b]
                graph.add_edge(
                    (one.name, one.dim),
                    (two.name, two.dim),
                    node=tie.node,
                    op=tie.op,
                    source=sources.get(tie.node, ""),
                )
        for every in names.values():  # one tensor under several names
            for other in every[1:]:
                for block_name, dim in [k for k in graph.nodes if k[0] == every[0]]:
                    graph.add_edge((block_name, dim), (other, dim), node="", op="shared", source="")
        return graph


def _why_alone(channels: int) -> str:
    if channels == 1:
        return "a single channel, without which nothing would remain"
    return f"its {channels} channels are all tied to each other: without them nothing would remain"


def _aliases(traced: Traced) -> dict[str, list[str]]:
    """First name of each tensor -> all its names."""
    by_id: dict[int, list[str]] = {}
    for name, tensor in named_tensors(traced.module):
        by_id.setdefault(id(tensor), []).append(name)
    return {every[0]: every for every in by_id.values()}


def _producer(members: list[Member]) -> Member:
    """The weight whose rows make the channels, if there's one; else the first member."""
    rows = [m for m in members if m.dim == 0 and m.name.endswith("weight")]
    columns = {m.name for m in members if m.dim == 1}
    return next((m for m in rows if m.name not in columns), rows[0] if rows else members[0])
