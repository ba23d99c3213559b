"""Peak activation memory: against a run that counts what is alive, and as a limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import halp_fx
from halp_fx.errors import BudgetError, InfeasibleError, InputError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rules.memory import memory_moments, peak
from halp_fx.passes.trace import trace
from tests import oracle

__all__: list[str] = []


class Counter(fx.Interpreter):
    """Runs a graph, frees what is read no more, and notes the most bytes alive at a time."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.most = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op in ("call_function", "call_module", "call_method"):
            state = {
                t.untyped_storage().data_ptr() for t in oracle.named_tensors(self.module).values()
            }
            alive = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in oracle.flatten_outputs([*self.env.values(), result]).values()
            }
            self.most = max(self.most, sum(b for at, b in alive.items() if at not in state))
        return result


def counted(module: fx.GraphModule, *inputs: Tensor) -> int:
    counter = Counter(module)
    with torch.no_grad():
        counter.run(*inputs)
    return counter.most


class Wide(nn.Module):
    """Its memory is the most in the middle, where a concat waits for a view of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 48, 3, padding=1), nn.Conv2d(16, 32, 1)
        self.down, self.head = nn.Conv2d(80, 24, 3, stride=2), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        flat = x.flatten(2)
        y = torch.cat([self.left(x), self.right(x)], 1)
        y = self.down(y).mean((2, 3))
        return self.head(y) + flat.sum()


X = torch.randn(2, 3, 12, 12)


def test_the_peak_is_what_a_run_has_alive() -> None:
    model = Wide().eval()
    groups = find_groups(trace(model, X))
    moments = memory_moments(groups)
    assert peak(moments, groups.dense_units)[0] == counted(groups.traced.module, X)
    by_hand = 4 * 2 * 144 * (16 + 48 + 32 + 80)  # the stem's result, both branches, their concat
    assert peak(moments, groups.dense_units)[0] == by_hand
    assert len(moments) < len(groups.traced.module.graph.nodes)


@pytest.mark.parametrize("memory", [0.7, 0.4, 60_000])
def test_a_limit_on_memory(memory: float) -> None:
    torch.manual_seed(0)
    model = oracle.randomize(Wide()).eval()
    budget = halp_fx.Budget(share=0.9, memory=memory)
    pruned = halp_fx.compile(model, budget, X, latency="analytic")
    report = halp_fx.plan_of(pruned).report
    limit = memory * report["memory"]["dense"] if memory <= 1 else memory
    assert report["memory"]["pruned"] == counted(pruned, X) <= limit
    oracle.assert_exact(model, pruned, (X,))
    free = halp_fx.plan_of(halp_fx.compile(model, 0.9, X, latency="analytic"))
    assert free.report["memory"]["pruned"] > report["memory"]["pruned"]
    assert free.value >= halp_fx.plan_of(pruned).value


class Parallel(nn.Module):
    """Four widths and their sum are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.branches = nn.ModuleList(nn.Conv2d(16, 256, 1) for _ in range(4))
        self.head = nn.Conv2d(4 * 256, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.head(torch.cat([torch.relu(branch(x)) for branch in self.branches], 1))
        return y


def test_many_tensors_alive_at_a_time() -> None:
    """Bytes are limited by sums of costs, not by a table of all widths together."""
    model, x = oracle.randomize(Parallel()).eval(), torch.randn(1, 3, 6, 6)
    pruned = halp_fx.compile(model, halp_fx.Budget(memory=0.5), x, latency="analytic")
    report = halp_fx.plan_of(pruned).report["memory"]
    assert report["dense"] == 4 * 36 * 2 * 4 * 256  # the branches and their concat
    assert report["pruned"] == counted(pruned, x) <= 0.5 * report["dense"]


def test_memory_that_can_not_be_met() -> None:
    with pytest.raises(InfeasibleError, match=r"bytes of memory can't be met: the fewest"):
        halp_fx.compile(
            Wide().eval(), halp_fx.Budget(memory=100), X, latency="analytic", drop_blocks=False
        )
    with pytest.raises(BudgetError, match="memory of the budget is 0, it must be above 0"):
        halp_fx.Budget(memory=0)
    with pytest.raises(InputError, match="takes a limit on latency alone: leave memory out"):
        halp_fx.compile(Wide(), halp_fx.Budget(memory=0.5), X, solver="greedy")
