"""How a network is called and how it is built: inputs, outputs, containers, control flow."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Head, cbr, image, pattern

__all__: list[str] = []


class _Trunk(nn.Module):
    """Two convolutions; subclasses add what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 32), cbr(32, 16)
        self.head = nn.Linear(16, 5)

    def features(self, x: Tensor) -> tuple[Any, Any]:
        y = self.b(self.a(x))
        return y, self.head(y.mean((2, 3)))


@pattern("output_features", free=(("a.0.weight", 0),), whole=(("b.0.weight", 0),))
class OutputFeatures(_Trunk):
    """The features are an output themselves: they keep their channels."""

    def forward(self, x: Tensor) -> Any:
        return self.features(x)


@pattern("output_nested", free=(("a.0.weight", 0),))
class OutputNested(_Trunk):
    """Lists and tuples in a dict, with a None and a number."""

    def forward(self, x: Tensor) -> Any:
        y, scores = self.features(x)
        return {"all": [scores, (y.mean(1), None)], "count": 3}


@pattern("output_dict", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class OutputDict(_Trunk):
    """An OrderedDict, as torchvision's segmentation models return it."""

    def forward(self, x: Tensor) -> Any:
        result = OrderedDict()
        y = self.b(self.a(x))
        result["out"] = self.head(y.amax((2, 3)))
        result["aux"] = self.head(y.mean((2, 3)))
        return result


@dataclass
class Prediction:
    """Scores and box of an object."""

    scores: Tensor
    box: Tensor


class NamedPrediction(NamedTuple):
    """Scores and their logarithm."""

    scores: Tensor
    logs: Tensor


@pattern("output_dataclass", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class OutputDataclass(nn.Module):
    """A dataclass comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = cbr(3, 16), cbr(16, 16)
        self.scores, self.box = nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x)).mean((2, 3))
        return Prediction(scores=self.scores(y), box=self.box(y))


@pattern("output_named_tuple", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class OutputNamedTuple(nn.Module):
    """A NamedTuple comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scores = cbr(3, 16), cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.scores(self.b(self.a(x)))
        return NamedPrediction(y, F.log_softmax(y, dim=1))


@pattern(
    "several_inputs",
    lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8), torch.randn(2, 6)),
    free=(("image.0.weight", 0), ("depth.0.weight", 0), ("vector.weight", 0)),
)
class SeveralInputs(nn.Module):
    """An image, a depth map and a vector; the last argument has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.depth, self.vector = cbr(3, 16), cbr(1, 8), nn.Linear(6, 12)
        self.mix, self.out = cbr(24, 16), nn.Linear(28, 5)

    def forward(self, x: Tensor, depth: Tensor, vector: Tensor, scale: float = 2.0) -> Any:
        y = self.mix(torch.cat([self.image(x), self.depth(depth)], 1)).mean((2, 3))
        return self.out(torch.cat([y * scale, F.relu(self.vector(vector))], 1))


@pattern("batch_control_flow", traceable=False, free=(("a.0.weight", 0),))
class BatchControlFlow(nn.Module):
    """A branch on the batch size, with equal results on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        if x.shape[0] > 1:
            y = y * 1.0
        return self.out(self.b(y))


@pattern("space_control_flow", traceable=False, free=(("a.0.weight", 0),))
class SpaceControlFlow(nn.Module):
    """A branch on the height, and an assertion on the width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        assert y.shape[3] % 2 == 0
        if y.shape[2] > 4:
            y = F.max_pool2d(y, 2)
        return self.out(self.b(y))


@pattern("data_control_flow", traceable=False, free=(("a.0.weight", 0),))
class DataControlFlow(nn.Module):
    """A part with a branch on values: nobody can trace it, the rest can still be pruned."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            if float(y.detach().abs().max()) > 1e6:
                y = y / 2
            return y

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.part, self.c = cbr(3, 32), cbr(32, 16), self.Part(), cbr(16, 16)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.c(self.part(self.b(self.a(x)))))


