"""A graph run node by node on several minibatches at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from halp_fx.errors import HalpError, InputError

__all__ = ["Walk"]

Watch = Callable[[fx.Node, "Walk"], None]  # called with a node that is about to run


class Walk:
    """A graph stopped between two nodes, with the values that are needed from there on.

    Minibatches may join on the way: they run up to where the others are, with the weights that
    the nodes before have by then.
    """

    def __init__(self, module: fx.GraphModule, watch: Watch | None = None) -> None:
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.index = {node.name: i for i, node in enumerate(self.nodes)}
        self._watch = watch
        self._interpreter = fx.Interpreter(module, garbage_collect_values=False)
        self._environments: list[dict[fx.Node, Any]] = []
        self._over = _last_uses(self.nodes)
        self._at = 0

    def __len__(self) -> int:
        return len(self._environments)

    @property
    def at(self) -> int:
        """Index of the node that runs next."""
        return self._at

    def join(self, inputs: tuple[Any, ...]) -> None:
        """One more minibatch; it runs up to where the others are."""
        environment: dict[fx.Node, Any] = {}
        self._interpreter.args_iter = iter(self.module.graph.process_inputs(*inputs))
        for i, node in enumerate(self.nodes):
            if node.op == "placeholder" or i < self._at:
                self._step(environment, i)
        self._environments.append(environment)

    def run(self, stop: int) -> None:
        """Run all nodes before that of this index."""
        for i in range(self._at, stop):
            node = self.nodes[i]
            if node.op == "placeholder":
                continue
            if self._watch is not None:
                self._watch(node, self)
            for environment in self._environments:
                self._step(environment, i)
        self._at = max(self._at, stop)

    def values(self, node: fx.Node) -> list[Any]:
        """What a node gave that is needed later, or a constant of the graph: one a minibatch."""
        if node.op == "get_attr":
            return [self._interpreter.fetch_attr(str(node.target))] * len(self)
        return [environment[node] for environment in self._environments]

    def peaks(self, inputs: tuple[Any, ...]) -> list[int]:
        """Bytes that one minibatch needs at most from each node on."""
        alone = Walk(self.module)
        alone.join(inputs)
        sizes = []
        for i in range(len(self.nodes)):
            environment = alone._environments[0]
            if self.nodes[i].op != "placeholder":
                alone._compute(environment, i)
            sizes.append(_bytes(environment))
            alone._forget(environment, i)
        for i in reversed(range(len(sizes) - 1)):
            sizes[i] = max(sizes[i], sizes[i + 1])
        return [*sizes, 0]

    def _step(self, environment: dict[fx.Node, Any], i: int) -> None:
        self._compute(environment, i)
        self._forget(environment, i)

    def _compute(self, environment: dict[fx.Node, Any], i: int) -> None:
        node = self.nodes[i]
        if node.op != "output":
            self._interpreter.env = environment
            try:
                environment[node] = self._interpreter.run_node(node)
            except HalpError:
                raise
            except Exception as error:
                first = str(error).partition("\n")[0]
                raise InputError(
                    f"data has a minibatch that {node.name} of the network can't be run on: "
                    f"{type(error).__name__}: {first}"
                ) from error

    def _forget(self, environment: dict[fx.Node, Any], i: int) -> None:
        for dead in self._over[i]:
            environment.pop(dead, None)


def _last_uses(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """For each node, the values that nobody needs once it has run."""
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        last[node] = i
        for used in node.all_input_nodes:
            last[used] = i
    over: list[list[fx.Node]] = [[] for _ in nodes]
    for node, i in last.items():
        if node.users:
            over[i].append(node)
    return over


def _bytes(environment: dict[fx.Node, Any]) -> int:
    storages = {}
    for node, value in environment.items():
        if node.op == "get_attr":
            continue  # weights, which are there anyway
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
