"""Small detectors of torchvision's classes, and what a pruned one is held to."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    KeypointRCNN,
    MaskRCNN,
    RetinaNet,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import halp_fx
from tests.oracle import assert_close, flatten_outputs, masked_dense, randomize

__all__ = [
    "ResNetExtractor",
    "assert_same_detections",
    "images",
    "lively",
    "resnet_ssd",
    "small_fcos",
    "small_rcnn",
    "small_retinanet",
    "small_ssd",
    "targets",
]

CLASSES = 4


def images(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Random images (3, H, W) of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *size, generator=generator) for size in sizes or ((60, 72), (64, 50))]


def targets(given: list[Tensor], kind: str = "faster") -> list[dict[str, Tensor]]:
    """Two boxes an image, with masks (2, H, W) or 17 keypoints a box where wanted."""
    boxes = torch.tensor([[1.0, 2.0, 48.0, 57.0], [10.0, 2.0, 30.0, 20.0]])
    found = []
    for image in given:
        target = {"boxes": boxes.clone(), "labels": torch.tensor([1, 2])}
        if kind == "mask":
            target["masks"] = torch.zeros(2, *image.shape[-2:], dtype=torch.uint8)
            target["masks"][:, 8:18, 12:28] = 1
        if kind == "keypoint":
            low, high = boxes[:, None, :2], boxes[:, None, 2:]
            inside = low + torch.linspace(0.1, 0.9, 17)[None, :, None] * (high - low)
            target["keypoints"] = torch.cat([inside, torch.ones(2, 17, 1)], dim=2)
            target["labels"] = torch.tensor([1, 1])
        found.append(target)
    return found


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights by which outputs vary with the image and each channel matters."""
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
                fan = module.weight[0].numel()
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(noise * math.sqrt(2.0 / fan))
        for name, module in model.named_modules():
            if name.endswith("bn3"):  # else what residual blocks add up to grows with each
                cast(Any, module).weight.mul_(0.1)
    return model


def _residual(norm: Any, block: Any = resnet.BasicBlock, width: int = 64) -> nn.Module:
    body = resnet.ResNet(block, [1, 1, 1, 1], norm_layer=norm, width_per_group=width)
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "layer1")))  # frozen, still cut
    return body


def _pyramid(out: int, extra: Any = None, norm: Any = FrozenBatchNorm2d) -> nn.Module:
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return BackboneWithFPN(
        _residual(norm), layers, [128, 256, 512], out, extra_blocks=extra or LastLevelMaxPool()
    )


def small_retinanet() -> nn.Module:
    """RetinaNet over a ResNet with one block a stage and frozen batch norms."""
    anchors = AnchorGenerator(tuple((2**i,) for i in range(3, 8)), ((0.5, 1.0),) * 5)
    return lively(
        RetinaNet(
            _pyramid(32, LastLevelP6P7(32, 32)), CLASSES, min_size=64, max_size=96,
            anchor_generator=anchors, score_thresh=0.0,
        )
    )  # fmt: skip


def small_fcos() -> nn.Module:
    """FCOS, whose heads have group norms."""
    anchors = AnchorGenerator(tuple((2**i,) for i in range(3, 7)), ((1.0,),) * 4)
    return lively(
        FCOS(
            _pyramid(64), CLASSES, min_size=64, max_size=96, anchor_generator=anchors,
            score_thresh=0.0,
        )
    )  # fmt: skip


def small_rcnn(kind: str = "faster", norm: Any = FrozenBatchNorm2d) -> nn.Module:
    """Faster, Mask or Keypoint R-CNN with few regions of interest."""
    anchors = AnchorGenerator(tuple((2**i,) for i in range(3, 7)), ((0.5, 1.0),) * 4)
    classes: dict[str, Any] = {"faster": FasterRCNN, "mask": MaskRCNN, "keypoint": KeypointRCNN}
    heads: dict[str, dict[str, Any]] = {
        "faster": {},
        "mask": {
            "mask_head": MaskRCNNHeads(32, (16, 16), 1),
            "mask_predictor": MaskRCNNPredictor(16, 8, CLASSES),
        },
        "keypoint": {
            "keypoint_head": KeypointRCNNHeads(32, (16, 16)),
            "keypoint_predictor": KeypointRCNNPredictor(16, 17),
        },
    }
    return lively(
        classes[kind](
            _pyramid(32, norm=norm), min_size=64, max_size=96, rpn_anchor_generator=anchors,
            box_head=TwoMLPHead(32 * 49, 64),
            box_predictor=FastRCNNPredictor(64, 2 if kind == "keypoint" else CLASSES),
            rpn_pre_nms_top_n_test=40, rpn_post_nms_top_n_test=20, box_score_thresh=0.0,
            box_detections_per_img=6, box_batch_size_per_image=16, **heads[kind],
        )
    )  # fmt: skip


