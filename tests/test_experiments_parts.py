"""What the experiments are made of: measures of quality, data, training."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")
pytest.importorskip("PIL")

from halp_fx.errors import DependencyError, HalpError, InputError
from halp_fx.tools.experiments.detection import Detection
from halp_fx.tools.experiments.detection_data import load_boxed
from halp_fx.tools.experiments.metrics import mean_iou, mean_precision, require_coco
from halp_fx.tools.experiments.segmentation import Segmentation
from halp_fx.tools.experiments.segmentation_data import VOID, load_scenes
from halp_fx.tools.experiments.training import Recipe, read_weights, train
from tests.experiment_data import write_boxed, write_data

Target = dict[str, Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def boxed(*rows: tuple[float, float, float, float], label: int = 1, score: float = 0.9) -> Target:
    return {
        "boxes": torch.tensor(rows).reshape(-1, 4),
        "labels": torch.full((len(rows),), label),
        "scores": torch.full((len(rows),), score),
    }


BOX, OTHER = (0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 30.0, 34.0)


@pytest.mark.parametrize(
    ("found", "wanted", "at_half", "mean"),
    [
        (boxed(BOX), boxed(BOX), 1.0, 1.0),
        (boxed(BOX), boxed(OTHER), 0.0, 0.0),
        (boxed(BOX, label=2), boxed(BOX), 0.0, 0.0),
        (boxed(), boxed(BOX), 0.0, 0.0),
        # Overlap 0.62: right at 0.5, 0.55 and 0.6 of ten thresholds.
        (boxed((0.0, 0.0, 10.0, 6.2)), boxed(BOX), 1.0, 0.3),
        # One of two: precision 1 at 51 of 101 points of recall.
        (boxed(BOX), boxed(BOX, OTHER), 51 / 101, 51 / 101),
    ],
)
def test_mean_precision_by_hand(found: Target, wanted: Target, at_half: float, mean: float) -> None:
    pytest.importorskip("pycocotools")
    result = mean_precision([found], [wanted])
    assert result["mAP50"] == pytest.approx(at_half)
    assert result["mAP"] == pytest.approx(mean)


def test_mean_precision_agrees_with_torchmetrics() -> None:
    pytest.importorskip("pycocotools")
    metrics = pytest.importorskip("torchmetrics.detection")
    generator = torch.Generator().manual_seed(0)
    found, wanted = [], []
    for _ in range(6):
        low = 60 * torch.rand(3, 2, generator=generator)
        boxes = torch.cat([low, low + 8 + 20 * torch.rand(3, 2, generator=generator)], dim=1)
        labels = torch.randint(1, 4, (3,), generator=generator)
        wanted.append({"boxes": boxes, "labels": labels})
        moved = boxes + 3 * torch.randn(3, 4, generator=generator)
        scores = torch.rand(3, generator=generator)
        found.append({"boxes": moved, "labels": labels, "scores": scores})
    # Its own thresholds are rounded to float32, which moves a point of recall or two.
    recalls = np.linspace(0, 1, 101).tolist()
    metric = metrics.MeanAveragePrecision(backend="pycocotools", rec_thresholds=recalls)
    metric.update(found, wanted)
    expected, result = metric.compute(), mean_precision(found, wanted)
    assert 0 < result["mAP"] < result["mAP50"] < 1
    assert result["mAP50"] == pytest.approx(float(expected["map_50"]), abs=1e-6)
    assert result["mAP"] == pytest.approx(float(expected["map"]), abs=1e-6)


def test_mean_precision_refuses_what_it_can_not_judge() -> None:
    with pytest.raises(InputError, match="detections of 1 images and 2 targets"):
        mean_precision([boxed(BOX)], [boxed(BOX)] * 2)
    with pytest.raises(InputError, match="no image has a true box"):
        mean_precision([boxed(BOX)], [boxed()])


def test_missing_pycocotools_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(DependencyError, match="run pip install pycocotools"):
        require_coco()


def test_mean_iou_by_hand() -> None:
    true = torch.tensor([[0, 0, 1, 1], [0, 0, 3, 3]])  # 3: void, of three classes
    predicted = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 2]])
    result = mean_iou([(predicted, true)], 3)
    # Class 0: 3 of 5; class 1: 1 of 3; class 2 occurs only where there is void.
    assert result["mIoU"] == pytest.approx((3 / 5 + 1 / 3) / 2)
    assert result["pixels"] == pytest.approx(4 / 6)
    with pytest.raises(InputError, match="no pixel has a class"):
        mean_iou([(predicted, torch.full_like(true, 3))], 3)


def test_boxes_follow_the_pixels(data: Path) -> None:
    boxes = load_boxed(data / "detection" / "train.npz", 80)
    changed = 0
    for seed in range(30):
        index = seed % len(boxes)
        pixels, target = boxes.augmented(index, (seed, 0))
        assert pixels.shape == (3, 80, 80)
        assert 0 <= pixels.min() <= pixels.max() <= 1
        bright = pixels.mean(0) > (pixels.min() + pixels.max()) / 2
        rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
        edges = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        (box,) = target["boxes"].tolist()
        assert box == pytest.approx(edges, abs=1.5)
        assert int(target["labels"]) == int(boxes.labels[index][0])
        changed += box != pytest.approx(boxes.plain(index)[1]["boxes"][0].tolist(), abs=1)
        again, _ = boxes.augmented(index, (seed, 0))
        assert torch.equal(pixels, again)
    assert changed > 15


def test_labels_count_from_one_and_images_are_spread(data: Path) -> None:
    path = data / "detection" / "train.npz"
    everything, some = load_boxed(path, 48), load_boxed(path, 48, limit=3)
    assert len(everything) == 8
    assert len(some) == 3
    assert {int(label[0]) for label in everything.labels} == {1, 2, 3}
    assert torch.equal(some.plain(2)[0], everything.plain(7)[0])


def test_label_maps_follow_the_pixels(data: Path) -> None:
    scenes = load_scenes(data / "camvid", "train")
    for seed in range(20):
        pixels, labels = scenes.augmented(seed % len(scenes), (seed, 0))
        assert pixels.shape == (3, 48, 64)
        assert labels.shape == (48, 64)
        shades = [pixels.mean(0)[labels == c].mean() for c in (0, 5, VOID) if (labels == c).any()]
        assert shades == sorted(shades)
        for label, other in ((0, VOID), (VOID, 0)):
            if (labels == label).any() and (labels == other).any():
                same = pixels.mean(0)[labels == label]
                away = pixels.mean(0)[labels == other].mean()
                near = (same - same.mean()).abs() < (same - away).abs()
                assert near.float().mean() > 0.9


def test_data_that_are_missing_are_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HALP_FX_DATA", raising=False)
    with pytest.raises(InputError, match="no data: pass --data DIR, or set HALP_FX_DATA"):
        Detection()
    with pytest.raises(InputError, match="has no folder 'camvid'"):
        Segmentation(tmp_path)
    (tmp_path / "detection").mkdir()
    with pytest.raises(InputError, match=r"there is no file train\.npz"):
        Detection(tmp_path)
    np.savez(tmp_path / "detection" / "train.npz", blob=np.zeros(1))
    with pytest.raises(InputError, match="has no array off, boxes"):
        Detection(tmp_path)
    with pytest.raises(InputError, match="no network 'unet': pass deeplab or lraspp"):
        Segmentation(data, network="unet")


def test_data_folder_may_be_a_variable(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALP_FX_DATA", str(data))
    assert Detection(size=64).facts() == {"size": 64, "batch": 8, "train_images": 8}


class KilledError(Exception):
    """Stands for a process that is killed."""


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(16, 1)
    )


class Noise:
    """Two minibatches; `stop` breaks off in the second."""

    def __init__(self, epoch: int, stop: bool = False) -> None:
        self.epoch, self.stop = epoch, stop

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.epoch)
        for i in range(2):
            if self.stop and i == 1:
                raise KilledError
            yield torch.randn(4, 1, 4, 4, generator=generator)


def square(network: nn.Module, batch: Tensor) -> Tensor:
    return ((network(batch) - batch.mean((1, 2, 3))[:, None]) ** 2).mean()


def test_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    recipe, path = Recipe(4, 1e-2), tmp_path / "net.safetensors"
    whole, parts = small_net(), small_net()
    before = torch.random.get_rng_state()
    train(whole, recipe, Noise, square)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(KilledError):
        train(parts, recipe, lambda e: Noise(e, stop=e == 2), square, checkpoint=path)
    parts = small_net()
    seen: list[tuple[int, int]] = []
    train(parts, recipe, Noise, square, checkpoint=path, tick=lambda *at: seen.append(at))
    assert seen[0] == (4, 8)
    assert seen[-1] == (8, 8)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert not torch.equal(whole.state_dict()["0.weight"], small_net().state_dict()["0.weight"])
    again = small_net()
    assert read_weights(path, again) == 4
    assert torch.equal(again.state_dict()["4.weight"], whole.state_dict()["4.weight"])
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_training_lowers_the_loss() -> None:
    network, batch = small_net().eval(), next(iter(Noise(0)))
    before = float(square(network, batch).detach())
    train(network, Recipe(40, 1e-2), lambda _: Noise(0), square)
    assert float(square(network, batch).detach()) < 0.5 * before
    assert not network.training


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    train(small_net(), Recipe(1, 1e-2), Noise, square, checkpoint=path, settings={"size": 4})
    with pytest.raises(InputError, match=r"was trained with epochs 1, now 2: give these again"):
        train(small_net(), Recipe(2, 1e-2), Noise, square, checkpoint=path, settings={"size": 4})
    with pytest.raises(InputError, match="weights of another network than this Linear"):
        read_weights(path, nn.Linear(2, 2))
    path.write_bytes(b"torn")
    with pytest.raises(InputError, match="Remove it to begin again"):
        train(small_net(), Recipe(1, 1e-2), Noise, square, checkpoint=path)


def test_wrong_recipes_and_losses_are_told() -> None:
    with pytest.raises(InputError, match=r"learning rate is 0\.0: pass a number above 0"):
        Recipe(1, 0.0)
    with pytest.raises(InputError, match="epochs is -1"):
        Recipe(-1, 0.1)
    with pytest.raises(HalpError, match="the loss is nan in epoch 1: pass a lower learning rate"):
        train(small_net(), Recipe(1, 0.1), Noise, lambda n, b: n(b).mean() * float("nan"))


def test_the_detector_learns(tmp_path: Path) -> None:
    """Boxes, labels, losses and precision fit together: what is wrong in one of them shows here."""
    pytest.importorskip("pycocotools")
    (tmp_path / "detection").mkdir()
    write_boxed(tmp_path / "detection" / "train.npz", 24, 0)
    write_boxed(tmp_path / "detection" / "test.npz", 12, 1)
    task = Detection(tmp_path, size=64, batch=8)
    network = task.network()
    assert task.evaluate(network, lambda done, total: None)["mAP50"] < 0.05
    train(network, Recipe(15, 3e-3), lambda number: task.epoch(0, number), task.loss)
    assert task.evaluate(network, lambda done, total: None)["mAP50"] > 0.15
