"""Two processes that train one network, over gloo on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halp_fx.errors import InfeasibleError, InputError
from halp_fx.training import GradualPruner
from halp_fx.training.processes import _taking
from halp_fx.training.wrapping import wrapping_of
from tests.training_networks import batches, example, network

WORLD = 2


def _plain() -> nn.Sequential:
    """Without batch norm, so that the gradient of a batch is the mean of its halves'."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
        ).double()  # fmt: skip


def _train(pruner: GradualPruner, optimizer: Any, data: list[Any]) -> list[bool]:
    cuts = []
    for images, classes in data:
        nn.functional.cross_entropy(pruner.model(images), classes).backward()
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        cuts.append(pruner.step(optimizer))
    return cuts


def _sgd(pruner: GradualPruner) -> torch.optim.Optimizer:
    return torch.optim.SGD(pruner.model.parameters(), 0.1, momentum=0.9)


def _start(model: nn.Module, inputs: torch.Tensor, **options: Any) -> GradualPruner:
    settings: dict[str, Any] = {"steps": 3, "every": 2, "latency": "analytic", **options}
    return GradualPruner(model, settings.pop("budget", 0.4), inputs, **settings)


def _units(pruner: GradualPruner) -> list[list[int]]:
    return [own.tolist() for own in pruner.plan.units]


# Each scenario runs in both processes and returns what the test looks at, as JSON.


def _halves(rank: int, folder: Path) -> Any:
    """Each process trains on half of each batch, in DistributedDataParallel."""
    halves = [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches(8, dtype=torch.float64)]
    pruner = _start(
        DistributedDataParallel(_plain(), find_unused_parameters=True), example().double()
    )
    optimizer = _sgd(pruner)
    cuts = _train(pruner, optimizer, halves)
    assert isinstance(pruner.model, DistributedDataParallel)
    assert pruner.model.module is pruner.network and pruner.model.find_unused_parameters
    torch.save(pruner.network.state_dict(), folder / f"halves{rank}.pt")
    return {"cuts": cuts, "units": _units(pruner), "done": pruner.done}


def _resumed(rank: int, folder: Path) -> Any:
    """The run stops after the second cut, and goes on from a file."""
    own = batches(8, seed=rank)
    whole = _start(DistributedDataParallel(network()), example())
    _train(whole, _sgd(whole), own)
    first = _start(DistributedDataParallel(network()), example())
    optimizer = _sgd(first)
    _train(first, optimizer, own[:5])
    torch.save([first.state_dict(), optimizer.state_dict()], folder / f"checkpoint{rank}.pt")
    state = torch.load(folder / f"checkpoint{rank}.pt", weights_only=True)
    second = _start(DistributedDataParallel(network()), example())
    second.load_state_dict(state[0])
    optimizer = _sgd(second)
    optimizer.load_state_dict(state[1])
    _train(second, optimizer, own[5:])
    pairs = zip(
        whole.network.state_dict().items(), second.network.state_dict().items(), strict=True
    )
    return {"same": all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs),
            "done": second.done, "milestone": state[0]["milestone"]}  # fmt: skip


def _unreduced(rank: int, folder: Path) -> Any:  # noqa: ARG001
    """Gradients of each process alone: only the scores are brought together."""
    pruner = _start(_plain(), example().double(), every=1, steps=2)
    images, classes = batches(1, seed=rank, dtype=torch.float64)[0]
    nn.functional.cross_entropy(pruner.model(images), classes).backward()
    pruner.after_backward()
    local = [t.tolist() for t in pruner._scores.totals]
    together = [s.tolist() for s in pruner._scores.saliency(pruner.plan.units).scores]
    pruner.step(_sgd(pruner))
    return {"local": local, "together": together, "units": _units(pruner)}


def _infeasible(rank: int, folder: Path) -> Any:  # noqa: ARG001
    with pytest.raises(InfeasibleError) as caught:
        _start(_plain(), example().double(), budget=0.001)
    return {"message": str(caught.value), "least": caught.value.least}


def _different(rank: int, folder: Path) -> Any:  # noqa: ARG001
    pruner = _start(_plain(), example().double(), every=1, exclude=["0"] if rank else None)
    with pytest.raises(InputError) as caught:
        _train(pruner, _sgd(pruner), batches(1, dtype=torch.float64))
    return {"message": str(caught.value)}


