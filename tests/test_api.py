"""`halp_fx.compile`: what it refuses, what it promises, what it leaves alone."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halp_fx
from halp_fx.errors import (
    HalpError,
    InfeasibleError,
    InputError,
    LatencyError,
    NothingToPruneError,
    SaliencyError,
    TraceError,
)
from tests import oracle

__all__: list[str] = []


class Net(nn.Module):
    """Residual, concat, dropout by a flag, tied convolutions."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.b.weight = self.a.weight
        self.side = nn.Sequential(nn.Conv2d(channels, 12, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(channels + 12, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        y = x + self.b(F.relu(self.a(x)))
        y = torch.cat([y, self.side(x)], 1).mean((2, 3))
        return self.fc(F.dropout(self.drop(y), 0.5, training=self.training))


def make_net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = oracle.randomize(Net())
    assert isinstance(model, Net)
    return model.eval()


def image(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(4, 3, 8, 8, generator=generator),
            torch.randint(0, 5, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def compiled(model: nn.Module, budget: Any = 0.5, inputs: Any = None, **options: Any) -> Any:
    options.setdefault("latency", "analytic")
    return halp_fx.compile(model, budget, image() if inputs is None else inputs, **options)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Nothing of the caller's changes: values, modes, gradients, flags, random generators."""
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(i)) if i % 2 else None
        parameter.requires_grad_(i % 3 != 2)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    random.seed(5)
    np.random.seed(6)  # noqa: NPY002
    torch.manual_seed(7)
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    grad_mode, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with oracle.snapshot(model):
        yield
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), pytorch)
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (grad_mode, dtype)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


# What is refused: (arguments of compile besides the model, error, message).
cross_entropy = F.cross_entropy
Change = Callable[[nn.Module], None]


def _zeros(groups: halp_fx.ChannelGroups) -> dict[str, Any]:
    return {g.name: np.zeros(g.units) for g in groups.groups}


def _misshapen(groups: halp_fx.ChannelGroups) -> dict[str, Any]:
    return {g.name: np.ones(g.units + 1) for g in groups.groups}


def _missing(groups: halp_fx.ChannelGroups) -> dict[str, Any]:
    return {g.name: np.ones(g.units) for g in groups.groups[1:]}


def _too_few(groups: halp_fx.ChannelGroups) -> list[Any]:
    return [np.ones(g.units) for g in groups.groups[1:]]


def _negative(groups: halp_fx.ChannelGroups) -> list[Any]:
    return [-np.ones(g.units) for g in groups.groups]


def _infinite(groups: halp_fx.ChannelGroups) -> list[Any]:
    return [np.full(g.units, np.inf) for g in groups.groups]


def _raising(groups: halp_fx.ChannelGroups) -> Any:
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)
    raise RuntimeError("mine")


NAN_DATA = [(torch.full((2, 3, 8, 8), math.nan), torch.zeros(2, dtype=torch.long))]

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "budget below the least": (
        {"budget": 1e-6},
        InfeasibleError,
        r"the budget of .* ms can't be met: the least latency that Net can be pruned to is",
    ),
    "inputs of a wrong shape": (
        {"example_inputs": torch.rand(1, 4, 8, 8)},
        InputError,
        r"Net rejects the example inputs \(\(1, 4, 8, 8\) torch.float32 on cpu\): .*4 channels",
    ),
    "inputs of a wrong rank": (
        {"example_inputs": torch.rand(8)},
        InputError,
        r"Net rejects the example inputs",
    ),
    "too many inputs": (
        {"example_inputs": (torch.rand(1, 3, 8, 8), 3, 4)},
        InputError,
        r"Net rejects the example inputs .*Pass example_inputs as a tensor or a tuple",
    ),
    "inputs of a wrong dtype": (
        {"example_inputs": torch.rand(1, 3, 8, 8).double()},
        InputError,
        r"Net rejects the example inputs \(\(1, 3, 8, 8\) torch.float64",
    ),
    "inputs of a wrong type": (
        {"example_inputs": "image.png"},
        InputError,
        "example_inputs must be a tensor or a tuple, not str",
    ),
    "inputs in a dict": (
        {"example_inputs": {"x": torch.rand(1, 3, 8, 8)}},
        InputError,
        "example_inputs must be a tensor or a tuple, not dict",
    ),
    "no inputs": ({"example_inputs": ()}, InputError, "example_inputs is empty"),
    "taylor without loss": (
        {"data": batches(), "saliency": "taylor"},
        InputError,
        r"'taylor' needs a loss: pass loss=callable\(output, target\), or saliency='output'",
    ),
    "taylor without data": (
        {"saliency": "taylor"},
        InputError,
        "the saliency 'taylor' needs data and loss",
    ),
    "unknown saliency": (
        {"saliency": "entropy"},
        InputError,
        "saliency='entropy' is not known: pass 'both', .*'fisher', 'taylor1.5', 'taylor', 'magn",
    ),
    "loss without a gradient: argmax": (
        {"data": batches(), "loss": lambda output, target: output.argmax(1).float().mean()},
        InputError,
        r"the loss gives no gradient: .*no argmax",
    ),
    "loss without a gradient: detach": (
        {"data": batches(), "loss": lambda output, target: output.detach().mean()},
        InputError,
        "the loss gives no gradient",
    ),
    "loss that is no scalar": (
        {"data": batches(), "loss": lambda output, target: output},
        InputError,
        r"loss must return a scalar tensor, not \(4, 5\)",
    ),
    "loss that is a float": (
        {"data": batches(), "loss": lambda output, target: 0.5},
        InputError,
        "loss must return a scalar tensor, not float",
    ),
    "loss that raises": (
        {"data": batches(), "loss": lambda output, target: output[99]},
        IndexError,
        "out of bounds",
    ),
    "loss without data": ({"loss": cross_entropy}, InputError, "there is none: pass data"),
    "loss by name": (
        {"data": batches(), "loss": "ce"},
        InputError,
        "loss must be a callable, not str",
    ),
    "the class of a loss": (
        {"data": batches(), "loss": nn.CrossEntropyLoss},
        InputError,
        r"loss is the class CrossEntropyLoss: pass an instance, CrossEntropyLoss\(\)",
    ),
    "progress that can't be called": (
        {"progress": 3},
        InputError,
        "progress must be a callable, not int",
    ),
    "a flag in words": ({"drop_blocks": "no"}, InputError, "drop_blocks is 'no': pass True or"),
    "a flag that is a number": ({"exact": 1}, InputError, "exact is 1: pass True or False"),
    "nothing to verify": ({"verify": None}, InputError, "verify is None: pass True or False"),
    "no batches": (
        {"data": [], "loss": cross_entropy},
        InputError,
        r"data has no batches: pass at least one \(inputs, target\)",
    ),
    "a batch that is a tensor": (
        {"data": [image()], "loss": cross_entropy},
        InputError,
        r"a batch of data must be a pair \(inputs, target\), not Tensor",
    ),
    "a batch of three": (
        {"data": [(image(), image(), image())], "loss": cross_entropy},
        InputError,
        r"a batch of data must be a pair \(inputs, target\), not tuple",
    ),
    "data that is not finite": (
        {"data": NAN_DATA, "loss": cross_entropy},
        SaliencyError,
        r"the saliency of group '\w+.*' is not finite in any of 1 batches",
    ),
    "loss times zero": (
        {"data": batches(), "loss": lambda o, t: 0 * cross_entropy(o, t)},
        SaliencyError,
        r"the saliency of group '.+' is zero for all its \d+ units",
    ),
    "zeros": ({"saliency": _zeros}, SaliencyError, r"of group '.+' is zero for all its \d+ units"),
    "scores of a wrong shape": (
        {"saliency": _misshapen},
        SaliencyError,
        r"of group '.+' has shape \(\d+,\), expected \(\d+,\)",
    ),
    "scores missing": (
        {"saliency": _missing},
        SaliencyError,
        r"the saliency '_missing' has no scores for the groups \['.+'\]",
    ),
    "too few scores": ({"saliency": _too_few}, SaliencyError, r"has \d+ arrays for \d+ groups"),
    "scores below 0": ({"saliency": _negative}, SaliencyError, "has negative values"),
    "scores not finite": ({"saliency": _infinite}, SaliencyError, "values that are not finite"),
    "a callable that raises": ({"saliency": _raising}, RuntimeError, "mine"),
    "unknown latency": ({"latency": "tensorrt"}, InputError, r"latency is 'tensorrt'.*Accepted"),
    "latency of a wrong type": ({"latency": 3}, InputError, r"latency is 3\..*Accepted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    options, error, message = REFUSED[case]
    model = make_net()
    arguments = {"budget": 0.5, "example_inputs": image(), "latency": "analytic", **options}
    with untouched(model), pytest.raises(error, match=f"(?s){message}"):
        halp_fx.compile(model, **arguments)


def test_a_model_without_data_is_refused() -> None:
    model = make_net().to("meta")
    with pytest.raises(InputError, match=r"Net has parameters without data .*load its weights"):
        halp_fx.compile(model, 0.5, image(), latency="analytic")


def test_a_module_with_the_name_of_a_keyword_is_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"class": nn.Conv2d(3, 8, 3), "box": nn.Conv2d(8, 4, 3)})

        def forward(self, x: Tensor) -> Any:
            return self.parts["box"](self.parts["class"](x))

    with pytest.raises(TraceError, match=r"a word of Python's own \(class\).*another name"):
        halp_fx.compile(Named(), 0.5, image(), latency="analytic")


