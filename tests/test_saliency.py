"""saliency: the Taylor score against a hand computation, and the scores without data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from halp_fx.errors import InputError, SaliencyError
from halp_fx.passes.groups import find_groups
from halp_fx.passes.saliency import BY_DATA, score
from halp_fx.passes.trace import trace
from halp_fx.types import ChannelGroups, Saliency
from tests import oracle

__all__: list[str] = []

Batch = tuple[Tensor, Tensor]


def groups_of(model: nn.Module, *shape: int) -> ChannelGroups:
    return find_groups(trace(model, torch.randn(2, *(shape or (3, 6, 6)))))


def batches(count: int, *shape: int, classes: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(4, *(shape or (3, 6, 6)), generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (4,), generator=generator),
        )
        for _ in range(count)
    ]


class TwoLayers(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def make(norm: bool = True) -> TwoLayers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = oracle.randomize(TwoLayers(norm)).double().eval()
    assert isinstance(model, TwoLayers)
    return model


def by_name(groups: ChannelGroups, found: Saliency) -> dict[str, Any]:
    return {g.name: s for g, s in zip(groups.groups, found.scores, strict=True)}


def _gradients(model: nn.Module, batch: Batch, *parameters: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), parameters)


def amounts(changes: Tensor, method: str) -> Tensor:
    """What a change of the loss counts for."""
    powers = {
        "taylor": changes.abs(),
        "taylor1.5": changes.abs() * changes.abs().sqrt(),
        "fisher": changes.square(),
    }
    return powers[method].detach()


@pytest.mark.parametrize("method", ["taylor", "fisher", "taylor1.5"])
def test_scores_on_batch_norm_by_hand(method: str) -> None:
    model, data = make(), batches(3)
    groups = find_groups(trace(model, data[0][0]))
    found = score(groups, data, F.cross_entropy, method)
    gamma, beta = model.norm.weight, model.norm.bias
    expected = torch.zeros(8, dtype=torch.float64)
    for batch in data:
        dgamma, dbeta = _gradients(model, batch, gamma, beta)
        expected += amounts(gamma * dgamma + beta * dbeta, method) / len(data)
    np.testing.assert_allclose(by_name(groups, found)["conv"], expected.numpy(), rtol=1e-9)
    assert (found.method, found.data_free) == (method, False)


def test_data_are_scored_by_both_where_nothing_is_said() -> None:
    model, data = make(), batches(3)
    groups = find_groups(trace(model, data[0][0]))
    found, named = (score(groups, data, F.cross_entropy, m) for m in (None, "both"))
    assert found.method == "both"
    for one, two in zip(found.scores, named.scores, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("method", ["taylor", "fisher", "taylor1.5"])
def test_changes_of_coupled_layers_are_summed_before_they_are_made_positive(method: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.na = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
            self.b, self.nb = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.na(self.a(x)))
            return self.fc(F.relu(x + self.nb(self.b(x))).mean((2, 3)))

    torch.manual_seed(0)
    model = oracle.randomize(Residual()).double().eval()
    data = batches(2)
    groups = find_groups(trace(model, data[0][0]))
    (scores,) = score(groups, data, F.cross_entropy, method).scores
    parameters = (model.na.weight, model.na.bias, model.nb.weight, model.nb.bias)
    expected = torch.zeros(6, dtype=torch.float64)
    for batch in data:
        products = [
            p * g for p, g in zip(parameters, _gradients(model, batch, *parameters), strict=True)
        ]
        expected += amounts(torch.stack(products).sum(0), method) / len(data)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-9)


@pytest.mark.parametrize("method", ["taylor", "fisher", "taylor1.5"])
def test_scores_without_batch_norm_use_the_filters(method: str) -> None:
    model, data = make(norm=False), batches(2)
    groups = find_groups(trace(model, data[0][0]))
    found = score(groups, data, F.cross_entropy, method)
    expected = torch.zeros(8, dtype=torch.float64)
    for batch in data:
        (gradient,) = _gradients(model, batch, model.conv.weight)
        change = (model.conv.weight * gradient).sum((1, 2, 3))
        expected += amounts(change, method) / len(data)
    np.testing.assert_allclose(by_name(groups, found)["conv"], expected.numpy(), rtol=1e-9)


def test_batch_norm_without_affine_falls_back_to_the_filters() -> None:
    model = make()
    model.norm = nn.BatchNorm2d(8, affine=False).double().eval()
    data = batches(1)
    groups = find_groups(trace(model, data[0][0]))
    found = score(groups, data, F.cross_entropy, "taylor")
    (gradient,) = _gradients(model, data[0], model.conv.weight)
    expected = (model.conv.weight * gradient).sum((1, 2, 3)).abs().detach()
    np.testing.assert_allclose(by_name(groups, found)["conv"], expected.numpy(), rtol=1e-9)


def test_batches_that_are_not_finite_are_skipped() -> None:
    model, good = make(), batches(2)
    groups = find_groups(trace(model, good[0][0]))
    bad = good[0][0].clone()
    bad[0, 0, 0, 0] = math.inf
    mixed = score(groups, [good[0], (bad, good[0][1]), good[1]], F.cross_entropy, "fisher")
    clean = score(groups, good, F.cross_entropy, "fisher")
    for one, two in zip(mixed.scores, clean.scores, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)
    with pytest.raises(SaliencyError, match="group 'conv' is not finite in any of 2 batches"):
        score(groups, [(bad, good[0][1])] * 2, F.cross_entropy, "fisher")


def test_data_is_scored_in_eval_mode_and_leaves_statistics_alone() -> None:
    model = make().train()
    data = batches(2)
    groups = find_groups(trace(model, data[0][0]))
    with oracle.snapshot(model):
        trained = score(groups, data, F.cross_entropy)
    evaluated = score(find_groups(trace(make(), data[0][0])), data, F.cross_entropy)
    for one, two in zip(trained.scores, evaluated.scores, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_frozen_parameters_are_scored_all_the_same() -> None:
    model, data = make(), batches(2)
    expected = score(find_groups(trace(model, data[0][0])), data, F.cross_entropy)
    model.requires_grad_(False)
    with oracle.snapshot(model), torch.no_grad():
        got = score(find_groups(trace(model, data[0][0])), data, F.cross_entropy)
    for one, two in zip(got.scores, expected.scores, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_data_may_be_a_generator_and_inputs_a_tuple() -> None:
    class Two(TwoLayers):
        def forward(self, x: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x * scale)

    model = oracle.randomize(Two()).eval()
    scale = torch.full((1, 1, 1, 1), 2.0)
    groups = find_groups(trace(model, (torch.randn(2, 3, 6, 6), scale)))

    def data() -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for x, target in batches(2):
            yield (x.float(), scale), target

    seen: list[tuple[int, int]] = []
    found = score(
        groups, data(), F.cross_entropy, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 1), (2, 2)]
    assert found.method == "both"


def test_data_may_be_a_loader_of_a_stream() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from batches(2)

    groups = groups_of(make())
    found = score(groups, DataLoader(Stream(), batch_size=None), F.cross_entropy)
    assert all(values.any() for values in found.scores)


def test_gradients_of_embeddings_may_be_sparse() -> None:
    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 8, sparse=sparse)
            self.fc = nn.Linear(8, 3)

        def forward(self, words: Tensor) -> Tensor:
            out: Tensor = self.fc(self.table(words))
            return out

    generator = torch.Generator().manual_seed(0)
    data = [(torch.randint(0, 9, (4,), generator=generator), torch.arange(4) % 3)]
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        groups = find_groups(trace(Words(sparse), data[0][0]))
        found.append(score(groups, data, F.cross_entropy, "fisher").scores)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other)
        assert one.any()


def squared_changes(model: TwoLayers, inputs: Tensor) -> Tensor:
    """For each channel, the squared first-order change of each logit, summed over all of them."""
    total = torch.zeros(8, dtype=torch.float64)
    gamma, beta = model.norm.weight, model.norm.bias
    for image in inputs:
        for logit in model(image[None])[0]:
            dgamma, dbeta = torch.autograd.grad(logit, (gamma, beta), retain_graph=True)
            total += (gamma * dgamma + beta * dbeta).detach().square()
    return total


def test_scores_by_outputs_are_the_squared_change_of_the_outputs() -> None:
    model, (batch, _) = make(), batches(2)
    groups = find_groups(trace(model, batch[0]))
    found = score(groups, [batch[0]] * 400)  # a mean over random signs
    squares = model(batch[0]).detach().square().sum()
    expected = (squared_changes(model, batch[0]) / squares).numpy()
    np.testing.assert_allclose(by_name(groups, found)["conv"], expected, rtol=0.15)
    assert (found.method, found.data_free) == ("output", False)
    again = score(groups, [[batch[0]]] * 400)  # as a loader of a dataset of one tensor gives it
    np.testing.assert_array_equal(found.scores[0], again.scores[0])
    again = score(groups, [batch] * 400, method="output")  # targets are not looked at
    np.testing.assert_array_equal(found.scores[0], again.scores[0])


def test_other_exponents_of_the_scores_by_outputs() -> None:
    model, data = make(), batches(3)
    groups = find_groups(trace(model, data[0][0]))
    found = score(groups, data)
    assert list(found.others) == ["output1.5", "output1.75", "output1"]
    for name, exponent in (("output1.5", 0.75), ("output1", 0.5), ("output1.75", 0.875)):
        np.testing.assert_allclose(found.others[name][0], found.scores[0] ** exponent)
        alone = score(groups, data, F.cross_entropy, name)
        assert alone.method == name
        np.testing.assert_array_equal(alone.scores[0], found.others[name][0])


def test_scores_by_both_are_geometric_means() -> None:
    model, data = make(), batches(3)
    groups = find_groups(trace(model, data[0][0]))
    found = score(groups, data, F.cross_entropy)
    by_loss = score(groups, data, F.cross_entropy, "fisher").scores[0]
    by_outputs = score(groups, data, method="output").scores[0]
    np.testing.assert_allclose(found.scores[0] ** 2, by_loss * by_outputs)
    np.testing.assert_allclose(found.others["both1.5"][0], found.scores[0] ** 0.75)
    # Of one pass over the data all scores are there.
    assert set(found.others) | {"both"} == set(BY_DATA)
    np.testing.assert_allclose(found.others["output"][0], by_outputs)


def test_the_loss_alone_counts_where_outputs_have_no_gradient() -> None:
    model, data = make(), batches(2)
    groups = find_groups(trace(model, data[0][0]))
    module = groups.traced.module
    output = next(node for node in module.graph.nodes if node.op == "output")
    with torch.no_grad():
        expected = score(groups, data, F.cross_entropy, "fisher").scores[0]

    class Hidden:
        """No container: what is in it is not looked for."""

        def __init__(self, value: Tensor) -> None:
            self.value = value

    inner = output.args[0]
    with module.graph.inserting_before(output):
        output.args = (module.graph.call_function(Hidden, (inner,)),)
    module.recompile()

    def loss(out: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(out.value, target)

    for method in (None, "fisher"):
        found = score(groups, data, loss, method, both=True)
        assert found.method == "fisher"
        assert list(found.others) == ["taylor1.5", "taylor"]
        np.testing.assert_allclose(found.scores[0], expected)
    with pytest.raises(InputError, match="no output of the network has a gradient"):
        score(groups, data, loss, "both")


class TwoOutputs(nn.Module):
    """A large output by one half of the channels, a small one by the other, and whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1, bias=False)
        self.large, self.small = nn.Linear(4, 5, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x).mean((2, 3))
        one, two = 1e4 * self.large(x[:, :4]), self.small(x[:, 4:])
        return {"large": one, "rest": [two, two.argmax(1)]}


