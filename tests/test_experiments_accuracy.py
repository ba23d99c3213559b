"""The accuracy experiments: data, search, methods and scores, on a small network."""

from __future__ import annotations

import itertools
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from halp_fx.errors import DependencyError, InfeasibleError, InputError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.trace import trace
from halp_fx.tools.experiments import accuracy_methods, accuracy_tune, cifar, imagenet, peers
from halp_fx.tools.experiments import accuracy_scores as scores
from halp_fx.tools.experiments.accuracy_data import Batches, correct
from halp_fx.tools.experiments.accuracy_methods import METHODS, SETS, candidate_key, chosen_methods
from halp_fx.tools.experiments.accuracy_records import Journal
from halp_fx.tools.experiments.accuracy_run import Plan, run
from halp_fx.tools.experiments.accuracy_task import Settings, Task, Variant, searched, to_latency
from halp_fx.tools.experiments.data import data_folder
from halp_fx.tools.experiments.peers import Way, torch_pruned
from halp_fx.training import Distillation, fine_tune
from tests.accuracy_task import images, needs_torch_pruning, tiny_task
from tests.oracle import assert_exact


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny_task()


# Data.


def test_minibatches_are_whole_and_repeat() -> None:
    own = images(50, 0)
    in_order = list(Batches(own, 20))
    assert [len(y) for _, y in in_order] == [20, 20]
    assert torch.equal(in_order[1][1], own.labels[20:40])
    assert torch.equal(in_order[0][0], own.pixels[:20].float() / 255)
    shuffled = Batches(own, 20, seed=3, count=120, shift=2)
    first, second = list(shuffled), list(shuffled)
    assert len(first) == len(shuffled) == 6
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    other = next(iter(replace(shuffled, seed=4)))
    assert not torch.equal(other[1], first[0][1])
    assert [len(y) for _, y in Batches(own.at(slice(0, 7)), 20)] == [7]


def test_every_image_comes_once_an_epoch() -> None:
    own = replace(images(40, 0), labels=torch.arange(40))
    labels = torch.cat([y for _, y in Batches(own, 20, seed=1, count=80)])
    assert sorted(labels[:40].tolist()) == sorted(labels[40:].tolist()) == list(range(40))


@pytest.mark.parametrize("seed", [1, None])
def test_what_was_skipped_is_not_seen_again(seed: int | None) -> None:
    own = replace(images(40, 0), labels=torch.arange(40))
    whole = [y.tolist() for _, y in Batches(own, 10, seed, 80)]
    rest = [y.tolist() for _, y in Batches(own, 10, seed, 50, skip=30)]
    assert rest == whole[3:]


def test_augmented_images_are_shifted_and_mirrored() -> None:
    own = images(30, 2)
    plain = {i: own.inputs(torch.tensor([i]))[0] for i in range(30)}
    marked = replace(own, labels=torch.arange(30))
    seen = set()
    for x, y in Batches(marked, 10, seed=0, shift=1):
        for image, i in zip(x, y.tolist(), strict=True):
            padded = nn.functional.pad(plain[i][None], (1, 1, 1, 1), mode="replicate")[0]
            found = [
                (top, left, mirror)
                for top, left, mirror in itertools.product(range(3), range(3), (False, True))
                if torch.equal(
                    image,
                    padded[:, top : top + 8, left : left + 8].flip(2)
                    if mirror
                    else padded[:, top : top + 8, left : left + 8],
                )
            ]
            assert found, i
            seen.add(found[0])
    assert len(seen) > 5


