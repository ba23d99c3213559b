"""The callback in a real Trainer: schedule, checkpoints, averages, mistakes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import halp_fx
from halp_fx.errors import DependencyError, InputError, SaliencyError
from halp_fx.training import GradualPruner
from tests.launching import as_launched, free_port, run_example
from tests.training_networks import batches, example, network

lightning: Any = pytest.importorskip("lightning.pytorch")
from halp_fx.training.lightning import PruningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:halp_fx. the network is within its budget after",
    "ignore:halp_fx. training ended after",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Starting from v1.9.0",
    "ignore:The number of training batches",
    "ignore:.*does not have many workers.*",
    "ignore:.*GPU available.*",
    "ignore:.*isinstance.*",
)

DATA = batches(24)


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """Takes the minibatch of each optimiser step from DATA, whatever the loader gives."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.model = network()
        self.loss = nn.CrossEntropyLoss()
        self.accumulate = accumulate

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        number = self.trainer.global_step * self.accumulate + batch_idx % self.accumulate
        images, classes = (each.to(self.device) for each in DATA[number % len(DATA)])
        return self.loss(self.model(images.to(self.dtype)), classes)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}
        ]


def _callback(**options: Any) -> PruningCallback:
    settings = {"budget": 0.4, "steps": 3, "every": 2, "latency": "analytic", **options}
    return PruningCallback(settings.pop("budget"), example(), **settings)


def _trainer(
    callbacks: list[Any], steps: int = 10, package: Any = lightning, **options: Any
) -> Any:
    return package.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=callbacks, logger=False,
        enable_checkpointing=any(isinstance(c, lightning.callbacks.Checkpoint) for c in callbacks),
        enable_progress_bar=False, enable_model_summary=False, **{"devices": 1, **options},
    )  # fmt: skip


def _loader() -> Any:
    return torch.utils.data.DataLoader(torch.zeros(4, 1), batch_size=1)


def _fit(callbacks: list[Any], module: Any = None, *, ckpt: Any = None, **options: Any) -> Any:
    module = Classifier() if module is None else module
    trainer = _trainer(callbacks, **options)
    trainer.fit(module, _loader(), ckpt_path=ckpt)
    return trainer


def _same(one: nn.Module, other: nn.Module) -> None:
    expected, actual = one.state_dict(), other.state_dict()
    assert list(expected) == list(actual)
    assert [k for k, v in expected.items() if not torch.equal(v, actual[k])] == []


