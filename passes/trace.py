"""trace: a model becomes a graph of module calls, functions and methods (torch.fx).

Requires: an `nn.Module` and inputs that it accepts.
Ensures: the graph gives the model's outputs, as seen on the example; module names, and with them
the keys of `state_dict()`, are the model's; the model itself is not changed.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from halp_fx.errors import InputError, TraceError, warn_caller
from halp_fx.passes.rules.agreement import (
    difference,
    difference_in_batch,
    difference_in_size,
)
from halp_fx.passes.rules.core import OnMeta, tensors_in
from halp_fx.passes.rules.leaves import module_rule
from halp_fx.passes.rules.proxies import facts_are_values, facts_as_values
from halp_fx.passes.rules.source import located
from halp_fx.passes.rules.structure import (
    detached_copy,
    empty_like,
    structural_copy,
    substitute_copy,
    without_data,
)
from halp_fx.passes.rules.tracer import Tracer, opened_functions
from halp_fx.passes.rules.training_flags import link_training_flags
from halp_fx.types import Traced

__all__ = ["trace"]


def trace(model: nn.Module, example_inputs: Any = None, *, quiet: bool = False) -> Traced:
    """Trace `model` into a graph and run it once on the example.

    Warns of what the graph does not hold: a part under `torch.no_grad()`, `torch.autocast()` or
    `torch.utils.checkpoint`, a train mode that does other things, Python code that decides by the
    number or the size of the images.

    Args:
        example_inputs: a tensor or a tuple, the positional arguments of the model. None: an
            image (1, C, H, W) of the size the model expects, as far as that can be told.
        quiet: no warnings.

    Raises:
        InputError: `model` is no module, or it rejects the inputs.
        TraceError: its `forward` can't be traced.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, not {type(model).__name__}: pass the network "
            "itself, not its class, its state dict or a file name"
        )
    root = structural_copy(model).eval()
    inputs = _example(root, example_inputs)
    name = type(model).__name__
    if any(is_lazy(p) for p in [*root.parameters(), *root.buffers()]):
        raise InputError(f"{name} has lazy parameters: run it once on an example first")
    found, differs = _first_tries(model, inputs, name)
    if differs is None and found.by_batch:
        found, only = _for_any_batch(found, model)
        if only is not None and not quiet:
            warn_caller(only)
    if differs is not None:
        raise TraceError(
            f"the graph traced of {name} is not the network: {differs}. Its forward decides by "
            "something that tracing can't see; prune the part that can be traced, with "
            "halp_fx.compile_core"
        )
    if not quiet:
        found.tell_limits()
    return Traced(
        module=found.module,
        example_inputs=inputs,
        training={path: part.training for path, part in model.named_modules()},
        root=found.root,
        opaque=found.opaque,
        values=found.values,
        model_name=name,
        flops=found.flops,
    )


_ADVICE = {
    "torch.no_grad()": "gradients will flow there; set requires_grad of parameters that are to "
    "stay to False",
    "torch.autocast()": "run the whole of it under autocast instead",
    "torch.utils.checkpoint": "it computes the same, and in training keeps those activations in "
    "memory",
}


