"""What weights can be: shared, tied, reparametrised, frozen, without any module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.patterns.base import Head, cbr, image, pattern, tokens

__all__: list[str] = []


@pattern("module_twice", free=(("a.0.weight", 0), ("shared.0.weight", 0)))
class ModuleTwice(nn.Module):
    """One convolution with its norm used twice in a row: in and out channels tie."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.out = cbr(3, 16), cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.shared(self.shared(self.a(x))))


@pattern("module_on_two_inputs", free=(("a.0.weight", 0), ("shared.0.weight", 0)))
class ModuleOnTwoInputs(nn.Module):
    """One head on two tensors: their channels tie, though they never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 16), cbr(3, 16, stride=2)
        self.shared, self.out = cbr(16, 24), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.shared(self.a(x))), self.out(self.shared(self.b(x)))


@pattern("module_two_names", free=(("a.0.weight", 0), ("one.weight", 0)))
class ModuleTwoNames(nn.Module):
    """One convolution under two names, each with a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one = cbr(3, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.two = self.one
        self.norm_one, self.norm_two = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.norm_one(self.one(self.a(x))))
        return self.out(F.relu(self.norm_two(self.two(y))))


@pattern("tied_parameters", free=(("a.0.weight", 0), ("one.weight", 0)))
class TiedParameters(nn.Module):
    """Two convolutions share their weight, not their bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = cbr(3, 16)
        self.one, self.two = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.two.weight = self.one.weight
        self.b = cbr(16, 16)
        self.mix, self.out = cbr(48, 16, 1), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.out(self.mix(torch.cat([self.one(y), F.silu(self.two(self.b(y)))], 1)))


@pattern("tied_autoencoder", image(20), strict=False, free=(("encode.weight", 0),))
class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(20, 32)
        self.shift = nn.Parameter(torch.randn(20))

    def forward(self, x: Tensor) -> Any:
        return F.linear(F.relu(self.encode(x)), self.encode.weight.t(), self.shift)


@pattern(
    "tied_embedding",
    lambda: (torch.randint(0, 20, (2, 7)),),
    strict=False,
    free=(("up.weight", 0),),
)
class TiedEmbedding(nn.Module):
    """The classifier is the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(48, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Any:
        y = self.table(x)
        return self.out(y + self.down(F.gelu(self.up(y))))


@pattern("spectral_norm", free=(("a.0.weight", 0), ("c.0.weight", 0)))
class SpectralNorm(nn.Module):
    """The weight is divided by its largest singular value, read off all its entries."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 32), cbr(32, 8)
        self.norm = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.c, self.out = cbr(8, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.c(F.relu(self.norm(self.b(self.a(x))))))


@pattern(
    "weight_norm",
    free=(("a.0.weight", 0), ("norm.parametrizations.weight.original1", 0)),
    unmasked=("norm.parametrizations.weight.original1",),
)
class WeightNorm(nn.Module):
    """Direction and length apart: each row is divided by its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 32), cbr(32, 8)
        self.norm = parametrizations.weight_norm(nn.Conv2d(8, 16, 3, padding=1))
        self.c, self.out = cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.c(F.relu(self.norm(self.b(self.a(x))))))


@pattern("cosine_linear", free=(("a.0.weight", 0),), whole=(("cosine", 0),))
class CosineLinear(nn.Module):
    """A classifier with normalised rows and normalised features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 32), cbr(32, 8)
        self.cosine = nn.Parameter(torch.randn(5, 8))
        self.temperature = nn.Parameter(torch.tensor(8.0))

    def forward(self, x: Tensor) -> Any:
        y = F.normalize(self.b(self.a(x)).mean((2, 3)), dim=1)
        return self.temperature * F.linear(y, F.normalize(self.cosine, dim=1))


@pattern("cosine_rows", unmasked=("rows",))
class CosineRows(nn.Module):
    """Rows normalised over their inputs, then a layer more: only rows can go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 32), cbr(32, 8)
        self.rows, self.out = nn.Parameter(torch.randn(24, 8)), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x)).mean((2, 3))
        return self.out(F.relu(F.linear(y, F.normalize(self.rows, dim=1))))


@pattern("reparametrised_scale", free=(("a.0.weight", 0),))
class ReparametrisedScale(nn.Module):
    """The weight is multiplied by a per-filter scale and passed through tanh before use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = cbr(3, 16), Head(24)
        self.weight = nn.Parameter(torch.randn(24, 16, 3, 3) * 0.2)
        self.scale = nn.Parameter(torch.ones(24, 1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(F.conv2d(self.a(x), torch.tanh(self.weight) * self.scale)))


@pattern("concatenated_weights", free=(("a.0.weight", 0),))
class ConcatenatedWeights(nn.Module):
    """Two parameters next to each other are one convolution's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = cbr(3, 16)
        self.one = nn.Parameter(torch.randn(8, 16, 3, 3) * 0.2)
        self.two = nn.Parameter(torch.randn(16, 16, 3, 3) * 0.2)
        self.out = Head(24)

    def forward(self, x: Tensor) -> Any:
        weight = torch.cat([self.one, self.two], 0)
        return self.out(F.relu(F.conv2d(self.a(x), weight, padding=1)))


@pattern("sliced_weights", tokens(), strict=False)
class SlicedWeights(nn.Module):
    """A fused weight and bias, indexed into three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 16) * 0.2)
        self.bias = nn.Parameter(torch.randn(48))
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        q = F.linear(x, self.weight[:16], self.bias[:16])
        k = F.linear(x, self.weight[16:32], self.bias[16:32])
        v = F.linear(x, self.weight[32:], self.bias[32:])
        y = (q @ k.transpose(1, 2) * 0.25).softmax(-1) @ v
        return self.out(F.relu(y))


@pattern("partly_frozen", free=(("a.0.weight", 0), ("b.0.weight", 0)))
def partly_frozen() -> nn.Module:
    """A backbone that isn't trained any more, a head that is."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = cbr(3, 16), cbr(16, 16), Head(16)

        def forward(self, x: Tensor) -> Any:
            return self.out(self.b(self.a(x)))

    net = Net()
    net.a.requires_grad_(False)
    net.b[1].weight.requires_grad_(False)
    return net


@pattern("unused_parameters", free=(("a.0.weight", 0),))
class UnusedParameters(nn.Module):
    """A module, a parameter and a buffer that the forward pass never reads."""

    spare: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), cbr(16, 16), Head(16)
        self.unused = nn.Conv2d(3, 7, 3)
        self.token = nn.Parameter(torch.randn(1, 16))
        self.register_buffer("spare", torch.arange(5))

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(self.a(x)))


@pattern("position_map", free=(("a.0.weight", 0),))
class PositionMap(nn.Module):
    """A parameter of the features' whole shape is added, a spatial one multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), cbr(16, 16), Head(16)
        self.position = nn.Parameter(torch.randn(1, 16, 8, 8))
        self.window = nn.Parameter(torch.rand(8, 8))

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(self.a(x) + self.position) * self.window)