def test_outputs_count_alike_however_large_they_are() -> None:
    torch.manual_seed(0)
    model = TwoOutputs().double().eval()
    inputs = batches(1)[0][0]
    of_large, of_small = score(find_groups(trace(model, inputs)), [inputs] * 50).scores
    assert 0.05 < of_large.sum() / of_small.sum() < 20


def test_outputs_without_a_gradient_are_refused() -> None:
    class Decides(TwoLayers):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).argmax(1)

    with pytest.raises(
        InputError, match="no output of the network has a gradient: pass a loss and"
    ):
        score(groups_of(Decides()), [torch.rand(2, 3, 6, 6)])


def test_magnitude_by_hand() -> None:
    """L2 norm of the filters, times the folded batch norm, relative to the group's mean."""
    model = make()
    groups = find_groups(trace(model, batches(1)[0][0]))
    found = score(groups)
    factor = model.norm.weight.abs() / torch.sqrt(model.norm.running_var + model.norm.eps)
    norms = (model.conv.weight.square().sum((1, 2, 3)).sqrt() * factor).detach()
    np.testing.assert_allclose(
        by_name(groups, found)["conv"], (norms / norms.mean()).numpy(), rtol=1e-6
    )
    assert (found.method, found.data_free) == ("magnitude", True)


