"""Tensors cut from one choice of channels to the next: weights, optimiser states, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from halp_fx.errors import InputError
from halp_fx.passes.rules.structure import named_tensors

__all__ = [
    "Cuts",
    "Positions",
    "adopt",
    "carry_optimizer",
    "check_optimizer",
    "copy_inside",
    "cuts_between",
    "fill",
    "load_values",
    "synchronise_like",
]

# Parameter or buffer -> for each dim the surviving indices of the dense one; None: all of them.
Positions: TypeAlias = Mapping[str, tuple[torch.Tensor | None, ...]]
# Parameter or buffer -> for each dim what to take of the present one; None: all of it.
Cuts: TypeAlias = Mapping[str, tuple[torch.Tensor | None, ...]]


def cuts_between(before: Positions, after: Positions) -> dict[str, tuple[torch.Tensor | None, ...]]:
    """What to take of each tensor, for survivors that become fewer.

    Example:
        >>> cuts_between({"w": (torch.tensor([1, 4, 6]),)}, {"w": (torch.tensor([1, 6]),)})
        {'w': (tensor([0, 2]),)}
    """
    cuts: dict[str, tuple[torch.Tensor | None, ...]] = {}
    for name, dims in after.items():
        old = before.get(name, (None,) * len(dims))
        cuts[name] = tuple(_between(o, n) for o, n in zip(old, dims, strict=True))
    return cuts


def _between(before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor | None:
    if after is None or before is None:
        return after
    if len(after) == len(before):
        return None
    return torch.searchsorted(before, after)


def cut(tensor: torch.Tensor, dims: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """A copy of what is left of a tensor, in its memory format."""
    left = tensor.detach()
    for dim, index in enumerate(dims):
        if index is not None:
            left = left.index_select(dim, index.to(left.device))
    if _channels_last(tensor):
        return left.clone(memory_format=torch.channels_last)
    return left.clone() if left.data_ptr() == tensor.data_ptr() else left


def _channels_last(tensor: torch.Tensor) -> bool:
    """Whether it is laid out so and not, with one channel or a 1x1 kernel, in both ways."""
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def fill(target: fx.GraphModule, present: nn.Module, cuts: Cuts) -> None:
    """Give a freshly cut network the values, gradients, flags and modes of the present one."""
    current = dict(named_tensors(present))
    done: dict[int, torch.Tensor] = {}
    for name, tensor in list(named_tensors(target)):
        old = current.get(name)
        if old is None or id(tensor) in done:
            continue
        # A constant of the graph that no plan names is as the rewrite left it.
        left = cut(old, cuts[name]) if name in cuts else tensor.detach().to(old.device)
        if isinstance(tensor, nn.Parameter):
            tensor.data = left
            tensor.requires_grad_(old.requires_grad)
            if old.grad is not None:
                tensor.grad = cut(old.grad, cuts.get(name, (None,) * old.ndim))
            done[id(tensor)] = tensor
        else:
            done[id(tensor)] = left
    like = next((p for p in present.parameters() if p.is_floating_point()), None)
    for part in target.modules():
        for leaf, buffer in part._buffers.items():
            if buffer is None:
                continue
            if id(buffer) in done:
                part._buffers[leaf] = done[id(buffer)]
            elif like is not None:  # a constant that is new: of a branch dropped just now
                dtype = like.dtype if buffer.is_floating_point() else buffer.dtype
                part._buffers[leaf] = buffer.to(like.device, dtype)
    _take_modes(target, present)


def synchronise_like(fresh: fx.GraphModule, present: nn.Module) -> None:
    """Make batch norms of a freshly cut network synchronised where the present one's are."""
    layers = dict(fresh.named_modules(remove_duplicate=False))
    for path, part in present.named_modules(remove_duplicate=False):
        own = layers.get(path)
        if isinstance(part, nn.SyncBatchNorm) and own is not None:
            parent, _, leaf = path.rpartition(".")
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(own, part.process_group)
            setattr(fresh.get_submodule(parent), leaf, converted)