SCENARIOS: list[Callable[[int, Path], Any]] = [
    _halves,
    _resumed,
    _unreduced,
    _infeasible,
    _different,
]


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    home = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{home / 'meet'}", rank=rank, world_size=WORLD
    )
    found: dict[str, Any] = {}
    for scenario in SCENARIOS:
        try:
            found[scenario.__name__] = scenario(rank, home)
        except Exception:  # noqa: BLE001  told to the test that asks for it
            found[scenario.__name__] = {"failed": traceback.format_exc()}
    (home / f"found{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    home = tmp_path_factory.mktemp("processes")
    mp.spawn(_work, (str(home),), nprocs=WORLD)  # type: ignore[attr-defined]
    return home


def _found(folder: Path, scenario: Callable[[int, Path], Any]) -> list[Any]:
    texts = [(folder / f"found{rank}.json").read_text(encoding="utf-8") for rank in range(WORLD)]
    results = [json.loads(text)[scenario.__name__] for text in texts]
    failed = [r["failed"] for r in results if "failed" in r]
    assert not failed, failed[0]
    return results


def test_two_halves_train_as_one_process_on_the_whole(folder: Path) -> None:
    first, second = _found(folder, _halves)
    assert first == second and first["done"]
    pruner = _start(_plain(), example().double())
    assert _train(pruner, _sgd(pruner), batches(8, dtype=torch.float64)) == first["cuts"]
    assert _units(pruner) == first["units"]
    states = [torch.load(folder / f"halves{r}.pt", weights_only=True) for r in range(WORLD)]
    for name, tensor in pruner.network.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-9, atol=1e-11)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(folder: Path) -> None:
    for found in _found(folder, _resumed):
        assert found == {"same": True, "done": True, "milestone": 2}


def test_scores_are_averages_over_the_processes(folder: Path) -> None:
    first, second = _found(folder, _unreduced)
    assert first["local"] != second["local"]
    assert first["together"] == second["together"] and first["units"] == second["units"]
    for one, other, both in zip(first["local"], second["local"], first["together"], strict=True):
        np.testing.assert_allclose((np.array(one) + np.array(other)) / 2, both)


def test_an_error_of_the_first_process_is_raised_in_both(folder: Path) -> None:
    first, second = _found(folder, _infeasible)
    assert "can't be met: the least latency" in first["message"]
    assert second == {"message": f"in the first process: {first['message']}", **_least(first)}


def _least(found: Any) -> dict[str, float]:
    assert found["least"] > 0
    return {"least": found["least"]}


def test_different_networks_are_an_error_in_both(folder: Path) -> None:
    for found in _found(folder, _different):
        assert found["message"].startswith("the processes have different networks: build the same")


def _torchrun(folder: Path, *arguments: str) -> int:
    """Exit status of two processes that torchrun started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr",
               "127.0.0.1", "-m", "tests.launched_training", str(folder), *arguments]  # fmt: skip
    home = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join([home, *sys.path])}  # fmt: skip
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            return process.wait(timeout=280)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its processes, too
            process.wait(timeout=60)
            raise


def test_a_run_under_torchrun_that_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    whole, killed = folders
    assert _torchrun(whole) == 0, (whole / "log.txt").read_text(encoding="utf-8")[-3000:]
    assert _torchrun(killed, "5") != 0  # after the second milestone of three
    assert not (killed / "final0.pt").exists()
    assert _torchrun(killed) == 0, (killed / "log.txt").read_text(encoding="utf-8")[-3000:]
    for rank in range(WORLD):
        assert (killed / f"lives{rank}.txt").read_text().split() == ["0", "5"]
        one, other = (torch.load(f / f"final{rank}.pt", weights_only=True) for f in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("backends", "of_a_network_on_a_gpu", "of_one_on_the_cpu"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo", "cpu", "cpu"),
        ("cuda:nccl", "cuda:1", "cuda"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
    ],
)
def test_tensors_go_where_the_group_takes_them(
    backends: str, of_a_network_on_a_gpu: str, of_one_on_the_cpu: str
) -> None:
    found = [str(_taking(backends, torch.device(device))) for device in ("cuda:1", "cpu")]
    assert found == [of_a_network_on_a_gpu, of_one_on_the_cpu]


def test_a_network_that_is_not_wrapped_stays_so() -> None:
    model = _plain()
    inner, wrap = wrapping_of(model, None)
    assert inner is model and wrap(model) is model
    with pytest.raises(InputError, match="wrap is 'ddp': pass a callable that wraps a network"):
        wrapping_of(model, "ddp")  # type: ignore[arg-type]
