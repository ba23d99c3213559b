"""trace: graphs that compute what the models do, and messages where there's none."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import halp_fx
from halp_fx.errors import InputError, TraceError
from halp_fx.passes.trace import trace
from halp_fx.types import Traced
from tests import oracle

__all__: list[str] = []


def image(batch: int = 2, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size)


def check_same(model: nn.Module, traced: Traced, *inputs: Any) -> None:
    """In eval mode the graph gives what the model gives."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        oracle.assert_close(traced.module(*inputs), twin(*inputs), tolerance=1e-6)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.body(x).mean((2, 3)))


def test_what_a_traced_network_holds() -> None:
    model = Small().train()
    model.body[1].eval()
    with oracle.snapshot(model):
        traced = trace(model, image())
    assert traced.model_name == "Small"
    assert traced.opaque == {}
    assert not traced.module.training
    assert [n.target for n in traced.module.graph.nodes if n.op == "call_module"] == [
        "body.0", "body.1", "body.2", "fc",
    ]  # fmt: skip
    assert traced.module.fc.weight is model.fc.weight, "parameters are shared, not copied"
    assert set(traced.module.state_dict()) == set(model.state_dict())
    values = traced.values["body_0"]
    assert (tuple(values.shape), values.device.type) == ((2, 8, 6, 6), "meta")
    assert set(traced.values) == {n.name for n in traced.module.graph.nodes}
    assert (traced.training[""], traced.training["body"], traced.training["body.1"]) == (
        True,
        True,
        False,
    )
    check_same(model, traced, image())


@pytest.mark.parametrize("given", [image(), (image(),), [image()]], ids=["tensor", "tuple", "list"])
def test_ways_to_give_inputs(given: Any) -> None:
    traced = trace(Small(), given)
    assert isinstance(traced.example_inputs, tuple)
    assert traced.example_inputs[0].shape == (2, 3, 8, 8)


# Default example inputs: (model, shape expected).
GUESSES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(4, 8, 3), (1, 4, 224, 224)),
    "conv1d": (lambda: nn.Conv1d(2, 8, 3), (1, 2, 1024)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 3), (1, 1, 16, 112, 112)),
    "linear": (lambda: nn.Sequential(nn.Linear(7, 8), nn.ReLU()), (1, 7)),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3)),
        (1, 1, 28, 28),
    ),
}


@pytest.mark.parametrize("name", GUESSES)
def test_default_inputs(name: str) -> None:
    build, shape = GUESSES[name]
    before = torch.get_rng_state()
    model = build()
    torch.set_rng_state(before)
    traced = trace(model)
    assert tuple(traced.example_inputs[0].shape) == shape
    assert torch.equal(torch.get_rng_state(), before)


def test_default_inputs_follow_the_models_own_attributes() -> None:
    class Sized(Small):
        def __init__(self) -> None:
            super().__init__()
            self.image_size = 40

    class Configured(Small):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_cfg = {"input_size": (3, 48, 40)}

    assert trace(Sized()).example_inputs[0].shape == (1, 3, 40, 40)
    assert trace(Configured()).example_inputs[0].shape == (1, 3, 48, 40)
    assert trace(Small().double()).example_inputs[0].dtype == torch.float64


def test_default_inputs_that_nothing_accepts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(InputError, match=r"no example_inputs were given and none of \[\(1, 3, 224"):
        trace(model)


def test_inputs_that_are_rejected() -> None:
    with pytest.raises(InputError, match=r"Small rejects the example inputs \(\(2, 5, 8, 8\)"):
        trace(Small(), image(channels=5))
    with pytest.raises(InputError, match="not dict"):
        trace(Small(), {"x": image()})
    with pytest.raises(InputError, match="is empty"):
        trace(Small(), [])


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, mode: str = "relu"
    ) -> Any:
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        y = F.relu(y) if mode == "relu" else torch.tanh(y)
        return y * scale if scale != 1.0 else y