def adopt(network: fx.GraphModule, fresh: fx.GraphModule) -> None:
    """Make `network` what `fresh` is, and stay the same object for those who hold it."""
    for store in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        setattr(network, store, getattr(fresh, store))
    network.meta = fresh.meta
    network.graph = fresh.graph


def check_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    """Whether an optimiser trains this network and has a state that can be cut.

    Raises:
        InputError: it has none of its parameters, or a state that is not one of each weight, or
            it hands the parameters to another optimiser by lists of their own.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    used = _used(optimizer, names)
    kind = type(optimizer).__name__
    if not used and any(p.requires_grad for p in network.parameters()):
        raise InputError(
            f"{kind} has no parameter of the network: build it from pruner.model.parameters(), "
            "not from the parameters of the model that was passed, and after load_state_dict()"
        )
    groups = {id(group) for group in optimizer.param_groups}
    for inner in _inside(optimizer):
        if not {id(group) for group in inner.param_groups} <= groups:
            raise InputError(
                f"{kind} keeps parameters in a {type(inner).__name__} inside, which would go on "
                "with those from before a cut (ZeroRedundancyOptimizer shards them so): use that "
                "optimiser itself"
            )
    for states in _states(optimizer):
        for p in used:
            for key, state in states.get(p, {}).items():
                _check_state(state, p, f"{kind}: the state {key!r} of {names[id(p)]!r}")


def _used(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[torch.Tensor]:
    """The parameters of the network, by their ids, that an optimiser trains."""
    return [p for group in optimizer.param_groups for p in group["params"] if id(p) in names]


def _inside(optimizer: Any) -> list[Any]:
    """The optimisers that wrappers keep under whatever name: timm's Lookahead has one."""
    found: list[Any] = []
    todo = list(vars(optimizer).values())
    while todo:
        value = todo.pop()
        if isinstance(value, (list, tuple)):
            todo += [each for each in value if _is_optimizer(each)]
        elif _is_optimizer(value) and not any(value is each for each in (optimizer, *found)):
            found.append(value)
            todo += vars(value).values()
    return found


def _is_optimizer(value: Any) -> bool:
    own = getattr(value, "__dict__", {})
    alike = isinstance(own.get("param_groups"), list) and isinstance(own.get("state"), Mapping)
    return alike or isinstance(value, torch.optim.Optimizer)


def _states(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The states by parameter of an optimiser and of those inside, which may share one."""
    every = [optimizer.state, *(inner.state for inner in _inside(optimizer))]
    return list({id(states): states for states in every}.values())


def _check_state(state: Any, parameter: torch.Tensor, where: str) -> None:
    if isinstance(state, Mapping):
        for key, item in state.items():
            _check_state(item, parameter, f"{where}, {key!r},")
        return
    if isinstance(state, (list, tuple)):
        for item in state:
            _check_state(item, parameter, where)
        return
    if not isinstance(state, torch.Tensor):
        if any(isinstance(own, torch.Tensor) for own in getattr(state, "__dict__", {}).values()):
            raise InputError(
                f"{where} is a {type(state).__name__} that holds tensors, which can't be cut: use "
                "an optimiser whose states are tensors, or lists or dicts of them"
            )
        return
    if state.numel() == 1:
        return
    fits = state.ndim == parameter.ndim and all(
        size in (whole, 1) for size, whole in zip(state.shape, parameter.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"{where} has the shape {tuple(state.shape)} for a parameter {tuple(parameter.shape)}, "
            "so it can't be cut with it: use an optimiser with a state for each weight (SGD, "
            "Adam, AdamW, RMSprop, Adafactor ...), not one as LBFGS"
        )


def carry_optimizer(
    optimizer: torch.optim.Optimizer, network: nn.Module, cuts: Cuts
) -> Callable[[nn.Module], None]:
    """The states of an optimiser, cut; they are put in place by calling the result.

    Every state tensor with a parameter's shape, or its shape with some dims 1 (factored second
    moments), is cut as the parameter is; single numbers stay. Groups, their options and order
    stay, and so do learning rate schedules, which refer to the optimiser. Parameters that are
    gone leave their group. States of an optimiser inside of a wrapper go the same way.

    Args:
        network: what it trains now; `check_optimizer` was content with it.

    Returns:
        A function of the network that has the parameters from then on.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    used = _used(optimizer, names)
    carried = [
        (
            states,
            {
                id(p): _carried(states[p], p, cuts.get(names[id(p)], ()))
                for p in used
                if p in states
            },
        )
        for states in _states(optimizer)
    ]

    def commit(after: nn.Module) -> None:
        fresh = dict(after.named_parameters(remove_duplicate=False))
        for states, left in carried:
            for p in used:
                states.pop(p, None)
                new = fresh.get(names[id(p)])
                if new is not None and id(p) in left:
                    states[new] = left[id(p)]
        for group in optimizer.param_groups:
            pairs = [(p, fresh.get(names[id(p)]) if id(p) in names else p) for p in group["params"]]
            labels = group.get("param_names")
            if labels:
                group["param_names"] = [
                    label for label, (_, new) in zip(labels, pairs, strict=True) if new is not None
                ]
            group["params"] = [new for _, new in pairs if new is not None]

    return commit


