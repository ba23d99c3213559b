"""Cuts of weights, optimiser states and averaged copies, held to training the masked network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

from halp_fx.errors import InputError
from halp_fx.training import GradualPruner
from halp_fx.training.surgery import cuts_between
from tests.oracle import assert_exact
from tests.state import named_tensors
from tests.training_networks import batches, example, network

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
}


def test_cuts_are_relative_to_what_was_left() -> None:
    before = {"w": (torch.tensor([1, 4, 6]), None), "v": (None,)}
    after = {"w": (torch.tensor([1, 6]), torch.tensor([0])), "v": (None,)}
    cuts = cuts_between(before, after)
    assert torch.equal(cuts["w"][0], torch.tensor([0, 2]))  # type: ignore[arg-type]
    assert torch.equal(cuts["w"][1], torch.tensor([0]))  # type: ignore[arg-type]
    assert cuts["v"] == (None,)


def _train_step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def _groups(net: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups with their own options."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    return [
        {"params": decayed},
        {"params": [p for p in net.parameters() if p.ndim < 2], "lr": 0.002},
    ]


def _zero_columns(net: nn.Module, cuts: Any) -> None:
    """The weights that read removed channels are zero: written apart from the code under test."""
    for name, tensor in named_tensors(net).items():
        if tensor.ndim > 1 and cuts[name][1] is not None:
            removed = np.setdiff1d(np.arange(tensor.shape[1]), cuts[name][1].numpy())
            tensor.data[:, torch.from_numpy(removed)] = 0.0


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_training_goes_on_as_the_masked_network_would(kind: str) -> None:
    """Survivors get the very updates that they get in the uncut network with zeros in place."""
    model = network().double()
    pruner = GradualPruner(
        model, 0.4, example().double(), steps=2, every=3, latency="analytic", drop_blocks=False
    )
    optimizer = OPTIMIZERS[kind](_groups(pruner.network))
    data = batches(9, dtype=torch.float64)
    for t, batch in enumerate(data):
        nn.functional.cross_entropy(pruner.model(batch[0]), batch[1]).backward()
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        before, dense, dense_optimizer = pruner.plan, *copy.deepcopy((pruner.network, optimizer))
        if not pruner.step(optimizer):
            continue
        cuts = cuts_between(before.kept, pruner.plan.kept)
        assert_exact(dense, pruner.network, (example().double(),), kept=cuts)
        ours, own = copy.deepcopy((pruner.network, optimizer))
        assert [len(g["params"]) for g in own.param_groups] == [
            len(g["params"]) for g in dense_optimizer.param_groups
        ]
        assert [g["lr"] for g in own.param_groups] == [
            g["lr"] for g in dense_optimizer.param_groups
        ]
        for later in data[t : t + 3]:
            _zero_columns(dense, cuts)
            _train_step(dense, dense_optimizer, later)
            _train_step(ours, own, later)
        trained = named_tensors(ours)
        for name, tensor in named_tensors(dense).items():
            for dim, index in enumerate(cuts[name]):
                tensor = tensor if index is None else tensor.index_select(dim, index)
            torch.testing.assert_close(trained[name], tensor, rtol=1e-7, atol=1e-9)
    assert pruner.done
    assert pruner.plan.predicted_ms <= 0.4 * pruner.plan.dense_ms


def _trained(pruner: GradualPruner, optimizer: Any, count: int, ema: Any = None) -> list[bool]:
    cuts = []
    for images, classes in batches(count):
        nn.functional.cross_entropy(pruner.model(images), classes).backward()
        pruner.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update_parameters(pruner.network)
        cuts.append(pruner.step(optimizer, ema=ema))
    return cuts


def _pruner(**options: Any) -> GradualPruner:
    settings = {"steps": 2, "every": 2, "latency": "analytic", **options}
    return GradualPruner(network(), 0.4, example(), **settings)


def test_an_averaged_copy_is_cut_with_its_own_values() -> None:
    pruner = _pruner(drop_blocks=False)
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    ema = AveragedModel(pruner.network, use_buffers=True)
    _trained(pruner, optimizer, 1, ema)
    before, plan = copy.deepcopy(ema.module), pruner.plan
    pruner.finish(optimizer, ema=ema)
    assert_exact(before, ema.module, (example(),), kept=cuts_between(plan.kept, pruner.plan.kept))
    assert int(ema.n_averaged) == 1
    _trained(pruner, optimizer, 2, ema)
    assert int(ema.n_averaged) == 3


def test_a_dropped_branch_leaves_the_optimiser_and_its_constant_stays() -> None:
    pruner = GradualPruner(
        network(), 0.12, example(), steps=6, every=1, latency="analytic", min_share=0.3
    )
    optimizer = torch.optim.AdamW(pruner.network.named_parameters(), 1e-3)
    ema = AveragedModel(pruner.network)
    seen: dict[str, torch.Tensor] = {}
    for _ in range(6):
        _trained(pruner, optimizer, 1, ema)
        state = pruner.network.state_dict()
        for name, constant in seen.items():
            assert state[name].flatten()[0].isfinite() and state[name].numel() <= constant.numel()
            assert torch.isin(state[name], constant).all()
        seen = {k: v.clone() for k, v in state.items() if k.startswith("_constants.")}
        assert set(ema.module.state_dict()) == set(state)
    assert seen, "the budget was meant to drop a branch"
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in pruner.network.parameters()]
    names = [n for group in optimizer.param_groups for n in group["param_names"]]
    assert names == [n for n, _ in pruner.network.named_parameters()]
    assert set(optimizer.state) == set(held)
    assert all(v["exp_avg"].shape == p.shape for p, v in optimizer.state.items())
    for name, tensor in named_tensors(ema.module).items():
        assert tensor.shape == named_tensors(pruner.network)[name].shape


def test_factored_moments_are_cut_where_they_have_the_dim() -> None:
    pruner = _pruner()
    optimizer = torch.optim.Adafactor(pruner.model.parameters(), 1e-3)
    assert any(_trained(pruner, optimizer, 4))
    for p, state in optimizer.state.items():
        if "row_var" in state:
            assert state["row_var"].shape == (*p.shape[:-1], 1)
            assert state["col_var"].shape == (*p.shape[:-2], 1, p.shape[-1])
    _trained(pruner, optimizer, 2)


def test_a_schedule_of_learning_rates_goes_on() -> None:
    pruner = _pruner()
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(4):
        _trained(pruner, optimizer, 1)
        scheduler.step()
    assert pruner.done
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)
    before = {n: p.detach().clone() for n, p in pruner.network.named_parameters() if p.ndim > 1}
    _trained(pruner, optimizer, 1)
    assert not [n for n, p in before.items() if torch.equal(p, pruner.network.get_parameter(n))]


def test_pending_gradients_are_cut_too() -> None:
    pruner = _pruner(drop_blocks=False)
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    images, classes = batches(1)[0]
    nn.functional.cross_entropy(pruner.model(images), classes).backward()
    pruner.after_backward()
    old = {n: p.grad.clone() for n, p in pruner.network.named_parameters() if p.grad is not None}
    assert pruner.finish(optimizer)
    for name, p in pruner.network.named_parameters():
        expected = old[name]
        for dim, index in enumerate(pruner.plan.kept[name]):
            expected = expected if index is None else expected.index_select(dim, index)
        assert p.grad is not None and torch.equal(p.grad, expected)


def test_the_network_keeps_its_identity_modes_flags_and_format() -> None:
    model = network()
    pruner = _pruner()
    held = pruner.network
    held.to(memory_format=torch.channels_last)
    held.get_submodule("1").eval()
    held.get_parameter("11.bias").requires_grad_(False)
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    assert any(_trained(pruner, optimizer, 4))
    assert pruner.network is held and pruner.model is held and isinstance(held, fx.GraphModule)
    assert held.training and not held.get_submodule("1").training
    assert not held.get_parameter("11.bias").requires_grad
    weight = held.get_parameter("3.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert any(p.shape != shapes[n] for n, p in held.named_parameters())
    assert {n: p.shape for n, p in network().named_parameters()} == shapes


def test_an_optimiser_of_the_model_that_was_passed_is_an_error() -> None:
    model = network()
    pruner = GradualPruner(model, 0.4, example(), steps=1, every=1, latency="analytic")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match=r"SGD has no parameter of the network: build it from "):
        _trained(pruner, optimizer, 1)
    assert pruner.milestone == 0


def test_a_state_that_can_not_be_cut_is_an_error_before_anything_changes() -> None:
    pruner = _pruner()
    optimizer = torch.optim.LBFGS(pruner.model.parameters())
    images, classes = batches(1)[0]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(pruner.model(images), classes)
        loss.backward()
        return loss

    optimizer.step(closure)
    pruner.after_backward()
    before = {n: p.shape for n, p in pruner.network.named_parameters()}
    with pytest.raises(InputError, match=r"LBFGS: the state '\w+' of '0.weight' has the shape"):
        pruner.finish(optimizer)
    assert {n: p.shape for n, p in pruner.network.named_parameters()} == before


def test_an_average_of_another_network_is_an_error() -> None:
    pruner = _pruner()
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    with pytest.raises(InputError, match="ema holds a Sequential that is no copy of the network"):
        _trained(pruner, optimizer, 2, AveragedModel(network()))


def test_several_optimisers_are_carried_and_what_is_not_the_networks_stays() -> None:
    pruner = _pruner()
    other = nn.Linear(3, 2)
    wide = [p for p in pruner.model.parameters() if p.ndim > 1]
    narrow = [p for p in pruner.model.parameters() if p.ndim < 2]
    one = torch.optim.SGD([*wide, *other.parameters()], 0.1, momentum=0.9)
    two = torch.optim.Adam(narrow, 1e-3)
    for images, classes in batches(4):
        loss = nn.functional.cross_entropy(pruner.model(images), classes)
        (loss + other(torch.ones(1, 3)).square().sum()).backward()
        pruner.after_backward()
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
        pruner.step([one, two])
    assert pruner.done
    held = {id(p) for o in (one, two) for group in o.param_groups for p in group["params"]}
    assert held == {id(p) for net in (pruner.network, other) for p in net.parameters()}
    for optimizer, key in ((one, "momentum_buffer"), (two, "exp_avg_sq")):
        assert optimizer.state
        assert all(state[key].shape == p.shape for p, state in optimizer.state.items())


class _Lookahead(torch.optim.Optimizer):
    """As timm's: it shares the groups of the optimiser inside, and keeps all states there."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([torch.zeros(1)], {})
        self._base_optimizer = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self._base_optimizer.step(closure)


