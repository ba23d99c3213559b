"""rewrite: the plan carried out. Every parameter is cut, nothing is masked.

Requires: a `Plan` made from groups of the same network.
Ensures: the module computes what the dense one computes when the consumers' weights for the
removed channels are zero; keys of the state dict (but for branches that were dropped),
`requires_grad`, modes, device, dtype and shared parameters are the model's; the plan is in
`module.meta["halp_fx"]`, with the "state_size" of both in its report.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import fx, nn

from halp_fx.errors import RewriteError
from halp_fx.passes.rules.branches import branch_constant
from halp_fx.passes.rules.core import StructureError
from halp_fx.passes.rules.plan import BoolArray, alive_labels
from halp_fx.passes.rules.shrink import Labelled, shrink
from halp_fx.passes.rules.structure import HOOKS, named_tensors
from halp_fx.types import Branch, Plan

__all__ = ["rewrite"]


def rewrite(plan: Plan) -> fx.GraphModule:
    """The physically smaller network of a plan.

    Raises:
        RewriteError: the shrunk graph is not what the plan says (a fault of ours).
    """
    groups = plan.groups
    traced = groups.traced
    labelled: Labelled = groups.labelled
    alive = alive_labels(groups, plan.units)
    dropped = _dropped(plan, alive)
    try:
        module = shrink(labelled, alive, dropped=dropped)
    except StructureError as error:
        raise RewriteError(
            f"{traced.model_name} can't be shrunk as planned: {error}. This should not happen: "
            "please report it; excluding the channels around that node avoids it"
        ) from error
    gone = {name for branch, _ in dropped for name in branch.tensors}
    cut = _fill(module, labelled, alive, gone)
    for branch, constant in dropped:
        module.get_submodule("_constants").register_buffer(branch.operand, constant)
    _share_modules(module, traced.root)
    _add_unreached(module, traced.root, cut, gone)
    for hooks in HOOKS:  # of the model itself; those of its layers came with the layers
        getattr(module, hooks).update(getattr(traced.root, hooks, {}))
    _restore_persistence(module, traced.root)
    _restore_order(module, traced.root)
    for path, part in module.named_modules():
        part.training = traced.training.get(path, traced.training[""])
    sizes = {"dense": _numbers(traced.root), "kept": _numbers(module)}
    module.meta["halp_fx"] = replace(plan, report={**plan.report, "state_size": sizes})
    module.meta["halp_fx_example"] = tuple(
        (tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else x
        for x in traced.example_inputs
    )
    return module


def _numbers(module: nn.Module) -> int:
    """How many the state dict holds; what goes by two names counts twice, as it does there."""
    state = module.state_dict()
    return sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))


def _dropped(plan: Plan, alive: BoolArray) -> list[tuple[Branch, torch.Tensor]]:
    """The branches whose groups are all empty, with the constants they leave behind."""
    groups, traced = plan.groups, plan.groups.traced
    found: list[tuple[Branch, torch.Tensor]] = []
    for branch in groups.branches:
        if any(len(plan.units[g]) for g in branch.groups):
            continue
        constant = branch_constant(
            traced.module, branch, traced.values, set(branch.groups), groups.outputs
        )
        for dim, labels in groups.labelled.snapshots[branch.operand].labels.items():
            if constant.shape[dim] > 1:
                index = torch.from_numpy(np.flatnonzero(alive[labels])).to(constant.device)
                constant = constant.index_select(dim, index)
        found.append((branch, constant.clone()))
    return found


def _fill(
    module: fx.GraphModule, labelled: Labelled, alive: BoolArray, gone: set[str]
) -> dict[int, torch.Tensor]:
    """Put the surviving slices of the dense tensors where the empty ones are.

    Returns:
        id of a dense tensor -> its surviving slice.
    """
    done: dict[int, torch.Tensor] = {}
    for name, dense in named_tensors(labelled.traced.module):
        if name in gone:
            continue
        if id(dense) not in done:
            cut = dense.detach()
            for dim, labels in labelled.own[id(dense)].items():
                survive = alive[labels]
                if not survive.all():
                    index = torch.from_numpy(np.flatnonzero(survive)).to(dense.device)
                    cut = cut.index_select(dim, index)
            cut = cut.clone() if cut.data_ptr() == dense.data_ptr() else cut
            if dense.ndim == 4 and dense.is_contiguous(memory_format=torch.channels_last):
                cut = cut.contiguous(memory_format=torch.channels_last)
            if isinstance(dense, nn.Parameter):
                cut = nn.Parameter(cut, requires_grad=dense.requires_grad)
            done[id(dense)] = cut
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        store = owner._parameters if isinstance(dense, nn.Parameter) else owner._buffers
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        store[leaf] = done[id(dense)]  # type: ignore[assignment]
    return done


def _share_modules(module: fx.GraphModule, root: nn.Module) -> None:
    """A module that the model has under several names is one module here as well."""
    present = dict(module.named_modules(remove_duplicate=False))
    first: dict[int, nn.Module] = {}
    for path, part in root.named_modules(remove_duplicate=False):
        if path in present and path:
            first.setdefault(id(part), present[path])
    for path, part in root.named_modules(remove_duplicate=False):
        parent, _, leaf = path.rpartition(".")
        if path and path not in present and id(part) in first and parent in present:
            present[parent].add_module(leaf, first[id(part)])
            present = dict(module.named_modules(remove_duplicate=False))


def _add_unreached(
    module: fx.GraphModule, root: nn.Module, cut: dict[int, torch.Tensor], gone: set[str]
) -> None:
    """Carry over, whole, the state that the graph never reads (heads used only in training)."""
    present = {name for name, _ in named_tensors(module)}
    missing = [name for name, _ in named_tensors(root) if name not in present | gone]
    if not missing:
        return
    clones = dict(cut)  # a tensor under a second name stays shared
    for name in missing:
        path, _, leaf = name.rpartition(".")
        owner, original = module, root.get_submodule(path)
        for step in path.split(".") if path else []:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner._modules[step]  # type: ignore[assignment]
        tensor = original._parameters.get(leaf, original._buffers.get(leaf))
        assert tensor is not None
        if id(tensor) not in clones:
            copied = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
            clones[id(tensor)] = copied
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, clones[id(tensor)])  # type: ignore[arg-type]
        else:
            persistent = leaf not in original._non_persistent_buffers_set
            owner.register_buffer(leaf, clones[id(tensor)], persistent=persistent)


def _restore_persistence(module: fx.GraphModule, root: nn.Module) -> None:
    """Buffers in the state dict are those of the model's; constants of the graph are not."""
    saved = set(root.state_dict(keep_vars=True))
    for path, part in module.named_modules():
        for leaf in part._buffers:
            name = f"{path}.{leaf}" if path else leaf
            part._non_persistent_buffers_set.discard(leaf)
            if name not in saved and not name.startswith("_constants."):
                part._non_persistent_buffers_set.add(leaf)


def _restore_order(module: nn.Module, root: nn.Module) -> None:
    """Order submodules, parameters and buffers as the model has them, for its state dict."""
    for name in ("_modules", "_parameters", "_buffers"):
        own, model = getattr(module, name), getattr(root, name)
        ordered = {k: own[k] for k in model if k in own}
        ordered.update({k: v for k, v in own.items() if k not in ordered})
        own.clear()
        own.update(ordered)
    for name, child in module._modules.items():
        twin = root._modules.get(name)
        if child is not None and twin is not None:
            _restore_order(child, twin)