def _carried(state: Any, parameter: torch.Tensor, dims: tuple[torch.Tensor | None, ...]) -> Any:
    if isinstance(state, Mapping):
        own = copy.copy(state) if isinstance(state, MutableMapping) else dict(state)
        for key, item in state.items():
            own[key] = _carried(item, parameter, dims)
        return own
    if isinstance(state, (list, tuple)):
        items = [_carried(item, parameter, dims) for item in state]
        named = hasattr(state, "_fields")
        return type(state)(*items) if named else type(state)(items)
    if not isinstance(state, torch.Tensor) or state.numel() == 1:
        return state
    pairs = zip(dims, state.shape, parameter.shape, strict=False)
    return cut(state, tuple(index if size == whole else None for index, size, whole in pairs))


def copy_inside(holder: Any, network: fx.GraphModule) -> fx.GraphModule:
    """The copy of `network` that an averaged model holds, or that `holder` is itself.

    Raises:
        InputError: it is no copy of the network.
    """
    inside = getattr(holder, "module", holder)
    own = {name: tensor.shape for name, tensor in named_tensors(network)}
    if (
        not isinstance(inside, fx.GraphModule)
        or inside is network
        or {name: tensor.shape for name, tensor in named_tensors(inside)} != own
    ):
        raise InputError(
            f"ema holds a {type(inside).__name__} that is no copy of the network as it is now: "
            "build it of pruner.network, as torch.optim.swa_utils.AveragedModel(pruner.network), "
            "and pass it to every pruner.step()"
        )
    return inside


def load_values(fresh: fx.GraphModule, present: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a freshly cut network the values of a state dict, and flags and modes of `present`."""
    device = next(present.parameters()).device
    constants = getattr(fresh, "_constants", nn.Module())
    for leaf, buffer in list(constants._buffers.items()):
        # Its dims of equal values may have been cut to 1.
        constants._buffers[leaf] = torch.empty_like(state[f"_constants.{leaf}"], dtype=buffer.dtype)
    fresh.to(device)
    fresh.load_state_dict(state)
    for name, p in fresh.named_parameters():
        if _channels_last(state[name]):
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    wanted = {name: p.requires_grad for name, p in present.named_parameters()}
    for name, p in fresh.named_parameters():
        p.requires_grad_(wanted.get(name, p.requires_grad))
    _take_modes(fresh, present)


def _take_modes(fresh: nn.Module, present: nn.Module) -> None:
    """Put the modules of a freshly cut network in the modes that they are in now."""
    modes = {path: part.training for path, part in present.named_modules()}
    for path, part in fresh.named_modules():
        part.training = modes.get(path, present.training)
