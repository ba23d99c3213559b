"""trace: what a graph can't hold of `forward` is seen, and refused, held whole or told."""

from __future__ import annotations

import builtins
import copy
import random
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import halp_fx
from halp_fx.errors import TraceError
from halp_fx.idle import acts_in_training_only, is_idle
from halp_fx.passes.rules.checkpointing import in_checkpoint
from halp_fx.passes.trace import trace
from tests import oracle

__all__: list[str] = []


class Body(nn.Module):
    """Two convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))))


Forward = Callable[[Any, Tensor], Any]


def network(function: Forward) -> nn.Module:
    class Net(Body):
        def forward(self, x: Tensor) -> Any:
            return function(self, x)

    torch.manual_seed(0)
    return oracle.randomize(Net()).eval()


def silent(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives that may not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return function(*args, **kwargs)


# The batch.


def if_there_are_several(self: Any, x: Tensor) -> Any:
    y = self.features(x)
    if x.shape[0] > 1:
        y = y - y.mean(0, keepdim=True)
    return self.head(y)


def if_even(self: Any, x: Tensor) -> Any:
    return self.head(self.features(x)) * (2.0 if len(x) % 2 == 0 else 1.0)


def image_by_image(self: Any, x: Tensor) -> Any:
    return torch.stack([self.head(one[None])[0] for one in self.features(x)])


def unbound(self: Any, x: Tensor) -> Any:
    return [self.head(one[None]) for one in self.features(x).unbind(0)]


def split(self: Any, x: Tensor) -> Any:
    return torch.cat([self.head(one) for one in self.features(x).split(1)])


def by_an_integer(self: Any, x: Tensor) -> Any:
    return self.head(self.features(x)) * (1 + len(x) // 4)


def named_by_a_list(self: Any, x: Tensor) -> Any:
    return self.head(self.features(x)) * [2.0, 1.0][int(x.shape[0] > 1)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("forward", [if_there_are_several, if_even, image_by_image, unbound, split])
def test_a_forward_that_decides_by_the_batch_is_told(forward: Forward, count: int) -> None:
    model, x = network(forward), torch.randn(count, 3, 8, 8)
    match = r"by the first dim of its inputs, .*\(.*\.py.*for that of the example alone: with \d"
    with pytest.warns(UserWarning, match=match) as told:
        traced = trace(model, x)
    assert {one.filename for one in told} == {__file__}
    with torch.no_grad():
        oracle.assert_close(traced.module(x), model(x), tolerance=1e-6)


@pytest.mark.parametrize("forward", [by_an_integer, named_by_a_list])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_numbers_that_depend_on_the_batch_are_no_constants(forward: Forward, count: int) -> None:
    try:
        traced = trace(network(forward), torch.randn(count, 3, 8, 8))
    except TraceError as error:
        assert "depends on the batch" in str(error)
        return
    for other in (1, 2, 3, 4, 8):
        x = torch.randn(other, 3, 8, 8)
        with torch.no_grad():
            oracle.assert_close(traced.module(x), network(forward)(x), tolerance=1e-6)


def test_further_inputs_do_not_hide_the_batch() -> None:
    class Timed(Body):
        def forward(self, x: Tensor, t: Any) -> Any:
            y = self.features(x)
            if x.shape[0] > 1:
                y = y - y.mean(0, keepdim=True)
            return self.head(y)

    model = oracle.randomize(Timed()).eval()
    for t in (None, 3, torch.tensor(2.0), torch.randn(1, 3, 8, 8)):
        with pytest.warns(UserWarning, match="by the first dim of its inputs"):
            trace(model, (torch.randn(4, 3, 8, 8), t))


def test_views_in_the_first_dim_may_be_looped_over() -> None:
    class Views(Body):
        def forward(self, x: Tensor) -> Any:
            return torch.stack([self.head(self.features(view)) for view in x]).mean(0)

    model = oracle.randomize(Views()).eval()
    x = torch.randn(3, 2, 3, 8, 8)
    with pytest.warns(UserWarning, match="by the first dim of its inputs"):
        pruned = halp_fx.compile(model, 0.6, x, latency="analytic")
    assert len(pruned.get_parameter("first.weight")) < 8
    oracle.assert_exact(model, pruned, (x,), batches=[3])


def test_a_module_that_decides_by_the_batch_is_held_whole() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True) if x.shape[0] > 1 else x

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Centred(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 3))
    x = torch.randn(2, 3, 9, 9)
    traced = trace(model, x)
    assert list(traced.opaque) == ["1"] and "depends on the batch" in traced.opaque["1"]
    pruned = halp_fx.compile(model, 0.7, x, latency="analytic")
    assert len(pruned.get_parameter("0.weight")) == 8 > len(pruned.get_parameter("2.weight"))
    for count in (1, 3):
        oracle.assert_exact(model, pruned, (torch.randn(count, 3, 9, 9),))


def lengths(self: Any, x: Tensor) -> Any:
    y = self.head(self.features(x)).mean((2, 3))
    return y.view(len(y), -1) @ y.t() - torch.eye(len(y))


def checks(self: Any, x: Tensor) -> Any:
    assert x.shape[0] > 0 and len(x.shape) == 4 and len(self.head.weight) == 4
    a, b = self.features(x).chunk(2, 1)
    return self.head(torch.cat([a, b], 1))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True) if int(x.shape[0] > 1) else x


def test_what_a_first_try_leaves_on_the_model_is_no_matter() -> None:
    class Cached(Body):
        def __init__(self) -> None:
            super().__init__()
            self.cache: Any = None
            self.centred = Centred()

        def forward(self, x: Tensor) -> Any:
            y = self.centred(self.features(x))
            if self.cache is None or self.cache.shape[-1] != y.shape[-1]:
                self.cache = torch.arange(y.shape[-1]) + y.new_zeros(y.shape[-1])
            return self.head(y + self.cache)

    model = oracle.randomize(Cached()).eval()
    traced = trace(model, torch.randn(2, 3, 8, 8))
    assert list(traced.opaque) == ["centred"]
    for count in (1, 2, 3):
        x = torch.randn(count, 3, 8, 8)
        with torch.no_grad():
            oracle.assert_close(traced.module(x), model(x), tolerance=1e-6)


def test_lengths_that_a_library_asks_to_keep_are_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(Body):
        def __init__(self) -> None:
            super().__init__()
            self.centred = Centred()

        def forward(self, x: Tensor) -> Any:
            return self.head(self.centred(self.features(x))) / len(x)

    # What torch.fx.wrap("len") does in a module.
    key, wrapped = (id(globals()), "len"), fx._symbolic_trace._wrapped_fns_to_patch
    monkeypatch.setitem(wrapped, key, globals())
    traced = silent(trace, Kept(), torch.randn(2, 3, 8, 8))
    assert list(traced.opaque) == ["centred"]
    functions = {n.target for n in traced.module.graph.nodes if n.op == "call_function"}
    assert not any("proxies" in getattr(f, "__module__", "") for f in functions)


@pytest.mark.parametrize("forward", [lengths, checks])
def test_lengths_and_checks_hold_for_any_batch(forward: Forward) -> None:
    model = network(forward)
    plain = builtins.len
    for count in (1, 2):
        traced = silent(trace, model, torch.randn(count, 3, 8, 8))
        assert builtins.len is plain
        assert traced.opaque == {}
        for other in (1, 2, 4):
            x = torch.randn(other, 3, 8, 8)
            with torch.no_grad():
                oracle.assert_close(traced.module(x), model(x), tolerance=1e-6)


def test_what_takes_one_batch_alone_is_traced_for_it() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        if x.shape[0] != 2:
            raise ValueError("two images, please")
        return self.head(self.features(x)).view(2, -1)

    x = torch.randn(2, 3, 8, 8)
    model = network(forward)
    with torch.no_grad():
        oracle.assert_close(silent(trace, model, x).module(x), model(x), tolerance=1e-6)


def test_the_batch_as_groups_stays_the_batch() -> None:
    """As in convolutions with weights of each image's own."""

    class Modulated(Body):
        def __init__(self) -> None:
            super().__init__()
            self.style = nn.Linear(5, 8)
            self.own = nn.Parameter(torch.randn(8, 8, 3, 3))

        def forward(self, x: Tensor, z: Tensor) -> Any:
            x = self.features(x)
            n, c, h, w = x.shape
            weight = self.own[None] * self.style(z).view(n, 1, c, 1, 1)
            weight = weight.reshape(n * 8, c, 3, 3)
            x = F.conv2d(x.reshape(1, n * c, h, w), weight, padding=1, groups=n)
            return self.head(F.relu(x.view(n, 8, h, w)))

    model = oracle.randomize(Modulated()).eval()
    example = torch.randn(2, 3, 8, 8), torch.randn(2, 5)
    pruned = halp_fx.compile(model, 0.8, example, latency="analytic")
    assert len(pruned.get_parameter("first.weight")) < 8
    for count in (1, 2, 3):
        oracle.assert_exact(model, pruned, (torch.randn(count, 3, 8, 8), torch.randn(count, 5)))


