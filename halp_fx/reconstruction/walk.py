"""A graph run node by node on several minibatches at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

__all__ = ["Walk"]

Watch = Callable[[fx.Node, list[Any]], None]  # a node that is about to run, and its first inputs


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
            if self._watch is not None and node.all_input_nodes:
                self._watch(node, self.values(node.all_input_nodes[0]))
            for environment in self._environments:
                self._step(environment, i)
        self._at = max(self._at, stop)

    def known(self, node: fx.Node) -> bool:
        """Whether a value is there, and needed later."""
        return all(node in environment for environment in self._environments)

    def values(self, node: fx.Node) -> list[Any]:
        """What a node gave, one value a minibatch."""
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
            environment[node] = self._interpreter.run_node(node)

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
    for value in environment.values():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
