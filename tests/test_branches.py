"""Residual branches that are dropped whole, and candidates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import halp_fx
from halp_fx.candidates import Draft, best_of, variants
from halp_fx.errors import InfeasibleError, InputError
from halp_fx.latency import Analytic, Source
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import price
from halp_fx.passes.saliency import score
from halp_fx.passes.select import select
from halp_fx.passes.trace import trace
from halp_fx.types import LatencyModel
from tests import oracle

# Scores of the same data that are tried besides "both".
OTHERS = ["output1.5", "both1.5", "output", "taylor1.5", "output1.75", "fisher", "both1.75",
          "taylor", "output1"]  # fmt: skip


class Block(nn.Module):
    def __init__(self, width: int, gate: bool = False) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.gate = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1))
        self.gated = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.na(self.a(x)))
        if self.gated:
            y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return F.relu(x + F.dropout(self.nb(self.b(y)), 0.1, self.training))


class Residual(nn.Module):
    def __init__(self, blocks: int = 3, gate: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Block(16, gate) for _ in range(blocks)))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def network(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = Residual(**options)
    oracle.randomize(model, 0)
    return model, torch.randn(2, 3, 12, 12)


# Kernels that cost the same at any width: dropping them is all that helps.
OVERHEAD = halp_fx.latency.Analytic(overhead_ms=1.0)


@pytest.mark.parametrize("gate", [False, True])
def test_branches_are_found(gate: bool) -> None:
    model, x = network(gate=gate)
    groups = find_groups(trace(model, x))
    assert len(groups.branches) == 3
    own = [{groups.groups[g].name for g in b.groups} for b in groups.branches]
    inner = {"blocks.0.a", "blocks.0.gate.0"} if gate else {"blocks.0.a"}
    assert own[0] == inner


@pytest.mark.parametrize("gate", [False, True])
def test_dropped_branch_leaves_its_constant(gate: bool, tmp_path: Path) -> None:
    model, x = network(gate=gate)
    with oracle.snapshot(model):
        pruned = halp_fx.compile(model, 0.75, x, latency=OVERHEAD)
    plan = halp_fx.plan_of(pruned)
    constants = [k for k in pruned.state_dict() if k.startswith("_constants.")]
    assert constants
    gone = [n for n, dims in plan.kept.items() if any(d is not None and not len(d) for d in dims)]
    assert gone
    assert not set(gone) & set(pruned.state_dict())
    assert plan.predicted_ms <= plan.budget_ms
    oracle.assert_exact(model, pruned, (x,))
    halp_fx.save(pruned, tmp_path / "net.halp")
    again = halp_fx.load(tmp_path / "net.halp")
    torch.testing.assert_close(again.eval()(x), copy.deepcopy(pruned).eval()(x), rtol=0, atol=0)
    pruned.train()
    pruned(x).sum().backward()  # it still trains


class TwoBranches(Residual):
    """A sum without a skip: one branch may go, not both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        one, two = self.blocks[0], self.blocks[1]
        y = one.nb(one.b(one.a(x))) + two.nb(two.b(two.a(x)))
        return self.head((y + self.stem.bias.view(1, -1, 1, 1)).mean((2, 3)))


def test_a_sum_keeps_one_operand() -> None:
    torch.manual_seed(0)
    model = TwoBranches()
    oracle.randomize(model, 0)
    x = torch.randn(2, 3, 12, 12)
    groups = find_groups(trace(model, x))
    assert len(groups.branches) == 1
    least = groups.branches[0].groups
    pruned = halp_fx.compile(model, 0.85, x, latency=OVERHEAD)
    units = halp_fx.plan_of(pruned).units
    assert any(not len(units[g]) for g in least)
    oracle.assert_exact(model, pruned, (x,))