def _by_hand(steps: int = 10, accumulate: int = 1, clip: float | None = None) -> Any:
    """The same training in a loop of one's own: (pruner, optimiser)."""
    pruner = GradualPruner(network(), 0.4, example(), steps=3, every=2, latency="analytic")
    optimizer = torch.optim.AdamW(pruner.model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    for step in range(steps):
        for images, classes in DATA[step * accumulate : (step + 1) * accumulate]:
            loss = nn.functional.cross_entropy(pruner.model(images), classes)
            (loss / accumulate).backward()
        pruner.after_backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(pruner.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        pruner.step(optimizer)
    return pruner, optimizer


@pytest.mark.parametrize(
    ("accumulate", "clip"), [(1, None), (2, None), (1, 0.05)], ids=["plain", "accumulate", "clip"]
)
def test_it_trains_and_cuts_as_a_loop_by_hand(accumulate: int, clip: float | None) -> None:
    pruning, module = _callback(), Classifier(accumulate)
    trainer = _fit([pruning], module, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    pruner, optimizer = _by_hand(10, accumulate, clip)
    assert pruning.pruner is not None and pruning.pruner.done
    assert module.model is pruning.network
    sizes = [sum(p.numel() for p in net.parameters()) for net in (pruning.network, network())]
    assert sizes[0] < sizes[1]
    _same(pruner.network, pruning.network)
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1e-2
    assert {id(p) for p in module.parameters()} == set(
        map(id, trainer.optimizers[0].param_groups[0]["params"])
    )


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        pytest.param(1, {}, id="before the first milestone"),
        pytest.param(5, {}, id="between milestones"),
        pytest.param(8, {}, id="done"),
        pytest.param(5, {"soft": True, "steps": 4}, id="soft"),
        pytest.param(5, {"budget": 0.3, "min_share": 0.7}, id="branches dropped"),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(stop: int, options: Any, tmp_path: Path) -> None:
    whole, first, second = (_callback(**options) for _ in range(3))
    one = _fit([whole])
    _fit([first], steps=stop).save_checkpoint(tmp_path / "run.ckpt")
    dropped = any(key.startswith("_constants.") for key in first.network.state_dict())
    assert dropped or "min_share" not in options
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert "network" not in stored["callbacks"][first.state_key]
    other = _fit([second], ckpt=tmp_path / "run.ckpt")
    _same(whole.network, second.network)
    assert _states(one) == _states(other)
    assert _units(whole) == _units(second)
    assert second.pruner is not None and second.pruner.done


def _states(trainer: Any) -> str:
    """Of optimiser and learning rate schedule."""
    (schedule,) = trainer.lr_scheduler_configs
    return repr([trainer.optimizers[0].state_dict(), schedule.scheduler.state_dict()])


def _units(pruning: PruningCallback) -> list[list[int]]:
    assert pruning.pruner is not None
    return [own.tolist() for own in pruning.pruner.plan.units]


def test_a_second_fit_goes_on_and_another_module_starts_anew() -> None:
    pruning, module = _callback(), Classifier()
    _fit([pruning], module, steps=3)
    pruner = pruning.pruner
    assert pruner is not None and pruner.milestone == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "halp_fx")  # 4 steps are enough after the first 3
        _fit([pruning], module, steps=4)
    assert pruning.pruner is pruner and pruner.done
    assert "on_load_checkpoint" not in vars(module)
    _fit([pruning], steps=2)
    assert pruning.pruner is not pruner


def test_evaluation_of_a_checkpoint_takes_its_widths(tmp_path: Path) -> None:
    pruning, module = _callback(), Classifier()
    _fit([pruning], module, steps=4).save_checkpoint(tmp_path / "four.ckpt")
    module.model.eval()
    expected = module.model(example())
    fresh, other = _callback(), Classifier()
    other.predict_step = lambda batch: other.model(example())
    loaded = _trainer([fresh]).predict(other, _loader(), ckpt_path=tmp_path / "four.ckpt")
    assert torch.equal(loaded[0], expected)
    assert fresh.pruner is not None and fresh.pruner.milestone == 2


def test_own_hooks_of_the_module_are_called(tmp_path: Path) -> None:
    seen: list[str] = []

    class Hooked(Classifier):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(f"method, {len(checkpoint['state_dict']['model.3.conv1.weight'])} channels")

    _fit([_callback()], steps=6).save_checkpoint(tmp_path / "run.ckpt")
    module = Hooked()
    _fit([_callback()], module, ckpt=tmp_path / "run.ckpt", steps=7)
    width = module.model.get_parameter("3.conv1.weight").shape[0]
    assert seen == [f"method, {width} channels"] and width < 8
    assert "on_load_checkpoint" not in vars(module)
    module = Hooked()
    own = lambda _: seen.append("attribute")  # noqa: E731
    module.on_load_checkpoint = own
    _fit([_callback()], module, ckpt=tmp_path / "run.ckpt", steps=7)
    assert seen[1:] == ["attribute"] and module.on_load_checkpoint is own


def test_averaged_weights_are_cut_and_resume(tmp_path: Path) -> None:
    callbacks = lightning.callbacks
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")

    def start() -> list[Any]:
        return [_callback(), callbacks.EMAWeightAveraging(decay=0.7)]

    saving = callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
    whole, second = Classifier(), Classifier()
    _fit([saving, *start()], whole, steps=10)
    (path,) = tmp_path.glob("*step=5.ckpt")
    _fit(start(), second, ckpt=path)
    _same(whole.model, second.model)  # where Lightning puts the averages at the end
    assert whole.model.get_parameter("3.conv1.weight").shape[0] < 8
    stored = torch.load(path, weights_only=True)
    average, current = stored["state_dict"], stored["current_model_state"]
    assert average["model.3.conv1.weight"].shape == current["model.3.conv1.weight"].shape
    assert not torch.equal(average["model.3.conv1.weight"], current["model.3.conv1.weight"])
    with pytest.raises(
        InputError, match=r"EMAWeightAveraging has copied .* put PruningCallback fi"
    ):
        _fit(start()[::-1])


def test_stochastic_weight_averaging_is_cut() -> None:
    averaging = lightning.callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    pruning, module = _callback(every=1), Classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _fit([pruning, averaging], module, steps=-1, max_epochs=3)
    assert module.model(example()).isfinite().all()
    assert pruning.pruner is not None and pruning.pruner.done


class Adversaries(lightning.LightningModule):  # type: ignore[misc]
    """Manual optimisation of two networks, of which one is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body = nn.ModuleDict({"net": network()})
        self.critic = nn.Linear(10, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        images, _ = DATA[self.trainer.global_step]
        first, second = self.optimizers()
        loss = self.critic(self.body["net"](images)).mean()
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(loss)
        second.step()
        first.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.body.parameters(), 0.01),
            torch.optim.Adam(self.critic.parameters()),
        ]


def test_manual_optimisation_of_two_networks() -> None:
    pruning, module = _callback(network="body.net", every=1), Adversaries()
    trainer = _fit([pruning], module, steps=8)
    assert pruning.pruner is not None and pruning.pruner.done
    assert module.body["net"] is pruning.network
    held = {id(p) for p in trainer.optimizers[0].param_groups[0]["params"]}
    assert held == {id(p) for p in pruning.network.parameters()}
    assert len(trainer.optimizers[1].state) == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision: str) -> None:
    pruning = _callback()
    _fit([pruning], precision=precision)
    assert pruning.pruner is not None and pruning.pruner.done
    dtypes = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert {p.dtype for p in pruning.network.parameters()} == {dtypes[precision]}
    assert all(p.isfinite().all() for p in pruning.network.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_scores_are_of_unscaled_gradients(fused: bool) -> None:
    """A GradScaler in Lightning's mixed precision: the scores are those without it.

    Fused optimisers take the scale off in their step, so Lightning leaves it to them.
    """

    class Wide(lightning.plugins.MixedPrecision):  # type: ignore[misc]  # float32 in its middle
        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    class Fused(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pruning, plain = _callback(every=100), _callback(every=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _fit([pruning], Fused(), steps=2, plugins=[Wide("16-mixed", "cpu", scaler)])
        _fit([plain], Fused(), steps=2)
    assert pruning.pruner is not None and plain.pruner is not None
    pairs = zip(pruning.pruner._scores.totals, plain.pruner._scores.totals, strict=True)
    for ours, theirs in pairs:
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-9)


def test_batches_without_a_loss_do_not_count() -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    pruning = _callback()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _fit([pruning], Skips(), steps=8)
    assert pruning.pruner is not None and pruning.pruner._count == 4


def test_synchronised_batch_norm_stays() -> None:
    pruning, module = _callback(every=1), Classifier()

    def convert() -> None:
        nn.SyncBatchNorm.convert_sync_batchnorm(module.model)

    module.on_fit_start = convert
    _fit([pruning], module, steps=4)
    assert isinstance(module.model.get_submodule("1"), nn.SyncBatchNorm)
    assert not any(type(m) is nn.BatchNorm2d for m in module.model.modules())


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[nn.Module] = []
    monkeypatch.setattr(halp_fx, "export_onnx", lambda net, path: exported.append(net))  # noqa: ARG005
    monkeypatch.chdir(tmp_path)  # where this Trainer keeps its checkpoints and logs
    module = Classifier()
    seen = run_example(
        "PyTorch Lightning", tmp_path, lightning=lightning, halp_fx=halp_fx, module=module,
        loader=_loader(), example_inputs=example(),
    )  # fmt: skip
    assert seen["pruning"].pruner.done and exported == [module.model]
    path = seen["trainer"].checkpoint_callback.best_model_path
    stored = torch.load(path, weights_only=True)
    assert stored["callbacks"][seen["pruning"].state_key]["milestone"] == 3


class Plain(lightning.LightningModule):  # type: ignore[misc]
    """Without batch norm: the gradient of a batch is the mean of its halves'."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            ).double()  # fmt: skip
            self.head = nn.Linear(64, 10).double()  # beside the network that is pruned

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        world, rank = self.trainer.world_size, self.trainer.global_rank
        pair = DATA[self.trainer.global_step]
        images, classes = (each.chunk(world)[rank] for each in pair)
        return nn.functional.cross_entropy(self.head(self.model(images.double())), classes)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def _plain() -> PruningCallback:
    return PruningCallback(
        0.6, example().double(), network="model", steps=3, every=2, latency="analytic"
    )


def _work(rank: int, port: int, folder: str) -> None:
    as_launched(rank, 2, port)
    home, settings = Path(folder), {"strategy": "ddp", "devices": 2}
    wrapped: list[bool] = []

    class Looks(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            inside = isinstance(trainer.strategy.model, DistributedDataParallel)
            wrapped.append(inside and trainer.strategy.model.module is trainer.lightning_module)

    whole, second = Plain(), Plain()
    _fit([_plain(), Looks()], whole, steps=8, **settings)
    _fit([_plain()], steps=5, module=Plain(), **settings).save_checkpoint(home / "run.ckpt")
    _fit([_plain()], second, ckpt=home / "run.ckpt", steps=8, **settings)
    assert len(wrapped) == 8 and all(wrapped)
    torch.save([whole.state_dict(), second.state_dict()], home / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume(tmp_path: Path) -> None:
    mp.spawn(_work, (free_port(), str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    states = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    alone = Plain()
    _fit([_plain()], alone, steps=8)
    expected = alone.state_dict()
    assert expected["model.0.weight"].shape[0] < 8
    for state in (*states[0], *states[1]):
        assert all(torch.equal(state[name], states[0][0][name]) for name in state)
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-11)


# Mistakes


def test_a_schedule_longer_than_the_training_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"after 200 more optimiser steps \(steps=2 \* every=100 in all\), and"
    ) as seen:
        _fit([_callback(steps=2, every=100)], steps=3)
    assert any("training ended after 0 of 2 milestones" in str(w.message) for w in seen)


def test_a_checkpoint_of_weights_alone_is_explained(tmp_path: Path) -> None:
    _fit([_callback()], steps=4).save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(InputError, match=r"no state of PruningCallback\[\] that tells which chann"):
        _fit([_callback()], ckpt=tmp_path / "weights.ckpt")


def test_a_dense_checkpoint_is_loaded(tmp_path: Path) -> None:
    _fit([], steps=2).save_checkpoint(tmp_path / "dense.ckpt")
    pruning = _callback(every=100)
    _fit([pruning], ckpt=tmp_path / "dense.ckpt", steps=2)
    stored = torch.load(tmp_path / "dense.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(pruning.network.state_dict()["0.weight"], stored["model.0.weight"])


def test_other_arguments_at_resumption_are_an_error(tmp_path: Path) -> None:
    _fit([_callback()], steps=2).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(
        InputError, match="the state was saved with steps=3, this pruner has steps=4"
    ):
        _fit([_callback(steps=4)], ckpt=tmp_path / "run.ckpt")


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="has no argument 'step': pass network, or one of"):
        _callback(step=3)
    with pytest.raises(InputError, match=r"the budget 1.5 is above 1"):
        _callback(budget=1.5)
    with pytest.raises(InputError, match="there is no pruned network yet"):
        _ = _callback().network


def test_modules_that_do_not_fit() -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    class Holds(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.held = list(self.parameters())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.held, 0.1)

    class Shares(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.model[0]

    with pytest.raises(InputError, match=r"Two has no single child .* \['model', 'head'\]: pass"):
        _fit([_callback()], Two())
    with pytest.raises(InputError, match="has no module 'net' when fit begins; it has"):
        _fit([_callback(network="net")])
    with pytest.raises(InputError, match=r"no optimiser of Holds.configure_optimizers has param"):
        _fit([_callback()], Holds())
    shares = Shares()
    with pytest.raises(InputError, match=r"'model' in other places too, as 'first.weight'"):
        _fit([_callback(network="model")], shares)
    assert isinstance(shares.model, nn.Sequential)


def test_a_frozen_group_is_named() -> None:
    module = Classifier()
    module.model[3].requires_grad_(False)
    with pytest.raises(SaliencyError, match=r"no gradient reaches the group '3.conv1'"):
        _fit([_callback(budget=0.7)], module)


def test_strategies_that_can_not_be_cut() -> None:
    from halp_fx.training.lightning import _check_strategy

    with pytest.raises(InputError, match="FSDPStrategy spreads each weight over processes"):
        _check_strategy(lightning.strategies.FSDPStrategy())
    trainer = _trainer([], devices=2, strategy="ddp_spawn")
    with pytest.raises(InputError, match="still the dense one: use strategy='ddp'"):
        _check_strategy(trainer.strategy)


def test_the_older_package_serves_as_well() -> None:
    package = pytest.importorskip("pytorch_lightning")

    class Module(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
            images, classes = DATA[self.trainer.global_step]
            return nn.functional.cross_entropy(self.model(images), classes)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    pruning, module = _callback(every=1), Module()
    _trainer([pruning], 4, package).fit(module, _loader())
    assert module.model is pruning.network
    assert pruning.pruner is not None and pruning.pruner.done


def test_without_lightning_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halp_fx.training.lightning._Callback", object)
    with pytest.raises(DependencyError, match="needs PyTorch Lightning: pip install lightning"):
        _callback()