class _Attempt:
    """A model as a graph, which has run on the example."""

    def __init__(
        self, model: nn.Module, inputs: tuple[Any, ...], name: str, *, strict: bool = False
    ) -> None:
        tracer, graph, self.opaque = _trace_graph(model, inputs, name, strict)
        self.by_batch, self.by_size = tracer.by_batch, tracer.by_size
        self.contexts, copied = tracer.contexts, tracer.root
        graph._tracer_cls = None  # ours can't be made again by unpickling
        constants = {k: v for k, v in vars(copied).items() if k.startswith("_tensor_constant")}
        self.root = structural_copy(model).eval()  # one that no `forward` has left proxies on
        for constant, value in constants.items():
            setattr(self.root, constant, value)
        self.other_in_training = link_training_flags(graph, model, inputs, self.opaque)
        try:
            self.module = fx.GraphModule(self.root, graph, class_name=name)
        except SyntaxError as error:
            raise TraceError(
                f"{name} has a module or parameter whose name is a word of Python's own "
                f"({', '.join(_keywords(graph)) or 'unknown'}), so no code can be made that calls "
                "it: give it another name"
            ) from error
        for path, own in self.module.named_modules():
            own.training = False
            if path in self.opaque:
                own.eval()
        self.values, self.flops = _record(self.root, self.module, inputs, name, self.opaque)
        self.inputs, self.name = inputs, name
        self.facts_are_values = facts_are_values()

    def difference(self) -> str | None:
        """What the graph gives that the network does not, or None."""
        return difference(self.root, self.module, self.inputs, whole=bool(self.by_batch))

    def tell_limits(self) -> None:
        """Warn of what the graph does not hold."""
        if self.other_in_training is not None:
            warn_caller(
                f"halp_fx: {self.name} does more or other things in train mode than in eval mode, "
                f"{self.other_in_training}; the pruned network does in both what the dense one "
                "does in eval mode"
            )
        if self.facts_are_values:
            warn_caller(
                f"halp_fx: forward of {self.name} decides by the dtype or the device of its "
                "tensors, and the pruned network is one for those of the example alone: pass an "
                "example, and a network, of the dtype and on the device that you will use"
            )
        for context, nodes in self.contexts.items():
            learnt = next((node for node in nodes if self._is_learnt(node)), None)
            if learnt is not None:
                warn_caller(
                    f"halp_fx: forward of {self.name} has a part under {context}{located(learnt)}, "
                    f"which the pruned network does not keep: {_ADVICE[context]}"
                )
        if self.by_size:
            in_size = difference_in_size(self.root, self.module, self.inputs)
            if in_size is not None:
                size, differs = in_size
                warn_caller(
                    f"halp_fx: forward of {self.name} decides by the size of the images"
                    f"{located(self.by_size[0])}, and the pruned network is one for the size of "
                    f"the example alone: at {'x'.join(map(str, size))} {differs}. Pass an example "
                    "of the size that you will use"
                )

    def _is_learnt(self, node: fx.Node) -> bool:
        """Whether parameters have a part in what a node gives, and would get a gradient by it."""
        seen, stack = {node}, [node]
        while stack:
            one = stack.pop()
            floats = [t for t in tensors_in(self.values.get(one.name)) if t.is_floating_point()]
            if not floats or one.target == "detach":
                continue
            if one.op == "call_module":
                if next(self.root.get_submodule(str(one.target)).parameters(), None) is not None:
                    return True
            elif one.op == "get_attr":
                path, _, leaf = str(one.target).rpartition(".")
                if leaf in self.root.get_submodule(path)._parameters:
                    return True
            fresh = [before for before in one.all_input_nodes if before not in seen]
            seen.update(fresh)
            stack += fresh
        return False


def _keywords(graph: fx.Graph) -> list[str]:
    parts = {part for node in graph.nodes for part in str(node.target).split(".")}
    return sorted(part for part in parts if keyword.iskeyword(part))


def _first_tries(
    model: nn.Module, inputs: tuple[Any, ...], name: str
) -> tuple[_Attempt, str | None]:
    """A graph for any dtype and device, else one for those of the example; what still differs."""
    try:
        found = _Attempt(model, inputs, name)
        differs = found.difference()
    except TraceError:
        fixed = _with_facts(model, inputs, name)
        if fixed is None:
            raise
        return fixed, None
    fixed = None if differs is None else _with_facts(model, inputs, name)
    return (found, differs) if fixed is None else (fixed, None)


def _with_facts(model: nn.Module, inputs: tuple[Any, ...], name: str) -> _Attempt | None:
    """A graph that is the network for the dtypes and devices of the example, or None."""
    try:
        with facts_as_values():
            fixed = _Attempt(model, inputs, name)
    except TraceError:
        return None
    return fixed if fixed.difference() is None else None


