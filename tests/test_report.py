"""The report: what a person and a program read about a plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halp_fx
from halp_fx.report import render_markdown, summarize, to_json
from halp_fx.types import Plan

__all__: list[str] = []


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.GroupNorm(1, 32), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten(),
        nn.Linear(8 * 12 * 12, 5),
    )  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    return halp_fx.plan_of(halp_fx.compile(net, 0.6, x, latency="analytic"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
    pruned = halp_fx.compile(net, 0.6, torch.randn(1, 3, 16, 16), latency="analytic")
    path: Path = tmp_path_factory.mktemp("loaded") / "network.safetensors"
    return halp_fx.plan_of(halp_fx.load(halp_fx.save(pruned, path)))


def with_facts(plan: Plan, **facts: Any) -> Plan:
    return dataclasses.replace(plan, report={**plan.report, **facts})


def test_the_figures(plan: Plan) -> None:
    summary = summarize(plan)
    assert summary["latency_ms"]["predicted"] <= summary["latency_ms"]["budget"]
    assert summary["met"] is True
    assert summary["measured_ms"] is None
    assert 0 < summary["state_size"]["kept"] < summary["state_size"]["dense"]
    assert 0 < summary["value_kept"] <= 1
    for group, units in zip(summary["groups"], plan.units, strict=True):
        assert group["kept"] == len(units)
    assert json.loads(to_json(plan)) == summary


def test_what_was_not_measured(plan: Plan) -> None:
    text = render_markdown(plan)
    assert "it has not been measured" in text
    assert "meets the budget" in text


def test_what_was_measured(plan: Plan) -> None:
    facts = {
        "measured_dense_ms": 4.0, "measured_ms": 2.5, "measured_spread_ms": 0.125,
        "measured_budget_ms": 2.4, "met": False,
    }  # fmt: skip
    text = render_markdown(with_facts(plan, **facts))
    assert "takes 2.500 ms (+- 0.125 ms) and **misses** the budget of 2.400 ms" in text
    assert "| latency measured | 4.000 ms | 2.500 ms | 0.625 |" in text
    del facts["measured_spread_ms"]
    assert "takes 2.500 ms and **misses**" in render_markdown(with_facts(plan, **facts))


def test_statistics_over_channels_are_named(plan: Plan) -> None:
    text = render_markdown(plan)
    assert "pass through statistics over channels" in text
    assert any(group["inexact"] for group in summarize(plan)["groups"])


def test_what_had_to_stay_and_why(plan: Plan) -> None:
    text = render_markdown(plan)
    assert "## Channels that had to stay" in text
    assert "output of the network" in text
    assert "scores from data are better" in text


def test_the_size_is_that_of_the_state_dict() -> None:
    """Also of state that nothing reads, and of branches that were dropped."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.unread = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 7)
            self.branch = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64))
            self.back = nn.Conv2d(64, 16, 3, padding=1)
            self.head = nn.Linear(16, 5)
            self.register_buffer("passing", torch.zeros(9), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.relu(self.stem(x))
            y = y + self.back(torch.relu(self.branch(y)))
            out: torch.Tensor = self.head(y.mean((2, 3)))
            return out + self.passing.sum()

    torch.manual_seed(0)
    net = Net()
    slow_to_start = halp_fx.latency.Analytic(overhead_ms=1.0)  # so only what is dropped helps
    pruned = halp_fx.compile(net, 0.83, torch.randn(1, 3, 16, 16), latency=slow_to_start)
    assert any(name.startswith("_constants") for name in pruned.state_dict())
    expected = {
        name: sum(value.numel() for value in network.state_dict().values())
        for name, network in (("dense", net), ("kept", pruned))
    }
    assert summarize(halp_fx.plan_of(pruned))["state_size"] == expected


def test_numbers_that_are_not_finite_are_text(plan: Plan) -> None:
    parsed = json.loads(to_json(with_facts(plan, odd=float("nan"), more=[float("inf"), 1])))
    assert parsed["facts"]["odd"] == "nan"
    assert parsed["facts"]["more"] == ["inf", 1]


def test_of_a_network_that_was_loaded_the_figures_are_given(loaded: Plan) -> None:
    summary = summarize(loaded)
    assert summary["latency_ms"]["predicted"] == loaded.predicted_ms
    assert summary["met"] is True
    assert 0 < summary["value_kept"] <= 1
    assert summary["facts"]["saliency"] == summary["saliency"] == "magnitude"
    for unknown in ("model", "groups", "pins", "opaque"):
        assert summary[unknown] is None
    assert json.loads(to_json(loaded)) == summary


def test_of_a_network_that_was_loaded_the_text_leaves_out_what_is_not_known(loaded: Plan) -> None:
    facts = {"measured_dense_ms": 4.0, "measured_ms": 2.5, "measured_budget_ms": 2.6, "met": True}
    text = render_markdown(with_facts(loaded, **facts))
    assert text.startswith("# Network, pruned to a latency budget")
    assert "takes 2.500 ms and meets the budget" in text
    assert "| latency by the table |" in text
    assert "| numbers in the state dict | 3,208 |" in text
    assert "## Facts of the run" in text
    for unknown in ("None", "## Groups", "had to stay", "held whole"):
        assert unknown not in text
