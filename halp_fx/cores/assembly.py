"""The parts of a model as one network that can be traced, with marks where each begins and ends."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from halp_fx.cores.calls import Call
from halp_fx.errors import TraceError
from halp_fx.passes.rules.structure import HOOKS

__all__ = ["CUTS", "Flow", "assemble", "cut_name", "side_by_side"]

# `flow(run, *inputs)` calls `run(part, *args)` in turn and returns what must stay as it is.
Flow = Callable[..., Any]
CUTS = "_core_cuts"


def cut_name(side: str, part: int, place: int) -> str:
    """Name of the mark at tensor `place` on a side ("in", "out") of a part."""
    return f"{CUTS}.{side}_{part}_{place}"


def side_by_side(calls: Mapping[str, Call]) -> Flow:
    """Parts that are not joined: each has inputs of its own, all outputs stay as they are."""

    def flow(run: Callable[..., Any], *inputs: Any) -> tuple[Any, ...]:
        results, start = [], 0
        for name, call in calls.items():
            stop = start + len(call.given.places)
            args, kwargs = call.arguments(inputs[start:stop])
            results.append(run(name, *args, **kwargs))
            start = stop
        return tuple(results)

    return flow


def assemble(model: nn.Module, calls: Mapping[str, Call], flow: Flow, inputs: int) -> nn.Module:
    """A network of parts of `model`, which keep their names and share their tensors.

    Args:
        flow: how tensors go from part to part; each part is run once.
        inputs: how many tensors the network takes.
    """
    members = {"forward": _forward_of(inputs)}
    kind = type(type(model).__name__, (_Assembly,), members)  # so called in messages
    return kind(model, calls, flow)


class _Assembly(nn.Module):
    def __init__(self, model: nn.Module, calls: Mapping[str, Call], flow: Flow) -> None:
        super().__init__()
        self._core_calls = dict(calls)
        self._core_flow = flow
        self.training = model.training
        cuts = nn.Module()
        for i, (name, call) in enumerate(calls.items()):
            _place(self, name, _without_hooks(model.get_submodule(name)), model)
            for side, nest in (("in", call.given), ("out", call.result)):
                for place in range(len(nest.places)):
                    cuts.add_module(cut_name(side, i, place).rpartition(".")[2], nn.Identity())
        cuts.train(model.training)
        self.add_module(CUTS, cuts)

    def _core_together(self, *inputs: Any) -> Any:
        return self._core_flow(self._core_run, *inputs)

    def _core_run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        call = self._core_calls[name]
        index = list(self._core_calls).index(name)
        tensors = call.tensors_in(args, kwargs)
        args, kwargs = call.arguments(self._marked("in", index, tensors))
        result = self.get_submodule(name)(*args, **kwargs)
        found = call.result.tensors_of(result)
        if found is None:
            raise TraceError(
                f"{name!r} gives another structure when traced ({type(result).__name__}) than "
                "when run: it can't be a core; name what is in it, or around it"
            )
        return call.result.fill(self._marked("out", index, found))

    def _marked(self, side: str, part: int, tensors: list[Any]) -> list[Any]:
        return [self.get_submodule(cut_name(side, part, i))(t) for i, t in enumerate(tensors)]


def _place(root: nn.Module, name: str, part: nn.Module, model: nn.Module) -> None:
    """Put `part` at the dotted `name`, with containers on the way in the modes of the model's."""
    owner, steps = root, name.split(".")
    for i, step in enumerate(steps[:-1]):
        if step not in owner._modules:
            container = nn.Module()
            container.training = model.get_submodule(".".join(steps[: i + 1])).training
            owner.add_module(step, container)
        owner = owner.get_submodule(step)
    owner.add_module(steps[-1], part)


def _without_hooks(part: nn.Module) -> nn.Module:
    """The part without hooks of its own: they run where the part is put back."""
    twin = copy.copy(part)
    for hooks in HOOKS:
        object.__setattr__(twin, hooks, OrderedDict())
    return twin


def _forward_of(inputs: int) -> Any:
    """A `forward` of so many arguments, as torch.fx wants them one by one."""
    graph = fx.Graph()
    arguments = tuple(graph.placeholder(f"input_{i}") for i in range(inputs))
    graph.output(graph.call_module("_core_together", arguments))
    holder = nn.Module()
    holder.add_module("_core_together", nn.Identity())
    return type(fx.GraphModule(holder, graph)).forward
