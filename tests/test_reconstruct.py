"""Weights fitted to what the dense network computes: what is made up for, what is left alone."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor, fx, nn

import halp_fx
from halp_fx.errors import InputError, NothingToPruneError
from halp_fx.passes.trace import trace
from halp_fx.reconstruction import checking
from halp_fx.reconstruction import reconstruct as module_under_test
from halp_fx.reconstruction.layers import layers_of, rows_of
from halp_fx.report import render_markdown
from tests import oracle
from tests.networks import build
from tests.pruning import compile_within
from tests.reconstructible import Chain, Stream, doubled, far, planned, stream
from tests.strategies import budgets, specs

__all__: list[str] = []

pytestmark = pytest.mark.usefixtures("seeded")


def two_d(**options: Any) -> nn.Module:
    return nn.Conv2d(3, 8, 3, padding=1, **options)


CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: Chain(two_d(), nn.Conv2d(8, 5, 3)), (3, 8, 8)),
    "no bias": (lambda: Chain(two_d(bias=False), nn.Conv2d(8, 5, 3, bias=False)), (3, 8, 8)),
    "stride": (lambda: Chain(two_d(), nn.Conv2d(8, 5, 3, 2, 1)), (3, 9, 8)),
    "dilation": (lambda: Chain(two_d(), nn.Conv2d(8, 5, (3, 2), dilation=(1, 3))), (3, 9, 8)),
    "reflected": (
        lambda: Chain(two_d(), nn.Conv2d(8, 5, 3, padding="same", padding_mode="reflect")),
        (3, 8, 7),
    ),
    "norm": (lambda: Chain(two_d(bias=False), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(8)), (3, 8, 8)),
    "conv1d": (lambda: Chain(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 5, 3, 2)), (3, 20)),
    "conv3d": (lambda: Chain(nn.Conv3d(2, 8, 2), nn.Conv3d(8, 3, 2)), (2, 6, 5, 4)),
    "linear": (lambda: Chain(nn.Linear(6, 8), nn.Linear(8, 5), nn.BatchNorm1d(8)), (6,)),
    "tokens": (lambda: Chain(nn.Linear(6, 8), nn.Linear(8, 5)), (7, 6)),
    "flattened": (lambda: Chain(two_d(), nn.Linear(8 * 36, 5), flat=True), (3, 6, 6)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_other_channels_say_as_well_is_made_up_for(name: str) -> None:
    make, shape = CHAINS[name]
    model = oracle.randomize(make())
    doubled(model.get_submodule("first"))
    doubled(model.get_submodule("norm"))
    model = model.double().eval()
    data = [torch.randn(64, *shape, dtype=torch.float64) for _ in range(8)]
    pruned = planned(model, data[0][:1], {"first": range(4)})
    fresh = torch.randn(16, *shape, dtype=torch.float64)
    assert far(pruned, model, fresh) > 0.01
    fits = halp_fx.reconstruct(pruned, model, data, ridge=1e-9)
    assert far(pruned, model, fresh) < 1e-4
    assert set(fits) == {"second"}
    assert fits["second"].before > 0.01 > 1e-4 > fits["second"].after


def test_a_later_block_makes_up_for_one_that_was_dropped() -> None:
    model, data = stream()
    pruned = planned(model, data[0][:1], {"one": []})
    assert "one" not in dict(pruned.named_modules())
    plain = copy.deepcopy(pruned)
    halp_fx.recalibrate(plain, data)
    fits = halp_fx.reconstruct(pruned, model, data)
    fresh = torch.randn(64, 3, 10, 10)
    assert far(pruned, model, fresh) < 0.5 * far(plain, model, fresh)
    assert fits["last"].after < 0.5 * fits["last"].before


def test_batch_norms_give_the_mean_and_variance_of_the_dense_ones() -> None:
    model, data = stream()
    with torch.no_grad():  # what running statistics are on other data than those that fit
        model.get_submodule("tnorm").running_var.mul_(2)  # type: ignore[operator, union-attr]
        model.get_submodule("tnorm").running_mean.add_(0.3)  # type: ignore[operator, union-attr]
    pruned = planned(model, data[0][:1], {"stem": [0, 2, 3, 5], "two": range(0, 24, 2)})
    halp_fx.reconstruct(pruned, model, data)
    seen: dict[nn.Module, list[Tensor]] = {}
    for net in (model, pruned):
        layer = net.get_submodule("tnorm")
        layer.register_forward_hook(lambda m, i, out: seen.setdefault(m, []).append(out.clone()))
        with torch.no_grad():
            for batch in data:
                net(batch)
    own, dense = (torch.cat(seen[net.get_submodule("tnorm")]) for net in (pruned, model))
    dense = dense[:, ::2]
    torch.testing.assert_close(own.mean((0, 2, 3)), dense.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own.var((0, 2, 3)), dense.var((0, 2, 3)), rtol=0.01, atol=1e-4)


def test_in_train_mode_it_computes_the_same_as_in_eval_mode() -> None:
    """So that fine-tuning, whose batch norms see batches, begins where the fit ended."""
    model, _ = stream()  # with running statistics of other data
    data = [1.5 * torch.randn(256, 3, 10, 10) + 0.5]
    pruned = planned(model, data[0][:1], {"one": [], "two": range(12)})
    halp_fx.reconstruct(pruned, model, data)
    with torch.no_grad():
        evaluated, trained = pruned.eval()(data[0]), copy.deepcopy(pruned).train()(data[0])
    torch.testing.assert_close(trained, evaluated, rtol=0.01, atol=0.01)


def test_what_lost_nothing_stays_bit_for_bit() -> None:
    model, data = stream()
    pruned = planned(model, data[0][:1], {})
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    assert halp_fx.reconstruct(pruned, model, data) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())
    pruned = planned(model, data[0][:1], {"two": range(12)})
    fits = halp_fx.reconstruct(pruned, model, data)
    assert set(fits) == {"last", "fc"}
    state = pruned.state_dict()
    early = [n for n in state if n.split(".")[0] in ("stem", "snorm", "one", "onorm", "back")]
    assert len(early) == 13
    assert all(torch.equal(state[name], before[name]) for name in early)


def test_the_dense_network_and_the_modes_are_left_alone() -> None:
    model, data = stream()
    pruned = planned(model, data[0][:1], {"two": range(12)})
    pruned.train()
    pruned.get_submodule("snorm").eval()
    model.train()
    with oracle.snapshot(model):
        halp_fx.reconstruct(pruned, model, data)
    assert pruned.training
    assert not pruned.get_submodule("snorm").training
    assert all(p.requires_grad and p.grad is None for p in pruned.parameters())


def test_an_error_leaves_the_network_as_it_was() -> None:
    model, data = stream()
    pruned = planned(model, data[0][:1], {"stem": range(3), "two": range(12)})
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}

    def stop(done: int, total: int) -> None:
        assert done <= total
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halp_fx.reconstruct(pruned, model, data, progress=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


class Odd(nn.Module):
    """Layers that can't be fitted: one that runs twice, tied, hooked and computed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.tied, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.other.weight = self.tied.weight
        self.computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.norm = nn.BatchNorm2d(8)
        self.hooked = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.twice(F.relu(self.twice(F.relu(self.stem(x)))))
        x = self.other(F.relu(self.tied(x)))
        x = self.norm(self.norm(self.computed(x)))
        return self.fc(self.up(self.hooked(x)).mean((2, 3)))