@pytest.mark.parametrize("budgets", [0.5, "4ms", halp_fx.Budget(share=0.5), None])
def test_a_sweep_needs_several_budgets(budgets: Any) -> None:
    with pytest.raises(InputError, match=r"budgets is .*: pass several, as \[0.7, 0.5\]"):
        halp_fx.sweep(make_net(), budgets, image(), latency="analytic")


def test_an_error_tells_stage_and_model() -> None:
    with pytest.raises(InputError) as caught:
        compiled(make_net(), saliency="entropy")
    assert "halp_fx: in the stage 'saliency' for Net" in caught.value.__notes__


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net, "model must be a torch.nn.Module, not type: pass the network itself, not its class"),
        (make_net().state_dict(), "model must be a torch.nn.Module, not OrderedDict: .*state dict"),
        ("net.pt", "model must be a torch.nn.Module, not str"),
        (None, "model must be a torch.nn.Module, not NoneType"),
    ],
    ids=["class", "state dict", "path", "None"],
)
def test_models_that_are_none(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        halp_fx.compile(model, 0.5, image(), latency="analytic")


def test_the_least_budget_can_be_asked_for() -> None:
    model = make_net()
    with pytest.raises(InfeasibleError) as caught:
        compiled(model, "0.000001ms")
    least = caught.value.least
    assert f"{least:.4g} ms" in str(caught.value)
    plan = halp_fx.plan_of(compiled(model, f"{1.001 * least!r}ms"))
    assert plan.predicted_ms <= plan.budget_ms
    assert plan.predicted_ms == pytest.approx(least, rel=2e-3)
    with pytest.raises(InfeasibleError):
        compiled(model, f"{0.99 * least!r}ms")


def test_nan_weights() -> None:
    model = make_net()
    with torch.no_grad():
        model.side[0].weight[3] = math.nan
    for options in ({}, {"data": batches(), "loss": cross_entropy}):
        with untouched(model), pytest.raises(SaliencyError, match=r"of group '.+'.* not finite"):
            compiled(model, **options)


class Whole(nn.Module):
    """Every channel is an output or an input of the network, or read by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.two(self.one(x).softmax(1))


def test_nothing_to_prune() -> None:
    model = Whole()
    with untouched(model), pytest.raises(NothingToPruneError) as caught:
        compiled(model)
    text = str(caught.value)
    assert text.startswith("Whole has no channel that can be removed:")
    assert "one.weight dim 0: 8 channels pinned by softmax (_softmax reads all channels) at" in text
    assert "test_api.py" in text
    assert "return self.two(self.one(x).softmax(1))" in text
    assert "two.weight dim 0: 4 channels pinned by output (output of the network)" in text


def test_a_network_without_parameters() -> None:
    with pytest.raises(NothingToPruneError, match="ReLU has no channel that can be removed"):
        compiled(nn.ReLU())


def test_control_flow_on_values_at_the_top() -> None:
    class Branches(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    model = Branches().eval()
    with untouched(model), pytest.raises(TraceError, match=r"Branches.forward can't be traced"):
        compiled(model)


@pytest.mark.parametrize("method", ["magnitude", "fisher", "steps", "callable"])
def test_success_leaves_the_model_alone(method: str) -> None:
    model = make_net()
    options: dict[str, Any] = {}
    if method in ("fisher", "steps"):
        steps = 3 if method == "steps" else 1
        options = {"data": batches(), "loss": cross_entropy, "steps": steps}
    if method == "callable":
        options = {"saliency": lambda groups: [np.arange(g.units) + 1.0 for g in groups.groups]}
    inputs = image()
    before = inputs.clone()
    with untouched(model):
        pruned = compiled(model, inputs=inputs, **options)
        oracle.assert_exact(model, pruned, (inputs,))  # flags and modes are held to the model's
        assert not {id(p) for p in model.parameters()} & {id(p) for p in pruned.parameters()}
        storages = {p.data_ptr() for p in model.state_dict().values() if p.numel()}
        assert not storages & {p.data_ptr() for p in pruned.state_dict().values()}
    assert torch.equal(inputs, before)
    assert all(parameter.grad is None for parameter in pruned.parameters())


def test_a_saliency_need_not_be_hashable() -> None:
    @dataclass
    class Ranks:
        start: float

        def __call__(self, groups: Any) -> Any:
            return [np.arange(g.units) + self.start for g in groups.groups]

    pruned = compiled(make_net(), saliency=Ranks(1.0))
    assert halp_fx.plan_of(pruned).report["saliency"] == "Ranks"
    with pytest.raises(InputError, match=r"saliency=\['fisher'\] is not known"):
        compiled(make_net(), saliency=["fisher"])


def test_plan_of_a_plain_module() -> None:
    for module in (nn.Conv2d(3, 8, 1), torch.fx.symbolic_trace(nn.ReLU()), "net"):
        with pytest.raises(InputError, match=r"has no plan: pass what halp_fx.compile or"):
            halp_fx.plan_of(module)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0.9, 0.5, 0.25])
def test_the_plan_is_consistent(budget: float) -> None:
    model = make_net()
    pruned = compiled(model, budget)
    plan = halp_fx.plan_of(pruned)
    assert plan.predicted_ms <= plan.budget_ms
    assert plan.budget_ms == pytest.approx(budget * plan.dense_ms)
    assert 0 <= plan.gap < 1
    assert 0 < plan.value < plan.dense_value
    assert list(plan.kept) == list(oracle.named_tensors(model))
    for name, dims in plan.kept.items():
        tensor, left = oracle.named_tensors(model)[name], oracle.named_tensors(pruned)[name]
        assert len(dims) == tensor.ndim
        for size, small, index in zip(tensor.shape, left.shape, dims, strict=True):
            assert small == (size if index is None else len(index))
            assert index is None or (index.dtype == torch.int64 and len(index) < size)
    assert len(plan.units) == len(plan.groups.groups)
    for units, group in zip(plan.units, plan.groups.groups, strict=True):
        assert group.least <= len(units) <= group.units
        assert np.all(np.diff(units) > 0)
    assert plan.report["model"] == "Net"
    assert plan.report["backend"] == "analytic"
    assert plan.report["saliency"] == "magnitude"
    assert plan.report["data_free"] is True


def test_the_whole_budget_keeps_everything() -> None:
    model = make_net()
    pruned = compiled(model, 1.0)
    assert all(index is None for dims in halp_fx.plan_of(pruned).kept.values() for index in dims)
    assert oracle.shrunk(model, pruned) == 1.0
    with torch.no_grad():
        assert torch.equal(pruned(image()), model(image()))


@pytest.mark.parametrize("budget", ["50%", halp_fx.Budget(share=0.5), "0.5"], ids=str)
def test_ways_to_say_half(budget: Any) -> None:
    model = make_net()
    assert _same_kept(compiled(model, budget), compiled(model, 0.5))


def test_times_as_budgets() -> None:
    model = make_net()
    dense_ms = halp_fx.plan_of(compiled(model, 1.0)).dense_ms
    for budget in (f"{0.6e3 * dense_ms:.9f}us", halp_fx.Budget(latency_ms=0.6 * dense_ms)):
        assert _same_kept(compiled(model, budget), compiled(model, 0.6))


def _same_kept(one: nn.Module, two: nn.Module) -> bool:
    a, b = halp_fx.plan_of(one).kept, halp_fx.plan_of(two).kept
    return a.keys() == b.keys() and all(
        len(a[k]) == len(b[k])
        and all(
            (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
            for x, y in zip(a[k], b[k], strict=True)
        )
        for k in a
    )


@pytest.mark.parametrize("options", [{}, {"data": batches(), "loss": cross_entropy}], ids=str)
def test_compiling_twice_keeps_the_same(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    one = compiled(make_net(), **options)
    torch.manual_seed(1)
    two = compiled(make_net(), **options)
    assert _same_kept(one, two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_random_net_is_not_the_callers_randomness() -> None:
    """Dropout in the model and random data do not move the caller's generators."""
    model = make_net().train()

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(2):
            yield torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))

    with untouched(model):
        compiled(model, data=data(), loss=cross_entropy)