def test_blocks_stay_where_asked() -> None:
    model, x = network()
    with pytest.raises(halp_fx.errors.InfeasibleError, match="least latency"):
        halp_fx.compile(model, 0.75, x, latency=OVERHEAD, drop_blocks=False)
    pruned = halp_fx.compile(model, 0.6, x, latency="analytic", drop_blocks=False)
    assert not [k for k in pruned.state_dict() if k.startswith("_constants.")]
    assert all(len(units) for units in halp_fx.plan_of(pruned).units)


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 3, 12, 12, generator=generator),
            torch.randint(0, 5, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def test_candidates_keep_the_least_loss() -> None:
    model, x = network()
    options: dict[str, Any] = {"data": batches(), "loss": F.cross_entropy, "latency": "analytic"}
    with oracle.snapshot(model):
        pruned = halp_fx.compile(model, 0.5, x, candidates=4, **options)
    plan = halp_fx.plan_of(pruned)
    losses = plan.report["candidate_losses"]
    assert len(losses) == 4
    assert losses[plan.report["candidate"]] == min(losses)
    assert plan.predicted_ms <= plan.budget_ms
    assert 0 <= plan.gap < 1
    oracle.assert_exact(model, pruned, (x,))
    assert plan.report["saliency"] == ("both", *OTHERS)[plan.report["candidate"]]
    single = halp_fx.plan_of(halp_fx.compile(model, 0.5, x, **options))
    assert single.report["saliency"] == "both"


def test_candidates_are_by_other_scores_first() -> None:
    model, x = network()
    groups = find_groups(trace(model, x))
    data = batches()
    for method, both, others in (("fisher", False, ["taylor1.5", "taylor"]), (None, True, OTHERS)):
        scores = score(groups, data, F.cross_entropy, method, both=both)
        found = variants(scores, len(others) + 2)
        perturbed = f"{scores.method}, groups perturbed"
        assert [s.method for s in found] == [*others, perturbed, perturbed]
        for given in found[:-2]:
            alone = score(groups, data, F.cross_entropy, given.method).scores
            for one, other in zip(given.scores, alone, strict=True):
                np.testing.assert_allclose(one, other)
        # Perturbed: the same order within each group, other weights between groups.
        for some in found[-2:]:
            pairs = zip(scores.scores, some.scores, strict=True)
            ratios = [round(float(b.sum() / a.sum()), 6) for a, b in pairs]
            assert len(set(ratios)) == len(ratios)
    assert variants(scores, 1) == found[:1]


def test_the_draft_with_the_least_loss_is_kept() -> None:
    model, x = network()
    groups = find_groups(trace(model, x))
    with torch.no_grad():
        data = [(a, model.eval()(a).argmax(1)) for a, _ in batches()]  # the dense one is right
    scores = score(groups, data, F.cross_entropy)
    costs = price(groups, Source(Analytic(), None))

    def draft(share: float) -> Draft:
        return Draft(select(groups, scores, costs, share * costs.dense_ms), scores)

    def fails(_: LatencyModel) -> Any:
        raise InfeasibleError("no", 1.0)

    makers = [fails, *(lambda costs, s=s: (costs, draft(s)) for s in (0.95, 0.3))]
    best = best_of(draft(0.3), makers, costs, data, F.cross_entropy)
    losses = best.facts["candidate_losses"]
    assert best.facts["candidate"] == 1 and losses[1] < losses[0] == losses[2]
    assert best.draft.plan.predicted_ms > 0.5 * costs.dense_ms


def test_candidates_are_compared_by_a_function_of_the_users() -> None:
    model, x = network()
    seen: list[fx.GraphModule] = []

    def first_is_best(pruned: fx.GraphModule) -> torch.Tensor:
        seen.append(pruned)
        loss = F.cross_entropy(pruned(x), torch.zeros(len(x), dtype=torch.int64))
        loss.backward()  # it may train
        with torch.no_grad():
            for parameter in pruned.parameters():
                parameter.zero_()
        return torch.tensor(-len(seen))

    options: dict[str, Any] = {"data": batches(), "loss": F.cross_entropy, "latency": "analytic"}
    with oracle.snapshot(model), torch.no_grad():
        pruned = halp_fx.compile(
            model, 0.4, x, steps=3, candidates=8, evaluate=first_is_best, **options
        )
    report = halp_fx.plan_of(pruned).report
    assert report["candidate"] == 0
    assert len(report["candidate_values"]) == 8
    # Each plan is tried once.
    assert sorted(set(report["candidate_values"])) == [-float(n) for n in range(len(seen), 0, -1)]
    assert len(seen) > 2
    oracle.assert_exact(model, pruned, (x,))  # what was trained is thrown away
    without = halp_fx.compile(
        model, 0.5, x, latency="analytic", candidates=3, evaluate=lambda _: float("nan")
    )
    assert halp_fx.plan_of(without).report["candidate"] == 0


def test_candidates_in_steps_are_also_tried_at_once() -> None:
    model, x = network()
    asked: list[int] = []

    def evaluate(pruned: fx.GraphModule) -> float:
        asked.append(len(asked))
        return float(len(asked))  # the last that is new

    pruned = halp_fx.compile(
        model, 0.4, x, data=batches(), loss=F.cross_entropy, latency="analytic", steps=3,
        candidates=5, evaluate=evaluate,
    )  # fmt: skip
    report = halp_fx.plan_of(pruned).report
    # In steps by two others; at once by the first and by them.
    steps = [3, 3, 3, 1, 1][report["candidate"]]
    methods = ["both", "output1.5", "both1.5", "both", "output1.5"]
    assert (report["steps"], report["saliency"]) == (steps, methods[report["candidate"]])
    assert len(asked) >= 3
    oracle.assert_exact(model, pruned, (x,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate": len}, "evaluate compares candidates: pass candidates=3"),
        ({"evaluate": 3, "candidates": 2}, "evaluate must be a callable, not int"),
        ({"evaluate": lambda _: "good", "candidates": 2}, "evaluate gave str: return a number"),
    ],
)
def test_evaluations_that_are_none(options: dict[str, Any], message: str) -> None:
    model, x = network()
    with pytest.raises(InputError, match=message):
        halp_fx.compile(model, 0.5, x, latency="analytic", **options)


def test_candidates_without_a_loss_keep_the_outputs_nearest_to_the_dense_network() -> None:
    model, x = network()
    inputs = [a for a, _ in batches()]
    with oracle.snapshot(model):
        pruned = halp_fx.compile(model, 0.5, x, data=inputs, latency="analytic", candidates=5)
    plan = halp_fx.plan_of(pruned)
    losses = plan.report["candidate_losses"]
    assert len(losses) == 5 and losses[plan.report["candidate"]] == min(losses)
    names = ("output", "output1.5", "output1.75", "output1", "output, groups perturbed")
    assert plan.report["saliency"] == names[plan.report["candidate"]]
    oracle.assert_exact(model, pruned, (x,))
    halp_fx.recalibrate(pruned.eval(), inputs[:8])
    dense = copy.deepcopy(model).eval()
    with torch.no_grad():
        shares = [(pruned(a) - dense(a)).square().sum() / dense(a).square().sum() for a in inputs]
    assert float(torch.stack(shares[:8]).mean()) == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.parametrize("candidates", [0, -1, 2.5, 3])
def test_candidates_need_data(candidates: Any) -> None:
    model, x = network()
    with pytest.raises(InputError, match="candidates"):
        halp_fx.compile(model, 0.5, x, latency="analytic", candidates=candidates)
