"""Distillation and the small training loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halp_fx
from halp_fx import minibatches
from halp_fx.errors import InputError
from halp_fx.training import Distillation, GradualPruner, distillation_loss, fine_tune
from tests.training_networks import batches, digits, example, network


def _logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_formula() -> None:
    student, teacher = _logits(0, 5, 4), _logits(1, 5, 4)
    target = torch.tensor([0, 1, 2, 3, 0])
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    soft = 9 * (p * (p / q).log()).sum(1).mean()
    hard = -student.log_softmax(1)[torch.arange(5), target].mean()
    ours = distillation_loss(student, teacher, target, temperature=3, alpha=0.7)
    torch.testing.assert_close(ours, 0.7 * soft + 0.3 * hard)
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=3), soft)
    smooth = distillation_loss(student, teacher, target, alpha=0.0, label_smoothing=0.1)
    torch.testing.assert_close(smooth, F.cross_entropy(student, target, label_smoothing=0.1))


def test_maps_of_logits_count_by_position() -> None:
    student, teacher = _logits(0, 2, 4, 3, 3), _logits(1, 2, 4, 3, 3)
    flat = [x.movedim(1, -1).reshape(-1, 4) for x in (student, teacher)]
    torch.testing.assert_close(distillation_loss(student, teacher), distillation_loss(*flat))


def test_no_gradient_goes_to_the_teacher() -> None:
    student, teacher = _logits(0, 2, 4).requires_grad_(), _logits(1, 2, 4).requires_grad_()
    distillation_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


def _pruned(model: nn.Module) -> Any:
    return halp_fx.compile(model, 0.5, example(), latency="analytic", drop_blocks=False)


def test_features_are_compared_on_the_channels_that_survive() -> None:
    model = network().eval()
    small = _pruned(model).eval()
    names = ["0", "3.bn1", "5", "8.conv1", "11"]
    images, target = batches(1)[0]
    distillation = Distillation(model, features=names, alpha=0.5)
    output, loss = distillation(small, images, target)
    expected = distillation_loss(output, model(images), target, alpha=0.5)
    kept = halp_fx.plan_of(small).kept

    def outputs(net: nn.Module) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        for name in names:
            net.get_submodule(name).register_forward_hook(
                lambda layer, inputs, output, name=name: seen.__setitem__(name, output)
            )
        net(images)
        return seen

    own, seen = outputs(small), outputs(model)
    assert any(own[n].shape != seen[n].shape for n in names)
    for name in names:
        index = kept[f"{name}.weight"][0]
        theirs = seen[name] if index is None else seen[name].index_select(1, index)
        expected = expected + ((own[name] - theirs) ** 2).mean() / (theirs**2).mean()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(output, small(images))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "old weight norm", "transposed"])
def test_features_of_layers_whose_weight_is_no_plain_parameter(kind: str) -> None:
    norms = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "old weight norm": nn.utils.weight_norm,
    }
    torch.manual_seed(0)
    first: nn.Module = nn.Conv2d(3, 16, 3)
    if kind == "transposed":  # in groups: of 16 channels come 32
        first = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 32, 2, groups=8))
    elif kind == "spectral_norm":  # which pins its own channels: those after it may go
        first = nn.Sequential(norms[kind](nn.Conv2d(3, 16, 3)), nn.Conv2d(16, 16, 1))
    else:
        first = norms[kind](first)
    model = nn.Sequential(first, nn.ReLU(), nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(5))
    images, target = torch.rand(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        model.eval()(images)
    budget = 0.25 if kind == "transposed" else 0.5
    small = halp_fx.compile(model, budget, images, latency="analytic").eval()
    name = {"transposed": "0.1", "spectral_norm": "0.0"}.get(kind, "0")
    _, plain = Distillation(model)(small, images, target)
    _, loss = Distillation(model, features=[name])(small, images, target)
    seen: list[torch.Tensor] = []
    for net in (small, model):
        hook = net.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
        net(images)
        hook.remove()
    own, whole = seen
    if kind != "spectral_norm":
        assert own.shape[1] < whole.shape[1]
    # Nothing before the layer was cut but its own channels, so that those are the dense ones.
    away = [(whole - channel[:, None]).abs().amax((0, 2, 3)) for channel in own.unbind(1)]
    theirs = whole[:, torch.stack(away).argmin(1)]
    expected = (own - theirs).square().mean() / theirs.square().mean()
    torch.testing.assert_close(loss - plain, expected, rtol=1e-3, atol=1e-5)


def test_features_that_the_student_lacks_are_refused() -> None:
    model = network().eval()
    other = nn.Sequential(*network(), nn.Linear(10, 10)).eval()
    with pytest.raises(InputError, match="'12', which the student does not have"):
        Distillation(other, features=["12"])(_pruned(model), *batches(1)[0])


def test_ignored_positions_say_nothing() -> None:
    student, teacher = _logits(0, 2, 4, 3, 3), _logits(1, 2, 4, 3, 3)
    target = torch.randint(0, 4, (2, 3, 3), generator=torch.Generator().manual_seed(2))
    target[0, 1:], target[1, :, 0] = 255, 255
    rows = (target != 255).flatten()
    counted = [x.movedim(1, -1).reshape(-1, 4)[rows] for x in (student, teacher)]
    for alpha in (0.0, 0.3, 1.0):
        ours = distillation_loss(student, teacher, target, alpha=alpha, ignore_index=255)
        expected = distillation_loss(*counted, target.flatten()[rows], alpha=alpha)
        torch.testing.assert_close(ours, expected)
    nothing = torch.full_like(target, 255)
    assert float(distillation_loss(student, teacher, nothing, ignore_index=255)) == 0.0


class Named(nn.Module):
    """Gives a dict, as the segmenters of torchvision do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor) -> Any:
        return {"aux": x.mean(), "out": self.net(x)}


