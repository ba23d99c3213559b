"""Detectors of torchvision: backbone and heads are pruned as one network, the rest stays."""

from __future__ import annotations

from halp_fx.detection.images import example_images
from halp_fx.detection.kinds import has_regions, is_detector
from halp_fx.detection.prune import detector_core, detector_parts, prune_detector

__all__ = [
    "detector_core",
    "detector_parts",
    "example_images",
    "has_regions",
    "is_detector",
    "prune_detector",
]
