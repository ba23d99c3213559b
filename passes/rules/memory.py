"""The memory that activations take while the network runs, as functions of the widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import fx

from halp_fx.passes.rules.counts import Count, count_of, reading, total
from halp_fx.passes.rules.kernels import axes_of, specs_in
from halp_fx.types import ChannelGroups, TensorSpec

__all__ = ["Moment", "memory_moments", "peak"]


Moment: TypeAlias = tuple[Count, ...]  # bytes, a count for all tensors with the same dims


def memory_moments(groups: ChannelGroups) -> list[Moment]:
    """Bytes of the activations that are alive at each moment at which that may be the most.

    A tensor lives from the node that makes it to the last that reads it, or a view of it; the
    inputs are alive from the start, outputs to the end. Parameters and the workspace within an
    operator are not counted, and no memory is taken to be shared by an operator's input and
    output.
    """
    alive = _alive(groups)
    most = [
        now
        for k, now in enumerate(alive)
        if not (k + 1 < len(alive) and now <= alive[k + 1]) and not (k > 0 and now < alive[k - 1])
    ]
    specs = {name: list(specs_in(groups.outputs.get(name))) for now in most for name in now}
    return [_bytes(spec for name in sorted(now) for spec in specs[name]) for now in most]


def _bytes(specs: Iterable[TensorSpec]) -> Moment:
    """What tensors take together; apart where their dims are, or a solver would have to list
    every combination of the widths that are alive at a time."""
    alike: dict[Any, list[TensorSpec]] = {}
    for spec in specs:
        alike.setdefault(frozenset(a.parts for a in axes_of(reading([spec]))[0]), []).append(spec)
    return tuple(count_of(reading(same), lambda _, moved: moved) for same in alike.values())


def peak(moments: Sequence[Moment], kept: Mapping[int, int] | Any) -> tuple[int, int]:
    """The most bytes that are alive at a time, and at which moment (an index into `moments`)."""
    sizes = [total(moment, kept) for moment in moments]
    most = max(sizes, default=0)
    return most, sizes.index(most) if sizes else -1


def _alive(groups: ChannelGroups) -> list[frozenset[str]]:
    """For each node that computes: the nodes whose results are in memory while it runs."""
    owner = _owners(groups)
    nodes = list(groups.traced.module.graph.nodes)
    born: dict[str, int] = {}
    last: dict[str, int] = {}
    for k, node in enumerate(nodes):
        if node.name in owner:
            born.setdefault(owner[node.name], 0 if node.op == "placeholder" else k)
            last.setdefault(owner[node.name], k)
        for source in node.all_input_nodes:
            if source.name in owner:
                last[owner[source.name]] = k
    return [
        frozenset(name for name in born if born[name] <= k <= last[name])
        for k, node in enumerate(nodes)
        if node.op not in ("placeholder", "get_attr", "output")
    ]


def _owners(groups: ChannelGroups) -> dict[str, str]:
    """Node -> the node that made the memory its result lies in; activations only."""
    computed = {w.node for w in groups.work if w.kind != "view"}
    owner: dict[str, str] = {}
    for node in groups.traced.module.graph.nodes:
        if node.op in ("get_attr", "output") or not list(specs_in(groups.outputs.get(node.name))):
            continue
        source = _viewed(node, owner)
        if node.op == "placeholder" or node.name in computed or source is None:
            owner[node.name] = node.name
        else:
            owner[node.name] = owner[source]
    return owner


def _viewed(node: fx.Node, owner: Mapping[str, str]) -> str | None:
    return next((source.name for source in node.all_input_nodes if source.name in owner), None)
