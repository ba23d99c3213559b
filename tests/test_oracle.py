"""The oracle accepts networks pruned by hand and notices what is wrong with others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import oracle

__all__: list[str] = []


class Net(nn.Module):
    """Two convolutions with a norm and sigmoid between; options for what the tests need."""

    def __init__(self, width: int, norm: str = "batch", gate: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, 4, 3)
        norms: dict[str, nn.Module] = {
            "batch": nn.BatchNorm2d(width),
            "group": nn.GroupNorm(2, width),
            "layer": nn.LayerNorm([width, 6, 6]),
            "plain": nn.GroupNorm(1, width, affine=False),
        }
        self.norm, self.gate = norms[norm], gate

    def forward(self, x: Tensor) -> Any:
        y = torch.sigmoid(self.norm(self.a(x)))
        if self.gate:
            y = y * y.sum(1, keepdim=True)
        return {"out": [self.b(y)]}


_KEPT = torch.tensor([0, 2, 5, 7])


def _kept(model: nn.Module, index: Tensor) -> oracle.Kept:
    kept: dict[str, tuple[Tensor | None, ...]] = {}
    for name, tensor in model.state_dict().items():
        dims: list[Tensor | None] = [None] * tensor.ndim
        if tensor.ndim and not name.startswith("b."):
            dims[0] = index
        if name == "b.weight":
            dims[1] = index
        kept[name] = tuple(dims)
    return kept


def _pair(index: Tensor = _KEPT, **options: Any) -> tuple[nn.Module, nn.Module, oracle.Kept]:
    model = oracle.randomize(Net(8, **options)).eval()
    kept = _kept(model, index)
    pruned = Net(len(index), **options).eval()
    pruned.load_state_dict(oracle.cut_state_dict(model.state_dict(), kept))
    return model, pruned, kept


_INPUTS = (torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8),)


@pytest.mark.parametrize("strict", [False, True])
def test_pruned_by_hand_is_exact(strict: bool) -> None:
    model, pruned, kept = _pair()
    with oracle.snapshot(model):
        oracle.assert_exact(model, pruned, _INPUTS, kept=kept, strict=strict, batches=(1, 2, 5))
    assert 0.4 < oracle.shrunk(model, pruned) < 0.6


@pytest.mark.parametrize("norm", ["group", "layer", "plain"])
def test_statistics_over_the_survivors(norm: str) -> None:
    model, pruned, kept = _pair(norm=norm)
    channels = {"norm": ("a.weight", 0)} if norm == "plain" else None
    oracle.assert_exact(
        model, pruned, _INPUTS, kept=kept, strict=True, norm_stats=True, norm_channels=channels
    )
    with pytest.raises(AssertionError, match="differs by"):
        oracle.assert_exact(model, pruned, _INPUTS, kept=kept, strict=True)


def test_group_norm_with_unequal_survivors_is_noticed() -> None:
    model, pruned, kept = _pair(torch.tensor([0, 1, 2, 5]), norm="group")
    with pytest.raises(AssertionError, match="differs by"):
        oracle.assert_exact(model, pruned, _INPUTS, kept=kept, norm_stats=True)


def test_a_sum_over_channels_is_noticed_when_strict() -> None:
    model, pruned, kept = _pair(gate=True)
    with pytest.raises(AssertionError, match="differs by"):
        oracle.assert_exact(model, pruned, _INPUTS, kept=kept, strict=True)


def test_a_swapped_channel_is_noticed() -> None:
    model, pruned, kept = _pair()
    with torch.no_grad():
        weight = pruned.get_parameter("b.weight")
        weight.copy_(weight[:, [1, 0, 2, 3]])
    with pytest.raises(AssertionError, match=r"b\.weight: not the dense tensor"):
        oracle.assert_exact(model, pruned, _INPUTS, kept=kept)


def test_flags_and_keys_are_checked() -> None:
    model, pruned, kept = _pair()
    frozen = copy.deepcopy(pruned)
    frozen.get_parameter("a.weight").requires_grad_(False)
    with pytest.raises(AssertionError, match=r"a\.weight: requires_grad is not True"):
        oracle.check_state(model, frozen, kept)
    with pytest.raises(AssertionError, match="training flag"):
        oracle.check_state(model, copy.deepcopy(pruned).train(), kept)
    extra = copy.deepcopy(pruned)
    extra.register_buffer("mask", torch.ones(1))
    with pytest.raises(AssertionError, match="unknown key 'mask'"):
        oracle.check_state(model, extra, kept)
    extra = copy.deepcopy(pruned)
    extra.register_module("_constants", nn.BatchNorm2d(1))
    oracle.check_state(model, extra, kept)
    with pytest.raises(AssertionError, match="not sorted"):
        oracle.check_state(model, pruned, {**kept, "a.bias": (_KEPT.flip(0),)})
    with pytest.raises(AssertionError, match="is missing"):
        oracle.check_state(nn.ModuleDict({"a": model}), nn.ModuleDict(), {})


class Branch(nn.Module):
    """A residual branch that can be dropped: what its last norm adds stays as a constant."""

    def __init__(self, dropped: bool = False) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        if dropped:
            self.register_buffer("constant", torch.zeros(8, 1, 1))
            return
        self.a, self.b = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        if "constant" in self._buffers:
            return self.out(y + self.get_buffer("constant"))
        return self.out(y + self.norm(self.b(F.relu(self.a(y)))))


class Constants(nn.Module):
    """Branch with the constant under the prefix that the rewrite uses."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.stem, self.out, self._constants = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Module()
        self._constants.register_buffer("norm", constant)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.stem(x) + self._constants.get_buffer("norm"))


