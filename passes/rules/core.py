"""Labels: which channel each slice of a tensor belongs to, carried through the network.

Every slice of every parameter along every dim has an integer label. A tensor's labels are one
1-D array for each dim whose slices can be removed; a dim without an entry can't shrink.
Running the graph once on tensors without data (device "meta") under `LabelRun` shows every
operator at the ATen level; its rule says which labels meet (a tie: they stand or fall together),
which must stay (a pin), and what labels the output carries.

Label 0 stands for "always there"; to tie a label with 0 is to pin it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from halp_fx.passes.rules.meta import OnMeta, run_on_meta
from halp_fx.types import IntArray

__all__ = [
    "FIXED",
    "Block",
    "FunctionMode",
    "LabelMode",
    "LabelRun",
    "OnMeta",
    "OpCall",
    "PinRecord",
    "Rule",
    "StructureError",
    "TieRecord",
    "Watch",
    "is_stored",
    "labels_of",
    "register",
    "rule_for",
    "set_labels",
    "set_stored",
    "tensors_in",
    "watch",
    "watch_of",
]

FIXED = 0  # the label of what is never removed

DimLabels = dict[int, IntArray]
Rule = Callable[["LabelRun", "OpCall"], None]
# (run, the operator that reads the tensor or None where it must stay, the tensor) -> None
Watch = Callable[["LabelRun", "OpCall | None", torch.Tensor], None]


class StructureError(Exception):
    """While checking a shrunk graph: labels meet that don't belong together."""


@dataclass(frozen=True)
class Block:
    """The labels of one dim of one parameter: `start .. start + size`."""

    name: str  # parameter or buffer
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class TieRecord:
    """Labels that stand or fall together, elementwise."""

    left: IntArray
    right: IntArray
    node: str
    op: str


@dataclass(frozen=True)
class PinRecord:
    """Labels that must stay."""

    labels: IntArray
    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """A reshape after which labels vary along several dims; all but one were tied."""

    key: tuple[str, int]  # graph node, and how many such reshapes came before it there
    dims: tuple[int, ...]  # dims along which labels vary, the largest first
    free: int  # the dim left free
    labels: IntArray  # labels along it


@dataclass
class OpCall:
    """One ATen operator as it ran: its arguments and its output (tensors without data)."""

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    @property
    def name(self) -> str:
        return self.func.overloadpacket.__name__

    def arg(self, position: int, keyword: str, default: Any = None) -> Any:
        """The argument at `position` or named `keyword`."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(keyword, default)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors among the arguments, in order."""
        return list(tensors_in((self.args, dict(self.kwargs))))


_RULES: dict[str, Rule] = {}


def register(*names: str) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of the ATen operators called `names`.

    A rule of an in-place operator (`relu_`) is found under the name without underscore.

    An operator outside of `aten` is named with its namespace: "mylib::my_op".

    Raises:
        ValueError: an operator has a rule already.
    """

    def add(rule: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ValueError(f"the operator {name!r} has a rule already: {_RULES[name]}")
            _RULES[name] = rule
        return rule

    return add


def rule_for(func: torch._ops.OpOverload) -> Rule | None:
    """The rule of an operator, or None where there's none."""
    namespace, name = func.namespace, func.overloadpacket.__name__
    if namespace != "aten":
        name = f"{namespace}::{name}"
    if name in _RULES:
        return _RULES[name]
    if name.endswith("_") and name[:-1] in _RULES:
        return _RULES[name[:-1]]
    if torch.Tag.pointwise in func.tags or _twin_is_pointwise(func):
        return _RULES["pointwise"]
    return None


