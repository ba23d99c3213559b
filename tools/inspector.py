"""Which channels stand or fall together, and why: the texts behind `halp-fx groups`."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import networkx as nx
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from halp_fx.errors import InputError
from halp_fx.tools.inspector_heads import cause_of, causes, places_of, read_by, rows_of
from halp_fx.tools.models import close_matches
from halp_fx.types import ChannelGroups, Group, Pin

__all__ = ["explain", "groups_table", "pins_table", "to_dot", "to_graphml", "to_json"]

Node = tuple[str, int]  # (parameter, dim), as in ChannelGroups.graph

# A list of numbers, or of lists of numbers, over several lines. A JSON string has no raw newline,
# so nothing inside one can match.
_NUMBER_LIST = re.compile(r"\[\n[\d\s,\[\]]*\]")

_SHOWN = 4  # names listed in a table's cell before "+12"
_READERS = 6  # a level of an SSD has two heads and the next level
_PLACES = 8


def groups_table(groups: ChannelGroups) -> Table:
    """One row a group: its channels, what makes and what reads them, and what couples them.

    A layer that reads other channels beside them, after a concatenation, says of how many:
    "features.4.squeeze (64 of 128)".
    """
    table = Table(title=f"{groups.traced.model_name}: groups of coupled channels")
    table.add_column("group", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column(escape("parameters [dim]"))
    table.add_column("read by")
    table.add_column("coupled by")
    for group in groups.groups:
        channels = f"{group.units}" if group.width == 1 else f"{group.units} x {group.width}"
        readers = _shorten(read_by(groups, group), _READERS)
        coupled = [
            f"{op} ({_shorten(nodes, 2)})" for op, nodes in sorted(_operators(groups, group))
        ]
        cells = (
            group.name,
            channels,
            _shorten(rows_of(groups, group)),
            readers,
            ", ".join(coupled),
        )
        table.add_row(*(escape(cell) for cell in cells))
    total = sum(group.units * group.width for group in groups.groups)
    count = len(groups.groups)
    table.caption = f"{count} group{'s' * (count != 1)}, {total} channels that may go"
    return table


def pins_table(groups: ChannelGroups) -> Table:
    """One row for each node that pins channels: which, why, and the line of source.

    Of the network's outputs, one row each. Where a view splits the channels of an output, the
    reason says into what, as "4 x 91" for 4 anchors of 91 classes.
    """
    table = Table(title="channels that must stay")
    for header in ("node", "reason", "parameters [dim] (channels)", "source"):
        table.add_column(escape(header), overflow="fold")
    for cause, pins in causes(groups):
        places = _shorten(places_of(pins), _PLACES)
        cells = (cause.node, cause.text, places, _line(cause.source))
        table.add_row(*(escape(cell) for cell in cells))
    for module, reason in sorted(groups.traced.opaque.items()):
        table.add_row(escape(module), escape(f"held whole: {reason}"), "", "")
    return table


def explain(groups: ChannelGroups, layer: str, to: str | None = None) -> list[RenderableType]:
    """What a layer's channels are coupled with, through which nodes, and what pins them.

    Args:
        groups: what the groups pass returned.
        layer: a module (`layer1.0.conv1`) or a parameter (`layer1.0.conv1.weight`).
        to: a second layer: only the shortest path from the first to it.

    Returns:
        Texts and trees to print. A tree's root is a dim of the layer; each step down is one
        coupling, on the shortest path from the root.

    Raises:
        InputError: the layer is unknown, or the two layers are not coupled.
    """
    sources = _nodes_of(groups, layer)
    if to is not None:
        return [_path(groups, layer, sources, to)]
    found: list[RenderableType] = []
    shown: set[Node] = set()
    for source in sources:
        around: set[Node] = set()
        for group in groups.groups:
            places = {(member.name, member.dim) for member in group.members}
            if source in places:
                around |= places
                width = f" of {group.width} channels" if group.width > 1 else ""
                title = f"{_place(source)}: {group.units} units{width} of group {group.name}"
                found.append(Text(title, style="bold"))
        if around and not around <= shown:
            found.append(_tree(groups, source, around))
        shown |= around
        pins = _pins_at(groups, source)
        found += [_pin_text(groups, source, pin) for pin in pins]
        if not around and not pins:
            found += _pinned_through(groups, source)
    if not found:
        found.append(Text(f"{layer}: nothing couples its channels, and nothing pins them"))
    return found


def to_json(groups: ChannelGroups) -> str:
    """Groups, pins and modules held whole, as JSON; the same text for the same network."""
    document = {
        "model": groups.traced.model_name,
        "groups": [
            {
                "name": group.name,
                "units": group.units,
                "width": group.width,
                "inexact": list(group.inexact),
                "members": [
                    {"name": member.name, "dim": member.dim, "index": member.index.tolist()}
                    for member in group.members
                ],
                "coupled_by": dict(sorted(_operators(groups, group))),
            }
            for group in groups.groups
        ],
        "pins": [
            {
                "name": pin.name,
                "dim": pin.dim,
                "index": pin.index.tolist(),
                "node": pin.node,
                "reason": pin.reason,
                "source": pin.source,
            }
            for pin in groups.pins
        ],
        "opaque": dict(sorted(groups.traced.opaque.items())),
    }
    return _NUMBER_LIST.sub(_one_line, json.dumps(document, indent=2)) + "\n"


def to_graphml(groups: ChannelGroups) -> str:
    """The coupling graph as GraphML, for yEd, Gephi or networkx."""
    stream = io.BytesIO()
    nx.write_graphml(_plain_graph(groups), stream, named_key_ids=True)
    return stream.getvalue().decode() + "\n"


def to_dot(groups: ChannelGroups) -> str:
    """The coupling graph in the DOT language, for Graphviz."""
    graph = _plain_graph(groups)
    lines = ["graph channels {", "  node [shape=box];"]
    for name, data in graph.nodes(data=True):
        label = name if not data["groups"] else f"{name}\n{data['groups']}"
        style = ", style=dashed" if data["pinned"] else ""
        lines.append(f"  {_quote(name)} [label={_quote(label)}{style}];")
    lines += [
        f"  {_quote(left)} -- {_quote(right)} [label={_quote(data['op'])}];"
        for left, right, data in graph.edges(data=True)
    ]
    return "\n".join([*lines, "}"]) + "\n"


def _operators(groups: ChannelGroups, group: Group) -> list[tuple[str, list[str]]]:
    """Operators that couple the members of a group, each with its nodes in graph order."""
    places = {(member.name, member.dim) for member in group.members}
    edges = groups.graph.subgraph(places).edges(data=True)
    order = {node.name: i for i, node in enumerate(groups.traced.module.graph.nodes)}
    nodes: dict[str, set[str]] = {}
    for _, _, data in edges:
        nodes.setdefault(str(data["op"]), set()).add(str(data["node"]))
    last = len(order)
    return [
        (op, sorted(names, key=lambda name: (order.get(name, last), name)))
        for op, names in nodes.items()
    ]


def _nodes_of(groups: ChannelGroups, layer: str) -> list[Node]:
    """The (parameter, dim) nodes of a module or parameter, in the graph's own order."""
    known = [(name, dim) for name, spec in groups.parameters.items() for dim in _dims(spec)]
    found = [node for node in known if node[0] == layer or node[0].startswith(f"{layer}.")]
    if found:
        return found
    modules = {name.rpartition(".")[0] for name, _ in known} - {""}
    names = modules | {name for name, _ in known}
    raise InputError(
        f"{groups.traced.model_name} has no layer {layer!r} with parameters"
        f"{close_matches(layer, names)}"
    )


