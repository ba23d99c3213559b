"""Cores of models with Python that can't be traced: pruned, put back, and nothing else changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halp_fx
from halp_fx.core import compile_core, core_of, restore_core
from halp_fx.cores import split_ms
from halp_fx.errors import HalpError, InputError
from halp_fx.latency import Source, Torch
from tests.oracle import assert_exact, check_state, randomize, shrunk, snapshot


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """x + a branch of its own, which may go whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(block(width, width), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Encoder(nn.Module):
    """Two maps, by name, from an image; `scale` is a plain number."""

    note = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.body = nn.Sequential(Residual(16), Residual(16))
        self.down = nn.Sequential(block(16, 24), nn.MaxPool2d(2))
        self.drop = 0.25

    def forward(self, image: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        fine = self.body(self.stem(image * scale))
        coarse = self.down(fine)
        coarse = nn.functional.dropout(coarse, self.drop, training=self.training)
        return {"fine": fine, "coarse": coarse}

    def describe(self) -> str:
        return f"encoder to {self.down[0][0].out_channels} channels"


class Head(nn.Module):
    """Reads both maps."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = block(16, 16)
        self.coarse = block(24, 16)
        self.last = nn.Conv2d(32, 5, 1)

    def forward(self, maps: list[Tensor], bias: Tensor | None = None) -> tuple[Tensor, None]:
        fine, coarse = self.fine(maps[0]), self.coarse(maps[1])
        coarse = nn.functional.interpolate(coarse, size=fine.shape[-2:])
        out = self.last(torch.cat([fine, coarse], dim=1))
        return (out if bias is None else out + bias), None


class Around(nn.Module):
    """Decides by the values of tensors, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = Head()
        self.tail = nn.Linear(5, 2)
        self.calls = 0

    def forward(self, images: list[Tensor]) -> Tensor:
        self.calls += 1
        batch = torch.stack([i if float(i.mean()) > 0 else -i for i in images])
        maps = self.encoder(batch, scale=2.0)
        out, _ = self.head(list(maps.values()))
        best = out.flatten(2).mean(2)
        rows = [row for row in best if bool(row.isfinite().all())]
        return self.tail(torch.stack(rows))


def around() -> Around:
    """The model, in eval mode, with random norms."""
    torch.manual_seed(0)
    model = Around()
    randomize(model)
    model.encoder.note = "of this one"
    return model.eval()


def example(seed: int = 0, size: int = 16) -> tuple[list[Tensor]]:
    """Two images."""
    generator = torch.Generator().manual_seed(seed)
    return ([torch.randn(3, size, size, generator=generator) for _ in range(2)],)


def prune(core: Any, budget: Any = 0.5, model: Any = None, **options: Any) -> Any:
    """`compile_core` of `around()` with the analytic latency."""
    model = around() if model is None else model
    return compile_core(model, core, budget, example(), latency="analytic", **options)


def joined(run: Any, image: Tensor) -> Any:
    """From the encoder to the head."""
    return run("head", list(run("encoder", image, scale=2.0).values()))


def hold(model: nn.Module, pruned: nn.Module) -> None:
    """The pruned model computes what the masked dense one does, at another size too."""
    for given in (example(), example(1, 22)):
        stacked = given[0]

        class Batched(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, batch: Tensor) -> Any:
                return self.inner(list(batch))

        kept = {f"inner.{n}": dims for n, dims in halp_fx.plan_of(pruned).kept.items()}
        renamed = copy.deepcopy(pruned)
        for part in ("encoder", "head"):  # constants of dropped branches are at the part's root
            getattr(renamed, part)._modules.pop("_constants", None)
        check_state(model, renamed, halp_fx.plan_of(pruned).kept)
        from tests.oracle import assert_close, masked_dense

        masked = masked_dense(Batched(model), kept).double().eval()
        small = Batched(copy.deepcopy(pruned)).double().eval()
        batch = torch.stack(stacked).double()
        with torch.no_grad():
            assert_close(small(batch), masked(batch), tolerance=1e-6)


@pytest.mark.parametrize("core", ["encoder", ["encoder"], ["encoder", "head"], ["head", "encoder"]])
def test_parts_are_pruned_and_put_back(core: Any) -> None:
    model = around()
    with snapshot(model):
        pruned = prune(core, model=model)
    assert type(pruned) is Around
    assert model.calls == pruned.calls == 0
    assert shrunk(model, pruned) < 0.9
    hold(model, pruned)
    outputs = pruned.encoder(torch.rand(1, 3, 8, 8), scale=2.0)
    assert list(outputs) == ["fine", "coarse"]
    assert [t.shape[1] for t in outputs.values()] == [16, 24]  # pinned: Python reads them
    assert pruned.encoder.note == "of this one"
    assert pruned.encoder.describe() == "encoder to 24 channels"
    assert isinstance(pruned.encoder, Encoder)


def test_a_flow_lets_channels_between_parts_go() -> None:
    model = around()
    pruned = prune(["encoder", "head"], 0.3, model, flow=joined)
    hold(model, pruned)
    widths = [t.shape[1] for t in pruned.encoder(torch.rand(1, 3, 8, 8), scale=2.0).values()]
    assert sum(widths) < 16 + 24
    assert pruned.head(list(pruned.encoder(torch.rand(1, 3, 8, 8), scale=2.0).values()))[1] is None


def test_a_dropped_branch_leaves_its_constant_in_the_part() -> None:
    model = around()
    pruned = prune("encoder", 0.4, model)
    constants = [k for k in pruned.state_dict() if "_constants." in k]
    assert constants
    assert all(key.startswith("encoder._constants.") for key in constants)
    assert not any(key.startswith("encoder.body.0.branch") for key in pruned.state_dict())
    hold(model, pruned)
    core = core_of(pruned)
    assert core.get_buffer(constants[0]) is pruned.get_buffer(constants[0])
    again = restore_core(model, core, example(), ["encoder"])
    assert list(again.state_dict()) == list(pruned.state_dict())
    hold(model, again)


def test_modes_and_hooks_are_those_of_the_parts() -> None:
    model = around()
    seen: list[Any] = []
    model.encoder.register_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    pruned = prune("encoder", model=model)
    seen.clear()  # of the run on the example
    image = torch.rand(1, 3, 8, 8)
    pruned.encoder(image, scale=2.0)
    assert seen == ["PrunedEncoder"]
    pruned.train()
    one, two = (pruned.encoder(image, scale=2.0)["coarse"] for _ in range(2))
    assert not torch.equal(one, two), "dropout is off in training"
    loss = pruned(example()[0]).sum()
    loss.backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_copies_and_moves_as_any_module() -> None:
    pruned = prune(["encoder", "head"])
    twin = copy.deepcopy(pruned).double()
    assert {t.dtype for t in core_of(twin).state_dict().values()} == {torch.float64, torch.int64}
    assert next(pruned.parameters()).dtype == torch.float32
    assert core_of(twin).get_parameter("head.last.weight") is twin.head.last.weight
    fresh = copy.deepcopy(pruned)
    fresh.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(*example()), pruned(*example()))


def test_data_and_loss_are_of_the_whole_model() -> None:
    model = around()
    data = [(example(seed), torch.tensor([0, 1])) for seed in range(2)]
    seen: list[torch.Size] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(output.shape)
        return nn.functional.cross_entropy(output, target)

    with snapshot(model):
        pruned = prune("encoder", model=model, data=data, loss=loss)
    assert seen == [torch.Size([2, 2])] * 2
    report = halp_fx.plan_of(pruned).report
    assert (report["saliency"], report["data_free"]) == ("fisher", False)
    hold(model, pruned)


def stem_and_body(model: Around) -> nn.Module:
    """A core that is no submodule: two layers in a row."""
    return nn.Sequential(model.encoder.stem, model.encoder.body)


def put_stem_back(copied: Around, small: nn.Module) -> None:
    """In place of the first layer, the other one being nothing from now on."""
    copied.encoder.stem, copied.encoder.body = small, nn.Identity()


def test_a_function_makes_the_core_and_another_puts_it_back() -> None:
    model = around()
    batch = torch.rand(2, 3, 16, 16)
    with snapshot(model):
        pruned: Any = compile_core(
            model, stem_and_body, 0.6, batch, put_back=put_stem_back, latency="analytic"
        )
    assert type(pruned) is Around
    assert_exact(stem_and_body(model), pruned.encoder.stem, (batch,))
    plan = halp_fx.plan_of(pruned)
    assert plan.predicted_ms <= plan.budget_ms
    assert pruned(*example()).shape == model(*example()).shape
    replaced = compile_core(
        model, stem_and_body, 0.6, batch, put_back=lambda _copied, small: small, latency="analytic"
    )
    assert_exact(stem_and_body(model), replaced, (batch,))


def test_mistakes_with_functions_are_named() -> None:
    model, batch = around(), torch.rand(2, 3, 16, 16)
    with pytest.raises(InputError, match="core is a function: pass put_back"):
        compile_core(model, stem_and_body, 0.5, batch)
    with pytest.raises(InputError, match=r"core gave a list: return a torch\.nn\.Module"):
        compile_core(model, lambda m: [m], 0.5, batch, put_back=put_stem_back)  # type: ignore[arg-type]


def test_a_core_is_reconstructed() -> None:
    model = around()
    data = [(example(seed), torch.zeros(1)) for seed in range(4)]
    options: dict[str, Any] = {"data": data, "loss": lambda out, _: out.float().square().mean()}
    with snapshot(model):
        plain = prune("encoder", model=model, **options)
        fitted = prune("encoder", model=model, **options, reconstruct=True)
    assert halp_fx.plan_of(fitted).report["reconstructed_layers"] > 0
    image = torch.stack(example(9)[0])
    with torch.no_grad():
        dense, *others = (
            net.eval().encoder(image, scale=2.0)["coarse"] for net in (model, plain, fitted)
        )
    off = [float((other - dense).square().mean()) for other in others]
    assert off[1] < off[0]
    with pytest.raises(InputError, match="an iterator, which is used up after one look"):
        prune("encoder", model=model, **{**options, "data": iter(data)}, reconstruct=True)


@pytest.mark.parametrize(
    ("core", "options", "message"),
    [
        ("encodr", {}, r"core='encodr' is no submodule of Around: .*'encoder', 'head', 'tail'"),
        ([], {}, "core names nothing"),
        (["encoder", "encoder"], {}, "names a submodule twice"),
        (["encoder", "encoder.stem"], {}, r"'encoder' and \['encoder.stem'\] inside of it"),
        ("encoder", {"put_back": print}, "put_back is for a core that is a function"),
        ("encoder", {"candidates": 4}, "candidates=4 is not known"),
        ("encoder", {"data": []}, "data was given without loss, which the core of a model needs"),
        ("encoder", {"saliency": "output"}, "saliency='output' is not known for the core"),
        ("tail", {}, r"has no channel that can be removed"),
    ],
)
def test_mistakes_are_named(core: Any, options: Any, message: str) -> None:
    model = around()
    with snapshot(model), pytest.raises(HalpError, match=message):
        prune(core, model=model, **options)


def test_mistakes_in_the_call_are_named() -> None:
    model = around()
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module, not str"):
        compile_core("model", "encoder", 0.5, example())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be a tensor or a tuple, not NoneType"):
        compile_core(model, "encoder", 0.5, None)
    with pytest.raises(InputError, match="Around can't be run on example_inputs: TypeError"):
        compile_core(model, "encoder", 0.5, (3,))
    model.unused = nn.Linear(3, 3)
    with pytest.raises(InputError, match=r"Around does not call \['unused'\]"):
        prune("unused", model=model)
    model.head.last.weight = model.unused.weight = nn.Parameter(torch.rand(5, 32, 1, 1))
    with pytest.raises(InputError, match=r"'unused.weight' is shared with the core"):
        prune("head", model=model)


def test_a_call_unlike_the_example_is_refused() -> None:
    pruned = prune("encoder")
    with pytest.raises(InputError, match=r"'encoder' was pruned for calls with 1 tensors and the"):
        pruned.encoder(torch.rand(1, 3, 8, 8), scale=3.0)
    with pytest.raises(TypeError, match="missing a required argument: 'image'"):
        pruned.encoder()


def test_a_flow_that_loses_an_output_is_refused() -> None:
    with pytest.raises(HalpError, match="let the flow use every output of a part"):
        prune("encoder", flow=lambda run, image: run("encoder", image, scale=2.0)["fine"])


def test_time_is_split_between_the_parts_and_the_rest() -> None:
    model = around().train()
    whole_ms, parts = split_ms(model, ["encoder", "head"], example(), threads=1)
    assert set(parts) == {"encoder", "head"}
    assert all(ms > 0 for ms in parts.values())
    assert sum(parts.values()) < whole_ms
    assert model.training
    assert not model.encoder._forward_hooks


@pytest.mark.slow
def test_reports_what_is_outside(tmp_path: Any) -> None:
    table = halp_fx.LatencyTable.open(tmp_path / "table.sqlite")
    model = around()
    pruned = compile_core(model, "encoder", 0.6, example(), latency=Source(Torch(threads=1), table))
    report = halp_fx.plan_of(pruned).report
    assert 0 < report["outside_share"] < 1
    assert "post_processing_share" not in report