def test_the_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HALP_FX_DATA", raising=False)
    with pytest.raises(InputError, match="no data: pass --data DIR, or set HALP_FX_DATA"):
        data_folder(None)
    with pytest.raises(InputError, match="is no folder: pass another with --data"):
        data_folder(tmp_path / "nowhere")
    monkeypatch.setenv("HALP_FX_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    with pytest.raises(InputError, match=r"has no 'weights/resnet56_cifar10\.safetensors'"):
        cifar.cifar_network(tmp_path, "resnet56")
    with pytest.raises(InputError, match="no network 'resnet20' for CIFAR-10: use resnet56"):
        cifar.cifar_network(tmp_path, "resnet20")


@pytest.mark.parametrize("name", list(cifar.NETWORKS))
def test_trained_networks_classify(data_folder: Path, name: str) -> None:
    network, head = cifar.cifar_network(data_folder, name)
    assert isinstance(network.get_submodule(head), nn.Linear)
    test = cifar.cifar_images(data_folder, "test")
    assert len(test) == 10_000
    assert correct(network, test.at(slice(0, 200))).mean() > 0.88


def test_imagenet_classes(data_folder: Path) -> None:
    pytest.importorskip("torchvision")
    network, head = imagenet.imagenet_network(data_folder, "mobilenet_v2")
    assert network.get_submodule(head).out_features == 1000
    val = imagenet.imagenet_images(data_folder, "val", "mobilenet_v2", 160)
    assert val.pixels.shape == (500, 3, 160, 160)
    assert set(val.labels.tolist()) == set(imagenet.CLASSES.values())
    assert correct(network, val.at(slice(0, None, 25)), batch=10).mean() >= 0.4


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        DependencyError,
        match=r'efficientnet_lite_pytorch is not installed: run pip install "halp-fx\[peers\]"',
    ):
        imagenet.imagenet_network(tmp_path, "efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(DependencyError, match=r'run pip install "halp-fx\[peers\]"'):
        torch_pruned(nn.Linear(1, 1), torch.rand(1, 1), "", 0.5, importance="magnitude",
                     way=Way(False))  # fmt: skip


# Search.


def width(knob: float) -> nn.Module:
    return nn.Linear(1, max(int(1000 * knob), 1))


def test_the_largest_network_within_the_budget() -> None:
    for budget in (0.9, 0.3, 0.05):
        found = to_latency(
            width, lambda net: (net.out_features / 1000) ** 3, budget, start=budget, tries=12
        )
        assert found is not None
        assert 0.97 * budget < found[0] ** 3 < 1.03 * budget


def test_latency_that_is_not_monotone() -> None:
    def share(network: nn.Module) -> float:
        n = network.out_features
        return n / 1000 + (0.1 if n % 8 else 0.0)

    found = to_latency(width, share, 0.5, start=0.5, tries=12)
    assert found is not None
    assert share(found[1]) <= 0.5 * 1.02


def test_knobs_that_are_too_low_are_left() -> None:
    def make(knob: float) -> nn.Module:
        if knob < 0.6:
            raise InfeasibleError("too narrow", 0.6)
        return width(knob)

    found = to_latency(make, lambda net: 0.5 * net.out_features / 1000, 0.4, start=0.1, tries=12)
    assert found is not None
    assert 0.75 < found[0] < 0.83
    assert to_latency(make, lambda net: 0.9, 0.4, start=0.1) is None


def test_of_several_variants_the_most_accurate_counts(task: Task) -> None:
    def spoilt(knob: float) -> nn.Module:
        network = deepcopy(task.dense)
        network.linear.weight.data.zero_()
        return network

    variants = [
        Variant("spoilt", spoilt, 0.9),
        Variant("good", lambda knob: deepcopy(task.dense), 0.9),
    ]
    assert searched(task, 1.0, variants, 0).variant == "good"
    with pytest.raises(InfeasibleError, match=r"for each of 2 variants meets 0\.5 of the dense"):
        searched(task, 0.5, variants, 0)


# Methods.


@pytest.mark.parametrize("name", [n for n in METHODS if not n.startswith("tp-")])
def test_methods_meet_the_budget(task: Task, name: str) -> None:
    before = deepcopy(task.dense.state_dict())
    candidate = METHODS[name].prune(task, 0.5, 0)
    dense, small = task.measured(candidate.network)
    assert small <= 0.51 * dense
    assert small > 0.25 * dense
    assert candidate.network(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    assert (candidate.used_images > 0) == (name == "joint-gradual")
    if name in ("joint", "joint-measured"):  # nothing but cutting was done
        assert_exact(task.dense, candidate.network, (task.example,))
    after = task.dense.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not task.dense.training


def test_gradual_pruning_is_brought_to_the_latency(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first try, at the latency that pruning at once needs, may miss."""
    start = METHODS["joint"].prune(task, 0.5, 0)
    trainings = 0

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal trainings
        trainings += 1
        return fine_tune(*arguments, **options)

    too_much = replace(start, knob=min(1.3 * start.knob, 1.0))
    monkeypatch.setattr(accuracy_methods, "_at_once", lambda *arguments: too_much)
    monkeypatch.setattr(accuracy_methods, "fine_tune", count)
    candidate = METHODS["joint-gradual"].prune(task, 0.5, 0)
    dense, small = task.measured(candidate.network)
    assert 0.35 * dense < small <= 0.51 * dense
    assert 1 < trainings <= 3
    assert candidate.used_images == 80
    slow = replace(task, _kept={})
    monkeypatch.setattr(slow, "measured", lambda network, bouts=1: (1.0, 1.0))
    with pytest.raises(InfeasibleError, match="none of 3 networks measured"):
        METHODS["joint-gradual"].prune(slow, 0.5, 0)


def test_gradual_pruning_and_fine_tuning_see_other_images(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Batches] = []

    def watched(network: Any, data: Batches, *arguments: Any, **options: Any) -> Any:
        seen.append(replace(data, images=replace(data.images, labels=torch.arange(500))))
        return fine_tune(network, data, *arguments, **options)

    monkeypatch.setattr(accuracy_methods, "fine_tune", watched)
    monkeypatch.setattr(accuracy_tune, "fine_tune", watched)
    plan = Plan(("tiny",), (METHODS["joint-gradual"],), (0.5,), (0,))
    run(plan, Journal(tmp_path / "r.jsonl", "x"), lambda name: replace(task, _kept={}))
    dense, *_, pruning, tuning = ([i for _, y in data for i in y.tolist()] for data in seen)
    assert pruning + tuning == dense
    assert len(set(dense)) == 160


@needs_torch_pruning
@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith("tp-")])
def test_peers_meet_the_budget(task: Task, name: str) -> None:
    candidate = METHODS[name].prune(task, 0.5, 0)
    dense, small = task.measured(candidate.network)
    assert 0.2 * dense < small <= 0.51 * dense
    assert candidate.variant
    assert candidate.network(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    assert all(p.grad is None for p in candidate.network.parameters())
    assert all(p.grad is None for p in task.dense.parameters())


@needs_torch_pruning
def test_a_peer_cuts_what_it_is_asked_to(task: Task) -> None:
    small = torch_pruned(
        task.dense, task.example, "linear", 0.25, importance="magnitude", way=Way(False)
    )
    dense = task.dense
    assert [c.out_channels for c in small.modules() if isinstance(c, nn.Conv2d)] == [
        c.out_channels * 3 // 4 for c in dense.modules() if isinstance(c, nn.Conv2d)
    ]
    assert torch.equal(small.linear.bias, dense.linear.bias)
    kept = set(small.layer1[0].bn1.weight.tolist())
    assert len(kept) == 12
    assert kept <= set(dense.layer1[0].bn1.weight.tolist())
    rounded = torch_pruned(
        dense, task.example, "linear", 0.4, importance="magnitude", way=Way(True, 8, 10)
    )
    assert all(c.out_channels % 8 == 0 for c in rounded.modules() if isinstance(c, nn.Conv2d))


@needs_torch_pruning
def test_a_way_in_which_a_peer_fails_leaves_the_others(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = peers.library().pruner.MetaPruner

    def failing(*arguments: Any, **options: Any) -> Any:
        if options["round_to"] is None:
            raise KeyError("no such group")
        return real(*arguments, **options)

    fresh = replace(task, _kept={})
    monkeypatch.setattr(peers.library().pruner, "MetaPruner", failing)
    assert METHODS["tp-magnitude-local"].prune(fresh, 0.5, 0).variant.startswith("rounded")
    monkeypatch.setattr(peers, "LOCAL", (Way(False),))
    with pytest.raises(
        InfeasibleError, match=r"the last: Torch-Pruning \(any width, 1 step\) fails"
    ):
        METHODS["tp-magnitude-local"].prune(fresh, 0.5, 0)


@needs_torch_pruning
def test_a_peer_gets_the_gradients_of_all_scoring_images(task: Task) -> None:
    network = deepcopy(task.dense)
    total = torch.stack([task.loss(network(x), y) for x, y in task.scoring(5)]).sum()
    total.backward()
    found = peers.gradients(task, 5)
    for name, parameter in network.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-5), name


def test_methods_that_differ_in_recovery_have_one_network() -> None:
    names = ("joint", "joint-reconstructed", "joint-distilled", "joint-plain")
    assert len({candidate_key(METHODS[name], 0.5, 1) for name in names}) == 1
    assert candidate_key(METHODS["halp"], 0.5, 1) != candidate_key(METHODS["joint"], 0.5, 1)
    assert candidate_key(METHODS["uniform"], 0.5, 1) == candidate_key(METHODS["uniform"], 0.5, 2)


def test_what_trains_while_it_prunes_has_the_loss_of_the_others(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[Any] = []

    def watched(pruner: Any, data: Any, loss: Any, **options: Any) -> Any:
        losses.append(loss)
        return fine_tune(pruner, data, loss, **options)

    monkeypatch.setattr(accuracy_methods, "fine_tune", watched)
    taught = replace(task, settings=replace(task.settings, recovery="distilled", alpha=1.0))
    METHODS["joint-gradual"].prune(taught, 0.5, 0)
    assert all(isinstance(loss, Distillation) and loss.alpha == 1.0 for loss in losses)
    idle = replace(task, settings=replace(task.settings, tune_images=0))
    with pytest.raises(InputError, match=r"tune_images is 0: .* needs at least 32"):
        METHODS["joint-gradual"].prune(idle, 0.5, 0)


def test_sets_of_methods() -> None:
    assert [m.name for m in chosen_methods("halp, main")][:2] == ["halp", "joint"]
    assert set(itertools.chain(*SETS.values())) == set(METHODS)
    assert len(SETS["main"]) == 9
    with pytest.raises(InputError, match="there is no method 'magic': use main, parts, scores"):
        chosen_methods("joint,magic")
    with pytest.raises(InputError, match="--methods is empty"):
        chosen_methods(" ,")


def test_images_that_accuracies_are_reported_on(task: Task) -> None:
    assert task.tested().pixels is task.test.pixels
    chosen = replace(task, settings=Settings(on="choose", choose_images=60))
    known = {image.numpy().tobytes() for image in task.choose.pixels}
    compared = {image.numpy().tobytes() for image in chosen.choosing().pixels}
    tested = {image.numpy().tobytes() for image in chosen.tested().pixels}
    assert len(compared) == 60
    assert compared | tested == known
    assert not compared & tested
    few = replace(task, settings=Settings(on="choose", choose_images=60, test_images=5)).tested()
    assert {image.numpy().tobytes() for image in few.pixels} < tested
    assert len(few) == 5
    none = replace(task, settings=Settings(on="choose", choose_images=len(task.choose)))
    with pytest.raises(InputError, match="choose_images is 100: all 100 kept"):
        none.tested()


# Scores.


def test_filter_norms(task: Task) -> None:
    groups = find_groups(trace(task.dense, task.example))
    found = dict(zip([g.name for g in groups.groups], scores.filter_l1(groups), strict=True))
    conv = task.dense.layer2[0].conv1.weight.detach().double()
    assert found["layer2.0.conv1"] == pytest.approx(conv.abs().sum((1, 2, 3)).numpy())


def test_scores_relative_to_their_group(task: Task) -> None:
    groups = find_groups(trace(task.dense, task.example))
    for own in scores.normalised(task.scoring(0), task.loss)(groups):
        assert own.mean() == pytest.approx(1.0)


def test_measured_scores_know_what_is_useless(task: Task) -> None:
    """Channels of which next to nothing comes through are worth next to nothing."""
    network = deepcopy(task.dense)
    network.layer2[0].bn2.weight.data.mul_(1e-4)
    groups = find_groups(trace(network, task.example))
    names = [g.name for g in groups.groups]
    found = dict(zip(names, scores.measured(task.scoring(0), task.loss)(groups), strict=True))
    assert found["layer2.0.conv1"].sum() < 0.02 * found["layer1.0.conv1"].sum()
    assert all((own >= 0).all() and own.any() for own in found.values())


def test_a_measured_rise_is_shared_out() -> None:
    order = np.array([2, 0, 3, 1])
    ranks = np.array([2.0, 4.0, 1.0, 3.0])
    spread = scores._spread(4, order, [3, 2, 1], [1.0, 3.0, 6.0], ranks)
    assert spread[order] == pytest.approx([1, 2, 3, 3], rel=0.01)
    falling = scores._spread(4, order, [3, 2, 1], [4.0, 4.0, 6.0], ranks)
    assert falling[order] == pytest.approx([2, 2, 2, 2], rel=0.01)
    assert (np.diff(falling[order]) > 0).all()
