"""State dicts of a network and of what is left of it: keys, values, flags, sharing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Kept", "check_state", "cut_state_dict", "kept_of", "named_tensors", "snapshot"]

# Parameter or buffer -> for each dim the indices that survive, or None where it is whole.
Kept = Mapping[str, tuple[Tensor | None, ...]]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have, those outside the state dict too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def kept_of(model: nn.Module, kept: Kept) -> dict[str, tuple[Tensor | None, ...]]:
    """`kept` for every name of `model`: shared tensors by any of their names, the rest whole."""
    tensors = named_tensors(model)
    by_identity = {id(tensors[name]): dims for name, dims in kept.items() if name in tensors}
    whole: dict[str, tuple[Tensor | None, ...]] = {
        name: by_identity.get(id(tensor), (None,) * tensor.ndim) for name, tensor in tensors.items()
    }
    return {**whole, **{name: dims for name, dims in kept.items() if name in tensors}}


def cut_state_dict(state: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The state dict with only what survives; tensors with an empty dim are left out."""
    cut: dict[str, Tensor] = {}
    for name, tensor in state.items():
        dims = kept.get(name, (None,) * tensor.ndim)
        if any(index is not None and not len(index) for index in dims):
            continue
        for dim, index in enumerate(dims):
            if index is not None:
                tensor = tensor.index_select(dim, index.to(tensor.device))
        cut[name] = tensor
    return cut


def check_state(model: nn.Module, pruned: nn.Module, kept: Kept) -> None:
    """The pruned state is the dense one cut by `kept`, with the same flags and sharing.

    Keys: each pruned key is a dense key or one of "_constants." of a graph; each dense key with no
    empty dim is there (a scalar may go with the rest of its module).
    """
    state, pruned_state = model.state_dict(), pruned.state_dict()
    tensors = named_tensors(model)
    for name, dims in kept.items():
        assert name in tensors, f"kept names {name!r}, which the dense network lacks"
        shape = tensors[name].shape
        assert len(dims) == len(shape), f"kept[{name!r}] has {len(dims)} dims, not {len(shape)}"
        for dim, index in enumerate(dims):
            if index is None:
                continue
            where = f"kept[{name!r}][{dim}]"
            assert index.dtype == torch.int64, f"{where} is {index.dtype}"
            assert index.ndim == 1, f"{where} is no vector"
            assert bool((index.diff() > 0).all()), f"{where} is not sorted or not unique"
            if len(index):
                assert 0 <= int(index[0]) <= int(index[-1]) < shape[dim], f"{where} out of range"
    resolved = kept_of(model, kept)
    expected = cut_state_dict(state, resolved)
    for name in pruned_state:
        assert name in state or _is_constant(name), f"unknown key {name!r}"
    for name, tensor in expected.items():
        if name not in pruned_state and not tensor.ndim:
            prefix = name.rpartition(".")[0]
            siblings = [n for n in state if n.rpartition(".")[0] == prefix and state[n].ndim]
            if siblings and not any(n in expected for n in siblings):
                continue
        assert name in pruned_state, f"key {name!r} is missing"
        got = pruned_state[name]
        assert got.dtype == tensor.dtype, f"{name}: {got.dtype}, expected {tensor.dtype}"
        assert got.shape == tensor.shape, f"{name}: {got.shape}, expected {tensor.shape}"
        assert torch.equal(got, tensor), f"{name}: not the dense tensor cut by kept"
    for name in pruned_state:
        if name in state:
            assert name in expected, f"{name}: kept says that it is gone"
    _check_flags(model, pruned)


def _is_constant(name: str) -> bool:
    """Whether it is what a dropped branch left behind, in a graph or one within a model."""
    return "_constants" in name.split(".")


def _check_flags(model: nn.Module, pruned: nn.Module) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    survivors = dict(pruned.named_parameters(remove_duplicate=False))
    for name, parameter in survivors.items():
        if name not in parameters:
            assert _is_constant(name), f"{name}: parameter made out of a buffer"
            continue
        wanted = parameters[name].requires_grad
        assert parameter.requires_grad == wanted, f"{name}: requires_grad is not {wanted}"
    lost = [name for name, _ in pruned.named_buffers(remove_duplicate=False) if name in parameters]
    assert not lost, f"buffers made out of parameters: {lost}"
    for name, parameter in survivors.items():
        for other, twin in survivors.items():
            if name < other and name in parameters and other in parameters:
                shared = parameters[name] is parameters[other]
                assert (parameter is twin) == shared, f"sharing of {name} and {other} changed"
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in pruned.named_modules():
        if name in modes:
            assert module.training == modes[name], f"{name or 'model'}: training flag changed"


@contextmanager
def snapshot(model: nn.Module) -> Iterator[None]:
    """Asserts that what happens inside leaves `model` as it was: values, gradients, modes."""
    tensors = named_tensors(model)
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    identities = {name: id(tensor) for name, tensor in tensors.items()}
    grads = {
        name: None if tensor.grad is None else tensor.grad.clone()
        for name, tensor in model.named_parameters()
    }
    flags = {name: tensor.requires_grad for name, tensor in tensors.items()}
    modes = {name: (id(m), m.training, type(m)) for name, m in model.named_modules()}
    hooks = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }
    yield
    after = named_tensors(model)
    assert list(after) == list(values), "the model's tensors were renamed"
    for name, tensor in after.items():
        same = torch.equal(tensor.detach().nan_to_num(), values[name].nan_to_num())
        assert same, f"{name} changed"
        assert tensor.dtype == values[name].dtype, f"dtype of {name} changed"
        assert id(tensor) == identities[name], f"{name} was replaced"
        assert tensor.requires_grad == flags[name], f"requires_grad of {name} changed"
    for name, parameter in model.named_parameters():
        before = grads[name]
        if before is None:
            assert parameter.grad is None, f"{name} was given a gradient"
        else:
            assert parameter.grad is not None, f"the gradient of {name} is gone"
            assert torch.equal(parameter.grad, before), f"the gradient of {name} changed"
    assert modes == {n: (id(m), m.training, type(m)) for n, m in model.named_modules()}, (
        "modules or their training flags changed"
    )
    assert hooks == {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }, "hooks were left on the model"
