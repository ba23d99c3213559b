"""Modules that a user keeps whole, with a rule of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import halp_fx
from halp_fx.passes.groups import find_groups
from halp_fx.passes.rules import LabelRun, ModuleCall, core, labels_of, register_module, set_labels
from halp_fx.passes.rules import leaves as registry
from halp_fx.passes.trace import trace
from tests import oracle
from tests.pruning import compile_within

__all__: list[str] = []

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Checked(nn.Module):
    """A scale for each channel, and a branch on values, which can't be traced."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Any:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the features are not finite")
        return x * self.weight.view(1, self.channels, 1, 1)


class Doubled(nn.Module):
    """Channels twice over, by torch.fft and back, which has no rule."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Any:
        y = torch.fft.ifft(torch.fft.fft(self.norm(x), dim=-1), dim=-1).real
        return torch.cat([y, y], 1)


class Net(nn.Module):
    def __init__(self, leaf: type[nn.Module], wider: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16 * wider, 16, 1)
        self.leaf, self.out = leaf(16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.b(self.leaf(self.a(x)))))


def checked_rule(run: LabelRun, call: ModuleCall) -> None:
    labels = labels_of(call.args[0])
    run.tie(labels.get(1), labels_of(call.module.weight).get(0))
    set_labels(call.out, labels)


def doubled_rule(run: LabelRun, call: ModuleCall) -> None:
    channels = labels_of(call.args[0]).get(1)
    for _, tensor in [*call.module.named_parameters(), *call.module.named_buffers()]:
        if tensor.is_floating_point():
            run.tie(channels, labels_of(tensor).get(0))
    set_labels(call.out, {1: None if channels is None else np.tile(channels, 2)})


def _resize(module: Checked, dense: Checked) -> None:
    assert dense.channels == 16
    module.channels = len(module.weight)


@pytest.fixture(autouse=True)
def rules() -> Iterator[dict[Any, Any]]:
    """What a test registers is forgotten again."""
    before = dict(registry._RULES)
    yield registry._RULES
    registry._RULES.clear()
    registry._RULES.update(before)


def net(leaf: type[nn.Module], wider: int = 1) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = oracle.randomize(Net(leaf, wider))
    assert isinstance(model, Net)
    return model.eval()


def _prunable(model: nn.Module) -> set[str]:
    return {m.name for g in find_groups(trace(model, IMAGE)).groups for m in g.members}


def test_without_a_rule_it_is_held_whole() -> None:
    assert "a.weight" not in _prunable(net(Checked))
    pins = find_groups(trace(net(Checked), IMAGE)).pins
    assert any("the module 'leaf' could not be traced" in pin.reason for pin in pins)
    assert "a.weight" not in _prunable(net(Doubled, 2))


@pytest.mark.parametrize("budget", [0.6, 0.3])
def test_what_nobody_can_trace_is_pruned_with_a_rule(budget: float) -> None:
    register_module(Checked, resize=_resize)(checked_rule)
    model = net(Checked)
    with oracle.snapshot(model):
        pruned: Any = halp_fx.compile(model, budget, IMAGE, latency="analytic")
    assert isinstance(pruned.leaf, Checked)
    assert pruned.leaf.channels == len(pruned.leaf.weight) == pruned.a.out_channels < 16
    assert model.leaf.channels == 16
    oracle.assert_exact(model, pruned, (IMAGE,), strict=True)


def test_what_has_operators_without_rules_is_pruned_with_its_own() -> None:
    register_module(Doubled)(doubled_rule)
    model = net(Doubled, 2)
    pruned: Any = compile_within(model, 0.5, (IMAGE,))
    assert pruned.b.in_channels == 2 * pruned.a.out_channels < 32
    assert pruned.leaf.norm.num_features == pruned.a.out_channels
    oracle.assert_exact(model, pruned, (IMAGE,), strict=True)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda run, call: None, "module leaf can't be shrunk"),
        (
            lambda run, call: set_labels(call.out, {1: np.tile(labels_of(call.args[0])[1], 2)}),
            "module leaf can't be shrunk",
        ),
        (lambda run, call: set_labels(call.out, {1: [1, 2]}), "the rule of Doubled fails: Attrib"),
        (
            lambda run, call: set_labels(call.out, {1: np.array([1, 2])}),
            "the rule of Doubled fails: StructureError: 2 labels for dim 1",
        ),
    ],
    ids=["says nothing", "forgets the parameters", "raises", "gives too few labels"],
)
def test_a_wrong_rule_pins(wrong: Callable[..., None], reason: str) -> None:
    register_module(Doubled)(wrong)
    model = net(Doubled, 2)
    groups = find_groups(trace(model, IMAGE))
    (pin,) = [p for p in groups.pins if (p.name, p.dim) == ("a.weight", 0)]
    assert pin.reason.startswith(reason)
    pruned = compile_within(model, 0.5, (IMAGE,))
    assert halp_fx.plan_of(pruned).kept["b.weight"][0] is not None
    oracle.assert_exact(model, pruned, (IMAGE,))


class Mixed(nn.Module):
    """A convolution, behind a branch on values or not."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x)