def _twin_is_pointwise(func: torch._ops.OpOverload) -> bool:
    """Whether `func` is the in-place form of a pointwise operator (those are not tagged)."""
    name = func.overloadpacket.__name__
    if func.namespace != "aten" or not name.endswith("_"):
        return False
    packet = getattr(torch.ops.aten, name[:-1], None)
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def tensors_in(value: Any) -> Iterable[torch.Tensor]:
    """Every tensor in a nest of tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def labels_of(tensor: torch.Tensor) -> DimLabels:
    """The labels of a tensor: dim -> one label a slice."""
    found: DimLabels = getattr(tensor, "_halp_labels", {})
    return found


def set_labels(tensor: torch.Tensor, labels: Mapping[int, IntArray | None]) -> None:
    """Give a tensor its labels; dims of size 1 and dims that can't shrink carry none."""
    kept: DimLabels = {}
    for dim, vector in labels.items():
        if vector is None or not vector.any():
            continue
        if vector.shape != (tensor.shape[dim],):
            raise StructureError(
                f"{len(vector)} labels for dim {dim} of a tensor of shape {tuple(tensor.shape)}"
            )
        kept[dim] = vector
    tensor._halp_labels = kept  # type: ignore[attr-defined]


def set_stored(tensor: torch.Tensor) -> None:
    """Say that a tensor is a parameter or buffer, or computed from those alone."""
    tensor._halp_stored = True  # type: ignore[attr-defined]


def is_stored(tensor: torch.Tensor) -> bool:
    """Whether no input of the network went into a tensor."""
    return getattr(tensor, "_halp_stored", False)


def watch(tensor: torch.Tensor, watcher: Watch) -> None:
    """Have `watcher` called before each operator that reads `tensor`, and where it must stay."""
    tensor._halp_watch = watcher  # type: ignore[attr-defined]


def watch_of(tensor: torch.Tensor) -> Watch | None:
    """The watcher of a tensor."""
    return getattr(tensor, "_halp_watch", None)


