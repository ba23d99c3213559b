"""Run a graph on labels: once to discover ties and pins, again to check a shrunk graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

import halp_fx.passes.rules  # noqa: F401  (registers the rules)
from halp_fx.passes.rules.core import (
    FunctionMode,
    LabelMode,
    LabelRun,
    StructureError,
    labels_of,
    set_labels,
    set_stored,
    tensors_in,
    watch_of,
)
from halp_fx.passes.rules.leaves import ModuleCall, module_rule
from halp_fx.passes.rules.structure import (
    empty_like,
    keep_values,
    named_tensors,
    substitute_copy,
)
from halp_fx.types import IntArray, Traced

__all__ = [
    "LabelInterpreter",
    "Snapshot",
    "fresh",
    "label_discovery",
    "map_tensors",
    "snapshot",
    "snapshots_in",
]


@dataclass(frozen=True)
class Snapshot:
    """Shape, dtype and labels of a tensor as a node gave it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    labels: Mapping[int, IntArray]


def map_tensors(value: Any, change: Any) -> Any:
    """The same nest with `change(tensor)` in place of each tensor (or `Snapshot`)."""
    if isinstance(value, (torch.Tensor, Snapshot)):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change) for v in value))
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, change) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


def snapshot(value: Any) -> Any:
    """A nest of tensors as a nest of `Snapshot`s."""
    return map_tensors(value, lambda t: Snapshot(tuple(t.shape), t.dtype, dict(labels_of(t))))


def snapshots_in(value: Any) -> Iterator[Snapshot]:
    """Every `Snapshot` in a nest, in order."""
    if isinstance(value, Snapshot):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from snapshots_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from snapshots_in(item)


def fresh(value: Any) -> Any:
    """New tensors without data and labels, of the same shapes, with the same known values."""

    def make(tensor: torch.Tensor) -> torch.Tensor:
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        keep_values(new, tensor)
        return new

    return map_tensors(value, make)