# The size of images.


def padded(self: Any, x: Tensor) -> Any:
    height, width = x.shape[-2:]
    if height % 8 or width % 8:
        x = F.pad(x, (0, -width % 8, 0, -height % 8))
    return self.head(F.avg_pool2d(self.features(x), 8))


def halved(self: Any, x: Tensor) -> Any:
    height, width = x.shape[-2:]
    size = int(height * 0.5), int(width * 0.5)
    return self.head(F.interpolate(self.features(x), size=size))


def by_the_longer_side(self: Any, x: Tensor) -> Any:
    return self.head(self.features(x)) / max(x.shape[-2:])


@pytest.mark.parametrize("forward", [padded, halved, by_the_longer_side])
def test_a_forward_that_decides_by_the_size_is_told(forward: Forward) -> None:
    model, x = network(forward), torch.randn(2, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"decides by the size of the images \(.*\.py.*alone: at"):
        traced = trace(model, x)
    with torch.no_grad():
        oracle.assert_close(traced.module(x), model(x), tolerance=1e-6)


def halved_by_whole_numbers(self: Any, x: Tensor) -> Any:
    height, width = x.shape[-2:]
    return self.head(F.interpolate(self.features(x), size=(height // 2, width // 2)))


def of_one_size(self: Any, x: Tensor) -> Any:
    assert x.shape[-1] == 16
    return self.head(self.features(x))


@pytest.mark.parametrize("forward", [halved_by_whole_numbers, of_one_size])
def test_nothing_is_told_where_sizes_are_no_matter(forward: Forward) -> None:
    silent(trace, network(forward), torch.randn(2, 3, 16, 16))


# What `with` blocks do.


def test_parts_without_gradients_are_told() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.features(x)
        return self.head(x)

    with pytest.warns(UserWarning, match=r"part under torch\.no_grad\(\) \(.*gradients will flow"):
        trace(network(forward), torch.randn(2, 3, 8, 8))


def test_positions_without_gradients_are_no_matter() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        with torch.no_grad():
            ramp = torch.arange(x.shape[-1]) / 10 + x.detach().amax((1, 2, 3), keepdim=True)
        y = self.features(x)
        with torch.no_grad():
            grid = torch.arange(y.shape[-1], device=y.device)
            mask = (y.detach() > 0).to(y.dtype)
        return self.head(mask * y + ramp + grid)

    model = network(forward)
    silent(trace, model, torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        silent(trace, model, torch.randn(2, 3, 8, 8))


def test_parts_of_mixed_precision_are_told() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.features(x)
        return self.head(x.float())

    with pytest.warns(UserWarning, match=r"part under torch\.autocast\(\) .*run the whole of it"):
        trace(network(forward), torch.randn(2, 3, 8, 8))


def kept_apart(self: Any, x: Tensor) -> Any:
    return self.head(checkpoint(self.features, x, use_reentrant=False))


def kept_apart_by_its_module(self: Any, x: Tensor) -> Any:
    x = torch.utils.checkpoint.checkpoint(self.features, x, use_reentrant=True)
    return self.head(x)


def kept_apart_in_segments(self: Any, x: Tensor) -> Any:
    layers = [self.first, F.relu, self.second, F.relu]
    return self.head(checkpoint_sequential(layers, 2, x, use_reentrant=False))


@pytest.mark.parametrize("forward", [kept_apart, kept_apart_by_its_module, kept_apart_in_segments])
def test_checkpoints_are_opened_and_told(forward: Forward) -> None:
    model, x = network(forward), torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"part under torch\.utils\.checkpoint .*in memory"):
        traced = trace(model, x)
    assert [n.target for n in traced.module.graph.nodes if n.op == "call_module"] == [
        "first", "second", "head",
    ]  # fmt: skip
    torch.testing.assert_close(traced.module(x), model(x))


def test_what_is_under_a_checkpoint_takes_its_own_arguments() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        def scaled(y: Tensor, *, by: float) -> Tensor:
            return by * self.first(y)

        return self.second(checkpoint(scaled, x, use_reentrant=False, by=3.0))

    model, x = network(forward), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(trace(model, x, quiet=True).module(x), model(x))


def test_checkpoints_are_checkpoints_again_after_an_error() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        def fails(y: Tensor) -> Tensor:
            raise ValueError("no")

        return checkpoint(fails, x, use_reentrant=False)

    before = checkpoint
    with pytest.raises(TraceError, match="ValueError: no"):
        trace(network(forward), torch.randn(2, 3, 8, 8))
    assert checkpoint is before is torch.utils.checkpoint.checkpoint
    assert not in_checkpoint()


def test_what_is_imported_while_a_network_is_traced_has_checkpoints_afterwards() -> None:
    late = types.ModuleType("imported_late")

    def forward(self: Any, x: Tensor) -> Any:
        if "imported_late" not in sys.modules:
            late.kept = torch.utils.checkpoint.checkpoint  # as its import line does
            sys.modules["imported_late"] = late
        return self.head(late.kept(self.features, x, use_reentrant=False))

    try:
        with pytest.warns(UserWarning, match="checkpoint"):
            trace(network(forward), torch.randn(2, 3, 8, 8))
        assert late.kept is checkpoint
    finally:
        sys.modules.pop("imported_late", None)


def test_outputs_of_another_precision_are_refused() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(self.features(x))

    with pytest.raises(TraceError, match=r"output 0 is torch\.float32, not torch\.bfloat16"):
        trace(network(forward), torch.randn(2, 3, 8, 8))


# Train mode.


class DropPath(nn.Module):
    """Stochastic depth, as many networks have it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(1 - self.rate) / (1 - self.rate)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class Residual(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.drop, self.head = drop, nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        x = x + self.drop(self.outer(F.relu(self.inner(x))))
        return F.dropout(self.head(x), 0.5, self.training)


@pytest.mark.parametrize("drop", [DropPath(0.5), Noise(), nn.Sequential(DropPath(0.5))])
def test_what_acts_in_train_mode_alone_stays(drop: nn.Module, tmp_path: Path) -> None:
    model = oracle.randomize(Residual(drop)).train()
    x = torch.randn(16, 3, 8, 8)
    with oracle.snapshot(model):
        pruned = silent(halp_fx.compile, model, 0.5, x, latency="analytic", drop_blocks=False)
    oracle.assert_exact(model, pruned, (x,))
    torch.manual_seed(1)
    with torch.no_grad():
        added = pruned.train().drop.forward(torch.ones(16, 1, 1, 1))
    assert len(added.unique()) > 1
    assert any(str(node.target).startswith("drop") for node in pruned.graph.nodes)
    pruner = halp_fx.GradualPruner(model, 0.5, x, steps=1, every=1, latency="analytic")
    assert any(str(node.target).startswith("drop") for node in pruner.network.graph.nodes)
    kind = type(drop[0] if isinstance(drop, nn.Sequential) else drop).__name__
    with pytest.warns(UserWarning, match=f"of class {kind}, which does something in train mode"):
        halp_fx.save(pruned.eval(), tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(halp_fx.load(tmp_path / "net.safetensors")(x), pruned(x))


def test_a_branch_with_stochastic_depth_is_made_up_for_and_dropped() -> None:
    model = oracle.randomize(Residual(DropPath(0.5))).eval()
    x = torch.randn(16, 3, 8, 8)
    small = halp_fx.compile(model, 0.12, x, latency="analytic", exclude="stem")
    assert not any(str(node.target) == "outer" for node in small.graph.nodes)
    oracle.assert_exact(model, small, (x,))
    pruned = halp_fx.compile(
        model, 0.6, x, data=[x], latency="analytic", drop_blocks=False, exclude="stem"
    )
    plain = copy.deepcopy(model)
    plain.drop = nn.Identity()
    other = halp_fx.compile(
        plain, 0.6, x, data=[x], latency="analytic", drop_blocks=False, exclude="stem"
    )
    found = halp_fx.reconstruct(pruned, model, [x])
    assert found and found == halp_fx.reconstruct(other, plain, [x])


class Chance(nn.Module):
    """Drops all, seldom."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 if self.training and random.random() < 0.01 else x


class Passing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("module", "idle", "acts"),
    [
        (DropPath(0.5), True, True),
        (nn.Sequential(DropPath(0.5)), True, True),
        (Chance(), True, True),
        (nn.Dropout(), True, True),
        (nn.Dropout2d(), True, True),
        (Passing(), True, False),
        (nn.Identity(), True, False),
        (nn.Flatten(), False, False),
        (nn.ReLU(), False, False),
        (nn.ReLU(inplace=True), False, False),
        (nn.BatchNorm2d(4), False, False),
        (nn.Softmax(1), False, False),
    ],
)
def test_modules_that_are_idle(module: nn.Module, idle: bool, acts: bool) -> None:
    state = random.getstate(), torch.get_rng_state()
    assert (is_idle(module), acts_in_training_only(module)) == (idle, acts)
    assert module.training
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_what_idle_modules_hold_is_not_copied() -> None:
    class Holder(DropPath):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    module = Holder(0.5)
    module.parents = [nn.Linear(4, 4)]  # not a child
    assert acts_in_training_only(module)


def test_idle_modules_that_do_nothing_in_train_mode_leave_no_trace() -> None:
    traced = silent(trace, Residual(Passing()), torch.randn(2, 3, 8, 8))
    assert not any(str(node.target) == "drop" for node in traced.module.graph.nodes)


def test_further_outputs_in_train_mode_are_told() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.features(x)
        return (self.head(y), y.mean((2, 3))) if self.training else self.head(y)

    with pytest.warns(UserWarning, match=r"more or other things in train mode .*first at mean.*py"):
        trace(network(forward), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers_are_the_same_in_train_mode(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    silent(trace, model, torch.randn(2, 5, 16))