def test_magnitude_counts_each_layer_that_writes_a_stream() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.inner, self.outer = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return self.head(x + self.outer(torch.relu(self.inner(x))))

    torch.manual_seed(0)
    model = Stream().eval()
    with torch.no_grad():
        model.outer.weight.mul_(1e-3)  # how large a layer is in all says nothing
    found = by_name(groups_of(model), score(groups_of(model)))
    assert found["inner"].mean() == pytest.approx(1)
    norms = [layer.weight.detach().flatten(1).norm(dim=1) for layer in (model.stem, model.outer)]
    expected = sum(own / own.mean() for own in norms)
    (stream,) = (own for name, own in found.items() if name != "inner")
    np.testing.assert_allclose(stream, expected, rtol=1e-5)


def test_magnitude_is_taken_when_asked_even_with_data() -> None:
    model, data = make(), batches(1)
    groups = find_groups(trace(model, data[0][0]))
    found = score(groups, data, F.cross_entropy, "magnitude")
    assert (found.method, found.data_free) == ("magnitude", True)


@pytest.mark.parametrize("kind", ["dict", "list", "tensors"])
def test_a_callable_of_ones_own(kind: str) -> None:
    groups = groups_of(TwoLayers())

    def mine(given: ChannelGroups) -> Any:
        assert given is groups
        arrays = [np.arange(g.units) for g in given.groups]
        if kind == "dict":
            return {g.name: a for g, a in zip(given.groups, arrays, strict=True)}
        return [torch.from_numpy(a) for a in arrays] if kind == "tensors" else arrays

    found = score(groups, method=mine)
    assert found.method == "mine"
    for group, scores in zip(groups.groups, found.scores, strict=True):
        assert scores.dtype == np.float64
        assert scores.tolist() == list(range(group.units))


