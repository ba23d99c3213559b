"""Statistics over channels outside of the norm modules: taken over the survivors, or pinned.

The truth is a network written for it: its layers know which channels survive, take their
statistics over those alone, and make the rest zero where it is read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halp_fx
from halp_fx.passes.groups import find_groups
from halp_fx.passes.trace import trace
from halp_fx.report import render_markdown
from tests import oracle
from tests.pruning import compile_within

__all__: list[str] = []

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _mask(index: Tensor | None, size: int) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    if index is not None:
        mask[:] = False
        mask[index] = True
    return mask


class Standardised(nn.Conv2d):
    """Scaled weight standardisation as the NFNets of timm write it."""

    alive: Tensor | None = None  # of the input channels, in the reference

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        if self.alive is not None:
            chosen = self.weight[:, self.alive].flatten(1)
            mean, variance = chosen.mean(1), chosen.var(1, unbiased=False)
            weight = (self.weight - mean[:, None, None, None]) * self.gain * self.scale
            weight = weight / torch.sqrt(variance + 1e-6)[:, None, None, None]
            kept = weight * self.alive.to(weight.dtype)[None, :, None, None]
            return F.conv2d(x, kept, self.bias, self.stride, self.padding)
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
            eps=1e-6,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class NormFree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b = Standardised(3, 16, 3, padding=1), Standardised(16, 32, 1)
        self.c, self.out = Standardised(32, 16, 3, stride=2, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.silu(self.stem(x))
        return self.out(F.silu(self.c(F.silu(self.b(x)))) + x[:, :, ::2, ::2])


class Response(nn.Module):
    """Global response norm of ConvNeXtV2: (N, H, W, C) by their norms over space."""

    alive: Tensor | None = None  # of the channels, in the reference

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Any:
        norms = x.norm(p=2, dim=(1, 2), keepdim=True)
        if self.alive is not None:
            return (
                x
                + self.bias
                + self.weight
                * (x * (norms / (norms[..., self.alive].mean(-1, keepdim=True) + 1e-6)))
            )
        scaled = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        return x + torch.addcmul(self.bias.view(1, 1, 1, -1), self.weight, x * scaled)


class Responding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.up, self.response, self.down = nn.Linear(16, 48), Response(48), nn.Linear(48, 16)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.down(self.response(F.gelu(self.up(x.permute(0, 2, 3, 1)))))
        return self.out(x + y.permute(0, 3, 1, 2))


def _network(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return oracle.randomize(kind()).eval()


def _reference(model: nn.Module, kept: oracle.Kept) -> nn.Module:
    reference = oracle.masked_dense(model, kept, strict=True)
    for name, module in reference.named_modules():
        if isinstance(module, Standardised):
            # Its columns were masked, and are masked again by `alive`: statistics need neither.
            module.weight.data = model.get_parameter(f"{name}.weight").detach().clone()
            module.alive = _mask(kept[f"{name}.weight"][1], module.in_channels)
        if isinstance(module, Response):
            module.alive = _mask(kept[f"{name}.weight"][0], len(module.weight))
    return reference.double()


@pytest.mark.parametrize("kind", [NormFree, Responding])
@pytest.mark.parametrize("budget", [0.6, 0.2])
def test_statistics_run_over_the_survivors(kind: type[nn.Module], budget: float) -> None:
    model = _network(kind)
    pruned = compile_within(model, budget, (IMAGE,), drop_blocks=False)
    kept = halp_fx.plan_of(pruned).kept
    oracle.check_state(model, pruned, kept)
    report = render_markdown(halp_fx.plan_of(pruned))
    assert "These groups pass through statistics over channels" in report
    assert oracle.shrunk(model, pruned) < 0.85
    with torch.no_grad():
        for batch in (2, 3):
            x = oracle.rebatch((IMAGE,), batch)[0].double()
            expected = _reference(model, kept)(x)
            oracle.assert_close(pruned.double()(x), expected)


@pytest.mark.parametrize(
    ("kind", "node", "free", "pinned"),
    [
        (NormFree, "batch_norm", {"b.weight", "c.weight"}, "batch norm takes statistics over the"),
        (Responding, "truediv", {"up.weight"}, "mean reads all channels"),
    ],
)
def test_they_are_named_or_pinned(
    kind: type[nn.Module], node: str, free: set[str], pinned: str
) -> None:
    traced = trace(_network(kind), IMAGE)
    found = find_groups(traced)
    named = {name for g in found.groups if g.inexact for name in (m.name for m in g.members)}
    assert free <= named
    assert any(n.startswith(node) for g in found.groups for n in g.inexact)
    strict = find_groups(traced, exact=True)
    assert not any(g.inexact for g in strict.groups)
    rows = {m.name for g in strict.groups for m in g.members if m.dim == 0}
    assert not rows & (free - {"c.weight"})
    assert any(pin.reason.startswith(pinned) for pin in strict.pins)


def test_statistics_keep_two_values() -> None:
    """A variance over one value is not defined: 1x1 convolutions keep two inputs."""
    model = _network(NormFree)
    pruned = halp_fx.compile(
        model, 1e-9 + _least_share(model), IMAGE, latency="analytic", min_share=0.0
    )
    kept = halp_fx.plan_of(pruned).kept["b.weight"][1]
    assert kept is not None
    assert kept.tolist()[:2] == [0, 1]
    assert torch.isfinite(pruned(IMAGE)).all()


def _least_share(model: nn.Module) -> float:
    try:
        halp_fx.compile(model, 1e-6, IMAGE, latency="analytic", min_share=0.0)
    except halp_fx.errors.InfeasibleError as error:
        least = error.least
    dense = halp_fx.plan_of(halp_fx.compile(model, 0.9, IMAGE, latency="analytic")).dense_ms
    return least / dense * 1.001
