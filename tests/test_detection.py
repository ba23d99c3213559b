"""Detectors of torchvision: the pruned one detects what the masked dense one detects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")

from torchvision.models import detection
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.ssd import SSD

import halp_fx
from halp_fx.core import core_of, restore_core
from halp_fx.detection import is_detector, prune_detector
from halp_fx.detection.images import Batches, for_losses, sum_of_losses
from halp_fx.errors import InputError, SaliencyError
from halp_fx.latency import Source, Torch
from halp_fx.report import render_markdown
from halp_fx.tools.detectors import ssd512_resnet50
from tests.detectors import (
    assert_same_detections,
    images,
    lively,
    small_fcos,
    small_rcnn,
    small_retinanet,
    small_ssd,
    targets,
)
from tests.oracle import check_state, snapshot

SMALL: dict[str, Callable[[], nn.Module]] = {
    "ssd": small_ssd,
    "retinanet": small_retinanet,
    "fcos": small_fcos,
    "faster": small_rcnn,
    "faster_batch_norm": partial(small_rcnn, norm=nn.BatchNorm2d),
    "mask": partial(small_rcnn, "mask"),
    "keypoint": partial(small_rcnn, "keypoint"),
}


def prune(model: nn.Module, budget: Any = 0.5, given: Any = None, **options: Any) -> Any:
    """The detector pruned with the analytic latency."""
    options.setdefault("latency", "analytic")
    example = images() if given is None else given
    return prune_detector(halp_fx.compile, model, budget, example, **options)


@pytest.fixture(scope="module")
def ssd() -> tuple[nn.Module, nn.Module]:
    """A dense SSD and what is left of it at half the latency."""
    dense = small_ssd().eval()
    return dense, prune(dense)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ("fcos", "keypoint") else ()) for n in SMALL],
)
def test_detects_what_the_masked_dense_detector_detects(name: str) -> None:
    model = SMALL[name]()
    # Group norms of FCOS take statistics over channels: exact only where those stay.
    pruned = prune(model, exact=name == "fcos")
    plan = halp_fx.plan_of(pruned)
    assert plan.predicted_ms <= plan.budget_ms < plan.dense_ms
    check_state(model, pruned, plan.kept)
    # What dropped branches leave behind has the precision of the network.
    dropped = any("_constants" in key for key in pruned.state_dict())
    tolerance = 1e-6 if dropped else 1e-8
    given = images()
    assert_same_detections(model, pruned, given, targets(given, name), tolerance=tolerance)
    others = images((80, 60), seed=1)  # another number of images, of another size
    assert_same_detections(model, pruned, others, tolerance=tolerance)


def test_channels_of_the_pyramid_go_through_region_pooling() -> None:
    model = small_rcnn()
    pruned = prune(model, 0.975, include="backbone.fpn")
    kept = halp_fx.plan_of(pruned).kept
    rows = kept["backbone.fpn.layer_blocks.0.0.weight"][0]
    assert rows is not None
    assert pruned.backbone.out_channels == len(rows) < 32
    columns = kept["roi_heads.box_head.fc6.weight"][1]
    assert columns is not None
    assert len(columns) == 49 * len(rows)
    assert_same_detections(model, pruned, images())


def test_group_norms_may_lose_channels() -> None:
    model = small_fcos()
    pruned = prune(model)
    kept = halp_fx.plan_of(pruned).kept
    assert kept["head.classification_head.conv.1.weight"][0] is not None
    given = images((80, 60))
    found = pruned.eval()(given)
    assert len(found[0]["boxes"]) > 0
    losses = pruned.train()(given, targets(given))
    assert all(bool(value.isfinite()) for value in losses.values())


def test_is_the_same_detector_and_leaves_the_callers_alone() -> None:
    model = small_ssd()
    model.backbone.eval()
    with snapshot(model):
        features = ["backbone.stages.2.0.conv2", "backbone.stages.2.0.downsample"]
        pruned = prune(model, 0.97, include=features)
    assert type(pruned) is SSD
    assert is_detector(pruned)
    assert isinstance(pruned.head, type(model.head))
    assert list(pruned.state_dict()) == list(model.state_dict())
    assert pruned.backbone.out_channels[0] < model.backbone.out_channels[0]
    assert {n: m.training for n, m in pruned.named_modules()} == {
        n: m.training for n, m in model.named_modules()
    }
    shared = {t.data_ptr() for t in model.parameters()} & {
        t.data_ptr() for t in pruned.parameters()
    }
    assert not shared, "pruned and dense detector share tensors"


def test_trains(ssd: tuple[nn.Module, nn.Module]) -> None:
    pruned = copy.deepcopy(ssd[1]).train()
    given = images()
    optimizer = torch.optim.SGD([p for p in pruned.parameters() if p.requires_grad], lr=1e-4)
    history = []
    for _ in range(4):
        losses = pruned(given, targets(given))
        assert set(losses) == {"bbox_regression", "classification"}
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < history[0]
    for name, parameter in pruned.named_parameters():
        if name.startswith("head.regression_head.module_list.2."):
            continue  # no anchor of the last level is near a box
        has = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert has == parameter.requires_grad, name
    assert not pruned.get_parameter("backbone.stem.0.weight").requires_grad  # frozen, and stays so


def test_core_is_one_graph_that_shares_the_weights(ssd: tuple[nn.Module, nn.Module]) -> None:
    pruned = copy.deepcopy(ssd[1]).double()
    core = core_of(pruned)
    assert isinstance(core, torch.fx.GraphModule)
    name = "head.classification_head.module_list.0.weight"
    assert core.get_parameter(name) is pruned.get_parameter(name)
    batch = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = pruned.head(list(pruned.backbone(batch).values()))
        assert torch.equal(core(batch)["cls_logits"], expected["cls_logits"])
        pruned.get_parameter(name).zero_()
        assert not torch.equal(core(batch)["cls_logits"], expected["cls_logits"])
    assert halp_fx.plan_of(core) is halp_fx.plan_of(pruned)
    with pytest.raises(InputError, match="SSD has no pruned core"):
        core_of(ssd[0])


def test_core_is_saved_and_put_back(ssd: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    dense, pruned = ssd
    path = tmp_path / "ssd.halp"
    halp_fx.save(core_of(pruned), path)
    again = restore_core(dense, halp_fx.load(path), images())
    for (name, one), (other, two) in zip(
        pruned.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(one, two), name
    assert_same_detections(dense, again, images(), targets(images()))
    with pytest.raises(InputError, match=r"the graph has no part|has no attribute|no part"):
        restore_core(small_rcnn(), halp_fx.load(path), images())


def test_prunes_again(ssd: tuple[nn.Module, nn.Module]) -> None:
    pruned = ssd[1]
    smaller: Any = prune(pruned, 0.7)
    assert type(smaller.head).__name__ == "PrunedSSDHead"
    assert_same_detections(pruned, smaller, images(), targets(images()))


def test_excluded_parts_stay_whole(ssd: tuple[nn.Module, nn.Module]) -> None:
    name = "backbone.stages.2.0.conv1.weight"
    assert halp_fx.plan_of(ssd[1]).kept[name][0] is not None
    kept = halp_fx.plan_of(prune(ssd[0], 0.9, exclude="backbone.stages.2")).kept
    assert kept[name][0] is None


def test_scores_by_the_losses_of_the_detector(ssd: tuple[nn.Module, nn.Module]) -> None:
    model = ssd[0]
    given, wanted = images(), targets(images())
    seen: list[Any] = []

    def scores_of(groups: Any) -> Any:
        seen.append(groups)
        return [torch.ones(g.units) for g in groups.groups]

    prune(model, saliency=scores_of)
    groups = seen[0]
    from halp_fx.cores import scores_of_whole

    data = Batches([(given, wanted)], torch.device("cpu"))
    with torch.random.fork_rng():
        scores = scores_of_whole(for_losses(model), data, sum_of_losses(None), "taylor")(groups)

    truth = copy.deepcopy(model).train()
    for module in truth.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    parameters = dict(truth.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    sum(truth(given, wanted).values()).backward()
    norm = "backbone.further.0.1"  # nothing else is coupled with these channels
    index = next(i for i, g in enumerate(groups.groups) if norm + ".weight" in _names(g))
    assert {n.rpartition(".")[0] for n in _names(groups.groups[index], 0)} == {
        "backbone.further.0.0",
        norm,
    }
    expected = torch.zeros(groups.groups[index].units)
    for leaf in ("weight", "bias"):
        parameter = parameters[f"{norm}.{leaf}"]
        expected += (parameter * parameter.grad).detach()
    order = next(m.index[:, 0] for m in groups.groups[index].members if m.name == norm + ".weight")
    assert torch.allclose(torch.tensor(scores[index]).float(), expected[order].abs(), rtol=1e-3)


def _names(group: Any, dim: int | None = None) -> set[str]:
    return {m.name for m in group.members if dim is None or m.dim == dim}


def test_data_makes_the_saliency(ssd: tuple[nn.Module, nn.Module]) -> None:
    model = ssd[0]
    given = images()
    data = [(given, targets(given))]
    by_sum = halp_fx.plan_of(prune(model, data=data))
    assert by_sum.report["saliency"] == "fisher"
    assert by_sum.report["data_free"] is False
    classes = halp_fx.plan_of(
        prune(model, data=data, loss=lambda losses, _targets: losses["classification"])
    )
    assert classes.dense_value != pytest.approx(by_sum.dense_value)
    for batch in (given[0], given, (given, torch.rand(2, 4))):
        with pytest.raises(InputError, match=r"must be a pair \(images, targets\): a list of"):
            prune(model, data=[batch])
    with pytest.raises(SaliencyError, match="zero"):
        prune(model, data=data, loss=lambda losses, _targets: 0.0 * losses["classification"])


def test_takes_images_in_any_common_form() -> None:
    model = small_ssd().eval()
    for given in (torch.rand(2, 3, 64, 64), (images(),), None):
        plan = halp_fx.plan_of(prune_detector(
            halp_fx.compile, model, 0.6, given, latency="analytic"))  # fmt: skip
        assert plan.predicted_ms <= plan.budget_ms


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.rand(1, 3, 64, 64)], r"a list of images \(3, H, W\).*not a list of .*1, 3, 64, 64"),
        (
            torch.rand(3, 64, 64),
            r"of a detector must be .*not a tensor \(3, 64, 64\)",
        ),
        ("image.png", "must be a list of images .*not str"),
        ([torch.rand(5, 64, 64)], "SSD can't be run on example_inputs"),
    ],
)
def test_wrong_images_are_named(given: Any, message: str) -> None:
    model = small_ssd()
    with snapshot(model), pytest.raises(InputError, match=message):
        prune(model, given=given)


def test_candidates_are_refused(ssd: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(InputError, match="candidates=3 is not known for the core"):
        prune(ssd[0], candidates=3)


def test_a_detector_of_one_stage_is_reconstructed() -> None:
    model = small_ssd().eval()
    data = [(given, targets(given, "ssd")) for given in (images(seed=s) for s in range(4))]
    with snapshot(model):
        plain, fitted = (prune(model, data=data, reconstruct=fit) for fit in (False, True))
    plans = [halp_fx.plan_of(net) for net in (plain, fitted)]
    assert [u.tolist() for u in plans[0].units] == [u.tolist() for u in plans[1].units]
    assert plans[1].report["reconstructed_layers"] > 0
    fresh = torch.rand(4, 3, 64, 64)

    def off(small: Any) -> float:
        with torch.no_grad():
            own, dense = (net.head(list(net.backbone(fresh).values())) for net in (small, model))
        names = dense.keys()
        return sum(float((own[k] - dense[k]).square().sum() / dense[k].var()) for k in names)

    assert off(fitted.eval()) < off(plain.eval())
    with pytest.raises(InputError, match="an iterator is used up after one look"):
        prune(model, data=iter(data), reconstruct=True)
    with pytest.raises(InputError, match="reconstruct=True is not known for a FasterRCNN"):
        prune(small_rcnn(), data=data, reconstruct=True)


class _Noted(FasterRCNN):
    def forward(self, images: Any, targets: Any = None) -> Any:
        return super().forward(images, targets)


def test_code_that_might_read_features_is_not_trusted() -> None:
    model = small_rcnn()
    model.__class__ = _Noted
    with pytest.raises(InputError, match=r"_Noted has a forward of its own .*compile_core"):
        prune(model)
    model = small_rcnn()
    model.roi_heads.box_roi_pool = nn.Identity()
    with pytest.raises(InputError, match=r"box_roi_pool is a Identity: only .*MultiScaleRoIAlign"):
        prune(model)
    assert not is_detector(nn.Linear(2, 2))
    assert not is_detector("ssd")


def test_a_call_of_another_kind_is_refused(ssd: tuple[nn.Module, nn.Module]) -> None:
    pruned: Any = ssd[1]
    levels = list(pruned.backbone(torch.rand(1, 3, 64, 64)).values())
    with pytest.raises(InputError, match="'head' was pruned for calls with 3 tensors"):
        pruned.head(levels[:2])


@pytest.mark.slow
def test_reports_the_share_of_post_processing(
    ssd: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    table = halp_fx.LatencyTable.open(tmp_path / "table.sqlite")
    pruned = prune(ssd[0], 0.6, latency=Source(Torch(threads=1), table))
    report = halp_fx.plan_of(pruned).report
    assert 0 < report["post_processing_share"] < 1
    assert report["post_processing_ms"] + report["pre_processing_ms"] == pytest.approx(
        report["outside_ms"]
    )
    assert report["outside_ms"] < report["whole_ms"]
    assert "post_processing_share" not in halp_fx.plan_of(ssd[1]).report  # nothing was measured
    text = render_markdown(halp_fx.plan_of(pruned))
    assert f"{100 * report['post_processing_share']:.1f} % post-processing" in text
    assert "of the whole model" not in render_markdown(halp_fx.plan_of(ssd[1]))


def test_a_whole_detector_is_not_exported_but_told_how(
    ssd: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    for example in (None, torch.rand(1, 3, 64, 64)):
        with pytest.raises(InputError, match=r"^SSD takes and gives lists.*core_of\(pruned\)"):
            halp_fx.export_onnx(ssd[1], tmp_path / "whole.onnx", example)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_exports_of_the_tensor_part(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pruned = prune(SMALL[name]().eval())
    path = halp_fx.export_onnx(core_of(pruned), tmp_path / "core.onnx")
    assert path.stat().st_size > 0
    assert path.stat().st_size < 1.1 * sum(4 * p.numel() for p in pruned.parameters()) + 1e6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_exports(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pruned = prune(small_ssd().eval())
    halp_fx.export_onnx(core_of(pruned), tmp_path / "core.onnx")
    image = torch.rand(3, 64, 64)
    path = tmp_path / "whole.onnx"
    torch.onnx.export(pruned, ([image],), path, dynamo=False, opset_version=18)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = torch.rand(3, 64, 64)
    found = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    with torch.no_grad():
        expected = pruned([other])[0]
    assert len(expected["boxes"]) > 0
    for want, got in zip(expected.values(), found, strict=True):
        assert torch.allclose(want.float(), torch.from_numpy(got).float(), atol=1e-3)
    parts: Any = prune(small_rcnn().eval())
    batch = torch.rand(2, 3, 64, 64)
    halp_fx.export_onnx(parts.backbone, tmp_path / "backbone.onnx", batch)
    levels: list[Tensor] = [t.detach() for t in parts.backbone(batch).values()]
    halp_fx.export_onnx(parts.rpn.head, tmp_path / "rpn.onnx", (levels,))
    pooled = torch.rand(5, parts.backbone.out_channels, 7, 7)
    halp_fx.export_onnx(parts.roi_heads.box_head, tmp_path / "box.onnx", pooled)


FULL = (
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
)

# Group norms take their statistics over the survivors, so only those kept whole are exact.
WITH_GROUP_NORM = ("retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn")


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_detectors_of_torchvision(name: str) -> None:
    options: dict[str, Any] = {"num_classes": 2 if "keypoint" in name else 4}
    if not name.startswith("ssd"):
        options |= {"min_size": 96, "max_size": 128}
    if "rcnn" in name:
        options |= {"box_score_thresh": 0.0, "box_detections_per_img": 10}
        options |= {"rpn_post_nms_top_n_test": 30, "rpn_pre_nms_top_n_test": 60}
    else:
        options |= {"score_thresh": 0.0}
    build = getattr(detection, name)
    model = lively(build(weights=None, weights_backbone=None, **options))
    pruned = prune(model, exact=name in WITH_GROUP_NORM)
    check_state(model, pruned, halp_fx.plan_of(pruned).kept)
    given = images((90, 120), (96, 100))
    kind = next((k for k in ("mask", "keypoint") if name.startswith(k)), "faster")
    assert_same_detections(model, pruned, given, targets(given, kind))


@pytest.mark.slow
def test_ssd512_with_resnet50() -> None:
    """The detector of the paper: ResNet-50 to layer 3, further levels, 512 pixels."""
    model = lively(ssd512_resnet50(classes=5))
    given = images((300, 400), (280, 320))
    pruned = prune(model, 0.5, given)
    assert_same_detections(model, pruned, given, targets(given))
