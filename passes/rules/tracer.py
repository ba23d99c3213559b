"""The tracer: modules of torch.nn stay whole, and what shapes decide is decided."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from halp_fx.idle import acts_in_training_only
from halp_fx.passes.rules.attention import expand_attention
from halp_fx.passes.rules.core import OnMeta
from halp_fx.passes.rules.leaves import module_rule
from halp_fx.passes.rules.proxies import ValueProxy, proxies_as_values
from halp_fx.passes.rules.source import source_of
from halp_fx.passes.rules.structure import (
    empty_like,
    named_tensors,
    substitute_copy,
    without_data,
)

__all__ = ["Tracer", "opened_functions"]

_OPENED = (
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.Transformer,
)


@contextmanager
def opened_functions() -> Iterator[None]:
    """While this lasts, tracing goes into functions that a library asks to keep whole."""
    wrapped = getattr(fx._symbolic_trace, "_wrapped_fns_to_patch", {})
    kept = dict(wrapped)
    try:
        for key, namespace in kept.items():
            if not f"{namespace.get('__name__')}.".startswith(("torch.", "torchvision.ops.")):
                del wrapped[key]
        yield
    finally:
        wrapped.clear()
        wrapped.update(kept)


class Tracer(fx.Tracer):
    """Symbolic tracing at module level.

    Args:
        inputs: the example; what Python code asks of shapes is answered by running the graph so
            far on tensors without data.
        opaque: modules to keep whole.
        strict: whether Python code that decides by the batch is an error.

    After an exception `broken` names the innermost module in which it arose. Afterwards `decisions`
    are the nodes whose values Python code went by, and `contexts` what ran in which `with` block.
    """

    def __init__(
        self, inputs: tuple[Any, ...], opaque: Mapping[str, str], *, strict: bool = False
    ) -> None:
        super().__init__()
        self.strict = strict
        self.decisions: list[fx.Node] = []
        self.contexts: dict[str, list[fx.Node]] = {}
        self._modes = _modes()
        self.proxy_buffer_attributes = True  # a buffer may hold one value a channel
        self.record_stack_traces = True
        self.inputs = inputs
        self.opaque = opaque
        self.broken: tuple[str, Exception] | None = None
        self._evaluating = False
        self._idle: dict[nn.Module, bool] = {}
        self._batches: list[_Evaluation] = []

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with proxies_as_values():
            return super().trace(root, concrete_args)

    def stays_whole(self, m: nn.Module, path: str) -> bool:
        """Whether a module could not be traced, or has a rule of its own."""
        return path in self.opaque or module_rule(m) is not None

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        for name, mode in _modes().items():
            if mode != self._modes[name] and kind.startswith("call"):
                self.contexts.setdefault(name, []).append(node)
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.stays_whole(m, module_qualified_name):
            return True
        if isinstance(m, _OPENED):
            return False
        if super().is_leaf_module(m, module_qualified_name):
            return True
        if m not in self._idle:
            self._evaluating = True
            try:
                self._idle[m] = acts_in_training_only(m)
            finally:
                self._evaluating = False
        return self._idle[m]  # else it would leave no trace: stochastic depth, noise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, ValueProxy) else super().create_arg(a)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        try:
            if isinstance(m, nn.MultiheadAttention) and not self.stays_whole(m, path):
                opened = expand_attention(m, args, kwargs)
                if opened is not None:
                    return opened
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if self.broken is None:
                self.broken = (path, error)
            raise

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Inputs that the example leaves out keep their defaults, and the graph insists on it."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = [
            p
            for p in inspect.signature(root_fn).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ][1:]
        given = len(self.inputs)
        for i, parameter in enumerate(parameters[given:], start=1 + given):
            if parameter.default is parameter.empty or i >= len(args):
                continue
            default = parameter.default
            compare = operator.is_ if default is None else operator.eq
            if default is None or isinstance(default, (bool, int, float, str)):
                same = self.create_proxy("call_function", compare, (args[i], default), {})
                text = f"the graph was traced with {parameter.name}={default!r}"
                self.create_proxy("call_function", torch._assert, (same, text), {})
                args[i] = default
        return function, args

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What a condition on shapes is for the example."""
        if isinstance(self.known(obj.node), torch.Tensor):
            return super().to_bool(obj)
        return bool(self.decided(obj.node, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The items of what the example shows to be a tuple."""
        value = self.known(obj.node)
        whole = isinstance(value, torch.Tensor) and value.ndim > 0
        if whole or isinstance(value, (tuple, list)):
            return iter([_item(obj, i) for i in range(self.decided(obj.node, len))])
        return super().iter(obj)

    def decided(self, node: fx.Node, answer: Callable[[Any], Any]) -> Any:
        """What Python code goes by: `answer` to what a node gives for the example.

        Raises:
            TraceError: it is another one for other batches, and the tracer is strict.
        """
        found = answer(self.known(node))
        self.decisions.append(node)
        if self.strict and any(found != answer(value) for value in self._elsewhere(node)):
            source = source_of(node)
            raise fx.proxy.TraceError(
                f"Python code decides by {node.name}, which depends on the batch"
                + (f" ({source})" if source else "")
            )
        return found

    def grows_with_batch(self, node: fx.Node) -> bool:
        """Whether a node gives a tensor whose first dim depends on the batch."""
        value = self.known(node)
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return False
        sizes = {other.shape[0] for other in self._elsewhere(node)}
        return not sizes <= {value.shape[0]}

    def _elsewhere(self, node: fx.Node) -> Iterator[Any]:
        """What a node gives for other batches, if the graph takes them."""
        for batch in (1, 2):
            try:
                yield self.known(node, batch)
            except fx.proxy.TraceError:
                continue

    def known(self, node: fx.Node, batch: int = 0) -> Any:
        """What a node gives for the example, without data.

        Args:
            batch: 1 for one more image than the example has; 2 for one image alone, or three.
        """
        if not self._batches:
            root = self.root
            tensors = {id(t): empty_like(t) for _, t in named_tensors(root)}
            meta = substitute_copy(root, tensors)
            self._batches = [
                _Evaluation(meta, root, self.inputs),
                _Evaluation(meta, root, _with_batch(self.inputs, lambda n: n + 1)),
                _Evaluation(meta, root, _with_batch(self.inputs, lambda n: 3 if n == 1 else 1)),
            ]
        self._evaluating = True
        try:
            return self._batches[batch].value(node)
        except Exception as error:
            raise fx.proxy.TraceError(
                f"what {node.format_node()} gives depends on data: {error}"
            ) from error
        finally:
            self._evaluating = False

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node gives a tensor, as far as that can be told without data."""
        try:
            return isinstance(self.known(node), torch.Tensor)
        except fx.proxy.TraceError:
            return False

    def same_in_any_batch(self, node: fx.Node, kinds: Any) -> Any:
        """A number that does not depend on the batch.

        Raises:
            TraceError: it does, so that Python code may not turn it into a constant.
        """
        value = self.known(node)
        self.decisions.append(node)
        if not isinstance(value, kinds) or self.known(node, batch=1) != value:
            raise fx.proxy.TraceError(
                f"{node.name} is used as a plain number but depends on the batch or on data"
            )
        return value


def _item(proxy: fx.Proxy, index: int) -> Any:
    return proxy.tracer.create_proxy("call_function", operator.getitem, (proxy, index), {})


def _modes() -> dict[str, Any]:
    """What `with` blocks of PyTorch change that a graph does not hold."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {
        "torch.no_grad()": torch.is_grad_enabled(),
        "torch.autocast()": [torch.is_autocast_enabled(device) for device in devices],
    }


def _with_batch(inputs: tuple[Any, ...], change: Callable[[int], int]) -> tuple[Any, ...]:
    return tuple(
        x.new_empty((change(x.shape[0]), *x.shape[1:]), device="meta")
        if isinstance(x, torch.Tensor) and x.ndim > 0
        else x
        for x in inputs
    )


class _Evaluation:
    """Values of nodes for some inputs, worked out when they are asked for."""

    def __init__(self, root: nn.Module, origin: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.root = root
        self.origin = origin
        self.inputs = without_data(inputs)
        self.values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        for before in node.graph.nodes:  # in order, since operators may work in place
            if before not in self.values and before.op != "output":
                self.values[before] = self._run(before)
            if before is node:
                break
        return self.values[node]

    def _run(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        with torch.no_grad(), OnMeta():
            match node.op:
                case "placeholder":
                    place = [n for n in node.graph.nodes if n.op == "placeholder"].index(node)
                    return self.inputs[place] if place < len(self.inputs) else node.args[0]
                case "get_attr":
                    path, _, leaf = str(node.target).rpartition(".")
                    owner = self.root.get_submodule(path)
                    if not hasattr(owner, leaf):  # a constant that tracing made since
                        return without_data(getattr(self.origin.get_submodule(path), leaf))
                    return getattr(owner, leaf)
                case "call_module":
                    return self.root.get_submodule(str(node.target))(*args, **kwargs)
                case "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                case _:
                    assert callable(node.target)
                    return node.target(*args, **kwargs)
