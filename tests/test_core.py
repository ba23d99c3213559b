"""The core of a model that a function made: found again, and nothing registered twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import halp_fx
from halp_fx.core import compile_core, core_of
from halp_fx.errors import InputError

X = torch.rand(2, 3, 8, 8)


class Whole(nn.Module):
    """Decides by a value, so only its layers can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        middle = nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.ReLU(), *middle, nn.Conv2d(32, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(self.stem(x if float(x.mean()) > 0 else -x))
        return y


def in_a_row(model: Whole) -> nn.Module:
    return nn.Sequential(model.stem, model.body)


def at_a_place(copied: Whole, core: nn.Module) -> None:
    copied.stem, copied.body = core, nn.Identity()


def in_pieces(copied: Whole, core: nn.Module) -> None:
    copied.stem, copied.body = core.get_submodule("0"), core.get_submodule("1")
    # What was a Sequential is a plain module in the core, whose graph has the calls.
    copied.body = nn.Sequential(*copied.body.children())


def instead(copied: Whole, core: nn.Module) -> nn.Module:
    del copied
    return core


def tensors(model: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


def pruned_by(put_back: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Whole().eval()
    return compile_core(model, in_a_row, 0.6, X, put_back=put_back, latency="analytic")


@pytest.mark.parametrize("put_back", [at_a_place, in_pieces, instead])
def test_the_core_of_a_function_is_found(put_back: Any, tmp_path: Path) -> None:
    whole = pruned_by(put_back)
    core = core_of(whole)
    assert isinstance(core, fx.GraphModule)
    assert halp_fx.plan_of(core) is halp_fx.plan_of(whole)
    assert tensors(core) == tensors(whole)
    assert len(whole.state_dict()) == len(core.state_dict()) == len(Whole().state_dict())
    with torch.no_grad():
        assert torch.equal(core(X), whole(X))
        loaded = halp_fx.load(halp_fx.save(core, tmp_path / "core.safetensors"))
        assert torch.equal(loaded(X), whole(X))


@pytest.mark.parametrize("put_back", [at_a_place, in_pieces, instead])
def test_the_core_of_a_copy_is_the_copys(put_back: Any) -> None:
    whole = pruned_by(put_back)
    twin = copy.deepcopy(whole).double()
    core = core_of(twin)
    assert tensors(core) == tensors(twin)
    assert {p.dtype for p in core.parameters()} == {torch.float64}
    assert {p.dtype for p in core_of(whole).parameters()} == {torch.float32}


def test_the_core_of_the_last_pruning_counts() -> None:
    first = compile_core(Whole().eval(), "body", 0.7, X, latency="analytic")
    assert "body.4.weight" in core_of(first).state_dict()
    again = compile_core(first, in_a_row, 0.6, X, put_back=at_a_place, latency="analytic")
    assert core_of(again) is again.stem


def test_a_core_that_was_taken_out_is_told() -> None:
    whole: Any = pruned_by(at_a_place)
    whole.stem = nn.Identity()
    with pytest.raises(InputError, match="the pruned core was at 'stem' of Whole, where there is"):
        core_of(whole)