def test_a_callable_object_is_named_by_its_class() -> None:
    class Ones:
        def __call__(self, groups: ChannelGroups) -> Any:
            return [np.ones(g.units) for g in groups.groups]

    assert score(groups_of(TwoLayers()), method=Ones()).method == "Ones"


def test_dead_groups_are_refused_small_ones_are_not() -> None:
    model = make()
    with torch.no_grad():
        model.conv.weight.zero_()
    groups = find_groups(trace(model, batches(1)[0][0]))
    with pytest.raises(SaliencyError, match="group 'conv' is zero for all its 8 units"):
        score(groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": [], "method": "fisher"}, "'fisher' needs a loss: pass loss=.*'output', which"),
        ({"data": []}, "data has no batches"),
        ({"data": [(1, 2, 3)]}, "a pair .inputs, target. or inputs alone, not 3 things"),
        ({"data": [{"x": 1}]}, "the network can't be run on a batch of data: TypeError"),
        ({"data": [torch.rand(2, 5, 6, 6)]}, "can't be run on a batch of data: RuntimeError"),
        ({"method": "output"}, "the saliency 'output' needs data: pass"),
        ({"method": "taylor"}, "needs data and loss"),
        ({"method": "fisher"}, "needs data and loss"),
        (
            {"method": "entropy"},
            "'entropy' is not known: pass 'both', .*'output', .*'fisher', 'taylor1.5'",
        ),
        ({"data": [], "loss": F.cross_entropy}, "data has no batches"),
        ({"data": ["a"], "loss": F.cross_entropy}, "must be a pair .inputs, target., not str"),
        ({"data": [(1, 2, 3)], "loss": F.cross_entropy}, "must be a pair"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(groups_of(TwoLayers()), **options)


@dataclasses.dataclass
class Scored:
    scores: Tensor
    name: str = "scored"


def test_outputs_in_a_dataclass_count() -> None:
    class Wrapped(TwoLayers):
        def forward(self, x: Tensor) -> Any:
            return Scored(super().forward(x))

    model = make()
    twin = Wrapped().double().eval()
    twin.load_state_dict(model.state_dict())
    data = [x for x, _ in batches(2)]
    found = [score(groups_of(net.float(), 3, 6, 6), None) for net in (model, twin)]
    assert all(np.array_equal(a, b) for a, b in zip(found[0].scores, found[1].scores, strict=True))
    by_data = [score(groups_of(net.float()), [x.float() for x in data]) for net in (model, twin)]
    assert by_data[0].method == "output"
    for a, b in zip(by_data[0].scores, by_data[1].scores, strict=True):
        np.testing.assert_allclose(a, b)
