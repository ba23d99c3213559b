"""The tracer: modules of torch.nn stay whole, and what shapes decide is decided."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from halp_fx.idle import acts_in_training_only
from halp_fx.passes.rules.agreement import has_rows, other_sizes, rows_of
from halp_fx.passes.rules.attention import expand_attention
from halp_fx.passes.rules.checkpointing import in_checkpoint, opened_checkpoints
from halp_fx.passes.rules.core import OnMeta, tensors_in
from halp_fx.passes.rules.leaves import module_rule
from halp_fx.passes.rules.meta import run_on_meta
from halp_fx.passes.rules.proxies import ValueProxy, plain_function, proxies_as_values
from halp_fx.passes.rules.source import located
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

    After an exception `broken` names the innermost module in which it arose. Afterwards
    `by_batch` and `by_size` are the nodes whose values Python code went by that are, or may be,
    others for other batches and for images of other sizes; `contexts` what ran in which `with`
    block.
    """

    def __init__(
        self, inputs: tuple[Any, ...], opaque: Mapping[str, str], *, strict: bool = False
    ) -> None:
        super().__init__()
        self.strict = strict
        self.by_batch: list[fx.Node] = []
        self.by_size: list[fx.Node] = []
        self.contexts: dict[str, list[fx.Node]] = {}
        self._contexts = _contexts()
        self.proxy_buffer_attributes = True  # a buffer may hold one value a channel
        self.record_stack_traces = True
        self.inputs = inputs
        self.opaque = opaque
        self.broken: tuple[str, Exception] | None = None
        self._evaluating = False
        self._idle: dict[nn.Module, bool] = {}
        self._cases: dict[str, _Evaluation] = {}

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        with proxies_as_values(), opened_checkpoints():
            return super().trace(root, concrete_args)

    def stays_whole(self, m: nn.Module, path: str) -> bool:
        """Whether a module could not be traced, or has a rule of its own."""
        return path in self.opaque or module_rule(m) is not None

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, plain_function(target), *args, **kwargs)
        if kind.startswith("call"):
            for name in _contexts() - self._contexts:
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
        """Inputs that the example leaves out keep their defaults, and the graph insists on it.

        `*xs` are as many inputs as the example has for it, each with a name.
        """
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        all_kinds = list(inspect.signature(root_fn).parameters.values())[1:]
        named = [p for p in all_kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        keywords = [p for p in all_kinds if p.kind is p.KEYWORD_ONLY]
        star = next((p.name for p in all_kinds if p.kind is p.VAR_POSITIONAL), None)
        if star is not None:
            names = [p.name for p in keywords]
            function, args = self._one_by_one(root_fn, args, star, len(named), names)
        for i, parameter in enumerate([*named, *keywords], start=1):
            left_out = i > len(self.inputs) or parameter.kind is parameter.KEYWORD_ONLY
            if not left_out or parameter.default is parameter.empty or i >= len(args):
                continue
            default = parameter.default
            compare = operator.is_ if default is None else operator.eq
            if default is None or isinstance(default, (bool, int, float, str)):
                same = self.create_proxy("call_function", compare, (args[i], default), {})
                text = f"the graph was traced with {parameter.name}={default!r}"
                self.create_proxy("call_function", torch._assert, (same, text), {})
                args[i] = default
        return function, args

    def _one_by_one(
        self, root_fn: Any, args: list[Any], star: str, named: int, keywords: list[str]
    ) -> tuple[Any, list[Any]]:
        """`forward` with the inputs of its `*xs` in place of one that stands for all of them.

        Args:
            args: the model, the `named` inputs, those of `keywords`, then `*xs` and `**kwargs`.
        """
        last = 1 + named + len(keywords)
        xs = []
        with self.graph.inserting_before(args[1 + named].node):
            for i in range(len(self.inputs) - named):
                proxy = self.create_proxy("placeholder", f"{star}_{i}", (), {})
                proxy.node.target = proxy.node.name  # which no other input has
                xs.append(proxy)
        for proxy in args[last:]:
            self.graph.erase_node(proxy.node)
        for proxy in args[1 : 1 + named] if xs else ():
            proxy.node.args = ()  # what comes after it has no default

        def called(*given: Any) -> Any:
            options = dict(zip(keywords, given[1 + named : last], strict=True))
            return root_fn(*given[: 1 + named], *given[last:], **options)

        return called, [*args[:last], *xs]

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
        self._note(node, found, answer)
        return found

    def _note(self, node: fx.Node, found: Any, answer: Callable[[Any], Any]) -> None:
        elsewhere = [self._answer(node, answer, case) for case in _BATCHES]
        if any(other != found for other in elsewhere):
            self.by_batch.append(node)
            known = [other for other in elsewhere if other is not _UNKNOWN]
            if self.strict and any(other != found for other in known):
                raise fx.proxy.TraceError(
                    f"Python code decides by {node.name}, which depends on the batch{located(node)}"
                )
        if any(self._answer(node, answer, case) != found for case in _SIZES):
            self.by_size.append(node)

    def _answer(self, node: fx.Node, answer: Callable[[Any], Any], case: str) -> Any:
        try:
            return answer(self.known(node, case))
        except Exception:  # noqa: BLE001  the graph does not take such inputs
            return _UNKNOWN

    def grows_with_batch(self, node: fx.Node) -> bool:
        """Whether a node gives a tensor whose first dim depends on the batch."""
        value = self.known(node)
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return False
        sizes = {self._answer(node, len, case) for case in _BATCHES}
        return not sizes <= {value.shape[0], _UNKNOWN}

    def known(self, node: fx.Node, case: str = "") -> Any:
        """What a node gives for the example, or for other inputs, without data."""
        if not self._cases:
            root = self.root
            tensors = {id(t): _placed(empty_like(t), t.device) for _, t in named_tensors(root)}
            meta = substitute_copy(root, tensors)
            inputs = {"": self.inputs} | {
                case: _changed(self.inputs, change) for case, change in _CHANGES.items()
            }
            places = [t.device for t in tensors_in(self.inputs)]
            self._cases = {k: _Evaluation(meta, root, v, places) for k, v in inputs.items()}
        self._evaluating = True
        try:
            return self._cases[case].value(node)
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
        others = [self.known(node, "one more")]
        others += [self._answer(node, lambda found: found, case) for case in _BATCHES[1:]]
        if not isinstance(value, kinds) or any(o != value for o in others if o is not _UNKNOWN):
            raise fx.proxy.TraceError(
                f"{node.name} is used as a plain number but depends on the batch or on data"
            )
        self._note(node, value, lambda found: found)
        return value


def _item(proxy: fx.Proxy, index: int) -> Any:
    return proxy.tracer.create_proxy("call_function", operator.getitem, (proxy, index), {})


_DEVICES = ("cpu", "cuda")


def _contexts() -> set[str]:
    """What of PyTorch this runs in that a graph does not hold: `with` blocks, a checkpoint."""
    found = set() if torch.is_grad_enabled() else {"torch.no_grad()"}
    if any(torch.is_autocast_enabled(device) for device in _DEVICES):
        found.add("torch.autocast()")
    if in_checkpoint():
        found.add("torch.utils.checkpoint")
    return found


_UNKNOWN = object()  # what can't be told is not equal to anything else
# Other inputs than the example: the shape of each tensor that has as many rows as the first.
_CHANGES: dict[str, Callable[[torch.Size], list[int]]] = {
    "one more": lambda shape: [shape[0] + 1, *shape[1:]],
    "one": lambda shape: [3 if shape[0] == 1 else 1, *shape[1:]],
    "twice as many": lambda shape: [2 * shape[0], *shape[1:]],
    "a little larger": lambda shape: _larger(shape, 0),
    "larger": lambda shape: _larger(shape, 1),
}
_BATCHES, _SIZES = list(_CHANGES)[:3], list(_CHANGES)[3:]


def _larger(shape: torch.Size, which: int) -> list[int]:
    return [*shape[:2], *other_sizes(shape[2:])[which]] if len(shape) > 3 else list(shape)


def _changed(inputs: tuple[Any, ...], change: Callable[[torch.Size], list[int]]) -> tuple[Any, ...]:
    rows = rows_of(inputs)
    return tuple(
        x.new_empty(change(x.shape), device="meta") if has_rows(x, rows) else x for x in inputs
    )


_PLACES = ("device", "is_cuda", "is_cpu", "is_meta")


def _is_stand_in(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _placed(stand_in: torch.Tensor, place: torch.device) -> torch.Tensor:
    """The stand-in, with a note of the device that the tensor itself is on."""
    stand_in._halp_device = place  # type: ignore[attr-defined]
    return stand_in


class _Placing(OnMeta):
    """Makes tensors without data that know which device they would be on."""

    def __init__(self, usual: torch.device) -> None:
        super().__init__()
        self.usual = usual

    def __torch_dispatch__(  # noqa: D105
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = run_on_meta(func, args, kwargs or {})
        place = (kwargs or {}).get("device")
        if place is None or place.type == "meta":
            place = self._place_of(list(tensors_in([args, kwargs])))
        for tensor in tensors_in(out):
            if not hasattr(tensor, "_halp_device"):
                _placed(tensor, place)
        return out

    def _place_of(self, read: list[torch.Tensor]) -> torch.device:
        if not read:
            return torch.device("cpu")
        first = next((t for t in read if t.ndim), read[0])  # single numbers may be on the CPU
        own: torch.device = getattr(first, "_halp_device", self.usual)
        return own


class _Evaluation:
    """Values of nodes for some inputs, worked out when they are asked for."""

    def __init__(
        self,
        root: nn.Module,
        origin: nn.Module,
        inputs: tuple[Any, ...],
        places: Sequence[torch.device],
    ) -> None:
        self.root = root
        self.origin = origin
        self.inputs = without_data(inputs)
        for tensor, place in zip(tensors_in(self.inputs), places, strict=True):
            _placed(tensor, place)
        self.usual = next(iter(places), torch.device("cpu"))
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
        if node.target is getattr and args[1] in _PLACES and _is_stand_in(args[0]):
            place = getattr(args[0], "_halp_device", self.usual)
            return getattr(torch.empty(0, device=place), args[1])
        with torch.no_grad(), _Placing(self.usual):
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
