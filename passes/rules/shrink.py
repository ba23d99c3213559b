"""Cut a graph's tensors by which labels are alive, set its constants, and check every node.

Requires: labels of a dense run of the graph, the component of each label, a choice of components.
Ensures: the shrunk graph runs, and at every node each channel is the one that the labels say.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from halp_fx.passes.rules.core import LabelRun, StructureError, set_labels, tensors_in
from halp_fx.passes.rules.interpret import (
    LabelInterpreter,
    Snapshot,
    map_tensors,
    snapshot,
    snapshots_in,
)
from halp_fx.passes.rules.leaves import module_rule
from halp_fx.passes.rules.repair import Shrunk, repair
from halp_fx.passes.rules.resize import fit_to_input, fit_to_weights, sizes_of
from halp_fx.passes.rules.structure import empty_like, named_tensors, substitute_copy
from halp_fx.types import Branch, IntArray, Traced

__all__ = ["Failure", "Labelled", "shrink"]

_NOT_IN_PLACE: dict[Any, Any] = {operator.iadd: operator.add, "add_": "add"}


@dataclass(frozen=True)
class Labelled:
    """A dense network with its labels, as the groups pass found them."""

    traced: Traced
    snapshots: Mapping[str, Any]  # node -> nest of `Snapshot`s
    own: Mapping[int, Mapping[int, IntArray]]  # id of a tensor of traced.module -> its labels
    components: IntArray  # label -> coupled component; FIXED for what is pinned
    held: frozenset[str]  # nodes that could not run without data: all around them is pinned
    blind: frozenset[str]  # modules that could not, but have a rule


@dataclass(frozen=True)
class Failure:
    """A node whose shrunk form is not what the labels say."""

    node: str
    reason: str


def shrink(
    labelled: Labelled,
    alive: np.ndarray[Any, np.dtype[np.bool_]],
    failures: list[Failure] | None = None,
    dropped: Sequence[tuple[Branch, torch.Tensor]] = (),
) -> fx.GraphModule:
    """The shrunk network without data (device "meta"), its graph's constants set and checked.

    Args:
        alive: by label, which channels survive.
        failures: collects the nodes that can't be shrunk; None raises at the first.
        dropped: branches without channels, and what each adds instead (cut already).

    Raises:
        StructureError: a node can't be shrunk.
    """
    dense = labelled.traced.module
    replaced: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    for _, tensor in named_tensors(dense):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        replaced[id(tensor)] = _cut_empty(labelled, tensor, alive)
    module: fx.GraphModule = substitute_copy(dense, replaced)
    for branch, constant in dropped:
        _drop(module, branch, constant, labelled, alive)
    for path, part in module.named_modules():
        if path != "_constants":
            fit_to_weights(part, dense.get_submodule(path))
    facts = Shrunk(labelled.snapshots, labelled.traced.values, alive)
    checker = _Checker(module, labelled, facts, failures)
    checker.execute()
    module.recompile()
    module.graph.lint()
    return module


def _drop(
    module: fx.GraphModule,
    branch: Branch,
    constant: torch.Tensor,
    labelled: Labelled,
    alive: np.ndarray[Any, np.dtype[np.bool_]],
) -> None:
    """Put a constant in place of a branch, and take its nodes, modules and tensors away."""
    nodes = {n.name: n for n in module.graph.nodes}
    operand = nodes[branch.operand]
    if not hasattr(module, "_constants"):
        module.add_module("_constants", nn.Module())
    empty = torch.empty(constant.shape, dtype=constant.dtype, device="meta")
    dense = labelled.snapshots[branch.operand]
    labels = {d: labelled.components[v[alive[v]]] for d, v in dense.labels.items()}
    set_labels(empty, {d: v for d, v in labels.items() if len(v) == constant.shape[d]})
    module.get_submodule("_constants").register_buffer(operand.name, empty)
    with module.graph.inserting_before(operand):
        new = module.graph.create_node("get_attr", f"_constants.{operand.name}")
    for user in list(operand.users):
        if user.args and user.args[0] is operand:  # a sum into the branch: not into the constant
            user.target = _NOT_IN_PLACE.get(user.target, user.target)
    operand.replace_all_uses_with(new)
    for name in reversed(branch.nodes):
        module.graph.erase_node(nodes[name])
    for name in branch.tensors:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
    _prune_shells(module, {name.rpartition(".")[0] for name in branch.tensors})


def _prune_shells(module: fx.GraphModule, paths: set[str]) -> None:
    """Delete modules that lost their tensors, and containers that hold nothing any more."""
    called = [str(n.target) for n in module.graph.nodes if n.op == "call_module"]
    for path in sorted(paths):
        while path and not any(f"{c}.".startswith(f"{path}.") for c in called):
            present = dict(module.named_modules())
            if path in present and any(True for _ in named_tensors(present[path])):
                break
            parent, _, leaf = path.rpartition(".")
            if path in present:
                del present[parent]._modules[leaf]
            path = parent


def _cut_empty(
    labelled: Labelled, tensor: torch.Tensor, alive: np.ndarray[Any, np.dtype[np.bool_]]
) -> torch.Tensor:
    own = labelled.own[id(tensor)]
    kept = {dim: labels[alive[labels]] for dim, labels in own.items()}
    shape = [len(kept[d]) if d in kept else size for d, size in enumerate(tensor.shape)]
    if shape == list(tensor.shape):
        empty = empty_like(tensor)
    else:
        empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=False)
    set_labels(empty, {dim: labelled.components[labels] for dim, labels in kept.items()})
    return empty


class _Checker(LabelInterpreter):
    """Runs a shrunk graph on labels, mending each node before it runs and comparing it after."""

    def __init__(
        self,
        module: fx.GraphModule,
        labelled: Labelled,
        facts: Shrunk,
        failures: list[Failure] | None,
    ) -> None:
        super().__init__(module, LabelRun(checking=True), labelled.traced)
        self.labelled = labelled
        self.facts = facts
        self.failures = failures
        self.fitted: dict[str, Any] = {}  # module without tensors -> its sizes

    def value_of(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            return super().value_of(n)
        if n.name in self.labelled.held:
            return self.hold(n, "")
        if n.name not in self.facts.snapshots:  # put in by a repair
            return fx.Interpreter.run_node(self, n)
        try:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            repair(n, args, kwargs, self.facts)
            self.run_repairs(n)
            if n.op == "call_module":
                self.fit_module(n, args)
            if n.op == "call_module" and module_rule(self.fetch_attr(str(n.target))) is not None:
                value = self.leaf(n)
            else:
                value = fx.Interpreter.run_node(self, n)
            self.compare(n, value)
        except Exception as error:
            if isinstance(dense := self.traced.values[n.name], (int, float)):
                return _freeze(n, dense)
            first = str(error).strip().splitlines()[:1] or [""]
            reason = f"{_target(n)} can't be shrunk: {first[0]}"
            if self.failures is None:
                raise StructureError(f"{n.name}: {reason}") from error
            self.failures.append(Failure(n.name, reason))
            return map_tensors(self.facts.snapshots[n.name], self.expected)
        return value

    def leaf_value(self, n: fx.Node, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if n.name in self.labelled.blind:
            return map_tensors(self.facts.snapshots[n.name], self.expected)
        with self.labels.without_rules():
            return module(*args, **kwargs)

    def run_repairs(self, n: fx.Node) -> None:
        """Run the nodes that a repair has put in before a node."""
        for new in n.all_input_nodes:
            if new not in self.env:
                self.run_repairs(new)
                self.env[new] = self.value_of(new)

    def fit_module(self, n: fx.Node, args: tuple[Any, ...]) -> None:
        first = next(iter(tensors_in(args)), None)
        out = self.facts.snapshots[n.name]
        if first is None or not isinstance(out, Snapshot):
            return
        dense = self.traced.module.get_submodule(str(n.target))
        module = self.fetch_attr(str(n.target))
        fit_to_input(module, dense, tuple(first.shape), self.facts.shape(out))
        sizes = sizes_of(module)
        if self.fitted.setdefault(str(n.target), sizes) != sizes:
            raise StructureError("it is used more than once, with other widths")

    def expected(self, dense: Snapshot) -> torch.Tensor:
        """A tensor without data as the labels say it should be."""
        tensor = torch.empty(self.facts.shape(dense), dtype=dense.dtype, device="meta")
        set_labels(tensor, self.expected_labels(dense))
        return tensor

    def expected_labels(self, dense: Snapshot) -> dict[int, IntArray]:
        return {
            dim: self.labelled.components[labels[self.facts.alive[labels]]]
            for dim, labels in dense.labels.items()
        }

    def compare(self, n: fx.Node, value: Any) -> None:
        """Every tensor must have the shape and the channels that the labels say."""
        dense = list(snapshots_in(self.facts.snapshots[n.name]))
        got = list(snapshots_in(snapshot(value)))
        if len(dense) != len(got):
            raise StructureError(f"gives {len(got)} tensors instead of {len(dense)}")
        for old, new in zip(dense, got, strict=True):
            want = self.facts.shape(old)
            if new.shape != want:
                raise StructureError(f"gives shape {new.shape} where {want} is needed")
            for dim, labels in self.expected_labels(old).items():
                found = new.labels.get(dim)
                whole = want[dim] == old.shape[dim]
                # Slices of one component only: their order can't be wrong, and a reshape of a
                # dim cut down to one slice does not tell where it went.
                alike = bool((labels == labels[:1]).all())
                if alike or (found is None and (whole or not labels.any())):
                    continue
                if found is None or not np.array_equal(found, labels):
                    raise StructureError(f"puts other channels along dim {dim}")
        self.relabel(n, value)

    def relabel(self, n: fx.Node, value: Any) -> None:
        """What goes on has the labels of the dense run."""
        pairs = zip(tensors_in(value), snapshots_in(self.facts.snapshots[n.name]), strict=True)
        for tensor, dense in pairs:
            set_labels(tensor, self.expected_labels(dense))


def _freeze(n: fx.Node, number: float) -> float:
    """A computation on sizes that fails at the shrunk widths gives what it gave at the dense."""
    n.op, n.target, n.args, n.kwargs = "call_function", operator.pos, (number,), {}
    return number


def _target(n: fx.Node) -> str:
    if n.op == "call_module":
        return f"module {n.target}"
    return n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
