"""SSD detectors to try things on: whole, or as the network of tensors inside of them.

`halp-fx groups halp_fx.tools.detectors:ssd300_tensors` shows the channels of torchvision's SSD300.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halp_fx.errors import DependencyError, InputError

__all__ = [
    "LevelsBackbone",
    "TensorPart",
    "small_ssd",
    "small_ssd_tensors",
    "ssd300_tensors",
    "ssd512_resnet50",
    "ssd512_tensors",
]

_FURTHER_512 = ((256, 512), (256, 512), (128, 256), (128, 256), (128, 256), (128, 256))


class TensorPart(nn.Module):
    """What a one-stage detector computes on tensors: backbone and head, without anchors and boxes.

    It shares the detector's layers, under the same names. Input: images `(N, 3, H, W)`, normalised
    and of one size. Output: what the head gives, a dict with `cls_logits` `(N, anchors, classes)`
    and `bbox_regression` `(N, anchors, 4)`.

    Args:
        detector: an SSD, RetinaNet or FCOS of torchvision, or one built alike.

    Raises:
        InputError: the detector has no `backbone` or no `head`.

    Example:
        >>> part = TensorPart(small_ssd(classes=5, size=96))
        >>> part(torch.rand(2, 3, 96, 96))["bbox_regression"].shape
        torch.Size([2, 1164, 4])
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        parts = dict(detector.named_children())
        missing = [name for name in ("backbone", "head") if name not in parts]
        if missing:
            raise InputError(
                f"{type(detector).__name__} has no {' and no '.join(missing)}: pass a one-stage "
                "detector of torchvision, as ssd300_vgg16"
            )
        self.backbone = parts["backbone"]
        self.head = parts["head"]

    def forward(self, images: Tensor) -> Any:
        levels = self.backbone(images)
        return self.head(list(levels.values()))


class LevelsBackbone(nn.Module):
    """Backbone of an SSD: residual stages, then a level for each further pair of convolutions.

    Input `(N, 3, H, W)`, output a dict from "0", "1" ... to levels `(N, C, H, W)`, each half as
    high and wide as the one before.

    Args:
        stem: what comes before the stages.
        stages: of which the last ones are levels too.
        widths: channels of those stages that are levels.
        further: (hidden, out) channels of the further levels: a 1x1 convolution to `hidden`, a
            3x3 convolution of stride 2 to `out`, each with batch norm and ReLU.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        widths: Sequence[int],
        further: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.first = len(stages) - len(widths)  # the first stage that is a level
        self.out_channels = list(widths)
        self.further = nn.ModuleList()
        for hidden, out in further:
            layers = [*_unit(self.out_channels[-1], hidden, 1), *_unit(hidden, out, 3, stride=2)]
            self.further.append(nn.Sequential(*layers))
            self.out_channels.append(out)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        levels = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i >= self.first:
                levels.append(x)
        for layer in self.further:
            levels.append(layer(levels[-1]))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


def small_ssd(classes: int = 32, size: int = 160) -> nn.Module:
    """An SSD with batch norm, basic residual blocks, five levels and 1.6 million parameters.

    Args:
        classes: with the background, which is class 0.
        size: height and width that images are resized to.

    Raises:
        DependencyError: torchvision is not installed.
    """
    stem = nn.Sequential(*_unit(3, 32, 3, stride=2))
    stages = [_residual_stage(32, 32), _residual_stage(32, 64), _residual_stage(64, 128)]
    backbone = LevelsBackbone(stem, stages, [64, 128], [(40, 80)] * 3)
    anchors = _library("models.detection.anchor_utils").DefaultBoxGenerator(
        [[2, 3]] * 5, scales=[0.06, 0.13, 0.25, 0.42, 0.62, 0.85]
    )
    return _ssd(backbone, anchors, size, classes, detections_per_img=100)


def small_ssd_tensors() -> tuple[nn.Module, Tensor]:
    """The tensor part of `small_ssd`, and an input (1, 3, 160, 160)."""
    return TensorPart(small_ssd()), torch.rand(1, 3, 160, 160)


def ssd300_tensors() -> tuple[nn.Module, Tensor]:
    """The tensor part of torchvision's ssd300_vgg16, and an input (1, 3, 300, 300).

    Raises:
        DependencyError: torchvision is not installed.
    """
    make = _library("models.detection").ssd300_vgg16
    return TensorPart(make(weights=None, weights_backbone=None)), torch.rand(1, 3, 300, 300)


def ssd512_resnet50(classes: int = 21) -> nn.Module:
    """An SSD at 512 pixels over a ResNet-50 up to its layer 3, which keeps the stride of layer 2.

    Seven levels, 64 to 1 pixels wide, with the anchors of Liu et al., *SSD: Single Shot MultiBox
    Detector* (ECCV 2016), for VOC.

    Args:
        classes: with the background, which is class 0.

    Raises:
        DependencyError: torchvision is not installed.
    """
    body = _library("models").resnet50(weights=None)
    first = body.layer3[0]
    first.conv2.stride = first.downsample[0].stride = (1, 1)
    stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
    stages = [body.layer1, body.layer2, body.layer3]
    backbone = LevelsBackbone(stem, stages, [1024], _FURTHER_512)
    anchors = _library("models.detection.anchor_utils").DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05],
        steps=[8, 16, 32, 64, 128, 256, 512],
    )
    return _ssd(backbone, anchors, 512, classes)


def ssd512_tensors() -> tuple[nn.Module, Tensor]:
    """The tensor part of `ssd512_resnet50`, and an input (1, 3, 512, 512)."""
    return TensorPart(ssd512_resnet50()), torch.rand(1, 3, 512, 512)


def _ssd(backbone: nn.Module, anchors: Any, size: int, classes: int, **options: Any) -> nn.Module:
    make = _library("models.detection.ssd").SSD
    detector: nn.Module = make(backbone, anchors, (size, size), classes, **options)
    return detector


def _residual_stage(channels_in: int, channels: int) -> nn.Module:
    """Two basic blocks, the first of stride 2."""
    block = _library("models.resnet").BasicBlock
    shortcut = nn.Sequential(
        nn.Conv2d(channels_in, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels)
    )
    return nn.Sequential(block(channels_in, channels, 2, shortcut), block(channels, channels))


def _unit(channels_in: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]


def _library(module: str) -> Any:
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ModuleNotFoundError as error:
        raise DependencyError(
            "detectors need torchvision; run 'pip install \"halp-fx[vision]\"'"
        ) from error