def _for_any_batch(found: _Attempt, model: nn.Module) -> tuple[_Attempt, str | None]:
    """A graph that holds for any number of images, where there is one.

    Code that decides by it is held whole in a second try; where that can't be, the first graph is
    one for the example's number alone, and the text says so.
    """
    in_batch = difference_in_batch(found.root, found.module, found.inputs)
    if in_batch is None:
        return found, None
    try:
        with facts_as_values(found.facts_are_values):
            strict = _Attempt(model, found.inputs, found.name, strict=True)
    except TraceError:
        pass
    else:
        if (
            strict.difference() is None
            and difference_in_batch(strict.root, strict.module, found.inputs) is None
        ):
            return strict, None
    count, differs = in_batch
    return found, (
        f"halp_fx: forward of {found.name} decides by the first dim of its inputs, in most "
        f"networks the batch{located(found.by_batch[0])}, and the pruned network is one for that "
        f"of the example alone: with {count} instead, {differs}. Move that code into a submodule, "
        "which is then held whole, or use the network with as many as in the example, in training "
        "too"
    )


def _trace_graph(
    model: nn.Module, inputs: tuple[Any, ...], name: str, strict: bool
) -> tuple[Tracer, fx.Graph, dict[str, str]]:
    """Trace, going into every function; where that fails, with functions and modules kept whole.

    Each try has a copy of its own, since `forward` may leave proxies on it.
    """
    tracer = Tracer(inputs, {}, strict=strict)
    with opened_functions():
        try:
            return tracer, tracer.trace(structural_copy(model).eval()), {}
        except Exception:  # noqa: BLE001  the next way tells what can't be traced
            pass
    opaque: dict[str, str] = {}
    while True:
        tracer = Tracer(inputs, opaque, strict=strict)
        try:
            return tracer, tracer.trace(structural_copy(model).eval()), opaque
        except Exception as error:
            if tracer.broken is None:
                raise TraceError(
                    f"{name}.forward can't be traced by torch.fx: {_first_line(error)}. Move what "
                    "depends on the values of tensors into a submodule (it is then held whole), "
                    "or pass the part that can be traced"
                ) from error
            opaque[tracer.broken[0]] = _first_line(tracer.broken[1])


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _check_inputs(root: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Run the model on the example, to say so when it is the inputs that are wrong."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(root)):
            detached_copy(root)(*inputs)
    except Exception as error:
        raise InputError(
            f"{type(root).__name__} rejects the example inputs ({_describe(inputs)}): "
            f"{_first_line(error)}. Pass example_inputs as a tensor or a tuple of the model's "
            "positional arguments"
        ) from error


def _describe(inputs: tuple[Any, ...]) -> str:
    return ", ".join(
        f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else repr(x)
        for x in inputs
    )


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node gave, without the data, and what some computed."""

    def __init__(self, module: fx.GraphModule, opaque: Mapping[str, str]) -> None:
        super().__init__(module)
        self.opaque = opaque
        self.values: dict[str, Any] = {}
        self.flops: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if self._is_closed(n):
            with FlopCounterMode(display=False) as counter:
                value = super().run_node(n)
            self.flops[n.name] = float(counter.get_total_flops()) or self._recurrent_flops(n)
        else:
            value = super().run_node(n)
        self.values[n.name] = without_data(value)
        return value

    def _recurrent_flops(self, n: fx.Node) -> float:
        """Of a recurrent layer, which runs as one operator: each weight once for each step."""
        module = self.fetch_attr(str(n.target))
        steps = self.env.get(n.args[0]) if n.args and isinstance(n.args[0], fx.Node) else None
        if not isinstance(module, nn.RNNBase) or not isinstance(steps, torch.Tensor):
            return 0.0
        weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
        return 2.0 * weights * steps.numel() / steps.shape[-1]

    def _is_closed(self, n: fx.Node) -> bool:
        """Whether it is a module that nobody may look into later."""
        if n.op != "call_module":
            return False
        module = self.fetch_attr(str(n.target))
        return (
            n.target in self.opaque
            or isinstance(module, nn.RNNBase)
            or module_rule(module) is not None
        )


def _record(
    root: nn.Module,
    module: fx.GraphModule,
    inputs: tuple[Any, ...],
    name: str,
    opaque: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, float]]:
    """What each node gives: on tensors without data where that works, else on the example.

    Beside it the operations of those that nobody may look into.
    """
    count = sum(1 for n in module.graph.nodes if n.op == "placeholder")
    if len(inputs) > count:
        _check_inputs(root, inputs)
    given = inputs[:count]
    devices = {t.device for t in [*root.parameters(), *tensors_in(list(inputs))]}
    if len(devices) == 1:
        tensors = {
            id(t): empty_like(t) for store in (module.parameters(), module.buffers()) for t in store
        }
        recorder = _Recorder(substitute_copy(module, tensors), opaque)
        try:
            with torch.no_grad(), OnMeta():
                recorder.run(*without_data(given))
            return recorder.values, recorder.flops
        except Exception:  # noqa: BLE001, S110  the example itself decides
            pass
    recorder = _Recorder(cast(fx.GraphModule, detached_copy(module)), opaque)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(module)):
            recorder.run(*given)
    except Exception as error:
        _check_inputs(root, inputs)
        raise TraceError(f"the graph of {name} does not run: {_first_line(error)}") from error
    return recorder.values, recorder.flops


def _cuda_devices(module: nn.Module) -> list[int]:
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    return sorted(d.index or 0 for d in devices)


def _example(root: nn.Module, given: Any) -> tuple[Any, ...]:
    if given is None:
        return _guess_inputs(root)
    if isinstance(given, torch.Tensor):
        return (given,)
    if isinstance(given, (tuple, list)):
        if not given:
            raise InputError("example_inputs is empty: pass a tensor or a tuple of tensors")
        return tuple(given)
    raise InputError(
        f"example_inputs must be a tensor or a tuple, not {type(given).__name__}: pass the "
        "model's positional arguments, e.g. torch.randn(1, 3, 224, 224)"
    )


def _guess_inputs(root: nn.Module) -> tuple[Any, ...]:
    """An image of the size the model's own attributes name, else the first common size it takes."""
    parameter = next((p for p in root.parameters() if p.is_floating_point()), None)
    options: dict[str, Any] = (
        {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}
    )
    generator = torch.Generator().manual_seed(0)
    tried: list[tuple[int, ...]] = []
    for shape in _shapes(root):
        image = torch.rand(shape, generator=generator).to(**options)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(root)):
                detached_copy(root)(image)
        except Exception:  # noqa: BLE001  the model decides what it takes
            tried.append(shape)
            continue
        return (image,)
    raise InputError(
        f"{type(root).__name__}: no example_inputs were given and none of {tried} is accepted: "
        "pass a tensor or a tuple of the model's positional arguments"
    )


def _shapes(root: nn.Module) -> list[tuple[int, ...]]:
    config = getattr(root, "pretrained_cfg", None) or getattr(root, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is not None:
        return [(1, *size)]
    for module in root.modules():
        if isinstance(module, nn.Conv3d):
            return [(1, module.in_channels, 16, s, s) for s in (112, 224)]
        if isinstance(module, nn.Conv2d):
            image = getattr(root, "image_size", None)
            sizes = [image] if isinstance(image, int) else [224, 299, 96, 64, 32, 28]
            return [(1, module.in_channels, s, s) for s in sizes]
        if isinstance(module, nn.Conv1d):
            return [(1, module.in_channels, s) for s in (1024, 128, 32)]
        if isinstance(module, nn.Linear):
            return [(1, module.in_features)]
    return [(1, 3, 224, 224)]
