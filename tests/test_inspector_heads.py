"""Detectors to try things on, and how the inspector shows their heads."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")

from rich.console import Console

from halp_fx.errors import InputError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.trace import trace
from halp_fx.tools import detectors, inspector, inspector_heads
from halp_fx.types import Pin

KINDS = ("regression", "classification")


def test_tensor_part_is_what_the_detector_computes() -> None:
    detector: Any = detectors.small_ssd(classes=3, size=64).eval()
    part = detectors.TensorPart(detector)
    seen: list[Any] = []
    hook = detector.head.register_forward_hook(lambda _m, _i, output: seen.append(output))
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        detector([image])
        hook.remove()
        batch = detector.transform([image])[0].tensors
        for name, value in part(batch).items():
            assert torch.equal(value, seen[0][name])
    assert set(part.state_dict()) == set(detector.state_dict())


def test_tensor_part_of_something_else_is_refused() -> None:
    with pytest.raises(InputError, match=r"Linear has no backbone and no head: pass a one-stage"):
        detectors.TensorPart(nn.Linear(2, 2))


def test_small_ssd_has_the_size_that_it_says() -> None:
    part, image = detectors.small_ssd_tensors()
    assert sum(p.numel() for p in part.parameters()) == pytest.approx(1.6e6, rel=0.05)
    assert image.shape == (1, 3, 160, 160)
    levels: Any = part.backbone(image)
    assert [level.shape[2] for level in levels.values()] == [20, 10, 5, 3, 2]


@pytest.mark.parametrize(
    ("make", "anchors", "classes"),  # as the paper of SSD counts them, for COCO and for VOC
    [(detectors.ssd300_tensors, 8732, 91), (detectors.ssd512_tensors, 24564, 21)],
)
def test_ssds_have_the_anchors_of_the_paper(make: Any, anchors: int, classes: int) -> None:
    with torch.device("meta"):
        part, image = make()
        output = part.eval()(image)
    assert output["cls_logits"].shape == (1, anchors, classes)
    assert output["bbox_regression"].shape == (1, anchors, 4)


def printed(*parts: Any) -> str:
    console = Console(width=250, file=io.StringIO(), highlight=False)
    for part in parts:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row_of(text: str, start: str) -> str:
    """The cells of the row whose first cell starts so, lines of a cell joined."""
    lines = iter(text.splitlines())
    found = next(line for line in lines if line.startswith(f"│ {start}"))
    cells = [cell.strip() for cell in found.strip("│").split("│")]
    for line in lines:
        more = [cell.strip() for cell in line.strip("│").split("│")]
        if len(more) != len(cells) or more[0]:
            break
        cells = [f"{cell} {rest}".strip() for cell, rest in zip(cells, more, strict=True)]
    return " | ".join(cells)


@pytest.fixture(scope="module")
def ssd300() -> Any:
    return find_groups(trace(*detectors.ssd300_tensors()))


def test_groups_name_the_heads_that_read_them(ssd300: Any) -> None:
    text = printed(inspector.groups_table(ssd300))
    level = row_of(text, "backbone.extra.0.7.3")
    readers = level.split(" | ")[3]
    assert readers.split(", ") == [
        "backbone.extra.1.0",
        "head.regression_head.module_list.1",
        "head.classification_head.module_list.1",
    ]
    last = row_of(text, "backbone.extra.4.2").split(" | ")[3]
    assert last.split(", ") == [f"head.{kind}_head.module_list.5" for kind in KINDS]


def test_pins_say_what_fixes_the_outputs(ssd300: Any) -> None:
    text = printed(inspector.pins_table(ssd300))
    classes = row_of(text, "output cls_logits")
    assert "anchors x classes fix their number (4 x 91, 6 x 91)" in classes
    boxes = row_of(text, "output bbox_regression")
    assert "anchors x coordinates of a box fix their number (4 x 4, 6 x 4)" in boxes
    assert "module_list.0-5.weight[0] (16, 24, 24, 24, 16, 16) and bias" in boxes
    first = row_of(text, "head_classification_head_module_list_0")
    assert "node normalize holds them, linalg_vector_norm reads all channels" in first
    assert "they are those of the input images" in row_of(text, "backbone_features_0")


def test_why_tells_of_outputs_and_of_what_holds_channels(ssd300: Any) -> None:
    text = printed(*inspector.explain(ssd300, "head.classification_head.module_list.0"))
    assert "pinned by node output cls_logits: output of the network: anchors x classes" in text
    assert "(4 x 91)" in text
    assert "node normalize holds them" in text


class Joined(nn.Module):
    """Two branches, concatenated, read by one layer; outputs in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 24, 1)
        self.up = nn.ConvTranspose2d(32, 16, 2)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(torch.cat([self.left(x), self.right(x)], dim=1))
        return self.last(y), x


def test_readers_after_a_concatenation_say_of_how_many() -> None:
    groups = find_groups(trace(Joined(), torch.rand(2, 3, 8, 8)))
    text = printed(inspector.groups_table(groups))
    assert "up (8 of 32)" in row_of(text, "left")
    assert "up (24 of 32)" in row_of(text, "right")
    made = row_of(text, "up").split(" | ")
    assert "up.weight[1]" in made[2]  # a transposed convolution makes its second dim
    assert made[3] == "last"
    pins = row_of(printed(inspector.pins_table(groups)), "output 0")
    assert "output of the network | last.weight[0] (5) and bias" in pins


def test_numbered_modules_are_one_entry() -> None:
    def pin(name: str, count: int, dim: int = 0) -> Pin:
        return Pin(name, dim, np.arange(count), "output", "", "")

    given = [
        pin("head.0.1.weight", 24), pin("head.0.1.bias", 24),
        pin("head.1.1.weight", 36), pin("head.1.1.bias", 36),
        pin("head.1.2.weight", 36),  # without a bias
        pin("last.bias", 4), pin("last.weight", 3),
    ]  # fmt: skip
    assert inspector_heads.places_of(given) == [
        "head.0-1.1.weight[0] (24, 36) and bias",
        "head.1.2.weight[0] (36)",
        "last.bias[0] (4)",
        "last.weight[0] (3)",
    ]
    counted = [pin(f"a.{i}.weight", 7, dim=1) for i in (1, 2, 3, 5)]
    assert inspector_heads.places_of(counted) == ["a.1-3.weight[1] (7)", "a.5.weight[1] (7)"]
