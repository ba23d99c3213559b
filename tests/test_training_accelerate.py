"""GradualPruner in a loop of Hugging Face Accelerate, as docs/training.md has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import halp_fx
from halp_fx.errors import InputError
from halp_fx.training import GradualPruner
from tests.launching import as_launched, free_port, run_example
from tests.training_networks import batches, example, network

accelerate: Any = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def _loader(count: int) -> Any:
    pairs = [
        pair for images, classes in batches(count) for pair in zip(images, classes, strict=True)
    ]
    return torch.utils.data.DataLoader(pairs, batch_size=8)  # type: ignore[arg-type]


def _start(accelerator: Any, model: nn.Module) -> GradualPruner:
    def wrap(net: nn.Module) -> nn.Module:
        return DistributedDataParallel(net) if accelerator.num_processes > 1 else net

    return GradualPruner(
        model.to(accelerator.device),
        0.4,
        example(),
        steps=3,
        every=2,
        latency="analytic",
        wrap=wrap,
    )


def _around(accelerator: Any, pruner: GradualPruner, count: int) -> tuple[Any, Any, Any]:
    optimizer = torch.optim.AdamW(pruner.model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return tuple(accelerator.prepare(optimizer, scheduler, _loader(count)))  # type: ignore[return-value]


def _train(
    accelerator: Any, pruner: GradualPruner, optimizer: Any, scheduler: Any, loader: Any
) -> list[bool]:
    criterion, cuts = nn.CrossEntropyLoss(), []
    for images, classes in loader:
        with accelerator.accumulate(pruner.model):
            with accelerator.autocast():
                loss = criterion(pruner.model(images), classes)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
                pruner.after_backward(scale)
                accelerator.clip_grad_norm_(pruner.model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            cuts.append(pruner.step(optimizer))
    return cuts


def _by_hand(count: int, accumulate: int) -> GradualPruner:
    pruner = GradualPruner(network(), 0.4, example(), steps=3, every=2, latency="analytic")
    optimizer = torch.optim.AdamW(pruner.model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    data = batches(count)
    for first in range(0, count, accumulate):
        for images, classes in data[first : first + accumulate]:
            loss = nn.functional.cross_entropy(pruner.model(images), classes)
            (loss / accumulate).backward()
        pruner.after_backward()
        nn.utils.clip_grad_norm_(pruner.model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        pruner.step(optimizer)
    return pruner


def _same(one: nn.Module, other: nn.Module) -> None:
    expected, actual = one.state_dict(), other.state_dict()
    assert list(expected) == list(actual)
    assert [k for k, v in expected.items() if not torch.equal(v, actual[k])] == []


def test_it_trains_and_cuts_as_a_loop_without_it() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    pruner = _start(accelerator, network())
    cuts = _train(accelerator, pruner, *_around(accelerator, pruner, 14))
    assert len(cuts) == 7 and any(cuts) and pruner.done
    assert accelerator.unwrap_model(pruner.model) is pruner.network
    _same(_by_hand(14, 2).network, pruner.network)


def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    whole = _start(accelerator, network())
    parts = _around(accelerator, whole, 8)
    first = _start(accelerator, network())
    optimizer, scheduler, loader = _around(accelerator, first, 8)
    data = [*loader]
    _train(accelerator, whole, *parts[:2], data)
    _train(accelerator, first, optimizer, scheduler, data[:5])
    state = {
        "pruner": first.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    accelerator.save(state, tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    second = _start(accelerator, network())
    second.load_state_dict(state["pruner"])
    optimizer, scheduler, _ = _around(accelerator, second, 8)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    _train(accelerator, second, optimizer, scheduler, data[5:])
    assert second.done and first.milestone == 2
    _same(whole.network, second.network)


def test_mixed_precision() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    pruner = _start(accelerator, network())
    seen: list[torch.dtype] = []
    parts = _around(accelerator, pruner, 7)
    with accelerator.autocast():
        seen.append(pruner.model(example()).dtype)
    _train(accelerator, pruner, *parts)
    with accelerator.autocast():
        seen.append(pruner.model(example()).dtype)
    assert pruner.done and seen == [torch.bfloat16] * 2
    assert {p.dtype for p in pruner.network.parameters()} == {torch.float32}


def test_a_prepared_model_is_traced_without_what_was_put_around_it() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(network())
    pruner = _start(accelerator, model)
    _train(accelerator, pruner, *_around(accelerator, pruner, 7))
    assert pruner.done and pruner.model(example()).dtype == torch.float32


def test_a_network_whose_forward_is_replaced_would_run_as_before_the_cut() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(
        InputError, match=r"the forward of pruner.network was replaced.*autocast\(\)"
    ):
        GradualPruner(network(), 0.4, example(), latency="analytic", wrap=accelerator.prepare)
    pruner = _start(accelerator, network())
    accelerator.prepare(pruner.model)
    with pytest.raises(InputError, match="would go on running the network as it was before"):
        _train(accelerator, pruner, *_around(accelerator, pruner, 4))
    assert pruner.milestone == 0


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[nn.Module] = []
    monkeypatch.setattr(halp_fx, "export_onnx", lambda net, path: exported.append(net))  # noqa: ARG005
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = run_example(
        "Hugging Face Accelerate", tmp_path, accelerate=accelerate, torch=torch, halp_fx=halp_fx,
        DistributedDataParallel=DistributedDataParallel, model=network(), example_inputs=example(),
        criterion=nn.CrossEntropyLoss(), loader=_loader(7),
    )  # fmt: skip
    assert seen["pruner"].done and exported == [seen["pruner"].network]
    assert seen["accelerator"].unwrap_model(seen["pruner"].model) is exported[0]


def _work(rank: int, port: int, folder: str) -> None:
    as_launched(rank, 2, port)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    pruner = _start(accelerator, network())
    _train(accelerator, pruner, *_around(accelerator, pruner, 28))
    assert pruner.done and isinstance(pruner.model, DistributedDataParallel)
    assert accelerator.unwrap_model(pruner.model) is pruner.network
    weights = {name: p.detach() for name, p in pruner.network.named_parameters()}
    torch.save(weights, Path(folder) / f"{rank}.pt")
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_cut_alike(tmp_path: Path) -> None:
    mp.spawn(_work, (free_port(), str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert list(first) == list(second) and first["0.weight"].shape[0] < 8
    assert all(torch.equal(p, second[name]) for name, p in first.items())
