"""Prune while PyTorch Lightning trains: a callback around `GradualPruner`."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from halp_fx.budget import Budget, parse_budget
from halp_fx.errors import DependencyError, InputError
from halp_fx.training.pruner import GradualPruner
from halp_fx.training.surgery import adopt

__all__ = ["PruningCallback"]

_SHARDED = {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}
_OPTIONS = tuple(
    name
    for name in inspect.signature(GradualPruner).parameters
    if name not in ("model", "budget", "example_inputs", "wrap")
)


def _base() -> Any:
    """Lightning's class for callbacks: of the package that is in use, else one that is there."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    return object


_Callback: Any = _base()


class PruningCallback(_Callback):  # type: ignore[misc]  # Lightning may not be there
    """Prunes a network of a LightningModule to a latency budget while a Trainer trains it.

    When `fit` begins, the network gives its place in the module to a `torch.fx.GraphModule` with
    the same weights, which shrinks at milestones; `training_step` goes on calling it by the same
    attribute. Scores are taken from the gradients before each optimiser step: unscaled, not yet
    clipped, and after the last of `accumulate_grad_batches`. Optimisers, learning rate schedules
    and the copies of Lightning's weight averaging stay valid. Checkpoints hold the state:
    `Trainer.fit(..., ckpt_path=...)` goes on in the middle of the schedule.

    Args:
        budget: as in `halp_fx.compile`.
        example_inputs: as in `halp_fx.compile`, of the network.
        network: attribute of the LightningModule that holds the network, as "model" or
            "student.backbone". None: its only child with parameters.
        options: the other arguments of `GradualPruner`, besides `wrap`: steps, every, latency ...

    Raises:
        DependencyError: neither `lightning` nor `pytorch_lightning` is installed.
        InputError: an argument is wrong. When `fit` begins: the module, its optimisers, other
            callbacks or the strategy don't go with pruning (`HalpError`: as `GradualPruner`).

    Example:
        >>> pruning = PruningCallback(0.5, inputs, network="model", steps=30)  # doctest: +SKIP
        >>> lightning.Trainer(callbacks=[pruning]).fit(module, loader)  # doctest: +SKIP
        >>> halp_fx.export_onnx(pruning.network, "net.onnx")  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: float | str | Budget,
        example_inputs: Any = None,
        *,
        network: str | None = None,
        **options: Any,
    ) -> None:
        if _Callback is object:
            raise DependencyError("PruningCallback needs PyTorch Lightning: pip install lightning")
        super().__init__()
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise InputError(
                f"PruningCallback has no argument {unknown[0]!r}: pass network, or one of "
                f"GradualPruner's, {', '.join(_OPTIONS)}"
            )
        parse_budget(budget)
        self.pruner: GradualPruner | None = None  # from the beginning of `fit` on
        self._budget, self._inputs, self._options = budget, example_inputs, options
        self._attribute = network
        self._backward = False  # whether this batch went backward
        self._stepped = False  # whether its gradients were scored and given to an optimiser

    @property
    def network(self) -> fx.GraphModule:
        """The network that shrinks.

        Raises:
            InputError: `fit` has not begun.
        """
        return self._started().network

    @property
    def state_key(self) -> str:
        return f"PruningCallback[{self._attribute or ''}]"

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state; the weights are in the checkpoint anyway."""
        state = {} if self.pruner is None else self.pruner.state_dict()
        state.pop("network", None)
        return state

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        _load_widths_first(pl_module)
        if stage == "fit":
            _check_strategy(trainer.strategy)
            self._start(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        _load_as_before(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        name = self._name_in(pl_module)
        for callback, average in _averages(trainer):
            if not isinstance(average.get_submodule(name), fx.GraphModule):
                raise InputError(
                    f"{type(callback).__name__} has copied the module before its network was "
                    "replaced: put PruningCallback first, Trainer(callbacks=[pruning, averaging])"
                )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pruner, name = self._started(), self._name_in(pl_module)
        if not self._optimizers(trainer):
            raise InputError(
                f"no optimiser of {type(pl_module).__name__}.configure_optimizers has parameters "
                f"of {name!r}: take them there, as self.{name}.parameters(), not in __init__, "
                "since the network that is pruned is a copy"
            )
        needed = pruner.steps * pruner.every - pruner._count
        there = trainer.estimated_stepping_batches - trainer.global_step
        if there < needed and not (pruner.done or trainer.fast_dev_run):
            warnings.warn(
                f"halp_fx: the network is within its budget after {needed} more optimiser steps "
                f"(steps={pruner.steps} * every={pruner.every} in all), and the Trainer ends after "
                f"{there}: lower steps or every, or train longer",
                stacklevel=2,
            )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:  # noqa: ARG002
        self._backward = self._stepped = False

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        self._backward = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:  # noqa: ARG002
        # Here gradients are summed up over accumulated batches, unscaled, and not yet clipped.
        if self._backward and not self._stepped and self._trains(optimizer):
            self._started().after_backward(_scale_left(trainer, optimizer))
            self._stepped = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int  # noqa: ARG002
    ) -> None:  # fmt: skip
        if not self._stepped:
            return
        pruner, name = self._started(), self._name_in(pl_module)
        copies = [average.get_submodule(name) for _, average in _averages(trainer)]
        if pruner.step(self._optimizers(trainer), ema=copies):
            _wrap_again(trainer.strategy, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        pruner = self._started()
        if not (pruner.done or trainer.fast_dev_run):
            warnings.warn(
                f"halp_fx: training ended after {pruner.milestone} of {pruner.steps} milestones, "
                "so the network is not within its budget yet: train on, or lower steps or every",
                stacklevel=2,
            )

    def _started(self) -> GradualPruner:
        if self.pruner is None:
            raise InputError("there is no pruned network yet: it is made when Trainer.fit begins")
        return self.pruner

    def _name_in(self, pl_module: nn.Module) -> str:
        """The attribute that holds the network."""
        kind = type(pl_module).__name__
        trained = [n for n, child in pl_module.named_children() if list(child.parameters())]
        if self._attribute is None:
            if len(trained) == 1:
                return trained[0]
            raise InputError(
                f"{kind} has no single child with parameters, but {trained}: pass the attribute "
                "that holds the network to prune, as network='model'"
            )
        try:
            pl_module.get_submodule(self._attribute)
        except AttributeError as error:
            raise InputError(
                f"{kind} has no module {self._attribute!r} when fit begins; it has {trained}: pass "
                "one of them as network=, made in __init__ and not in configure_model"
            ) from error
        return self._attribute

    def _start(self, trainer: Any, pl_module: Any) -> GradualPruner:
        """Put the network that shrinks in the place of the module's own, if it isn't there yet."""
        name = self._name_in(pl_module)
        model = pl_module.get_submodule(name)
        if self.pruner is not None and model is self.pruner.network:
            return self.pruner
        model.to(trainer.strategy.root_device)  # where Lightning moves it soon, and is measured
        self.pruner = GradualPruner(model, self._budget, self._inputs, **self._options)
        _replace(pl_module, name, self.pruner.network)
        mine = {id(p) for p in model.parameters()}
        shared = [n for n, p in pl_module.named_parameters() if id(p) in mine]
        if shared:
            _replace(pl_module, name, model)
            self.pruner = None
            raise InputError(
                f"{type(pl_module).__name__} has parameters of {name!r} in other places too, as "
                f"{shared[0]!r}, which would stay with the dense network: keep them in one place"
            )
        return self.pruner

    def _trains(self, optimizer: torch.optim.Optimizer) -> bool:
        own = {id(p) for p in self.network.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _optimizers(self, trainer: Any) -> list[torch.optim.Optimizer]:
        """Those that train the network."""
        return [each for each in trainer.optimizers if self._trains(each)]

    def _take_in(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Give the network the widths of a checkpoint whose weights are loaded next."""
        prefix = f"{self._name_in(pl_module)}."
        # With weight averaging, "state_dict" holds the averages.
        weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state:
            self._check_widths(own)
            return
        pruner = self._start(trainer, pl_module)
        pruner.load_state_dict({**state, "network": own})
        for _, average in _averages(trainer):
            held = average.get_submodule(prefix[:-1])
            if isinstance(held, fx.GraphModule):
                adopt(held, copy.deepcopy(pruner.network))

    def _check_widths(self, weights: Mapping[str, torch.Tensor]) -> None:
        present = {} if self.pruner is None else self.pruner.network.state_dict()
        for name, tensor in present.items():
            if name in weights and weights[name].shape != tensor.shape:
                raise InputError(
                    f"the checkpoint has {name} in the shape {tuple(weights[name].shape)}, the "
                    f"network {tuple(tensor.shape)}, and no state of {self.state_key} that tells "
                    "which channels are left: save it with this callback in the Trainer, and "
                    "without save_weights_only"
                )


def _replace(pl_module: nn.Module, name: str, network: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(pl_module.get_submodule(parent), leaf, network)


@dataclass
class _WidthsFirst:
    """Lets callbacks see a checkpoint before its weights go into the module.

    Lightning restores callbacks after the weights, which would not fit then. What it calls before
    is the module's own `on_load_checkpoint`.
    """

    pl_module: Any
    own: Any  # the module's method
    attribute: Any  # what the instance had of that name, or None

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        trainer = self.pl_module.trainer
        for callback in trainer.callbacks:
            if isinstance(callback, PruningCallback):
                callback._take_in(trainer, self.pl_module, checkpoint)
        self.own(checkpoint)


def _load_widths_first(pl_module: Any) -> None:
    attribute = vars(pl_module).get("on_load_checkpoint")
    if not isinstance(attribute, _WidthsFirst):
        own = pl_module.on_load_checkpoint
        pl_module.on_load_checkpoint = _WidthsFirst(pl_module, own, attribute)


def _load_as_before(pl_module: Any) -> None:
    hook = vars(pl_module).get("on_load_checkpoint")
    if isinstance(hook, _WidthsFirst):
        del pl_module.on_load_checkpoint
        if hook.attribute is not None:
            pl_module.on_load_checkpoint = hook.attribute


def _check_strategy(strategy: Any) -> None:
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    if kinds & _SHARDED:
        raise InputError(
            f"{type(strategy).__name__} spreads each weight over processes, which can't be cut: "
            "use strategy='ddp' or a single device"
        )
    if type(getattr(strategy, "launcher", None)).__name__ == "_MultiProcessingLauncher":
        raise InputError(
            "strategies that spawn or fork give the weights back to a process whose network is "
            "still the dense one: use strategy='ddp', or torchrun"
        )


def _scale_left(trainer: Any, optimizer: Any) -> float:
    """What gradients are still multiplied by: fused optimisers take the scale off themselves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and fused else 1.0


def _wrap_again(strategy: Any, pl_module: Any) -> None:
    """Put a new DistributedDataParallel around a module with new parameters."""
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model = pl_module
        strategy.configure_ddp()


def _averages(trainer: Any) -> list[tuple[Any, nn.Module]]:
    """Callbacks that hold an averaged copy of the module (WeightAveraging and the like)."""
    held = [(each, getattr(each, "_average_model", None)) for each in trainer.callbacks]
    return [
        (each, average.module if isinstance(average, AveragedModel) else average)
        for each, average in held
        if isinstance(average, nn.Module)
    ]
