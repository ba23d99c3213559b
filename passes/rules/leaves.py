"""Rules for whole modules: leaves of the graph that nobody looks into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halp_fx.passes.rules.core import LabelRun, tensors_in

__all__ = ["ModuleCall", "ModuleRule", "Resize", "module_rule", "register_module", "resize_leaf"]


@dataclass(frozen=True)
class ModuleCall:
    """One call of a leaf module: its arguments and its output (tensors without data)."""

    module: nn.Module  # its parameters and buffers carry labels
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors among the arguments, in order."""
        return iter(tensors_in((self.args, dict(self.kwargs))))


ModuleRule = Callable[[LabelRun, ModuleCall], None]
Resize = Callable[[Any, Any], None]  # (module with cut tensors, its uncut twin) -> None

_RULES: dict[type[nn.Module], tuple[ModuleRule, Resize | None]] = {}


def register_module(
    kind: type[nn.Module], *, resize: Resize | None = None
) -> Callable[[ModuleRule], ModuleRule]:
    """Keep modules of class `kind` whole, with the decorated function as their rule.

    The rule must say which labels of the inputs and of the module's own tensors meet, and set the
    labels of the output, as the rule of an operator does. Subclasses share it unless they have
    a `forward` of their own.

    Args:
        resize: called as `resize(module, dense)` once the tensors of a module are cut, to set
            attributes that repeat a size; `dense` is the uncut module.

    Raises:
        TypeError: `kind` is not a class of modules.
        ValueError: it has a rule already.

    Example:
        >>> from halp_fx.passes.rules import labels_of, register_module, set_labels
        >>> @register_module(Scale)  # doctest: +SKIP
        ... def rule(run, call):
        ...     x = labels_of(call.args[0])  # of (N, C, H, W)
        ...     run.tie(x.get(1), labels_of(call.module.weight).get(0))
        ...     set_labels(call.out, x)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register_module takes a class of torch.nn.Module, not {kind!r}")

    def add(rule: ModuleRule) -> ModuleRule:
        if kind in _RULES:
            raise ValueError(f"modules of {kind.__name__} have a rule already: {_RULES[kind][0]}")
        _RULES[kind] = rule, resize
        return rule

    return add


def module_rule(module: nn.Module) -> ModuleRule | None:
    """The rule of a module, or None where its class has none."""
    found = _entry(module)
    return None if found is None else found[0]


def resize_leaf(module: nn.Module, dense: nn.Module) -> None:
    """Set what repeats a size in a module that has a rule of its own."""
    found = _entry(module)
    if found is not None and found[1] is not None:
        found[1](module, dense)


def _entry(module: nn.Module) -> tuple[ModuleRule, Resize | None] | None:
    for kind in type(module).__mro__:
        if kind in _RULES and type(module).forward is kind.forward:
            return _RULES[kind]
    return None
