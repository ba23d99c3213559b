"""A detector of torchvision in, the same detector with a smaller core out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from halp_fx.cores import Call, Compile, Flow, assemble, capture, prune_parts, with_outside
from halp_fx.detection.images import Batches, example_images, for_losses, sum_of_losses
from halp_fx.detection.kinds import channels_of, core_flow, core_names, has_regions
from halp_fx.errors import InputError
from halp_fx.passes.rules.core import OnMeta
from halp_fx.passes.rules.structure import empty_like, named_tensors, substitute_copy, without_data

__all__ = ["detector_core", "detector_parts", "prune_detector"]


def prune_detector(
    compile: Compile,
    model: nn.Module,
    budget: Any,
    example_inputs: Any = None,
    *,
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    latency: Any = None,
    **options: Any,
) -> nn.Module:
    """Prune a detector: what `halp_fx.compile` does with one.

    Args:
        compile: `halp_fx.compile` for the core, which is a network that can be traced.
        budget: of the core: what transforms images, makes anchors and suppresses boxes is not in.
        example_inputs: a list of images (3, H, W), or a tensor (N, 3, H, W). None: one image of
            the size that the detector expects.
        data: minibatches `(images, targets)`, as the detector takes them in training.
        loss: `loss(losses, targets)` of the detector's dict of losses; None: their sum.
        options: further options of `halp_fx.compile`, save `candidates` and `steps`.

    Returns:
        The same detector with smaller layers; names in its `state_dict()` are as they were.
    """
    images = example_images(model, example_inputs)
    names = core_names(model)
    calls, flow, batched = _calls(model, names, images)
    if options.get("reconstruct") and has_regions(model):
        raise InputError(
            f"reconstruct=True is not known for a {type(model).__name__}, whose heads read pooled "
            "regions: leave it out, and fine-tune"
        )
    if options.get("reconstruct") and isinstance(data, Iterator):
        raise InputError(
            "reconstruct=True reads the data again, and an iterator is used up after one look: "
            "pass a list of minibatches or a loader"
        )
    if data is not None:
        data, loss = Batches(data, batched[0].device), sum_of_losses(loss)
    pruned = prune_parts(
        compile, model, calls, flow, budget, tuple(batched),
        read=["backbone"], scored=for_losses(model), data=data, loss=loss, latency=latency,
        **options,
    )  # fmt: skip
    _correct_width(pruned.get_submodule("backbone"), batched)
    with_outside(pruned, names, (images,), latency, before="transform")
    return pruned


def detector_core(
    model: nn.Module, example_inputs: Any = None
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """What is pruned of a detector as one network that can be traced, and its inputs.

    Args:
        example_inputs: as for `halp_fx.compile`.

    Returns:
        The network, which shares the detector's tensors under the same names; and the tensor of
        images (N, 3, H, W), normalised and of one size, for the example.
    """
    images = example_images(model, example_inputs)
    calls, flow, batched = _calls(model, core_names(model), images)
    return assemble(model, calls, flow, len(batched)), tuple(batched)


def _calls(
    model: nn.Module, names: list[str], images: list[torch.Tensor]
) -> tuple[dict[str, Call], Flow, list[torch.Tensor]]:
    """How the parts of a detector are called, how they are joined, and the tensors of images."""
    calls, tensors = capture(model, names, (images,))
    heads: Any = getattr(model, "roi_heads", None)
    # Where nothing is found in the example, as by random weights, the most that may be found.
    most = len(images) * int(getattr(heads, "detections_per_img", 1))
    rows = {name: given[0].shape[0] or most for name, given in tensors.items()}
    return calls, core_flow(model, calls, rows), list(tensors["backbone"])


def detector_parts(
    model: nn.Module, example_inputs: Any = None
) -> tuple[tuple[Any, ...], list[str]]:
    """Positional arguments of a detector for an example, and the submodules that are pruned."""
    return (example_images(model, example_inputs),), core_names(model)


def _correct_width(backbone: Any, batched: list[torch.Tensor]) -> None:
    """`backbone.out_channels`, which code around detectors reads, says what there is now."""
    if not hasattr(backbone, "out_channels"):
        return
    empty = substitute_copy(backbone, {id(t): empty_like(t) for _, t in named_tensors(backbone)})
    with torch.no_grad(), OnMeta():
        widths = channels_of(empty(*without_data(batched)))
    several = isinstance(backbone.out_channels, (list, tuple))
    backbone.out_channels = [widths] if several and isinstance(widths, int) else widths