def test_layers_that_cannot_be_fitted_stay() -> None:
    model = oracle.randomize(Odd()).eval()
    model.hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    data = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    pruned = halp_fx.compile(model, 0.85, data[0][:1], latency="analytic")
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    assert halp_fx.plan_of(pruned).predicted_ms < 0.86 * halp_fx.plan_of(pruned).dense_ms
    assert set(halp_fx.reconstruct(pruned, model, data)) == {"fc"}
    changed = {n for n, tensor in pruned.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == {"fc.weight", "fc.bias"}


class Sums(nn.Module):
    """Layers that end in sums of all kinds: `kind` says which."""

    def __init__(self, kind: str, width: int = 6) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.snorm = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, 20, 1)
        self.a, self.anorm = nn.Conv2d(20, width, 1), nn.BatchNorm2d(width)
        self.b, self.bnorm = nn.Conv2d(20, width, 1), nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.snorm(self.stem(x)))
        wide = F.relu(self.wide(x))
        if self.kind == "parallel":
            a, b = self.anorm(self.a(wide)), self.bnorm(self.b(wide))
            x = x + a + b
        elif self.kind == "in place":
            a = self.a(wide)
            b = F.relu_(self.b(wide))
            x = a + b
        elif self.kind == "changed":
            a = self.a(wide)
            x = x.mul_(2)
            x = a + x
        elif self.kind == "number":
            x = self.a(wide) + x.shape[1]
        elif self.kind == "broadcast":
            context = x.mean((2, 3), keepdim=True)
            x = self.a(wide) + context
        elif self.kind == "wider":
            x = self.a(wide.mean((2, 3), keepdim=True)) + x
        elif self.kind == "dropped out":
            x = x + self.drop(self.anorm(self.a(wide)))
        elif self.kind == "added in place":
            a = self.a(wide)
            a += x
            x = a
        else:
            x = x + self.anorm(self.a(wide))
        return self.fc(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("parallel", []),
        ("in place", ["b"]),
        ("changed", []),
        ("number", []),
        ("broadcast", ["a"]),
        ("wider", ["a"]),
        ("dropped out", ["a"]),
        ("added in place", ["a"]),
        ("plain", ["a"]),
    ],
)
def test_sums_of_all_kinds(kind: str, ends: list[str]) -> None:
    model = oracle.randomize(Sums(kind)).eval()
    data = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    halp_fx.recalibrate(model, data)
    pruned = planned(model, data[0][:1], {"wide": range(0, 20, 2)})
    plain = copy.deepcopy(pruned)
    halp_fx.recalibrate(plain, data)
    layers = layers_of(pruned, trace(model, data[0]).module, halp_fx.plan_of(pruned).kept)
    # An in-place ReLU between the branch and the sum is no idle node.
    expected = [] if kind == "in place" else ends
    assert [layer.name for layer in layers if layer.sum is not None] == expected
    with oracle.snapshot(model):
        fits = halp_fx.reconstruct(pruned, model, data)
    fresh = torch.randn(64, 3, 8, 8)
    assert "a" in fits
    assert far(pruned, model, fresh) < far(plain, model, fresh)