def _dims(spec: Any) -> range:
    return range(len(spec.extents))


def _pins_at(groups: ChannelGroups, place: Node) -> list[Pin]:
    return [pin for pin in groups.pins if (pin.name, pin.dim) == place]


def _pinned_through(groups: ChannelGroups, source: Node) -> list[RenderableType]:
    """The way to the nearest place that is pinned, for channels that no group has."""
    if source not in groups.graph:
        return []
    for _, place in [(source, source), *nx.bfs_edges(groups.graph, source, sort_neighbors=sorted)]:
        pins = _pins_at(groups, place)
        if pins:
            path = nx.shortest_path(groups.graph, source, place)
            return [_path_tree(groups, path), *(_pin_text(groups, place, pin) for pin in pins)]
    return []


def _tree(groups: ChannelGroups, source: Node, around: set[Node]) -> Tree:
    graph = groups.graph.subgraph(around | {source})
    root = Tree(Text(_place(source)))
    # Neighbours in sorted order: the same tree for the same network.
    edges = list(nx.bfs_edges(graph, source, sort_neighbors=sorted)) if source in graph else []
    parents = {parent for parent, _ in edges}
    branches = {source: root}
    leaves: dict[tuple[Node, str, int, str], tuple[Text, int]] = {}
    for parent, child in edges:
        (name, dim), coupling = child, _edge_text(graph, parent, child)
        module, _, short = name.rpartition(".")
        # A norm's weight, bias and statistics are one line.
        key = (parent, module, dim, coupling)
        if child not in parents and key in leaves:
            text, end = leaves[key]
            text.plain = f"{text.plain[:end]}, {short}{text.plain[end:]}"
            leaves[key] = text, end + len(short) + 2
            continue
        text = Text(f"{_place(child)}  {coupling}", overflow="fold")
        branches[child] = branches[parent].add(text)
        if child not in parents:
            leaves[key] = text, len(name)
    return root