class LabelInterpreter(fx.Interpreter):
    """Runs every node of a graph under a `LabelRun`."""

    def __init__(self, module: fx.GraphModule, run: LabelRun, traced: Traced) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.labels = run
        self.traced = traced
        self.snapshots: dict[str, Any] = {}
        self.held: set[str] = set()
        self.blind: set[str] = set()  # modules with a rule that don't run without data
        self.writes: dict[str, set[str]] = {}  # node -> those whose tensors it changes in place
        self._versions: dict[str, list[int]] = {}

    def execute(self) -> None:
        """Run the graph on the example's shapes."""
        inputs = [
            fresh(self.traced.values[n.name]) for n in self.graph.nodes if n.op == "placeholder"
        ]
        with torch.no_grad(), LabelMode(self.labels), FunctionMode(self.labels):
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        self.labels.node = n.name
        self.labels.op = str(n.target)
        value = self.value_of(n)
        known = self.traced.values.get(n.name)
        for new, old in zip(tensors_in(value), tensors_in(known), strict=False):
            keep_values(new, old)
        self.snapshots[n.name] = snapshot(value)
        self._note_writes(n, value)
        return value

    def _note_writes(self, n: fx.Node, value: Any) -> None:
        """Which tensors of the nodes before a node has changed, as their version counters tell."""
        if self.labels.checking:
            return
        read = {m.name: self._versions_of(self.env[m]) for m in n.all_input_nodes if m in self.env}
        if any(now != self._versions[name] for name, now in read.items()):
            # Views and what they are of have one counter.
            for before in self.env:
                now = self._versions_of(self.env[before])
                if now != self._versions.get(before.name, now):
                    self.writes.setdefault(n.name, set()).add(before.name)
                    self._versions[before.name] = now
        self._versions[n.name] = self._versions_of(value)

    @staticmethod
    def _versions_of(value: Any) -> list[int]:
        return [tensor._version for tensor in tensors_in(value)]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem and isinstance(args[0], torch.Tensor):
            item = args[1]
            known = tuple(map(_known_index, item)) if isinstance(item, tuple) else item
            args = (args[0], known if isinstance(item, tuple) else _known_index(item))
        return super().call_function(target, _thawed(args), _thawed(kwargs))

    def value_of(self, n: fx.Node) -> Any:
        """Run one node; what can't run without data pins its channels."""
        if n.op == "output":
            args, _ = self.fetch_args_kwargs_from_env(n)
            for tensor in tensors_in(args):
                self.labels.pin_tensor(tensor, "output of the network")
            return args[0]
        if n.op == "placeholder":
            return super().run_node(n)
        if n.op == "call_module" and n.target in self.traced.opaque:
            reason = f"the module {n.target!r} could not be traced"
            return self.hold(n, f"{reason} ({self.traced.opaque[str(n.target)]})")
        if n.op == "call_module" and module_rule(self.fetch_attr(str(n.target))) is not None:
            return self.leaf(n)
        if n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), nn.RNNBase):
            return self.hold(n, "a recurrent layer, which has no rule")
        try:
            value = super().run_node(n)
            if (kind := _unknown_object(value)) is not None:
                for tensor in self.tensors_into(n):
                    self.labels.pin_tensor(tensor, f"goes into an object of type {kind}")
            return value
        except Exception as error:  # noqa: BLE001  unknown never breaks
            first = str(error).strip().splitlines()[:1]
            return self.hold(n, f"can't be run without data: {type(error).__name__} {first}")

    def leaf(self, n: fx.Node) -> Any:
        """Run a module that has a rule, and apply that."""
        module = self.fetch_attr(str(n.target))
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        rule = module_rule(module)
        assert rule is not None
        value = self.leaf_value(n, module, args, kwargs)
        for tensor in tensors_in((args, kwargs)):
            if (watching := watch_of(tensor)) is not None:
                watching(self.labels, None, tensor)
        try:
            rule(self.labels, ModuleCall(module, args, kwargs, value))
        except Exception as error:
            if self.labels.checking and isinstance(error, StructureError):
                raise
            kind, text = type(module).__name__, f"{type(error).__name__}: {error}"
            return self.hold(n, f"the rule of {kind} fails: {text}")
        self.note_whole(n, value)
        return value

    def leaf_value(self, n: fx.Node, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a module gives; one that needs data, what it gave for the example."""
        try:
            with self.labels.without_rules():
                return module(*args, **kwargs)
        except Exception:  # noqa: BLE001  it may well depend on values
            self.blind.add(n.name)
            return fresh(self.traced.values[n.name])

    def hold(self, n: fx.Node, reason: str) -> Any:
        """Pin all that goes into a node and give what it gave for the example."""
        self.held.add(n.name)
        for tensor in self.tensors_into(n):
            self.labels.pin_tensor(tensor, reason)
        return self.given(n)

    def given(self, n: fx.Node) -> Any:
        """What a node gave for the example."""
        value = fresh(self.traced.values[n.name])
        self.note_whole(n, value)
        return value

    def note_whole(self, n: fx.Node, value: Any) -> None:
        """Tell who prices the network of a node that nobody looks into."""
        if self.labels.whole_observer is not None:
            target: Any = self.fetch_attr(str(n.target)) if n.op == "call_module" else n.target
            self.labels.node = n.name
            self.labels.op = (
                type(target).__name__
                if n.op == "call_module"
                else getattr(target, "__name__", str(target))
            )
            self.labels.whole_observer(list(self.tensors_into(n)), list(tensors_in(value)))

    def tensors_into(self, n: fx.Node) -> Iterator[torch.Tensor]:
        """Argument tensors of a node, and the parameters and buffers of its module."""
        yield from tensors_in(self.fetch_args_kwargs_from_env(n))
        if n.op == "call_module":
            for _, tensor in named_tensors(self.fetch_attr(str(n.target))):
                yield tensor


def _known_index(item: Any) -> Any:
    """A list of positions as an index tensor whose values are known."""
    if not isinstance(item, list) or not all(type(i) is int for i in item):
        return item
    index = torch.empty(len(item), dtype=torch.int64, device="meta")
    index._halp_values = np.array(item, dtype=np.int64)  # type: ignore[attr-defined]
    return index


def _thawed(value: Any) -> Any:
    """Arguments as the generated code passes them: lists and dicts that may be changed."""
    if isinstance(value, list):
        return [_thawed(v) for v in value]
    if isinstance(value, dict):
        return {k: _thawed(v) for k, v in value.items()}
    if type(value) is tuple:
        return tuple(_thawed(v) for v in value)
    return value


_PLAIN = (int, float, complex, str, bytes, type(None), type(Ellipsis), slice, range, torch.Tensor,
          torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)  # fmt: skip


def _unknown_object(value: Any) -> str | None:
    """Type of an object in a nest that may hide tensors, or None."""
    if isinstance(value, _PLAIN):
        return None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((kind for v in value if (kind := _unknown_object(v)) is not None), None)
    return type(value).__name__


def label_discovery(
    traced: Traced, run: LabelRun
) -> tuple[LabelInterpreter, dict[int, dict[int, IntArray]]]:
    """Give every parameter labels and run the graph.

    Returns:
        the interpreter that ran, and id of each tensor of `traced.module` -> its labels.
    """
    tensors: dict[int, torch.Tensor] = {}
    own: dict[int, dict[int, IntArray]] = {}
    # The kernel size of a convolution is no channel dim; weights are often viewed as (O, I k k).
    # Weights that are computed before each call have other names.
    kernels = {
        id(tensor)
        for m in traced.module.modules()
        if isinstance(m, (nn.modules.conv._ConvNd))
        for _, tensor in named_tensors(m)
        if tuple(tensor.shape[2:]) == m.kernel_size
    }
    for name, tensor in named_tensors(traced.module):
        if id(tensor) in tensors:
            continue
        own[id(tensor)] = {
            dim: run.new_block(name, dim, size)
            for dim, size in enumerate(tensor.shape)
            # Integers are counters and indices, not one value a channel.
            if size > 1
            and not (dim > 1 and id(tensor) in kernels)
            and (tensor.is_floating_point() or tensor.is_complex())
        }
        tensors[id(tensor)] = tensor
    module = labelled_copy(traced.module, tensors.values(), own)
    interpreter = LabelInterpreter(module, run, traced)
    interpreter.execute()
    return interpreter, own


def labelled_copy(
    module: nn.Module, tensors: Iterable[torch.Tensor], labels: Mapping[int, dict[int, IntArray]]
) -> Any:
    """A copy of `module` on the device "meta" whose tensors carry labels."""
    replaced: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        replaced[id(tensor)] = empty_like(tensor)
        set_labels(replaced[id(tensor)], labels[id(tensor)])
        set_stored(replaced[id(tensor)])
    return substitute_copy(module, replaced)
