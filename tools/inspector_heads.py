"""What reads the channels of a group, and what the network's outputs fix: for people."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from halp_fx.passes.rules.scope import output_dims, owner_of
from halp_fx.passes.rules.structure import tensor_at
from halp_fx.types import ChannelGroups, Group, Pin

__all__ = ["Cause", "cause_of", "causes", "places_of", "read_by", "rows_of"]

# Outputs of torchvision's detectors whose channels anchors, classes and coordinates count.
_MEANING = {
    "cls_logits": "anchors x classes",
    "bbox_regression": "anchors x coordinates of a box",
    "bbox_ctrness": "anchors x centre",
}
# Reasons that pass on what another node demands.
_PASSED_ON = ("that can't be removed", "that can't shrink")


@dataclass(frozen=True)
class Cause:
    """What pins channels, as a person wants to know it."""

    node: str  # graph node, with the name of the output where that is it
    reason: str
    source: str
    splits: tuple[str, ...] = ()  # into what an output's channels are read: "4 x 91"

    @property
    def text(self) -> str:
        """The reason, and the splits where there are any."""
        return f"{self.reason} ({', '.join(self.splits)})" if self.splits else self.reason


def rows_of(groups: ChannelGroups, group: Group) -> list[str]:
    """`parameter[dim]` of what makes a group's channels, or has one value for each of them."""
    return [
        f"{member.name}[{member.dim}]"
        for member in group.members
        if _makes(groups, member.name, member.dim)
    ]


def read_by(groups: ChannelGroups, group: Group) -> list[str]:
    """The modules, or parameters of no module, whose weights read a group's channels.

    One that reads other channels beside them, as after a concatenation, says of how many:
    "features.4.squeeze (64 of 128)".
    """
    found = []
    for member in group.members:
        if _makes(groups, member.name, member.dim):
            continue
        module, _, leaf = member.name.rpartition(".")
        name = module if module and leaf == "weight" else member.name
        size = groups.parameters[member.name].extents[member.dim].dense
        some = f" ({member.index.size} of {size})" if member.index.size < size else ""
        found.append(f"{name}{some}")
    return found


def cause_of(groups: ChannelGroups, pin: Pin) -> Cause:
    """What pins channels: which output, or what holds the channels that a layer reads."""
    node = _node(groups, pin.node)
    if node is not None and node.op == "output":
        return _output_cause(groups, pin, node)
    if node is not None and any(reason in pin.reason for reason in _PASSED_ON):
        holder = _holder(groups, node)
        if holder:
            return Cause(pin.node, f"{pin.reason}: {holder}", pin.source)
    return Cause(pin.node, pin.reason, pin.source)


def causes(groups: ChannelGroups) -> list[tuple[Cause, list[Pin]]]:
    """Each cause once, with its pins; levels of one output with other splits are one cause."""
    merged: dict[tuple[str, str, str], tuple[dict[str, None], list[Pin]]] = {}
    for pin in groups.pins:
        cause = cause_of(groups, pin)
        key = (cause.node, cause.reason, cause.source)
        splits, pins = merged.setdefault(key, ({}, []))
        splits.update(dict.fromkeys(cause.splits))
        pins.append(pin)
    return [(Cause(*key, tuple(splits)), pins) for key, (splits, pins) in merged.items()]


def places_of(pins: Iterable[Pin]) -> list[str]:
    """Places of pins as `parameter[dim] (channels)`; modules that are numbered are one entry.

    Six heads are "head.0-5.weight[0] (364, 546, 546, 546, 364, 364) and bias".
    """
    counts = {(pin.name, pin.dim): len(pin.index) for pin in pins}
    entries = [
        (name, dim, count, counts.get((_bias_of(name), 0)) == count and dim == 0)
        for (name, dim), count in counts.items()
        if not (name.endswith(".bias") and counts.get((_weight_of(name), 0)) == count)
    ]
    runs: list[list[tuple[str, int, int, bool]]] = []
    for entry in entries:
        if runs and _goes_on(runs[-1], entry):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return [_run_text(run) for run in runs]


def _run_text(run: list[tuple[str, int, int, bool]]) -> str:
    (name, dim, _, biased), last = run[0], run[-1][0]
    step = _step(name, run[1][0]) if len(run) > 1 else None
    if step is not None:
        parts = name.split(".")
        parts[step] += f"-{last.split('.')[step]}"
        name = ".".join(parts)
    sizes = [str(count) for _, _, count, _ in run]
    shown = sizes[0] if len(set(sizes)) == 1 else ", ".join(sizes)
    return f"{name}[{dim}] ({shown}){' and bias' if biased else ''}"