class Functional(nn.BatchNorm2d):
    """A batch norm that is traced as a function, as timm's with activations are."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum or 0.1, self.eps,
        )  # fmt: skip


def test_batch_norms_that_are_functions() -> None:
    results = []
    for kind in (nn.BatchNorm2d, Functional):
        torch.manual_seed(0)
        model = Sums("plain")
        model.snorm, model.anorm = kind(6), kind(6)
        model = oracle.randomize(model).eval()
        data = [torch.randn(32, 3, 8, 8) for _ in range(4)]
        pruned = planned(model, data[0][:1], {"stem": range(4), "wide": range(0, 20, 2)})
        fits = halp_fx.reconstruct(pruned, model, data)
        results.append((fits, pruned.state_dict(), far(pruned, model, data[0])))
    (fits, state, error_), (other_fits, other_state, other_error) = results
    assert fits.keys() == other_fits.keys()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other_state[name], rtol=1e-3, atol=1e-4)
    assert other_error == pytest.approx(error_, rel=1e-2)


class Called(nn.Module):
    """Convolutions and linear layers called as functions, with all kinds of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, (3, 2), groups=16)
        self.c, self.d, self.fc = nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(F.conv2d(x, self.a.weight, self.a.bias, 1, "same"))
        x = F.relu(F.conv2d(x, self.b.weight, None, (1, 1), [1, 2], (1, 1), x.shape[1]))
        x = F.relu(F.conv2d(x, self.c.weight, self.c.bias, stride=2, padding=1, dilation=1))
        x = F.conv2d(x, weight=self.d.weight)
        return F.linear(x.mean((2, 3)), self.fc.weight, self.fc.bias)


