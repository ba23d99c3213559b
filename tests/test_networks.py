"""Networks as people use them: pruned to half their latency they compute what the oracle says."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

import halp_fx
from tests import oracle
from tests.pruning import compile_within

torchvision = pytest.importorskip("torchvision")

__all__: list[str] = []


class SSDTensors(nn.Module):
    """What SSD computes on tensors: features, then class logits and box offsets, side by side."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = detector.backbone
        self.head: Any = detector.head

    def forward(self, x: Tensor) -> Any:
        maps = list(self.backbone(x).values())
        found = self.head(maps)
        return torch.cat([found["cls_logits"], found["bbox_regression"]], dim=-1)


def _ssd() -> nn.Module:
    detection = torchvision.models.detection
    return SSDTensors(detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=6))


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


@dataclass(frozen=True)
class Network:
    """A network, an image size it takes, and how to hold it to the oracle."""

    build: Callable[[], nn.Module]
    size: int = 32
    strict: bool = True  # mask at the consumers' columns alone
    norm_stats: bool = False


NETWORKS = {
    "resnet18": Network(_torchvision("resnet18")),
    "resnet50": Network(_torchvision("resnet50")),
    "mobilenet_v2": Network(_torchvision("mobilenet_v2")),
    "vgg16_bn": Network(_torchvision("vgg16_bn")),
    "densenet121": Network(_torchvision("densenet121")),
    "shufflenet_v2_x1_0": Network(_torchvision("shufflenet_v2_x1_0")),
    "efficientnet_b0": Network(_torchvision("efficientnet_b0")),
    "regnet_y_400mf": Network(_torchvision("regnet_y_400mf")),
    "googlenet": Network(_torchvision("googlenet", init_weights=False)),
    "deeplabv3_resnet50": Network(_torchvision("deeplabv3_resnet50", weights_backbone=None)),
    "vit_b_16": Network(_torchvision("vit_b_16", image_size=32), strict=False, norm_stats=True),
    "ssd300_vgg16": Network(_ssd, size=300),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision, on its own defaults
        yield
    gc.collect()


def _random(network: Network) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network with random statistics, one image for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = oracle.randomize(network.build()).eval()
        return model, (torch.randn(1, 3, network.size, network.size),)


def _check(network: Network, model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    with oracle.snapshot(model):
        pruned = halp_fx.compile(model, 0.5, inputs, latency="analytic")
    plan = halp_fx.plan_of(pruned)
    assert plan.predicted_ms <= plan.budget_ms * (1 + 1e-9)
    assert plan.budget_ms == pytest.approx(0.5 * plan.dense_ms)
    oracle.assert_exact(
        model,
        pruned,
        inputs,
        strict=network.strict,
        norm_stats=network.norm_stats,
        batches=(1, 2),
    )
    assert oracle.shrunk(model, pruned) < 0.95
    return pruned


def _check_state_dict(model: nn.Module, pruned: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Another state of the dense network, cut by the plan, makes the pruned one another too."""
    kept = halp_fx.plan_of(pruned).kept
    state, left = model.state_dict(), pruned.state_dict()
    known = [key for key in left if not key.startswith("_constants.")]
    gone = {key for key in state if any(i is not None and not len(i) for i in kept[key])}
    assert set(known) == set(state) - gone
    assert known == [key for key in state if key in set(known)], "the order of keys changed"
    cut = oracle.cut_state_dict(state, kept)
    with torch.no_grad():
        before = pruned.eval()(*inputs)
        for tensor in oracle.named_tensors(pruned).values():
            if tensor.is_floating_point():
                tensor.zero_()
    constants = {k: v for k, v in left.items() if k.startswith("_constants.")}
    pruned.load_state_dict({**cut, **constants}, strict=True)
    if constants:
        return  # what dead branches add was zeroed above, and no dense state has it
    with torch.no_grad():
        oracle.assert_close(pruned(*inputs), before, tolerance=0.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_latency(name: str) -> None:
    network = NETWORKS[name]
    model, inputs = _random(network)
    pruned = _check(network, model, inputs)
    _check_state_dict(model, pruned, inputs)


def test_mobilenet_of_imagenet(data_folder: Path) -> None:
    """Trained weights: many channels are dead, batch norm scales are far from random."""
    weights = data_folder / "weights" / "mobilenet_v2_imagenet.safetensors"
    if not weights.is_file():
        pytest.skip(f"{weights.name} is not in the data folder")
    network = NETWORKS["mobilenet_v2"]
    model = network.build().eval()
    model.load_state_dict(load_file(weights))
    inputs = (torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)),)
    pruned = _check(network, model, inputs)
    _check_state_dict(model, pruned, inputs)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_the_least_latency(name: str) -> None:
    """Whatever can go goes, whole branches too."""
    network = NETWORKS[name]
    model, inputs = _random(network)
    pruned = compile_within(model, 1e-4, inputs)
    oracle.assert_exact(model, pruned, inputs, strict=True, batches=(1, 2))