@pytest.mark.parametrize("strict", [False, True])
def test_a_dropped_branch_keeps_its_constant(strict: bool) -> None:
    model = oracle.randomize(Branch()).eval()
    none = torch.empty(0, dtype=torch.int64)
    kept: dict[str, tuple[Tensor | None, ...]] = {
        "a.weight": (none, None, None, None),
        "a.bias": (none,),
        "b.weight": (None, none, None, None),
        "b.bias": (none,),
        **{f"norm.{name}": (none,) for name in ("weight", "bias", "running_mean", "running_var")},
    }
    zero = torch.zeros(1, 8, 1, 1)
    with torch.no_grad():
        bias = model.get_parameter("b.bias").reshape(1, 8, 1, 1)
        constant = model.get_submodule("norm")(zero + bias)[0]
    pruned = Constants(constant).eval()
    pruned.load_state_dict(
        {**oracle.cut_state_dict(model.state_dict(), kept), "_constants.norm": constant},
        strict=False,
    )
    oracle.assert_exact(model, pruned, _INPUTS, kept=kept, strict=strict, tolerance=1e-6)
    pruned = Constants(constant * 0).eval()
    pruned.load_state_dict(oracle.cut_state_dict(model.state_dict(), kept), strict=False)
    with pytest.raises(AssertionError, match="differs by"):
        oracle.assert_exact(model, pruned, _INPUTS, kept=kept, strict=strict, tolerance=1e-6)


class Heads(nn.Module):
    """Attention scores with `width` channels and the dense scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(6, width), nn.Linear(6, width), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out((self.q(x) @ self.k(x).mT * 0.3).softmax(-1) @ x)


def test_products_of_activations_need_the_loose_mask() -> None:
    model = oracle.randomize(Heads(8)).eval()
    kept = {
        f"{m}.{p}": (_KEPT, None)[: 2 - (p == "bias")] for m in "qk" for p in ("weight", "bias")
    }
    pruned = Heads(4).eval()
    pruned.load_state_dict(oracle.cut_state_dict(model.state_dict(), kept))
    inputs = (torch.linspace(-1, 1, 60).reshape(2, 5, 6).sin(),)
    oracle.assert_exact(model, pruned, inputs, kept=kept)
    with pytest.raises(AssertionError, match="differs by"):
        oracle.assert_exact(model, pruned, inputs, kept=kept, strict=True)


def test_snapshot_notices_changes() -> None:
    model = Net(8)
    with pytest.raises(AssertionError, match="training flags"), oracle.snapshot(model):
        model.norm.eval()
    with (
        pytest.raises(AssertionError, match=r"a\.bias was given a gradient"),
        oracle.snapshot(model),
    ):
        model.a.bias.grad = torch.ones(8)  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match=r"norm\.running_mean changed"), oracle.snapshot(model):
        model.get_buffer("norm.running_mean").add_(1)
    with pytest.raises(AssertionError, match="hooks"), oracle.snapshot(model):
        model.a.register_forward_hook(lambda *_: None)


def test_nested_outputs_are_compared() -> None:
    one, two = {"a": (torch.ones(2), None), "b": [3]}, {"a": (torch.ones(2), None), "b": [3]}
    oracle.assert_close(one, two)
    with pytest.raises(AssertionError, match=r"output\['a'\]\[0\] differs"):
        oracle.assert_close({"a": (torch.zeros(2), None), "b": [3]}, two)
    with pytest.raises(AssertionError, match="structure"):
        oracle.assert_close({"a": [torch.ones(2), None], "b": [3]}, two)