def test_optional_arguments_keep_their_defaults() -> None:
    model = Optional()
    traced = trace(model, image())
    x = image()
    check_same(model, traced, x)
    check_same(model, traced, x, None, 1.0, "relu")
    for wrong, name in [((x, x[:, :1]), "mask"), ((x, None, 2.0), "scale")]:
        with pytest.raises(AssertionError, match=f"the graph was traced with {name}="):
            traced.module(*wrong)


def test_optional_arguments_that_are_given() -> None:
    model, x = Optional(), image()
    traced = trace(model, (x, torch.rand(2, 1, 8, 8)))
    check_same(model, traced, x, torch.rand(2, 1, 8, 8))


class Sorting(nn.Module):
    """Its path depends on values: no graph of it exists."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class WithOpaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.inner = nn.Sequential(Sorting(), nn.ReLU())
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.inner(self.first(x)))


def test_what_cannot_be_traced_is_held_whole() -> None:
    model = WithOpaque()
    with oracle.snapshot(model):
        traced = trace(model, image())
    assert set(traced.opaque) == {"inner.0"}, "the innermost module alone"
    assert traced.opaque["inner.0"].startswith("TraceError: symbolically traced variables cannot")
    called = [n.target for n in traced.module.graph.nodes if n.op == "call_module"]
    assert called == ["first", "inner.0", "inner.1", "last"]
    assert set(traced.module.state_dict()) == set(model.state_dict())
    for sign in (1.0, -1.0):  # both branches are still there
        check_same(model, traced, sign * image())


def test_the_top_cannot_be_held_whole() -> None:
    with pytest.raises(
        TraceError, match=r"Sorting.forward can't be traced by torch.fx: .*submodule"
    ):
        trace(Sorting(), image(channels=8))


class Pair(NamedTuple):
    one: Tensor
    two: Tensor


class Structures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return {"all": y, "parts": [y[:, :4], (y[:, 4:], 3)], "pair": Pair(y, y + 1)}


def test_nested_outputs() -> None:
    model = Structures()
    check_same(model, trace(model, image()), image(3))


class Flagged(nn.Module):
    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.fc, self.rate = nn.Linear(64, 64), rate

    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.fc(x), self.rate, training=self.training)


def test_training_flags_are_read_when_the_graph_runs() -> None:
    module = trace(Flagged(), torch.rand(2, 64)).module
    x = torch.ones(2, 64)
    assert torch.equal(module(x), module(x))
    module.train()
    assert bool((module(x) == 0).any())
    module.eval()
    assert torch.equal(module(x), module(x))


class Activated(nn.BatchNorm2d):
    """A batch norm with an activation, which counts its batches, as timm's are."""

    def forward(self, x: Tensor) -> Tensor:
        share = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1 / float(self.num_batches_tracked)
        batch = True if self.training else self.running_mean is None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, batch, share, self.eps
        )
        return F.relu(x + 1)