def test_flags_and_modes_are_the_models() -> None:
    model = make_net().train()
    model.norm.eval()
    model.side[1].eval()
    model.stem.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    pruned = compiled(model)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in pruned.named_modules():
        assert module.training == modes.get(name, True), name
    flags = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
    left = {n: p.requires_grad for n, p in pruned.named_parameters(remove_duplicate=False)}
    assert left == flags


def test_it_fine_tunes() -> None:
    torch.manual_seed(0)
    pruned = compiled(make_net(), data=batches(), loss=cross_entropy).train()
    for module in pruned.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs, target = batches(1)[0]
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.05, momentum=0.9)
    losses: list[float] = []
    for _ in range(25):
        optimizer.zero_grad()
        value = F.cross_entropy(pruned(inputs), target)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert min(losses[-5:]) < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_tied_weights_stay_tied() -> None:
    model = make_net()
    pruned = compiled(model)
    assert pruned.a.weight is pruned.b.weight
    assert pruned.a.bias is not pruned.b.bias
    assert len(list(pruned.parameters())) == len(list(model.parameters()))
    twin = copy.deepcopy(pruned)
    assert twin.a.weight is twin.b.weight
    assert twin.a.weight is not pruned.a.weight


@pytest.mark.parametrize("training", [True, False])
def test_dropout_by_a_flag_follows_the_mode(training: bool) -> None:
    """Whatever the mode at compile time, and without any dropout module."""
    model = make_net().train(training)
    model.drop.p = 0.0
    pruned = compiled(model)
    inputs = image()
    for mode in (True, False, True):
        pruned.train(mode)
        pruned.norm.eval()
        pruned.side.eval()
        with torch.no_grad():
            same = torch.equal(pruned(inputs), pruned(inputs))
        assert same is (not mode)