def test_layers_that_are_called_as_functions() -> None:
    model = oracle.randomize(Called()).eval()
    data = [torch.randn(32, 3, 10, 9) for _ in range(4)]
    pruned = planned(model, data[0][:1], {"a": range(0, 16, 2), "c": range(6)})
    plain = copy.deepcopy(pruned)
    layers = layers_of(pruned, trace(model, data[0]).module, halp_fx.plan_of(pruned).kept)
    run = fx.Interpreter(pruned, garbage_collect_values=False)
    with torch.no_grad():
        run.run(data[0][:4])
    for layer in layers:
        x, y = run.env[layer.node.all_input_nodes[0]], run.env[layer.node]
        rows = rows_of(layer, x, y, 30, torch.Generator().manual_seed(0))
        assert rows is not None
        weight = layer.map.weight.detach()
        shaped = weight.reshape(layer.map.groups, len(weight) // layer.map.groups, -1)
        computed = torch.einsum("rgd,god->rgo", rows.read, shaped)
        if layer.map.bias is not None:
            computed = computed + layer.map.bias.detach().reshape(shaped.shape[:2])
        torch.testing.assert_close(computed, rows.given, rtol=1e-4, atol=1e-5)
    assert [layer.name for layer in layers] == ["a", "b", "c", "d", "fc"]
    fits = halp_fx.reconstruct(pruned, model, data)
    assert {"c", "fc"} <= fits.keys()
    assert far(pruned, model, data[0]) < far(plain, model, data[0])


def test_channels_that_a_norm_nearly_switches_off_keep_their_size() -> None:
    model = oracle.randomize(Sums("plain")).eval()
    data = [torch.randn(32, 3, 8, 8) for _ in range(4)]
    halp_fx.recalibrate(model, data)
    with torch.no_grad():
        model.anorm.weight[:3] *= 1e-5
        model.anorm.weight[3] = 0
    pruned = planned(model, data[0][:1], {"stem": range(6), "wide": range(0, 20, 2)})
    plain = copy.deepcopy(pruned)
    halp_fx.recalibrate(plain, data)
    before: Any = pruned.get_submodule("a").weight
    sizes = before.detach().flatten(1).norm(dim=1)
    assert "a" in halp_fx.reconstruct(pruned, model, data)
    after: Any = pruned.get_submodule("a").weight
    torch.testing.assert_close(after.detach().flatten(1).norm(dim=1), sizes)
    assert far(pruned, model, data[0]) < far(plain, model, data[0])


def test_a_linear_layer_whose_norm_is_over_tokens() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 8)
            self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            return self.fc(self.norm(self.down(F.relu(self.up(x)))))

    model = oracle.randomize(Tokens()).eval()
    data = [torch.randn(32, 8, 6) for _ in range(4)]
    halp_fx.recalibrate(model, data)
    pruned = planned(model, data[0][:1], {"up": range(6)})
    plain = copy.deepcopy(pruned)
    halp_fx.recalibrate(plain, data)
    halp_fx.reconstruct(pruned, model, data)
    assert far(pruned, model, data[0]) < far(plain, model, data[0])


def test_shared_biases_and_norms_stay() -> None:
    model = Sums("parallel")
    model.a.bias = model.b.bias
    model.bnorm = model.anorm
    model = oracle.randomize(model).eval()
    data = [torch.randn(32, 3, 8, 8) for _ in range(2)]
    pruned = planned(model, data[0][:1], {"wide": range(10)})
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    assert set(halp_fx.reconstruct(pruned, model, data)) == {"fc"}
    for name in ("a.weight", "a.bias", "b.weight", "anorm.weight", "anorm.running_mean"):
        assert torch.equal(pruned.state_dict()[name], before[name]), name


def test_recalibrated_statistics_are_no_starting_point() -> None:
    model, data = stream()
    others = [3 * batch for batch in data]
    results = []
    for first in (False, True):
        pruned = planned(model, data[0][:1], {"two": range(12)})
        if first:
            halp_fx.recalibrate(pruned, others)
        halp_fx.reconstruct(pruned, model, data)
        results.append(far(pruned, model, data[0]))
    assert results[1] == pytest.approx(results[0], rel=0.05)


def test_samples_kept_for_checking_see_overfitting() -> None:
    """Positions of one image are much alike: others of it say nothing about a fit."""
    model = oracle.randomize(Chain(nn.Conv2d(3, 60, 1), nn.Conv2d(60, 5, 1))).eval()
    data = [torch.randn(12, 3, 1, 1).expand(12, 3, 20, 20).clone() for _ in range(2)]
    pruned = planned(model, data[0][:1], {"first": range(0, 60, 3)})
    plain = copy.deepcopy(pruned)
    fits = halp_fx.reconstruct(pruned, model, data, ridge=1e-9)
    fresh = torch.randn(400, 3, 1, 1)
    assert far(pruned, model, fresh) <= far(plain, model, fresh)
    assert fits["second"].after > 1e-5