def test_batch_norms_with_a_forward_of_their_own_train() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Activated(8), nn.Conv2d(8, 8, 3), Activated(8))
    model += nn.Sequential(model[3], nn.Conv2d(8, 2, 1))  # the second norm runs twice
    data = [torch.randn(4, 3, 9, 9) + i for i in range(3)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    traced = trace(model, data[0])
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    pruned = halp_fx.compile(model, 0.999, data[0], latency="analytic", include=["2"])
    assert pruned.state_dict()["2.weight"].shape[0] < 8
    for network in (copy.deepcopy(traced.module), pruned):
        assert torch.equal(network.get_buffer("1.running_mean"), before["1.running_mean"])
        dense = copy.deepcopy(model)
        for x in data:
            dense.train()(x)
            network.train()(x)
        torch.testing.assert_close(
            network.get_buffer("1.running_var"), dense.get_buffer("1.running_var")
        )
        network.eval()(data[0])
        assert network.get_buffer("1.running_mean").equal(dense.get_buffer("1.running_mean"))
        assert halp_fx.recalibrate(dense, data) == halp_fx.recalibrate(network, data) == 3
        for name in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(network.get_buffer(name), dense.get_buffer(name))
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(InputError, match="no batches"):
            halp_fx.recalibrate(network, [])
        assert all(torch.equal(tensor, state[n]) for n, tensor in network.state_dict().items())


def test_flags_are_left_where_training_is_another_network() -> None:
    class Other(Flagged):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return self.fc(y) if self.training else y

    model = Other().train()
    with oracle.snapshot(model):
        traced = trace(model, torch.rand(2, 64))
    check_same(model, traced, torch.rand(3, 64))


class Several(nn.Module):
    """Takes as many images as there are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def features(self, x: Tensor) -> Any:
        return self.head(F.relu(self.norm(self.conv(x))))


class Joined(Several):
    def forward(self, *xs: Tensor) -> Any:
        return self.features(torch.cat(xs, 1))


class Each(Several):
    def forward(self, *xs: Tensor) -> Any:
        return sum(self.features(x) for x in xs) / len(xs)


class Single(Several):
    def forward(self, *xs: Tensor) -> Any:
        (x,) = xs
        return self.features(x)


class First(Several):
    def forward(self, xs_0: Tensor, weight: float = 1.0, *xs: Tensor, add: bool = True) -> Any:
        y = self.features(xs_0) * weight
        return y + self.features(xs[-1]) if xs and add else y


class Options(Several):
    def forward(self, x: Tensor, *rest: Tensor, **options: Any) -> Any:
        y = self.features(torch.cat([x, *rest], 1))
        return y.tanh() if options.get("bounded") else y


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Joined, (1, 1)), (Joined, (1, 1, 1)), (Joined, (1,)), (Each, (1,)), (Each, (1, 1, 1)),
        (Single, (1,)), (First, (1,)), (First, (1, 0.5)), (First, (1, 0.5, 1, 1)),
        (Options, (1,)), (Options, (1, 1)),
    ],
)  # fmt: skip
def test_as_many_inputs_as_the_example_has(kind: type[Several], given: tuple[float, ...]) -> None:
    inputs = tuple(image() if part == 1 else part for part in given)
    model = oracle.randomize(kind(3 * len(given) if kind in (Joined, Options) else 3)).eval()
    check_same(model, trace(model, inputs), *inputs)
    pruned = halp_fx.compile(model, 0.6, inputs, latency="analytic")
    assert pruned.conv.out_channels < 16
    oracle.assert_exact(model, pruned, inputs)
    with pytest.raises(TypeError, match=r"positional argument|forward\(\) takes"):
        pruned(*inputs, *[inputs[0]] * 4)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, bounded: bool = True) -> Any:
        y = self.conv(x if mask is None else x * mask)
        return torch.tanh(y) if bounded else y


def test_keywords_keep_their_defaults() -> None:
    model, x = ByKeyword(), image()
    traced = trace(model, x)
    check_same(model, traced, x)
    check_same(model, traced, image(3))
    for wrong in ({"bounded": False}, {"mask": x}):
        with pytest.raises(AssertionError, match=f"the graph was traced with {next(iter(wrong))}="):
            traced.module(x, **wrong)


# Copies ---------------------------------------------------------------------------------------


class Keeps(nn.Module):
    """A network that keeps something beside its layers."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
        self.inner[0].kept = kept

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


@pytest.mark.parametrize(
    ("kept", "kind"),
    [
        (threading.Lock(), "lock"),
        (math, "module"),
        ((i for i in range(3)), "generator"),
        ({"locks": [threading.Lock()]}, "dict"),
    ],
)
def test_what_cannot_be_copied_is_named(kept: Any, kind: str) -> None:
    match = rf"Keeps can't be copied.* attribute 'inner.0.kept' is of type {kind}, .* to None"
    with pytest.raises(InputError, match=match):
        trace(Keeps(kept), image())
    with pytest.raises(InputError, match=match):
        halp_fx.compile(Keeps(kept), 0.6, image(), latency="analytic")


class Remembers(Keeps):
    """Keeps features, with their history, as a step of training leaves them."""

    features: list[Any]

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return y + self.features[0]["y"].mean() if self.features else y


def test_features_that_are_kept_lose_their_history() -> None:
    model = oracle.randomize(Remembers()).eval()
    model.features = []
    first = {"y": model(image())}
    model.features += [first, (first["y"] * 2,)]
    model.features.append(model.features)
    model.register_buffer("average", first["y"].mean())
    pruned = halp_fx.compile(model, 0.6, image(), latency="analytic")
    assert model.features[0] is first
    assert first["y"].grad_fn is not None
    model.average = model.average.detach()  # as a copy of the network itself needs it
    model.features = [{"y": first["y"].detach()}]
    assert pruned.get_submodule("inner.0").out_channels < 16
    oracle.assert_exact(model, pruned, (image(),), dtype=torch.float32, tolerance=1e-5)


def test_buffers_and_bare_parameters() -> None:
    class Bare(nn.Module):
        offset: Tensor
        hidden: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 1, 1))
            self.register_buffer("offset", torch.randn(8, 1, 1))
            self.register_buffer("hidden", torch.randn(8, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Any:
            return F.conv2d(x, self.weight) + self.offset * self.hidden

    model = Bare()
    traced = trace(model, image())
    read = {n.target for n in traced.module.graph.nodes if n.op == "get_attr"}
    assert {"weight", "offset", "hidden"} <= read
    check_same(model, traced, image())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x + torch.zeros(x.shape[0], 3, 1, 1),
        lambda x: x + torch.zeros((x.shape[0], 3, 1, 1)),
        lambda x: x + torch.ones(1, x.shape[1], 1, x.shape[3]),
        lambda x: x + torch.ones(x.shape),
        lambda x: x + 0 * torch.rand(x.shape[0], 1, 1, 1),
        lambda x: x + torch.arange(3.0).view(1, 3, 1, 1).expand(x.shape[0], 3, 1, 1),
        lambda x: x + torch.arange(3.0).view(3, 1, 1).expand((x.shape[0], -1, -1, -1)),
        lambda x: x + torch.ones(1, 3, 1, 1).repeat(x.shape[0], 1, 1, 1),
        lambda x: x + torch.ones(3, 1, 1).expand(-1, -1, x.shape[-1]),
    ],
)
def test_tensors_made_with_the_sizes_of_others(make: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return make(x)

    plain = torch.zeros, torch.rand, torch.Tensor.expand
    traced = trace(Model(), image())
    assert traced.opaque == {}
    assert plain == (torch.zeros, torch.rand, torch.Tensor.expand), "torch is left as it was"
    for batch in (2, 3):
        check_same(Model(), traced, image(batch))


@pytest.mark.parametrize(
    "branch",
    [
        lambda x: x * 2 if isinstance(x, Tensor) else x,
        lambda x: x * 2 if isinstance(x, (int, Tensor)) else x,
        lambda x: x * 2 if isinstance(x, int | Tensor) else x,
        lambda x: x * 2 if torch.is_tensor(x) else x,
        lambda x: x * 2 if isinstance(x, (list, tuple)) else x + 1,
        lambda x: x * 2 if isinstance(x, nn.Parameter) else x + 1,
        lambda x: x * 2 if isinstance(x.shape, Tensor) else x + 1,
        lambda x: torch.cat([x] if isinstance(x, Tensor) else x, 1),
    ],
)
def test_what_is_asked_about_types(branch: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return branch(x)

    plain = isinstance
    traced = trace(Model(), image())
    assert isinstance is plain
    assert traced.opaque == {}
    check_same(Model(), traced, image())


_REAL = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("asked", "alone"),
    [
        (lambda y: y.device.type == _REAL, False),
        (lambda y: y.device == torch.ones(1, device=_REAL).device, False),
        (lambda y: y.device in (torch.ones(1, device=_REAL).device,), False),
        (lambda y: y.is_cuda is not None and bool(y.is_cuda) == (_REAL == "cuda"), False),
        (lambda y: bool(y.is_cpu) == (_REAL == "cpu"), False),
        (lambda y: not y.is_meta, False),
        (lambda y: y.new_zeros(3, device="cpu").is_cpu, False),
        (lambda y: y.cpu().mean((2, 3)).device.type == "cpu", False),
        (lambda y: torch.arange(y.shape[1], device=y.device).device == y.device, False),
        (lambda y: torch.arange(y.shape[1]).device.type == "cpu", False),
        (lambda y: y.dtype == torch.float32, False),
        (lambda y: y.dtype is torch.float32, True),
        (lambda y: y.half().dtype is torch.float16, True),
        (lambda y: str(y.device).startswith(_REAL), True),
        (lambda y: {torch.float32: True}.get(y.dtype), True),
    ],
)
def test_what_is_asked_about_dtypes_and_devices(
    asked: Callable[[Tensor], Any], alone: bool
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x).relu()
            return self.head(y * 2 + 1 if asked(y) else y) * 3

    x = image().to(_REAL)
    model = oracle.randomize(Model()).eval().to(_REAL)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        pruned = halp_fx.compile(model, 0.6, x, latency="analytic")
    assert ["by the dtype or the device" in str(one.message) for one in told] == [True] * alone
    assert pruned.conv.out_channels < 16
    oracle.assert_exact(model, pruned, (x,), dtype=torch.float32, tolerance=1e-5)


def test_a_check_of_the_dtype_is_passed() -> None:
    class Checked(Small):
        def forward(self, x: Tensor) -> Any:
            if x.dtype is not torch.float32:
                raise TypeError(f"images must be float32, not {x.dtype}")
            return super().forward(x)

    model = Checked()
    with pytest.warns(UserWarning, match="Checked decides by the dtype or the device"):
        check_same(model, trace(model, image()), image(3))


def test_dtypes_and_devices_that_decide_nothing_stay_in_the_graph() -> None:
    class Casts(Small):
        def forward(self, x: Tensor) -> Any:
            scale = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1).to(x.dtype)
            return super().forward(x * scale if x.device.type == _REAL else x)

    model = Casts()
    traced = trace(model, image())
    check_same(model, traced, image())
    check_same(copy.deepcopy(model).double(), _doubled(traced), image().double())


