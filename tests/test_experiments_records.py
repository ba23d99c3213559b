"""The accuracy experiments: runs, their records, statistics and report, on a small network."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from halp_fx.errors import DependencyError, DivergedError, InfeasibleError, InputError
from halp_fx.tools.experiments.accuracy_data import correct
from halp_fx.tools.experiments.accuracy_methods import METHODS, SETS, Method
from halp_fx.tools.experiments.accuracy_records import Journal, Record, packed, unpacked
from halp_fx.tools.experiments.accuracy_report import compared, page, write_report
from halp_fx.tools.experiments.accuracy_run import Plan, run
from halp_fx.tools.experiments.accuracy_statistics import paired, sign_test
from halp_fx.tools.experiments.accuracy_task import Candidate, Settings, Task
from halp_fx.tools.experiments.accuracy_tune import Remembering, best_tuned, tune
from tests.accuracy_task import tiny_task


@pytest.fixture(scope="module")
def task() -> Task:
    return tiny_task()


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
    for damaged in ("nonsense", '{"network": "net", "method": "joint", "budget": 0.5}'):
        path.write_text(f"{damaged}\n")
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


def test_one_network_is_measured_once(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []

    def measure(self: Task, network: nn.Module) -> tuple[float, float]:
        measured.append(1.0)
        return 2.0, float(len(measured))

    monkeypatch.setattr(Task, "measured", measure)
    fresh = replace(task, _kept={})
    plan = Plan(("tiny",), (METHODS["joint"], METHODS["uniform"]), (0.5,), (0, 1))
    _, *records = run(plan, Journal(tmp_path / "r.jsonl", "x"), lambda name: fresh)
    shares = [record.share for record in records]
    assert shares[1] == shares[3]  # the widths of uniform do not depend on the seed
    assert len(set(shares)) == 3


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


def test_a_teacher_is_asked_once_for_each_minibatch(task: Task) -> None:
    asked: list[int] = []
    teacher = deepcopy(task.dense)
    teacher.register_forward_hook(lambda *args: asked.append(1))
    remembering = Remembering(teacher).eval()
    images = [task.train.inputs(slice(start, start + 8)) for start in (0, 8)]
    with torch.no_grad():
        for x in (*images, images[0].clone(), images[1].flip(3).flip(3)):
            torch.testing.assert_close(remembering(x), task.dense(x), rtol=0, atol=0)
    assert len(asked) == 2


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