def test_what_is_no_better_in_the_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stream()
    pruned = planned(model, data[0][:1], {"two": range(12)})
    plain = copy.deepcopy(pruned)
    halp_fx.recalibrate(plain, data)
    # Fits that claim to be better each time, and are not.
    errors = (0.5**i for i in itertools.count())
    monkeypatch.setattr(module_under_test, "error", lambda *_, **__: next(errors))
    monkeypatch.setattr(module_under_test, "solve", lambda _, weight, **__: weight + 9)
    assert halp_fx.reconstruct(pruned, model, data) == {}
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name])


def test_more_minibatches_than_usual_are_used() -> None:
    model, data = stream()
    read: list[int] = []
    many = [data[0][:4]] * 40
    model.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    pruned = planned(model, data[0][:1], {"two": range(12)})
    first = pruned.get_submodule("stem")
    keep = first.register_forward_hook(lambda module, inputs, output: read.append(len(output)))
    halp_fx.reconstruct(pruned, model, many, minibatches=36)
    keep.remove()
    # To see what it needs, with the others, in the end to recalibrate, and twice to check, on 9.
    assert len(read) == 1 + 2 * 36 + 2 * 9


def test_single_samples_whose_norm_reads_one_value() -> None:
    class Pooled(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.pnorm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.snorm(self.stem(x)))
            x = x + self.lnorm(self.last(F.relu(self.tnorm(self.two(x)))))
            return self.fc(self.pnorm(x.mean((2, 3))))

    model = oracle.randomize(Pooled()).eval()
    data = [torch.randn(1, 3, 10, 10) for _ in range(12)]
    pruned = planned(model, data[0], {"two": range(12)})
    assert "last" in halp_fx.reconstruct(pruned, model, data)


def test_outputs_that_are_not_numbers_do_not_decide() -> None:
    class Masked(Stream):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return torch.cat([y, torch.full_like(y, -torch.inf)], 1)

    model = oracle.randomize(Masked()).eval()
    data = [torch.randn(16, 3, 10, 10) for _ in range(4)]
    halp_fx.recalibrate(model, data)
    pruned = planned(model, data[0][:1], {"two": range(12)})
    assert "last" in halp_fx.reconstruct(pruned, model, data)


def test_a_fit_whose_outputs_overflow_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stream()
    pruned = planned(model, data[0][:1], {"two": range(12)})
    before = copy.deepcopy(pruned)
    halp_fx.recalibrate(before, data)
    run = module_under_test._Reconstruction.run

    def overflowing(self: Any, tell: Any) -> Any:
        found = run(self, tell)
        pruned.get_parameter("fc.weight").fill_(torch.inf)
        return found

    monkeypatch.setattr(module_under_test._Reconstruction, "run", overflowing)
    assert halp_fx.reconstruct(pruned, model, data) == {}
    for name, value in before.state_dict().items():
        torch.testing.assert_close(pruned.state_dict()[name], value, msg=name)


def test_norms_are_checked_where_no_layer_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = stream()
    pruned = planned(model, data[0][:1], {"two": range(12)})
    before = copy.deepcopy(pruned)
    halp_fx.recalibrate(before, data)
    checked: list[bool] = []

    def no_nearer(network: Any, dense: Any, batches: Any) -> float:
        checked.append(True)
        return 1.0

    monkeypatch.setattr(module_under_test._Reconstruction, "_fit", lambda self, layer: None)
    monkeypatch.setattr(checking, "_distance", no_nearer)
    assert halp_fx.reconstruct(pruned, model, data) == {}
    assert len(checked) == 2
    for name, value in before.state_dict().items():
        torch.testing.assert_close(pruned.state_dict()[name], value, msg=name)


