"""A task of the accuracy experiments whose latencies are counted, on a small network."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

from halp_fx.latency import Analytic, Source
from halp_fx.tools.experiments import cifar
from halp_fx.tools.experiments.accuracy_data import Batches, Images
from halp_fx.tools.experiments.accuracy_task import Settings, Task

__all__ = ["Counted", "images", "macs", "needs_torch_pruning", "tiny_task"]

needs_torch_pruning = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="needs torch_pruning"
)


def macs(network: nn.Module, example: torch.Tensor) -> float:
    """Multiply-adds of the convolutions and linear layers, counted as they run."""
    total = 0.0
    handles = []

    def count(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            handles.append(layer.register_forward_hook(count))
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return total


class Counted(Task):
    """A task whose clock is the number of multiply-adds, the same on every machine."""

    def measured(self, network: nn.Module, bouts: int = 1) -> tuple[float, float]:
        del bouts
        return macs(self.dense, self.example), macs(network, self.example)


def images(count: int, seed: int) -> Images:
    """Ten classes that differ in the colour of a half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    pixels = torch.randint(0, 120, (count, 3, 8, 8), generator=generator)
    for i, label in enumerate(labels.tolist()):
        pixels[i, label % 3, : 4 if label % 2 else 8, label // 2 :] += 100
    return Images(pixels.to(torch.uint8), labels)


def tiny_task() -> Task:
    """A small trained network with its images; with other tasks it shares nothing."""
    torch.manual_seed(0)
    network = cifar.ResNet56(blocks=1, width=16)
    train = images(600, 0)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for x, y in Batches(train, 50, seed=0, count=3000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.zero_grad()
    settings = Settings(
        tune_images=160, batch=16, score_images=64, recalibrate_images=128, choose_images=100,
        tries=6, rates=(0.02,),
    )  # fmt: skip
    return Counted(
        "tiny", network.eval(), "linear", train.at(slice(0, 500)), train.at(slice(500, None)),
        images(200, 1), settings, Source(Analytic(), None), torch.rand(1, 3, 8, 8),
    )  # fmt: skip