def test_the_state_of_an_optimiser_in_a_wrapper_is_carried() -> None:
    ends = []
    for wrapped in (False, True):
        pruner = _pruner()
        inner = torch.optim.AdamW(pruner.model.parameters(), 1e-2)
        assert any(_trained(pruner, _Lookahead(inner) if wrapped else inner, 6))
        held = [p for group in inner.param_groups for p in group["params"]]
        assert set(inner.state) == set(held)
        assert all(state["exp_avg"].shape == p.shape for p, state in inner.state.items())
        assert {float(state["step"]) for state in inner.state.values()} == {6.0}
        ends.append(pruner.network.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_timm_s_lookahead() -> None:
    optim = pytest.importorskip("timm.optim")
    pruner = _pruner()
    inner = torch.optim.SGD(pruner.model.parameters(), 0.05, momentum=0.9)
    assert any(_trained(pruner, optim.Lookahead(inner, k=1), 4))
    held = [p for group in inner.param_groups for p in group["params"]]
    assert set(inner.state) == set(held)
    for p, state in inner.state.items():
        assert state["momentum_buffer"].shape == state["lookahead_slow_buff"].shape == p.shape


def _with_state(make: Callable[[torch.Tensor], Any]) -> tuple[GradualPruner, torch.optim.Optimizer]:
    """A pruner that is scored, and an optimiser with a state of this kind for each weight."""
    pruner = _pruner(drop_blocks=False)
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    images, classes = batches(1)[0]
    nn.functional.cross_entropy(pruner.model(images), classes).backward()
    pruner.after_backward()
    for p in pruner.network.parameters():
        optimizer.state[p]["own"] = make(p)
    return pruner, optimizer


def test_states_in_dicts_are_cut_too() -> None:
    pruner, optimizer = _with_state(lambda p: {"moments": (p.detach() * 2, 3), "step": 7})
    held = optimizer.state[pruner.network.get_parameter("0.weight")]["own"]
    assert pruner.finish(optimizer)
    assert held["moments"][0].shape[0] == 8  # the one from before is left as it was
    for p in pruner.network.parameters():
        own = optimizer.state[p]["own"]
        assert torch.equal(own["moments"][0], p.detach() * 2)
        assert own["moments"][1] == 3 and own["step"] == 7


def test_states_in_dicts_that_can_not_be_cut_are_an_error() -> None:
    pruner, optimizer = _with_state(lambda p: {"factor": torch.ones(p.numel() + 1)})
    with pytest.raises(InputError, match=r"the state 'own' of '0.weight', 'factor', has the shape"):
        pruner.finish(optimizer)

    class Preconditioner:
        def __init__(self, p: torch.Tensor) -> None:
            self.factor = torch.ones_like(p)

    pruner, optimizer = _with_state(Preconditioner)
    with pytest.raises(InputError, match=r"'own' of '0.weight' is a Preconditioner that holds ten"):
        pruner.finish(optimizer)
    assert pruner.milestone == 0


def test_synchronised_batch_norm_stays() -> None:
    pruner = _pruner(drop_blocks=False)
    nn.SyncBatchNorm.convert_sync_batchnorm(pruner.network)
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1, momentum=0.9)
    ema = AveragedModel(pruner.network)
    assert any(_trained(pruner, optimizer, 3, ema))
    other = _pruner(drop_blocks=False)
    nn.SyncBatchNorm.convert_sync_batchnorm(other.network)
    other.load_state_dict(pruner.state_dict())
    for net in (pruner.network, ema.module, other.network):
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    plain = _pruner(drop_blocks=False)
    _trained(plain, torch.optim.SGD(plain.model.parameters(), 0.1, momentum=0.9), 3)
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, pruner.network.state_dict()[name])