class ResNetExtractor(nn.Module):
    """The SSD backbone of the paper: a ResNet up to layer 3, and further levels by convolutions.

    Args:
        body: a ResNet; its layer 3 keeps the stride of layer 2, as in the paper's SSD.
        widths: (hidden, out) of each further level.
    """

    def __init__(self, body: Any, widths: list[tuple[int, int]]) -> None:
        super().__init__()
        first = body.layer3[0]
        strided = first.conv2 if isinstance(first, resnet.Bottleneck) else first.conv1
        strided.stride = first.downsample[0].stride = (1, 1)
        self.stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
        self.stages = nn.Sequential(body.layer1, body.layer2, body.layer3)
        last = list(body.layer3.modules())
        channels = [m for m in last if isinstance(m, nn.BatchNorm2d)][-1].num_features
        self.out_channels = [channels]
        self.further = nn.ModuleList()
        for hidden, out in widths:
            self.further.append(
                nn.Sequential(
                    nn.Conv2d(self.out_channels[-1], hidden, 1, bias=False),
                    nn.BatchNorm2d(hidden),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(hidden, out, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(out),
                    nn.ReLU(inplace=True),
                )
            )
            self.out_channels.append(out)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = [self.stages(self.stem(x))]
        for layer in self.further:
            levels.append(layer(levels[-1]))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


def resnet_ssd(body: nn.Module, widths: list[tuple[int, int]], size: int) -> SSD:
    """SSD of `size` pixels over a ResNet."""
    backbone = ResNetExtractor(body, widths)
    anchors = DefaultBoxGenerator([[2]] + [[2, 3]] * len(widths), min_ratio=15, max_ratio=90)
    return SSD(backbone, anchors, (size, size), CLASSES)


def small_ssd() -> nn.Module:
    """SSD over a ResNet with one block a stage."""
    return lively(resnet_ssd(_residual(nn.BatchNorm2d), [(16, 32), (16, 24)], 64))


def assert_same_detections(
    model: nn.Module,
    pruned: nn.Module,
    given: list[Tensor],
    wanted: list[dict[str, Tensor]] | None = None,
    *,
    tolerance: float = 1e-8,
) -> None:
    """Boxes, labels, scores, and with targets losses, are those of the masked dense detector."""
    kept = halp_fx.plan_of(pruned).kept
    masked = masked_dense(model, kept).double().eval()
    small = copy.deepcopy(pruned).double().eval()
    doubled = [image.double() for image in given]
    with torch.no_grad():
        expected, actual = masked(doubled), small(doubled)
        dense = copy.deepcopy(model).double().eval()(doubled)
    assert sum(len(found["boxes"]) for found in expected) > 0, "nothing is detected"
    assert_close(actual, expected, tolerance=tolerance, where="detections")
    pairs = zip(flatten_outputs(dense).values(), flatten_outputs(expected).values(), strict=True)
    differs = any(a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4) for a, b in pairs)
    assert differs, "pruning changes nothing: the comparison would hold for any network"
    if wanted is not None:
        losses = [_losses(network, doubled, wanted) for network in (small, masked)]
        assert_close(losses[0], losses[1], tolerance=tolerance, where="losses")


def _losses(network: nn.Module, given: list[Tensor], wanted: list[dict[str, Tensor]]) -> Any:
    network.train()
    torch.manual_seed(0)
    exact = [{**target, "boxes": target["boxes"].double()} for target in wanted]
    return {name: value.detach() for name, value in network(given, exact).items()}