def test_one_of_several_outputs_is_compared() -> None:
    model = Named()
    pruned = halp_fx.compile(model, 0.6, example(), latency="analytic")
    x, target = batches(1)[0]
    output, loss = Distillation(model, select=lambda output: output["out"])(pruned, x, target)
    assert set(output) == {"aux", "out"}
    expected = distillation_loss(output["out"], model.eval()(x)["out"], target)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(InputError, match="student_logits are a dict"):
        Distillation(model)(pruned, x, target)


class OwnNorm(nn.BatchNorm2d):
    """A norm of a library: tracing goes into it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def test_features_that_are_not_seen_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), OwnNorm(16), nn.Conv2d(16, 4, 1), nn.Flatten())
    pruned = halp_fx.compile(model, 0.6, example(), latency="analytic")
    x = batches(1)[0][0]
    assert float(Distillation(model, features=["0"])(pruned, x)[1].detach()) > 0
    with pytest.raises(InputError, match=r"features has '1', but no output of it is seen"):
        Distillation(model, features=["1"])(pruned, x)


def test_inputs_and_targets_may_be_nested() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Any) -> Any:
            return self.layer(x["a"] + x["b"][0])

    x = {"a": torch.ones(4, 3), "b": [torch.ones(4, 3)]}
    target = (torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64), 0.3)
    moved: list[Any] = []

    def mixed(output: torch.Tensor, aim: Any) -> torch.Tensor:
        moved.append(aim)
        first, second, share = aim
        return share * F.cross_entropy(output, first) + (1 - share) * F.cross_entropy(
            output, second
        )

    network_, losses = Several(), []
    losses += fine_tune(network_, [((x,), target)] * 2, mixed, epochs=2)
    assert losses[1] < losses[0]
    device = torch.device("meta")
    nested = minibatches.moved((x, target), device)
    assert nested[0]["b"][0].device == nested[1][1].device == device
    assert nested[1][2] == 0.3


def test_a_network_that_is_the_teacher_differs_in_nothing() -> None:
    model = network().eval()
    same = halp_fx.compile(model, 1.0, example(), latency="analytic").eval()
    _, loss = Distillation(model, features=["0", "8.conv1"])(same, batches(1)[0][0])
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-9)


def test_the_teacher_is_left_as_it_was() -> None:
    model = network()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    distillation = Distillation(model, features=["0"])
    _, loss = distillation(_pruned(model).train(), *batches(1)[0])
    loss.backward()
    assert model.training and not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_features_follow_a_network_that_shrinks() -> None:
    model = network()
    pruner = GradualPruner(model, 0.12, example(), steps=4, every=1, latency="analytic",
                           min_share=0.3)  # fmt: skip
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.01)
    distillation = Distillation(model, features={"0": 1.0, "3.conv1": 0.5, "8.bn2": 0.1})
    assert len(fine_tune(pruner, batches(4), distillation, optimizer=optimizer)) == 1
    assert pruner.done
    assert not [n for n, _ in pruner.network.named_parameters() if n.startswith("3.")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distillation_loss(_logits(0, 2, 3), _logits(0, 2, 4)), r"student_logits are \(2"),
        (lambda: distillation_loss(_logits(0, 2, 3), _logits(0, 2, 3), alpha=2), "alpha is 2"),
        (lambda: Distillation(network(), temperature=0), "temperature is 0: pass a number above"),
        (lambda: Distillation(network(), select="out"), "select is 'out': pass a callable"),  # type: ignore[arg-type]
        (lambda: Distillation(network(), features=["2"]), "features has '2', which is no layer"),
        (lambda: Distillation(network(), features="conv"), "features has 'conv', which is no"),
        (
            lambda: Distillation(network(), features=["0"])(network(), example()),
            r"the student \(Sequential\) has no plan",
        ),
        (lambda: fine_tune(network(), [], F.cross_entropy), "data has no minibatches in epoch 1"),
        (lambda: fine_tune(network(), [], F.cross_entropy, epochs=-1), "epochs is -1: pass a"),
        (
            lambda: fine_tune(network(), [], F.cross_entropy, scheduler=object()),
            "scheduler was given without optimizer",
        ),
        (
            lambda: fine_tune(network(), batches(1), lambda o, t: o.sum() * math.nan),
            "the loss is nan in minibatch 1 of epoch 1",
        ),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_fine_tune_trains_and_gives_modes_back() -> None:
    model = network().eval()
    seen: list[tuple[int, int]] = []
    data = batches(3)
    means = fine_tune(
        model, data, nn.CrossEntropyLoss(label_smoothing=0.1), epochs=4, clip_norm=1.0,
        progress=lambda epoch, batch, loss: seen.append((epoch, batch)),
    )  # fmt: skip
    assert means[-1] < means[0]
    assert seen == [(e, b) for e in range(1, 5) for b in range(1, 4)]
    assert not any(m.training for m in model.modules())


def test_fine_tune_does_what_a_plain_loop_does() -> None:
    ours, plain = network(), network()
    make = lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)  # noqa: E731
    optimizer, other = make(ours), make(plain)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.1) for o in (optimizer, other)]
    fine_tune(ours, batches(3), F.cross_entropy, optimizer=optimizer, scheduler=schedules[0])
    for images, classes in batches(3):
        F.cross_entropy(plain(images), classes).backward()
        other.step()
        other.zero_grad()
        schedules[1].step()
    pairs = zip(ours.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gradients_of_what_was_done_before_do_not_count() -> None:
    ours, plain = network(), network()
    F.cross_entropy(ours(batches(1)[0][0]), batches(1)[0][1]).mul(100).backward()
    for net in (ours, plain):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        fine_tune(net, batches(1), F.cross_entropy, optimizer=optimizer)
    pairs = zip(ours.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_distillation_recovers_digits() -> None:
    pytest.importorskip("sklearn")
    data, (images, classes) = digits()
    model = network(width=12)
    loss = nn.CrossEntropyLoss()
    fine_tune(model, data, loss, optimizer=torch.optim.AdamW(model.parameters(), 5e-3), epochs=5)
    small = halp_fx.compile(model, 0.4, example(), data=list(data)[:8], loss=loss,
                            latency="analytic")  # fmt: skip

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net.eval()(images).argmax(1) == classes).float().mean())

    before = accuracy(small)
    optimizer = torch.optim.AdamW(small.parameters(), 2e-3)
    fine_tune(small, data, Distillation(model, features=["5"]), optimizer=optimizer, epochs=2)
    assert accuracy(small) > before + 0.1
    assert accuracy(small) > accuracy(model) - 0.12


class _InPlace(nn.Module):
    """What the convolution gives is overwritten by what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y += 1
        y = nn.functional.relu(self.norm(y), inplace=True)
        return self.head(y.mean((2, 3)))


