"""The detectors of torchvision: which of their submodules are the core, and how these are joined.

A detector is known by the class in torchvision that it derives from; torchvision itself is not
imported. What reads the features between the parts has to be torchvision's own code: it takes the
sizes of feature maps for anchors, and pools regions channel by channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from halp_fx.cores import Call, Flow
from halp_fx.errors import InputError

__all__ = ["channels_of", "core_flow", "core_names", "is_detector"]

_PACKAGE = "torchvision.models.detection"
_TWO_STAGES = "generalized_rcnn.GeneralizedRCNN"
_KINDS = ("ssd.SSD", "retinanet.RetinaNet", "fcos.FCOS", _TWO_STAGES)
_BRANCHES = ("box", "mask", "keypoint")


def is_detector(model: Any) -> bool:
    """Whether this is a detector of torchvision, or of a class derived from one."""
    return isinstance(model, nn.Module) and _kind(model) is not None


def has_regions(model: nn.Module) -> bool:
    """Whether a detector pools regions of interest between its parts, as all R-CNN do."""
    return _kind(model) == _TWO_STAGES


def core_names(model: nn.Module) -> list[str]:
    """The submodules of a detector that are pruned, in the order in which they run.

    Raises:
        InputError: the detector has a `forward` of its own in a place where it could read features.
    """
    kind = _kind(model)
    assert kind is not None
    _check_forward(model, "", kind)
    if kind != _TWO_STAGES:
        return ["backbone", "head"]
    _check_forward(model, "rpn", "rpn.RegionProposalNetwork")
    _check_forward(model, "roi_heads", "roi_heads.RoIHeads")
    names = ["backbone", "rpn.head"]
    for branch in _present(model):
        path = f"roi_heads.{branch}_roi_pool"
        pool = model.get_submodule(path)
        if "torchvision.ops.poolers.MultiScaleRoIAlign" not in _classes(pool):
            raise InputError(
                f"{path} is a {type(pool).__name__}: only torchvision's MultiScaleRoIAlign is "
                f"known to pool channel by channel. {_OTHERWISE}"
            )
        names += [f"roi_heads.{branch}_head", f"roi_heads.{branch}_predictor"]
    return names


def core_flow(model: nn.Module, calls: Mapping[str, Call], rows: Mapping[str, int]) -> Flow:
    """How tensors go from part to part.

    Args:
        calls: how the detector calls its parts.
        rows: part -> regions of interest that it is priced for.
    """
    if _kind(model) != _TWO_STAGES:
        return _one_stage
    branches = []
    for branch in _present(model):
        pool: Any = model.get_submodule(f"roi_heads.{branch}_roi_pool")
        count = rows[f"roi_heads.{branch}_head"]
        branches.append((branch, tuple(pool.featmap_names), tuple(pool.output_size), count))
    return _two_stages(branches)


_OTHERWISE = "Name the submodules to prune in halp_fx.compile_core instead"


def _one_stage(run: Callable[..., Any], images: Any) -> Any:
    return run("head", list(_levels(run("backbone", images)).values()))


def _two_stages(branches: list[tuple[str, tuple[str, ...], tuple[int, int], int]]) -> Flow:
    def flow(run: Callable[..., Any], images: Any) -> Any:
        features = _levels(run("backbone", images))
        results = [run("rpn.head", list(features.values()))]
        for branch, levels, size, rows in branches:
            pooled = _pooled([features[k] for k in levels if k in features], size, rows)
            hidden = run(f"roi_heads.{branch}_head", pooled)
            results.append(run(f"roi_heads.{branch}_predictor", hidden))
        return results

    return flow


def _levels(features: Any) -> dict[str, Any]:
    return features if isinstance(features, dict) else {"0": features}


def _pooled(features: list[Any], size: tuple[int, int], rows: int) -> Any:
    """Stands for RoIAlign while pruning: it too keeps channels apart, the same in all levels."""
    pooled = sum(F.interpolate(feature, size=size) for feature in features)
    return pooled[:1].expand(rows, -1, -1, -1)  # type: ignore[index]


def _present(model: nn.Module) -> list[str]:
    heads: Any = model.get_submodule("roi_heads")
    return [b for b in _BRANCHES if getattr(heads, f"{b}_roi_pool", None) is not None]


def _kind(model: nn.Module) -> str | None:
    classes = _classes(model)
    return next((kind for kind in _KINDS if f"{_PACKAGE}.{kind}" in classes), None)


def _classes(module: nn.Module) -> set[str]:
    return {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}


def _check_forward(model: nn.Module, path: str, kind: str) -> None:
    """Its `forward` is that of torchvision: another one might read the features' channels."""
    part = model.get_submodule(path)
    file, _, name = kind.partition(".")
    forward = type(part).forward
    if (forward.__module__, forward.__qualname__) == (f"{_PACKAGE}.{file}", f"{name}.forward"):
        return
    where = f"the {path} of this {type(model).__name__}" if path else type(part).__name__
    raise InputError(
        f"{where} has a forward of its own ({forward.__module__}.{forward.__qualname__}), which "
        f"may read features in a way that torchvision's {name} does not. {_OTHERWISE}"
    )


def channels_of(output: Any) -> int | list[int]:
    """Channels of features: one number, or one a level where they differ."""
    widths = [t.shape[1] for t in _levels(output).values() if isinstance(t, torch.Tensor)]
    return widths[0] if len(set(widths)) == 1 else widths