@dataclass
class LabelRun:
    """Collects ties and pins while a graph runs; or, when `checking`, verifies them.

    Args:
        exact: pin channels that statistics run over (LayerNorm), since removing some of them
            changes what the others become.
        checking: the graph is a shrunk one and the labels of its parameters are numbers of
            coupled components: a tie of unequal ones raises `StructureError`.
    """

    exact: bool = False
    checking: bool = False
    blocks: list[Block] = field(default_factory=list)
    ties: list[TieRecord] = field(default_factory=list)
    pins: list[PinRecord] = field(default_factory=list)
    inexact: list[tuple[IntArray, str]] = field(default_factory=list)
    # Which dim a reshape leaves free, where it's not the largest: (node, how many before) -> dim.
    prefer: Mapping[tuple[str, int], int] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    node: str = ""
    op: str = ""
    size: int = 1  # labels handed out, FIXED included
    observer: Callable[[OpCall], None] | None = None  # sees every operator after its rule
    # Sees what goes into and comes out of each node that nobody looks into.
    whole_observer: Callable[[list[torch.Tensor], list[torch.Tensor]], None] | None = None
    silent: bool = False  # operators run without rules: inside of a module that has its own

    def choose(self, dims: tuple[int, ...]) -> tuple[tuple[str, int], int]:
        """Key of the next choice among `dims`, and the dim to leave free."""
        key = (self.node, sum(1 for c in self.choices if c.key[0] == self.node))
        return key, self.prefer.get(key, dims[0])

    def new_block(self, name: str, dim: int, size: int) -> IntArray:
        """Fresh labels for one dim of one parameter."""
        self.blocks.append(Block(name, dim, self.size, size))
        self.size += size
        return np.arange(self.size - size, self.size, dtype=np.int64)

    def tie(self, left: IntArray | None, right: IntArray | None, reason: str = "") -> None:
        """`left` and `right` stand or fall together, elementwise; None is "can't shrink"."""
        if left is None and right is None:
            return
        if left is None or right is None:
            only = left if right is None else right
            assert only is not None
            self.pin(only, reason or "meets a dim that can't shrink")
            return
        if self.checking and min(left.size, right.size) <= 1:
            return  # a dim cut down to one slice says nothing about the order of channels
        left, right = np.broadcast_arrays(left, right)
        differ = left != right
        if not differ.any():
            return
        left, right = left[differ], right[differ]
        if self.checking:
            raise StructureError(f"{self.op} at {self.node} joins channels of different groups")
        fixed = (left == FIXED) | (right == FIXED)
        if fixed.any():
            self.pin(np.maximum(left[fixed], right[fixed]), reason or "meets channels that stay")
            left, right = left[~fixed], right[~fixed]
        if left.size:
            self.ties.append(TieRecord(left, right, self.node, self.op))

    def same_size(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """Two tensors of one shape: what shrinks the one must shrink the other."""
        a, b = labels_of(tensor), labels_of(other)
        for dim in sorted(a.keys() | b.keys()):
            self.tie(a.get(dim), b.get(dim), "takes its size from another tensor")

    def pin(self, labels: IntArray | None, reason: str) -> None:
        """These labels must stay."""
        if labels is None or self.checking:
            return
        labels = np.unique(labels)
        labels = labels[labels != FIXED]
        if labels.size:
            self.pins.append(PinRecord(labels, self.node, self.op, reason))

    def pin_tensor(self, tensor: torch.Tensor, reason: str) -> None:
        """Every channel of a tensor must stay."""
        if (watch := watch_of(tensor)) is not None:
            watch(self, None, tensor)
        for vector in labels_of(tensor).values():
            self.pin(vector, reason)

    def note_inexact(self, labels: IntArray | None) -> None:
        """Statistics run over these channels: removing some changes the others' values."""
        if labels is not None and not self.checking:
            self.inexact.append((np.unique(labels), self.node))

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator on tensors without data, then its rule."""
        out = run_on_meta(func, args, kwargs)
        self.follow(OpCall(func, args, kwargs, out))
        return out

    @contextmanager
    def without_rules(self) -> Iterator[None]:
        """While this lasts, operators only run."""
        self.silent = True
        try:
            yield
        finally:
            self.silent = False

    def follow(self, call: OpCall) -> None:
        """Apply the rule of an operator that ran."""
        if self.silent:
            return
        self.op = call.name
        self.apply(call)
        if self.observer is not None:
            self.observer(call)

    def apply(self, call: OpCall) -> None:
        """What the rule of an operator says."""
        for tensor in call.tensors():
            if (watch := watch_of(tensor)) is not None:
                watch(self, call, tensor)
        if any(labels_of(t) for t in call.tensors()):
            rule = rule_for(call.func)
            if rule is None:
                self.pin_all(call, f"no rule for the operator {self.op!r}")
            else:
                rule(self, call)
        tensors = call.tensors()
        if tensors and all(map(is_stored, tensors)):
            for tensor in tensors_in(call.out):
                set_stored(tensor)

    def pin_all(self, call: OpCall, reason: str) -> None:
        """The fall-back: nothing is known, so every channel that goes in must stay."""
        for tensor in call.tensors():
            self.pin_tensor(tensor, reason)
        for tensor in tensors_in(call.out):
            if not any(tensor is t for t in call.tensors()):
                set_labels(tensor, {})


class LabelMode(TorchDispatchMode):
    """Sends every ATen operator through a `LabelRun`."""

    def __init__(self, run: LabelRun) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = run

    def __torch_dispatch__(  # noqa: D105
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.run.call(func, args, kwargs or {})


class FunctionMode(TorchFunctionMode):
    """Keeps whole some functions that would come apart into operators without a rule."""

    def __init__(self, run: LabelRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(  # noqa: D105
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.run.silent:
            return func(*args, **(kwargs or {}))
        if func in _SIZED_AS:
            out = func(*args, **(kwargs or {}))
            self.run.same_size(out, args[1] if len(args) > 1 else (kwargs or {})["other"])
            return out
        operator = _WHOLE.get(func)
        if operator is None or not isinstance(args[0], torch.Tensor):
            return func(*args, **(kwargs or {}))
        out = torch.empty_like(args[0], device="meta")
        self.run.follow(OpCall(operator, args, kwargs or {}, out))
        return out


# Function that gives a tensor like its first argument -> the operator that stands for it.
_WHOLE = {
    torch.rms_norm: torch.ops.aten.rms_norm.default,
    torch.nn.functional.rms_norm: torch.ops.aten.rms_norm.default,
}


# Functions that take a shape from their second argument, which is not read otherwise.
_SIZED_AS = {torch.Tensor.expand_as, torch.Tensor.view_as, torch.Tensor.reshape_as}
