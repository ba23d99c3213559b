"""trace: a model becomes a graph of module calls, functions and methods (torch.fx).

Requires: an `nn.Module` and inputs that it accepts.
Ensures: the graph gives the model's outputs, as seen on the example; module names, and with them
the keys of `state_dict()`, are the model's; the model itself is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from halp_fx.errors import InputError, TraceError
from halp_fx.passes.rules.agreement import difference
from halp_fx.passes.rules.core import OnMeta, tensors_in
from halp_fx.passes.rules.structure import (
    detached_copy,
    empty_like,
    structural_copy,
    substitute_copy,
    without_data,
)
from halp_fx.passes.rules.tracer import Tracer, opened_functions
from halp_fx.types import Traced

__all__ = ["trace"]


def trace(model: nn.Module, example_inputs: Any = None) -> Traced:
    """Trace `model` into a graph and run it once on the example.

    Args:
        example_inputs: a tensor or a tuple, the positional arguments of the model. None: an
            image (1, C, H, W) of the size the model expects, as far as that can be told.

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
    graph, opaque = _trace_graph(root, inputs, name)
    graph._tracer_cls = None  # ours can't be made again by unpickling
    constants = {k: v for k, v in vars(root).items() if k.startswith("_tensor_constant")}
    root = structural_copy(model).eval()  # one that no `forward` has left proxies on
    for constant, value in constants.items():
        setattr(root, constant, value)
    _link_training_flags(graph, model, inputs, opaque)
    module = fx.GraphModule(root, graph, class_name=name)
    for path, own in module.named_modules():
        own.training = False
        if path in opaque:
            own.eval()
    values = _record(root, module, inputs, name)
    differs = difference(root, module, inputs)
    if differs is not None:
        raise TraceError(
            f"the graph traced of {name} is not the network: {differs}. Its forward decides by "
            "something that tracing can't see; prune the part that can be traced, with "
            "halp_fx.compile_core"
        )
    return Traced(
        module=module,
        example_inputs=inputs,
        training={path: part.training for path, part in model.named_modules()},
        root=root,
        opaque=opaque,
        values=values,
        model_name=name,
    )


def _trace_graph(
    root: nn.Module, inputs: tuple[Any, ...], name: str
) -> tuple[fx.Graph, dict[str, str]]:
    """Trace, going into every function; where that fails, with functions and modules kept whole."""
    with opened_functions():
        try:
            return Tracer(inputs, {}).trace(root), {}
        except Exception:  # noqa: BLE001  the next way tells what can't be traced
            pass
    opaque: dict[str, str] = {}
    while True:
        tracer = Tracer(inputs, opaque)
        try:
            return tracer.trace(root), opaque
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


def _link_training_flags(
    graph: fx.Graph, model: nn.Module, inputs: tuple[Any, ...], opaque: Mapping[str, str]
) -> None:
    """Constants that are False in eval and True in train mode read `training` when they run.

    Tracing freezes `F.dropout(x, training=self.training)`; a second graph, traced in train mode,
    shows which constants those are. The count of batches of a batch norm, which is there in train
    mode only, is left out. Where the two graphs differ in more, nothing is linked.
    """
    twin = structural_copy(model).train()
    try:
        with nullcontext() if opaque else opened_functions():
            other = Tracer(inputs, opaque).trace(twin)
    except Exception:  # noqa: BLE001  whatever it is, the graph traced in eval mode stands
        return
    others = _without_counts(other)
    pairs = list(zip(graph.nodes, others, strict=False))
    twins = {b: a for a, b in pairs}
    if len(graph.nodes) != len(others) or any(
        a.op != b.op
        or str(a.target) != str(b.target)
        or not all(used in twins for used in b.all_input_nodes)
        for a, b in pairs
    ):
        return
    # Both in nodes of the one graph: names may differ where the other has more.
    given: list[tuple[fx.Node, Any, Any]] = []
    for a, b in pairs:
        args, kwargs = (fx.node.map_arg(x, twins.__getitem__) for x in (b.args, b.kwargs))
        given.append((a, args, kwargs))
    flags = [(a, x, y) for a, x, y in given if (str(a.args), str(a.kwargs)) != (str(x), str(y))]
    if not flags or not all(_flag_only(*one) for one in flags):
        return
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        training = graph.create_node("get_attr", "training")
    for a, args, kwargs in flags:
        a.args = tuple(_linked(x, y, training) for x, y in zip(a.args, args, strict=True))
        a.kwargs = {k: _linked(v, kwargs[k], training) for k, v in a.kwargs.items()}


def _without_counts(graph: fx.Graph) -> list[fx.Node]:
    """The nodes, save those that count the batches of a batch norm, which nobody reads."""
    found = list(graph.nodes)
    counted: set[fx.Node] = set()
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if (
            node.op == "call_method"
            and node.target == "add_"
            and isinstance(first, fx.Node)
            and first.op == "get_attr"
            and str(first.target).endswith("num_batches_tracked")
            and not node.users
        ):
            found.remove(node)
            counted.add(first)
    for first in counted:  # of a norm that runs more than once there is one
        if not any(user in found for user in first.users):
            found.remove(first)
    return found


def _flag_only(a: fx.Node, args: Any, kwargs: Any) -> bool:
    if len(a.args) != len(args) or a.kwargs.keys() != kwargs.keys():
        return False
    pairs = [*zip(a.args, args, strict=True), *((v, kwargs[k]) for k, v in a.kwargs.items())]
    return all(str(x) == str(y) or (x is False and y is True) for x, y in pairs)


def _linked(eval_value: Any, train_value: Any, training: fx.Node) -> Any:
    return training if eval_value is False and train_value is True else eval_value


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
    """Runs a graph and keeps what each node gave, without the data."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = without_data(value)
        return value


def _record(
    root: nn.Module, module: fx.GraphModule, inputs: tuple[Any, ...], name: str
) -> dict[str, Any]:
    """What each node gives: on tensors without data where that works, else on the example."""
    count = sum(1 for n in module.graph.nodes if n.op == "placeholder")
    if len(inputs) > count:
        _check_inputs(root, inputs)
    given = inputs[:count]
    devices = {t.device for t in [*root.parameters(), *tensors_in(list(inputs))]}
    if len(devices) == 1:
        tensors = {
            id(t): empty_like(t) for store in (module.parameters(), module.buffers()) for t in store
        }
        recorder = _Recorder(substitute_copy(module, tensors))
        try:
            with torch.no_grad(), OnMeta():
                recorder.run(*without_data(given))
            return recorder.values
        except Exception:  # noqa: BLE001, S110  the example itself decides
            pass
    recorder = _Recorder(cast(fx.GraphModule, detached_copy(module)))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(module)):
            recorder.run(*given)
    except Exception as error:
        _check_inputs(root, inputs)
        raise TraceError(f"the graph of {name} does not run: {_first_line(error)}") from error
    return recorder.values


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