def _path(groups: ChannelGroups, layer: str, sources: list[Node], to: str) -> Tree:
    targets = set(_nodes_of(groups, to))
    best: list[Node] | None = None
    for source in sources:
        if source not in groups.graph:
            continue
        paths = nx.single_source_shortest_path(groups.graph, source)
        reached = [paths[target] for target in sorted(targets) if target in paths]
        for path in reached:
            if best is None or len(path) < len(best):
                best = path
    if best is None:
        raise InputError(f"{layer!r} and {to!r} are not coupled")
    return _path_tree(groups, best)


def _path_tree(groups: ChannelGroups, path: list[Node]) -> Tree:
    root = branch = Tree(Text(_place(path[0])))
    for parent, child in pairwise(path):
        text = f"{_place(child)}  {_edge_text(groups.graph, parent, child)}"
        branch = branch.add(Text(text, overflow="fold"))
    return root


def _edge_text(graph: Any, left: Node, right: Node) -> str:
    couplings = sorted(
        {
            (str(data["node"]), str(data["op"]), str(data["source"]))
            for data in _edges(graph, left, right)
        }
    )
    node, op, source = couplings[0]
    more = f" and {len(couplings) - 1} more" if len(couplings) > 1 else ""
    where = f", {_line(source)}" if source else ""
    return f"by {op} at node {node}{more}{where}"


def _line(source: str) -> str:
    """A line of source, its file named from its package or from the current folder."""
    _, installed, inside = source.partition("site-packages/")
    return inside if installed else source.removeprefix(f"{os.getcwd()}{os.sep}")


def _edges(graph: Any, left: Node, right: Node) -> list[dict[str, Any]]:
    return list(graph.get_edge_data(left, right).values())


def _pin_text(groups: ChannelGroups, place: Node, pin: Pin) -> Text:
    where = f", {_line(pin.source)}" if pin.source else ""
    cause = cause_of(groups, pin)
    text = Text(f"{_place(place)}: {len(pin.index)} channels pinned by node {cause.node}: ")
    text.append(f"{cause.text}{where}", style="yellow")
    return text


def _plain_graph(groups: ChannelGroups) -> Any:
    """The coupling graph with text for nodes and attributes, in a fixed order."""
    inside: dict[Node, list[str]] = {}
    for group in groups.groups:
        for member in group.members:
            inside.setdefault((member.name, member.dim), []).append(group.name)
    pinned = {(pin.name, pin.dim) for pin in groups.pins}
    places = sorted(set(groups.graph) | set(inside) | pinned)
    plain = nx.MultiGraph()
    for place in places:
        names = ", ".join(dict.fromkeys(inside.get(place, [])))
        plain.add_node(_place(place), groups=names, pinned=place in pinned)
    edges = Counter(
        (*sorted((left, right)), str(data["op"]), str(data["node"]), str(data["source"]))
        for left, right, data in groups.graph.edges(data=True)
    )
    for left, right, op, node, source in sorted(edges):
        plain.add_edge(_place(left), _place(right), op=op, node=node, source=source)
    return plain


def _place(node: Node) -> str:
    return f"{node[0]}[{node[1]}]"


def _shorten(names: list[str], shown: int = _SHOWN) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" +{rest}" if rest > 0 else "")


def _one_line(match: re.Match[str]) -> str:
    return re.sub(r",(?=\S)", ", ", re.sub(r"\s", "", match.group()))


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