def test_features_are_those_before_an_operation_in_place() -> None:
    model = _InPlace().eval()
    images = torch.rand(2, 3, 8, 8)
    small = halp_fx.compile(model, 0.6, images, latency="analytic").eval()
    output, loss = Distillation(model, features=["conv", "norm"])(small, images)
    kept = halp_fx.plan_of(small).kept["conv.weight"][0]
    assert kept is not None
    expected = distillation_loss(output, model(images))
    theirs, ours = model.conv(images), small.get_submodule("conv")(images)
    norms = model.norm(theirs + 1), small.get_submodule("norm")(ours + 1)
    for seen, own in ((theirs, ours), norms):
        seen = seen[:, kept]
        expected = expected + (own - seen).square().mean() / seen.square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()


def test_features_in_half_precision_do_not_overflow() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5))
    inputs = torch.rand(2, 4)
    small = halp_fx.compile(model, 0.6, inputs, latency="analytic")
    for net in (model, small):
        with torch.no_grad():
            net.get_submodule("0").bias.fill_(300.0)  # type: ignore[union-attr, operator]
        net.half()
    distillation = Distillation(model, features=["0"])
    seen = model[0](inputs.half()).detach()
    kept = halp_fx.plan_of(small).kept["0.weight"][0]
    loss = distillation._difference(small, "0", seen[:, kept] * 2, seen)
    torch.testing.assert_close(loss, torch.tensor(1.0))