def test_random_numbers_of_the_caller_stay() -> None:
    class Noisy(Stream):
        def forward(self, x: Tensor) -> Any:
            random.random()
            return super().forward(x)

    model = oracle.randomize(Noisy()).eval()
    data = [torch.randn(16, 3, 10, 10) for _ in range(4)]
    pruned = planned(model, data[0][:1], {"two": range(12)})
    states = random.getstate(), torch.get_rng_state()
    halp_fx.reconstruct(pruned, model, data)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_single_samples_and_autocast() -> None:
    model, data = stream()
    singles = [image[None] for image in torch.cat(data)[:24]]
    pruned = planned(model, data[0][:1], {"stem": range(4), "two": range(12)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fits = halp_fx.reconstruct(pruned, model, singles)
    plain = planned(model, data[0][:1], {"stem": range(4), "two": range(12)})
    halp_fx.recalibrate(plain, data)
    assert "last" in fits
    assert far(pruned, model, data[0]) < far(plain, model, data[0])


@settings(
    max_examples=60, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(spec=specs(), budget=budgets())
def test_random_networks_can_be_fitted(spec: dict[str, Any], budget: float) -> None:
    """Each fit is better on the rows kept for checking, and nothing breaks."""
    note(f"spec = {json.dumps(spec)}")
    model, inputs = build(spec)
    try:
        pruned = compile_within(model, budget, inputs)
    except NothingToPruneError:
        return
    data = [(oracle.rebatch(inputs, 8), None) for _ in range(2)]
    with oracle.snapshot(model):
        fits = halp_fx.reconstruct(pruned, model, data)
    assert all(fit.after <= fit.before for fit in fits.values())
    with torch.no_grad():
        output = pruned.eval()(*data[0][0])
    for path, tensor in oracle.flatten_outputs(output).items():
        assert torch.isfinite(tensor).all(), path


def test_compile_reconstructs_and_says_so() -> None:
    model, data = stream()
    stages: list[str] = []

    def tell(stage: str, done: int, total: int) -> None:
        if done == 0:
            stages.append(stage)
        assert done <= total

    common: dict[str, Any] = {"data": data, "latency": "analytic", "progress": tell}
    plain = halp_fx.compile(model, 0.6, data[0][:1], **common)
    assert "reconstruct" not in stages
    with oracle.snapshot(model):
        fitted = halp_fx.compile(model, 0.6, data[0][:1], **common, reconstruct=True)
    assert stages.count("reconstruct") == 1
    assert halp_fx.plan_of(fitted).units[0].tolist() == halp_fx.plan_of(plain).units[0].tolist()
    halp_fx.recalibrate(plain, data)
    fresh = torch.randn(64, 3, 10, 10)
    assert far(fitted, model, fresh) < far(plain, model, fresh)
    report = halp_fx.plan_of(fitted).report
    assert report["reconstructed_layers"] > 0
    assert report["reconstruction_error"] < report["reconstruction_error_before"]
    assert "reconstruction_error" in render_markdown(halp_fx.plan_of(fitted))


def test_candidates_are_compared_after_they_are_fitted() -> None:
    model, data = stream()
    common: dict[str, Any] = {"data": data, "latency": "analytic", "candidates": 3}
    plain = halp_fx.compile(model, 0.5, data[0][:1], **common)
    fitted = halp_fx.compile(model, 0.5, data[0][:1], **common, reconstruct=True)
    losses = [halp_fx.plan_of(net).report["candidate_losses"] for net in (plain, fitted)]
    assert len(losses[0]) == len(losses[1]) == 3
    assert min(losses[1]) < min(losses[0])


def test_a_network_that_was_saved_can_be_fitted(tmp_path: Any) -> None:
    model, data = stream()
    pruned = halp_fx.compile(model, 0.6, data[0][:1], latency="analytic")
    halp_fx.save(pruned, tmp_path / "net.halp")
    loaded = halp_fx.load(tmp_path / "net.halp")
    assert halp_fx.reconstruct(loaded, model, data) == halp_fx.reconstruct(pruned, model, data)
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor)


def test_half_precision() -> None:
    model, data = stream()
    model = model.to(torch.bfloat16)
    halves = [batch.to(torch.bfloat16) for batch in data]
    pruned = planned(model, halves[0][:1], {"two": range(12)})
    fits = halp_fx.reconstruct(pruned, model, halves)
    assert fits["last"].after < fits["last"].before
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in pruned.parameters())


def test_what_is_refused() -> None:
    model, data = stream()
    x = data[0][:1]
    pruned = planned(model, x, {"two": range(12)})
    with pytest.raises(InputError, match=r"has no plan: pass what halp_fx\.compile"):
        halp_fx.reconstruct(trace(model, x).module, model, data)
    with pytest.raises(InputError, match="data has no batches"):
        halp_fx.reconstruct(pruned, model, [])
    for none in (data[0], 5):
        with pytest.raises(InputError, match=r"data is a \w+: pass a list of minibatches"):
            halp_fx.reconstruct(pruned, model, none)  # type: ignore[arg-type]
    nan = data[1].clone()
    nan[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="minibatch 1 of data has inputs that are NaN"):
        halp_fx.reconstruct(pruned, model, [data[0], nan])
    with pytest.raises(InputError, match="minibatch 2 of data is empty"):
        halp_fx.reconstruct(pruned, model, [*data[:2], data[0][:0]])
    with pytest.raises(InputError, match="a minibatch that stem of the network can't be run on"):
        halp_fx.reconstruct(pruned, model, [data[0], torch.rand(2, 4, 10, 10)])
    with pytest.raises(InputError, match=r"two.weight of shape \(12, 6, 1, 1\), from which \(12,"):
        halp_fx.reconstruct(pruned, pruned, data)
    with pytest.raises(InputError, match=r"dense has stem\.weight of shape None"):
        halp_fx.reconstruct(pruned, nn.Conv2d(3, 6, 3), data)
    with pytest.raises(InputError, match="dense is a str"):
        halp_fx.reconstruct(pruned, "net", data)  # type: ignore[arg-type]
    whole = nn.Sequential(model)
    core = halp_fx.compile_core(whole, "0", 0.6, x, latency="analytic")
    with pytest.raises(InputError, match="Sequential has a core that was pruned"):
        halp_fx.reconstruct(core, whole, data)  # type: ignore[arg-type]
    for wrong in ({"minibatches": 0}, {"minibatches": True}, {"ridge": 0}, {"ridge": "small"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            halp_fx.reconstruct(pruned, model, data, **wrong)  # type: ignore[arg-type]
    for given_ in ({}, {"data": iter(data)}):
        with pytest.raises(InputError, match="reconstruct=True fits weights to what the network"):
            halp_fx.compile(model, 0.5, x, latency="analytic", reconstruct=True, **given_)
    with pytest.raises(InputError, match="reconstruct is 'yes'"):
        halp_fx.compile(model, 0.5, x, data=data, reconstruct="yes")  # type: ignore[arg-type]


def test_a_small_last_minibatch_does_no_harm() -> None:
    """It is too small to check by: with it and without, the networks are fitted alike."""
    model, data = stream()
    x = data[0][:1]
    units = {"two": range(12)}
    whole, tailed = planned(model, x, units), planned(model, x, units)
    batches = [*data, *data][:3]
    halp_fx.reconstruct(whole, model, batches)
    # What would mislead a check: nothing but zeros.
    fits = halp_fx.reconstruct(tailed, model, [*batches, torch.zeros_like(data[0][:1])])
    assert fits
    held_out = torch.cat(data)
    assert far(tailed, model, held_out) < 1.2 * far(whole, model, held_out)


@pytest.mark.parametrize("kind", ["module", "function", "flattened"])
def test_fits_behind_a_dropout_hold_under_it(kind: str) -> None:
    """Weights that cancel each other fit as well, but not where half of the inputs are dropped."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 24), nn.Linear(24, 16)
            self.last, self.dropout = nn.Linear(16, 5), nn.Dropout(0.5)
            self.flat = nn.Flatten()

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.second(F.relu(self.first(x))))
            if kind == "function":
                return self.last(F.dropout(x, 0.5, self.training))
            x = self.dropout(x)
            return self.last(self.flat(x) if kind == "flattened" else x)

    model = Dropped().eval()
    data = [torch.randn(256, 6) for _ in range(8)]
    pruned = planned(model, data[0][:1], {"second": range(8)})
    before = copy.deepcopy(pruned)
    assert "last" in halp_fx.reconstruct(pruned, model, data, ridge=1e-7)
    x = torch.randn(4096, 6)

    def off(network: nn.Module, *, training: bool) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return float((network.train(training)(x) - model.eval()(x)).square().mean())

    assert off(pruned, training=False) < off(before, training=False)
    assert off(pruned, training=True) < 1.1 * off(before, training=True)
