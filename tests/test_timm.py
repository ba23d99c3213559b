"""Models of timm, one of each of some of its files, held to the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import halp_fx
from halp_fx.passes.groups import find_groups
from halp_fx.passes.trace import trace
from halp_fx.tools.coverage_worker import prunable_share
from tests import oracle
from tests.pruning import compile_within

timm = pytest.importorskip("timm")


@dataclass(frozen=True)
class Case:
    """A model, and how it is made small."""

    size: int = 32  # height and width of the image
    options: dict[str, Any] = field(default_factory=dict)  # for `timm.create_model`
    norm_stats: bool = False  # it has norms whose statistics run over channels
    below: float = 0.7  # share of the parameters that is left at most


CASES = {
    "convnext_atto": Case(norm_stats=True),
    "edgenext_xx_small": Case(64, norm_stats=True),
    "efficientvim_m1": Case(64, norm_stats=True, below=0.8),
    "ghostnet_050": Case(),
    "levit_128s": Case(224, below=0.9),
    "mixer_s32_224": Case(64, {"img_size": 64}, norm_stats=True),
    "mobilenetv3_small_050": Case(),
    "pit_ti_224": Case(64, {"img_size": 64}, norm_stats=True),
    "regnetx_002": Case(),
    "repvgg_a0": Case(),
    "resnet10t": Case(below=0.8),
    "selecsls42": Case(64),
    "starnet_s1": Case(),
    "swin_tiny_patch4_window7_224": Case(64, {"img_size": 64}, norm_stats=True, below=0.85),
    "vit_tiny_patch16_224": Case(32, {"img_size": 32}, norm_stats=True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # timm's own
def test_half_the_latency(name: str) -> None:
    case = CASES[name]
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = oracle.randomize(timm.create_model(name, **case.options)).eval()
        image = torch.randn(2, 3, case.size, case.size)
    pruned = compile_within(model, 0.5, (image,))
    plan = halp_fx.plan_of(pruned)
    assert plan.predicted_ms <= 1.03 * max(plan.budget_ms, 0.5 * plan.dense_ms)
    assert oracle.shrunk(model, pruned) < case.below
    oracle.assert_exact(model, pruned, (image,), norm_stats=case.norm_stats)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("convnextv2_atto", 0.9),  # the means of its global response norm
        ("nfnet_l0", 0.95),  # standardised weights
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_share_that_may_go(name: str, least: float) -> None:
    """Of the output channels of convolutions and linear layers, the classifier's left out."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = timm.create_model(name, num_classes=4).eval()
    groups = find_groups(trace(model, torch.randn(2, 3, 32, 32)))
    assert prunable_share(groups) > least
    assert any(group.inexact for group in groups.groups)