@pattern("containers", free=(("stages.first.0.weight", 0), ("stages.second.0.weight", 0)))
class Containers(nn.Module):
    """Sequential, ModuleList, ModuleDict, ParameterList and ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({"first": cbr(3, 16), "second": cbr(16, 16)})
        self.extra = nn.ModuleList([nn.Identity(), nn.Sequential(), cbr(16, 16)])
        self.gains = nn.ParameterList([torch.ones(16, 1, 1), torch.ones(16, 1, 1)])
        self.shifts = nn.ParameterDict({"last": torch.zeros(16, 1, 1)})
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        for stage, gain in zip(self.stages.values(), self.gains, strict=True):
            x = stage(x) * gain
        for layer in self.extra:
            x = layer(x)
        return self.out(x + self.shifts["last"])


@pattern("in_place", free=(("a.weight", 0), ("b.weight", 0)))
class InPlace(nn.Module):
    """x += y, activations in place, and out-of-place twins on the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.hard, self.leaky = nn.Hardswish(inplace=True), nn.LeakyReLU(0.1, inplace=True)
        self.out = Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.hard(self.a(x))
        z = self.b(y)
        z += y
        z.mul_(0.5).add_(y, alpha=0.1)
        z -= 0.1
        z = self.leaky(z) * 2.0
        return self.out(torch.relu_(F.relu6(z, inplace=True) - y))


@pattern("in_place_slice", traceable=False)
class InPlaceSlice(nn.Module):
    """An assignment to a slice of channels; may be pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.out = cbr(3, 32), cbr(32, 8), cbr(8, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(self.stem(x)).clone()
        y[:, 2:5] = y[:, 2:5] * 2.0
        return self.out(self.b(y))


@pattern("in_place_view", free=(("stem.0.weight", 0),))
class InPlaceView(nn.Module):
    """An in-place change of a view shows in its base."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = cbr(3, 32), nn.Conv2d(32, 16, 3, padding=1)
        self.b, self.out = cbr(16, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(self.stem(x))
        view = y[:, :, ::2]
        view.mul_(0.5)
        return self.out(self.b(y))


@pattern("resize_to_other", image(3, 9, 9), free=(("a.0.weight", 0), ("b.0.weight", 0)))
class ResizeToOther(nn.Module):
    """F.interpolate and adaptive pool to another tensor's size, then a grid sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = cbr(3, 16), cbr(16, 16, stride=2), cbr(16, 16)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        z = F.interpolate(self.b(y), size=y.size()[2:], mode="bicubic")
        y = self.c(y + z) + F.adaptive_avg_pool2d(y, (9, 9))
        return self.out(F.interpolate(y, size=(x.size(2), x.size(3)), mode="area"))


@pattern("constants_in_forward", free=(("a.0.weight", 0),))
class ConstantsInForward(nn.Module):
    """Tensors made on the fly: arange, linspace, zeros_like, new_ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = cbr(3, 16), cbr(18, 16), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        rows = torch.arange(8, device=x.device).to(y.dtype).view(1, 1, 8, 1) / 8
        columns = torch.linspace(-1, 1, 8, dtype=torch.float64).to(y.dtype).view(1, 1, 1, 8)
        ones = torch.ones_like(y[:, :1])
        y = y + torch.zeros_like(y) + y.new_ones(1)
        return self.out(self.b(torch.cat([y, rows * ones, columns * ones], 1)))


@pattern("dropout", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class Dropout(nn.Module):
    """Dropout of elements and channels, by module and by function with a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = cbr(3, 16), nn.Dropout2d(0.2), cbr(16, 16)
        self.alpha, self.out = nn.AlphaDropout(0.1), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = F.dropout(self.drop(self.a(x)), 0.3, training=self.training)
        return self.out(self.alpha(self.b(y)))


@pattern("stochastic_depth", free=(("a.0.weight", 0), ("b.0.weight", 0)))
class StochasticDepth(nn.Module):
    """torchvision's stochastic depth and dropped blocks, idle in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import StochasticDepth as Drop

        self.a, self.b, self.c = cbr(3, 16), cbr(16, 24), cbr(24, 16)
        self.drop, self.out = Drop(0.2, "row"), Head(16)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.out(y + self.drop(self.c(self.b(y))))
