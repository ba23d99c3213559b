"""How a model calls its parts: structure of arguments and results, seen on one example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from halp_fx.errors import InputError
from halp_fx.passes.rules.structure import detached_copy

__all__ = ["Call", "Nest", "capture"]


@dataclass(frozen=True)
class Nest:
    """Tuples, lists and dicts with tensors in some places and constants in the others."""

    spec: pytree.TreeSpec
    constants: tuple[Any, ...]  # one a leaf; None where a tensor goes
    places: tuple[int, ...]  # leaves that are tensors

    @classmethod
    def of(cls, value: Any) -> tuple[Nest, list[torch.Tensor]]:
        """The structure of `value`, and its tensors."""
        leaves, spec = pytree.tree_flatten(value)
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
        constants = tuple(None if i in places else leaf for i, leaf in enumerate(leaves))
        return cls(spec, constants, places), [leaves[i] for i in places]

    def fill(self, tensors: Sequence[Any]) -> Any:
        """The nest with these tensors (or proxies) in its places."""
        leaves = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.spec)

    def tensors_of(self, value: Any) -> list[Any] | None:
        """The tensors (or proxies) of a value of this structure; None: it has another."""
        leaves, spec = pytree.tree_flatten(value)
        if spec != self.spec:
            return None
        if any(
            leaves[i] is not constant and not _same(leaves[i], constant)
            for i, constant in enumerate(self.constants)
            if i not in self.places
        ):
            return None
        return [leaves[i] for i in self.places]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or type(one) is not type(other):
        return False
    return bool(one == other)


@dataclass(frozen=True)
class Call:
    """How one part is called."""

    name: str  # the part: a submodule of the model
    signature: inspect.Signature  # of its `forward`, without `self`
    given: Nest  # its arguments by name
    result: Nest

    def tensors_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors among the arguments of a call.

        Raises:
            InputError: the call differs in structure, or in a constant, from that of the example.
        """
        tensors = self.given.tensors_of(bound(self.signature, args, kwargs))
        if tensors is None:
            raise InputError(
                f"{self.name!r} was pruned for calls with {self._described()}, and is called with "
                "other arguments: pass the same number of tensors and the same options as in "
                "example_inputs, or prune with an example of the other kind"
            )
        return tensors

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for these tensors."""
        found = inspect.BoundArguments(self.signature, self.given.fill(tensors))
        return found.args, found.kwargs

    def _described(self) -> str:
        constants = [c for i, c in enumerate(self.given.constants) if i not in self.given.places]
        others = f" and the constants {constants}" if constants else ""
        return f"{len(self.given.places)} tensors{others}"


def bound(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name, defaults included."""
    found = signature.bind(*args, **kwargs)
    found.apply_defaults()
    return dict(found.arguments)


def capture(
    model: nn.Module,
    names: Sequence[str],
    inputs: tuple[Any, ...],
    what: str = "example_inputs",
) -> tuple[dict[str, Call], dict[str, list[torch.Tensor]]]:
    """Run the whole model once on a copy, in eval mode, and note how it calls the parts.

    Args:
        names: submodules of `model`, none inside of another.
        inputs: positional arguments of `model`.
        what: they are, for messages.

    Returns:
        part -> its first call, and part -> the tensors that it was called with; both in the
        order of `names`.

    Raises:
        InputError: a part does not exist, is not called, or is called without tensors; the model
            rejects the inputs.
    """
    _check_names(model, names)
    copied = detached_copy(model).eval()
    seen: dict[str, tuple[Call, list[torch.Tensor]]] = {}
    handles = [
        copied.get_submodule(name).register_forward_hook(_recorder(name, seen), with_kwargs=True)
        for name in names
    ]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
            copied(*inputs)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} can't be run on {what}: {type(error).__name__}: "
            f"{error}. Pass the positional arguments of the whole model"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in seen]
    if missing:
        raise InputError(
            f"{type(model).__name__} does not call {missing} on {what} in eval mode: name "
            "submodules that its forward calls"
        )
    for call, tensors in seen.values():
        if not tensors or not call.result.places:
            raise InputError(
                f"{call.name!r} takes or gives no tensor: name a submodule that maps tensors "
                "to tensors"
            )
    return {n: seen[n][0] for n in names}, {n: seen[n][1] for n in names}


def _recorder(
    name: str, seen: dict[str, tuple[Call, list[torch.Tensor]]]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if name in seen:
            return
        signature = inspect.signature(module.forward)
        given, tensors = Nest.of(bound(signature, args, kwargs))
        result, _ = Nest.of(output)
        seen[name] = (Call(name, signature, given, result), [t.detach() for t in tensors])

    return note


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if not isinstance(name, str) or name == "" or name not in known:
            raise InputError(
                f"core={name!r} is no submodule of {type(model).__name__}: its submodules are "
                f"{[n for n, _ in model.named_children()]} and what is in them"
            )
    if len({id(known[name]) for name in names}) < len(names):
        raise InputError(f"core={list(names)} names a submodule twice: name each once")
    for name in names:
        inside = [other for other in names if other.startswith(f"{name}.")]
        if inside:
            raise InputError(f"core names {name!r} and {inside} inside of it: leave those out")