def test_deepcopy_of_the_result() -> None:
    pruned = compiled(make_net())
    twin = copy.deepcopy(pruned)
    with torch.no_grad():
        assert torch.equal(twin(image()), pruned(image()))
        twin.fc.weight.zero_()
    assert bool(pruned.fc.weight.any())
    assert _same_kept(pruned, twin)


def test_pruning_twice() -> None:
    """The result is a network as any other."""
    model = make_net()
    pruned = compiled(model, 0.6)
    again = compiled(pruned, 0.5)
    oracle.assert_exact(pruned, again, (image(),))
    assert oracle.shrunk(pruned, again) < 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = make_net().to(dtype)
    inputs = image().to(dtype)
    pruned = compiled(model, inputs=inputs)
    assert {t.dtype for t in pruned.parameters()} == {dtype}
    oracle.assert_exact(model, pruned, (inputs,))
    with torch.no_grad():
        assert pruned(inputs).dtype == dtype


def test_the_call_signature_is_the_models() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, image: Tensor, scale: float = 2.0) -> Any:
            return {"out": self.b(F.relu(self.a(image))) * scale}

    model = Keywords().eval()
    pruned = compiled(model)
    with torch.no_grad():
        assert pruned(image=image())["out"].shape == (2, 4, 8, 8)
        assert torch.equal(pruned(image())["out"], pruned(image(), 2.0)["out"])
        with pytest.raises(AssertionError, match="scale"):
            pruned(image(), 3.0)


