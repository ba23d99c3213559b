"""How good detections and segmentations are."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halp_fx.errors import InputError
from halp_fx.tools.experiments.data import library

__all__ = ["mean_iou", "mean_precision", "require_coco"]

_COCO = "pycocotools"


def mean_precision(
    found: Sequence[Mapping[str, Tensor]], wanted: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Mean average precision of detections, by COCO's own evaluation.

    Args:
        found: for each image `boxes` (n, 4) as x0, y0, x1, y1, `scores` (n,) and `labels` (n,).
        wanted: for each image the true `boxes` and `labels`.

    Returns:
        "mAP50", at an overlap of 0.5, and "mAP", the mean over overlaps of 0.5 to 0.95; from 0 to
        1. Classes that are in no image don't count.

    Raises:
        InputError: the lengths differ, or there is no true box.
        DependencyError: pycocotools is not installed.

    Example:
        >>> box, one = torch.tensor([[0., 0., 8., 8.]]), torch.tensor([1])
        >>> mean_precision([{"boxes": box, "scores": torch.tensor([0.9]), "labels": one}],
        ...                [{"boxes": box, "labels": one}])
        {'mAP50': 1.0, 'mAP': 1.0}
    """
    if len(found) != len(wanted):
        raise InputError(f"there are detections of {len(found)} images and {len(wanted)} targets")
    truths = [row for i, target in enumerate(wanted) for row in _truths(i, target)]
    if not truths:
        raise InputError("no image has a true box: precision is not defined")
    rows = [_rows(i, one) for i, one in enumerate(found) if len(one["boxes"])]
    if not rows:
        return {"mAP50": 0.0, "mAP": 0.0}
    coco = library(f"{_COCO}.coco", _COCO).COCO
    evaluation = library(f"{_COCO}.cocoeval", _COCO).COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its steps
        known = coco()
        known.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(len(wanted))],
            "categories": [{"id": c} for c in sorted({t["category_id"] for t in truths})],
            "annotations": [{"id": i + 1, **truth} for i, truth in enumerate(truths)],
        }
        known.createIndex()
        run = evaluation(known, known.loadRes(np.concatenate(rows)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {"mAP50": float(run.stats[1]), "mAP": float(run.stats[0])}


def require_coco() -> None:
    """Tells that pycocotools is missing before anything is trained.

    Raises:
        DependencyError: it is not installed.
    """
    library(f"{_COCO}.coco", _COCO)


def mean_iou(pairs: Iterable[tuple[Tensor, Tensor]], classes: int) -> dict[str, float]:
    """Mean over classes of intersection over union, and the share of pixels that are right.

    Args:
        pairs: predicted and true labels, of one shape. True labels that are no class are void.
        classes: how many there are. Those that occur in neither don't count.

    Raises:
        InputError: there is no pixel with a class.
    """
    counts = torch.zeros(classes, classes, dtype=torch.int64)  # (true, predicted)
    for predicted, true in pairs:
        counted = (true >= 0) & (true < classes)
        joint = true[counted] * classes + predicted[counted]
        counts += torch.bincount(joint.flatten(), minlength=classes**2).view(classes, classes)
    if counts.sum() == 0:
        raise InputError("no pixel has a class: there is nothing to compare with")
    right = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    shares = (right / union)[union > 0]
    return {"mIoU": float(shares.mean()), "pixels": float(right.sum() / counts.sum())}


def _truths(image: int, target: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
        corner = _corner(box)
        rows.append(
            {
                "image_id": image + 1,
                "category_id": int(label),
                "bbox": corner,
                "area": corner[2] * corner[3],
                "iscrowd": 0,
            }
        )
    return rows


def _rows(image: int, found: Mapping[str, Tensor]) -> Any:
    """(n, 7): image, x, y, width, height, score, label, as pycocotools takes them."""
    boxes = [_corner(box) for box in found["boxes"].tolist()]
    numbers = np.array(boxes, dtype=np.float64)
    ids = np.full((len(boxes), 1), image + 1.0)
    scores = found["scores"].double().cpu().numpy()[:, None]
    labels = found["labels"].double().cpu().numpy()[:, None]
    return np.concatenate([ids, numbers, scores, labels], axis=1)


def _corner(box: Sequence[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