def _goes_on(run: list[tuple[str, int, int, bool]], entry: tuple[str, int, int, bool]) -> bool:
    """Whether an entry is of the next module in a list, and alike."""
    name, dim, _, biased = run[-1]
    step = _step(name, entry[0])
    alike = (dim, biased) == (entry[1], entry[3])
    return alike and step is not None and (len(run) == 1 or step == _step(run[-2][0], name))


def _step(name: str, following: str) -> int | None:
    """The one part of two dotted names that differs, if the second has the next number there."""
    parts, others = name.split("."), following.split(".")
    if len(parts) != len(others):
        return None
    differ = [i for i, (one, two) in enumerate(zip(parts, others, strict=True)) if one != two]
    if len(differ) != 1 or not (parts[differ[0]].isdigit() and others[differ[0]].isdigit()):
        return None
    return differ[0] if int(others[differ[0]]) == int(parts[differ[0]]) + 1 else None


def _bias_of(name: str) -> str:
    return f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else ""


def _weight_of(name: str) -> str:
    return f"{name.removesuffix('.bias')}.weight"


def _makes(groups: ChannelGroups, name: str, dim: int) -> bool:
    try:
        root = groups.traced.module
        return dim in output_dims(owner_of(root, name), tensor_at(root, name))
    except AttributeError:  # a constant that tracing added
        return dim == 0


def _node(groups: ChannelGroups, name: str) -> fx.Node | None:
    return next((n for n in groups.traced.module.graph.nodes if n.name == name), None)


def _output_cause(groups: ChannelGroups, pin: Pin, output: fx.Node) -> Cause:
    names = _output_names(output)
    found: dict[str, str] = {}
    for start in _runs_of(groups, pin.name):
        for node, split in _downstream(groups, start):
            if node in names:
                found.setdefault(names[node], split)
    keys = [key for key in found if key]
    if not keys:
        return Cause(pin.node, pin.reason, pin.source)
    meaning = ", ".join(dict.fromkeys(_MEANING[key] for key in keys if key in _MEANING))
    splits = tuple(dict.fromkeys(split for split in found.values() if split))
    reason = f"{pin.reason}: {meaning} fix their number" if meaning else pin.reason
    return Cause(f"{pin.node} {', '.join(keys)}", reason, pin.source, splits)


def _output_names(output: fx.Node) -> dict[fx.Node, str]:
    """Node -> what the caller finds it under: "cls_logits", "0.out", or "" for all there is."""
    found: dict[fx.Node, str] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, fx.Node):
            found.setdefault(value, ".".join(path))
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*path, str(key)))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(item, (*path, str(i)))

    walk(output.args[0], ())
    return found


def _runs_of(groups: ChannelGroups, parameter: str) -> list[fx.Node]:
    """The nodes that run the module of a parameter, or read the parameter itself."""
    module = parameter.rpartition(".")[0]
    return [
        node
        for node in groups.traced.module.graph.nodes
        if (node.op == "call_module" and node.target == module)
        or (node.op == "get_attr" and node.target == parameter)
    ]


def _downstream(groups: ChannelGroups, start: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """Each node that channels of `start` come to, and how they were split: "4 x 91" or ""."""
    channels = _shape(groups, start)[1:2]
    queue = deque([(start, "")])
    seen = {start}
    while queue:
        node, split = queue.popleft()
        yield node, split
        for user in node.users:
            shape = _shape(groups, user)
            if user in seen or not shape or _reads_with_weights(groups, user):
                continue
            seen.add(user)
            deeper = len(shape) == len(_shape(groups, node)) + 1
            fits = deeper and channels and shape[1] * shape[2] == channels[0]
            queue.append((user, f"{shape[1]} x {shape[2]}" if fits and not split else split))


def _shape(groups: ChannelGroups, node: fx.Node) -> tuple[int, ...]:
    value = groups.traced.values.get(node.name)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _reads_with_weights(groups: ChannelGroups, node: fx.Node) -> bool:
    """Whether a node mixes the channels that come in: a convolution, a linear layer."""
    if node.op != "call_module":
        return False
    module = groups.traced.module.get_submodule(str(node.target))
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _holder(groups: ChannelGroups, node: fx.Node) -> str:
    """The nearest node before `node` that holds the channels which reach it, and why."""
    reasons: dict[str, str] = {}
    for pin in groups.pins:
        if not any(reason in pin.reason for reason in _PASSED_ON):
            reasons.setdefault(pin.node, pin.reason)
    queue, seen = deque(node.all_input_nodes), {node}
    while queue:
        before = queue.popleft()
        if before in seen:
            continue
        seen.add(before)
        if before.name in reasons:
            return f"node {before.name} holds them, {reasons[before.name]}"
        if before.op == "placeholder":
            return f"they are those of the input {before.name}"
        if not _reads_with_weights(groups, before):
            queue.extend(before.all_input_nodes)
    return ""