def _doubled(traced: Traced) -> Any:
    return dataclasses.replace(traced, module=copy.deepcopy(traced.module).double())


# MultiheadAttention ---------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self, cross: bool, need_weights: bool, batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, batch_first=batch_first, **options)
        self.cross, self.need_weights = cross, need_weights

    def forward(self, x: Tensor, other: Tensor) -> Any:
        memory = other if self.cross else x
        return self.inner(x, memory, memory, need_weights=self.need_weights)


def _attention_inputs(batch_first: bool) -> tuple[Tensor, Tensor]:
    x, other = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    return (x, other) if batch_first else (x.transpose(0, 1), other.transpose(0, 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_is_spelled_out(
    batch_first: bool, need_weights: bool, cross: bool, bias: bool
) -> None:
    model = Attends(cross, need_weights, batch_first, bias=bias)
    oracle.randomize(model)
    inputs = _attention_inputs(batch_first)
    traced = trace(model, inputs)
    targets = [n.target for n in traced.module.graph.nodes if n.op == "call_module"]
    assert targets == ["inner.out_proj"], "the module is opened"
    assert set(traced.module.state_dict()) == set(model.state_dict())
    check_same(model, traced, *inputs)
    weights = traced.module(*inputs)[1]
    assert weights is None if not need_weights else weights.shape == (3, 5, 7 if cross else 5)


def test_attention_with_three_sources() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return self.inner(query=q, key=k, value=v)[0]

    model = oracle.randomize(Three())
    inputs = torch.randn(2, 4, 16), torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    check_same(model, trace(model, inputs), *inputs)


class TwoSources(nn.Module):
    """Queries and keys from one tensor, values from another, which may have another width."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, batch_first=True, **options)

    def forward(self, x: Tensor, v: Tensor) -> Any:
        return self.inner(x, x, v, need_weights=False)[0]


def _modules_of(traced: Traced) -> list[str]:
    return [str(n.target) for n in traced.module.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({"kdim": 16, "vdim": 12}, ["inner.out_proj"]),
        ({"vdim": 12, "bias": False, "dropout": 0.1}, ["inner.out_proj"]),
        ({"dropout": 0.2}, ["inner.out_proj"]),
        ({"add_bias_kv": True}, ["inner"]),
        ({"add_zero_attn": True}, ["inner"]),
    ],
    ids=str,
)
def test_what_attention_is_spelled_out_and_what_stays(
    options: dict[str, Any], modules: list[str]
) -> None:
    model = oracle.randomize(TwoSources(**options)).eval()
    inputs = torch.randn(3, 5, 16), torch.randn(3, 5, options.get("vdim", 16))
    traced = trace(model, inputs)
    assert _modules_of(traced) == modules
    check_same(model, traced, *inputs)


def test_dropout_of_attention_follows_the_mode() -> None:
    model, x = oracle.randomize(TwoSources(dropout=0.5)).eval(), torch.randn(2, 5, 16)
    module = trace(model, (x, x)).module
    module.train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(module(x, x), module(x, x))
        torch.manual_seed(0)
        first = module(x, x)
        torch.manual_seed(0)
        assert torch.equal(module(x, x), first)
        assert torch.equal(module.eval()(x, x), module(x, x))


@pytest.mark.parametrize(
    ("kind", "modules"),
    [("bool", ["inner.out_proj"]), ("float", ["inner.out_proj"]), ("each head", ["inner"])],
)
@pytest.mark.parametrize("need_weights", [False, True])
def test_masked_attention(kind: str, modules: list[str], need_weights: bool) -> None:
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 4, batch_first=True)
            mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
            if kind == "float":
                mask = torch.randn(5, 5)
            if kind == "each head":
                mask = mask.expand(12, 5, 5).clone()
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x, x, x, attn_mask=self.mask, need_weights=need_weights)[0]

    model, x = oracle.randomize(Masked()).eval(), torch.randn(3, 5, 16)
    traced = trace(model, x)
    assert _modules_of(traced) == modules
    with torch.no_grad():
        oracle.assert_close(traced.module(x), model(x), tolerance=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_over_a_single_sequence_stays_a_module(batch_first: bool) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 16)
            self.inner = nn.MultiheadAttention(16, 2, batch_first=batch_first)
            self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Any:
            t = self.first(x)
            return self.head(F.relu(self.body(self.inner(t, t, t)[0])))

    model, x = oracle.randomize(Sequence()).eval(), torch.randn(5, 6)
    traced = trace(model, x)
    assert _modules_of(traced) == ["first", "inner", "body", "head"]
    check_same(model, traced, x)
    pruned = halp_fx.compile(model, 0.8, x, latency="analytic")
    assert pruned.body.out_features < 32
    oracle.assert_exact(model, pruned, (x,))


def test_masked_keys_stay_a_module() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor, padding: Tensor) -> Any:
            return self.inner(x, x, x, key_padding_mask=padding)[0]

    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 4:] = True
    model, x = oracle.randomize(Padded()).eval(), torch.randn(3, 5, 16)
    traced = trace(model, (x, padding))
    assert _modules_of(traced) == ["inner"]
    check_same(model, traced, x, padding)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers_are_opened(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    oracle.randomize(model).eval()
    x = torch.randn(2, 5, 16)
    traced = trace(model, x)
    targets = {str(n.target) for n in traced.module.graph.nodes if n.op == "call_module"}
    assert "0.layers.1.linear1" in targets
    assert traced.opaque == {}
    with torch.no_grad():
        oracle.assert_close(traced.module(x), model(x), tolerance=1e-5)


def test_nodes_carry_the_line_they_come_from() -> None:
    traced = trace(Small(), image())
    node = next(n for n in traced.module.graph.nodes if n.target == "mean")
    assert "test_trace.py" in (node.stack_trace or "")


class Decides(nn.Module):
    """What it computes depends on how often it ran: a trace sees one case."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(1)
        y: torch.Tensor = self.layer(x)
        return y if isinstance(x, fx.Proxy) else 2 * y


def test_a_graph_that_is_not_the_network_is_refused() -> None:
    with pytest.raises(TraceError, match=r"traced of Decides is not the network: output 0 differs"):
        trace(Decides(), torch.randn(2, 4))


class Noisy(nn.Module):
    """Random numbers in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x + torch.rand_like(x))
        return y


def test_random_numbers_in_a_network_are_no_difference() -> None:
    assert trace(Noisy(), torch.randn(2, 4)).opaque == {}