def test_progress_names_the_stages() -> None:
    calls: list[tuple[str, int, int]] = []
    compiled(
        make_net(),
        data=batches(),
        loss=cross_entropy,
        progress=lambda stage, done, total: calls.append((stage, done, total)),
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["trace", "groups", "saliency", "latency", "select", "rewrite"]
    assert ("saliency", 2, 2) in calls
    assert all(0 <= done <= total for _, done, total in calls)


def test_exact_keeps_what_layer_norm_reads() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = nn.Linear(12, 32), nn.LayerNorm(32)
            self.mid, self.down = nn.Linear(32, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Any:
            return self.down(F.relu(self.mid(self.norm(self.up(x)))))

    model, inputs = oracle.randomize(Normed()).eval(), torch.randn(2, 12)
    free = compiled(model, 0.5, inputs)
    exact = compiled(model, 0.7, inputs, exact=True)
    assert free.up.out_features < 32
    assert exact.up.out_features == 32
    assert exact.mid.out_features < 24
    oracle.assert_exact(model, exact, (inputs,))
    oracle.assert_exact(model, free, (inputs,), norm_stats=True)


def test_every_error_is_ours() -> None:
    for error in (InfeasibleError, InputError, LatencyError, NothingToPruneError, SaliencyError):
        assert issubclass(error, HalpError)