class MixedByData(Mixed):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x if bool(x.sum() > -1e9) else -x)


def mixed_rule(run: LabelRun, call: ModuleCall) -> None:
    weight = call.module.conv.weight
    run.tie(labels_of(call.args[0]).get(1), labels_of(weight).get(1))
    run.tie(labels_of(weight).get(0), labels_of(call.module.conv.bias).get(0))
    set_labels(call.out, {1: labels_of(weight).get(0)})


def resize_mixed(module: Mixed, dense: Mixed) -> None:  # noqa: ARG001
    module.conv.out_channels, module.conv.in_channels = module.conv.weight.shape[:2]


@pytest.mark.parametrize("leaf", [Mixed, MixedByData])
def test_work_inside_of_a_leaf_is_counted_at_the_widths_that_are_left(leaf: type[Mixed]) -> None:
    register_module(leaf, resize=resize_mixed)(mixed_rule)
    model = net(leaf)
    pruned = halp_fx.compile(model, 0.2, IMAGE, latency="analytic", min_share=0.3)
    part = pruned.get_submodule("leaf").conv
    assert isinstance(part, nn.Conv2d)
    assert part.in_channels < 16 and part.out_channels < 16
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pruned(IMAGE)
    macs = halp_fx.plan_of(pruned).report["macs"]
    assert macs["pruned"] == counter.get_total_flops() / 2


def test_means_that_go_into_a_leaf_pin() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.sigmoid(x)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.out = nn.Conv2d(3, 16, 1), Gate(), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return self.out(x * self.gate(x.mean(1, keepdim=True)))

    @register_module(Gate)
    def rule(run: LabelRun, call: ModuleCall) -> None:
        set_labels(call.out, labels_of(call.args[0]))

    assert "a.weight" not in _prunable(Gated().eval())


def test_subclasses_with_another_forward_have_no_rule() -> None:
    class Same(Checked):
        pass

    class Other(Checked):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.flip(1))

    register_module(Checked, resize=_resize)(checked_rule)
    assert registry.module_rule(Same(4)) is checked_rule
    assert registry.module_rule(Other(4)) is None
    assert registry.module_rule(nn.ReLU()) is None


def test_what_can_not_be_registered() -> None:
    register_module(Checked)(checked_rule)
    with pytest.raises(ValueError, match="modules of Checked have a rule already: <function"):
        register_module(Checked)(checked_rule)
    with pytest.raises(TypeError, match=r"takes a class of torch\.nn\.Module, not Checked\("):
        register_module(Checked(4))(checked_rule)  # type: ignore[arg-type]


DOCS = Path(__file__).parent.parent / "docs" / "new_op.md"


def test_the_page_that_teaches_it() -> None:
    """Its code runs as it stands, one block after the other, and prunes exactly."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)  # noqa: S102  the project's own page
    try:

        class Swapped(Net):
            def forward(self, x: Tensor) -> Any:
                x = torch.ops.mylib.swap_pairs(self.a(x))
                return self.out(torch.relu(self.b(self.leaf(x))))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = oracle.randomize(Swapped(names["Checked"], 1)).eval()
        pruned: Any = compile_within(model, 0.5, (IMAGE,))
        assert pruned.a.out_channels == pruned.leaf.channels < 16
        assert pruned.a.out_channels % 2 == 0, "pairs go together"
        oracle.assert_exact(model, pruned, (IMAGE,), strict=True)
    finally:
        core._RULES.pop("mylib::swap_pairs")
        names["library"]._destroy()
