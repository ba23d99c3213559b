"""export_onnx: files that compute what the network does, or an error and no file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from halp_fx.errors import DependencyError, ExportError, InputError
from halp_fx.passes.export import DEFAULT_OPSET, export_onnx

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Net(nn.Module):
    """Convolution, batch norm, views, resizing, a tie, a dict with nested results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(6, 6)
        self.linear_1 = nn.Linear(6, 6)
        self.linear_1.weight = self.linear.weight

    def forward(self, x: torch.Tensor, mask: torch.Tensor, unused: Any = None) -> Any:
        y = self.norm(self.conv(x))
        y = torch.cat([y, F.interpolate(y[:, :2], scale_factor=1.0, mode="nearest")], dim=1)
        y = self.linear_1(self.linear(F.dropout(y, 0.5, self.training)))
        flat = y.reshape(x.shape[0], -1) * mask
        # Names as the exporter's own, one result twice, an input, and what is no tensor.
        return {"linear": flat, "rest": [y, y, (mask, None)], "size": x.shape[0]}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def session(path: Path) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def names(values: Any) -> list[str]:
    return [value.name for value in values]


@pytest.fixture
def net() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Net().eval()).train()


EXAMPLE = (torch.randn(1, 3, 8, 8), torch.randn(1, 1))


def test_the_file_computes_what_the_network_does(
    net: fx.GraphModule, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = export_onnx(net, tmp_path / "net.onnx", EXAMPLE)
    assert path == tmp_path / "net.onnx"
    assert list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")

    found = session(path)
    assert names(found.get_inputs()) == ["x", "mask"]
    assert names(found.get_outputs()) == ["linear", "rest_0", "rest_1", "rest_2_0"]
    assert [value.shape[0] for value in found.get_inputs()] == ["batch", "batch"]
    x, mask = torch.randn(5, 3, 8, 8), torch.randn(5, 1)
    ours = net.eval()(x, mask)
    theirs = [torch.from_numpy(a) for a in found.run(None, {"x": x.numpy(), "mask": mask.numpy()})]
    expected = [ours["linear"], ours["rest"][0], ours["rest"][1], mask]
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)

    model = onnx.load(str(path))
    assert {"conv.weight", "linear.bias"} <= set(names(model.graph.initializer))
    assert model.opset_import[0].version == DEFAULT_OPSET


def test_the_callers_network_and_random_state_stay(net: fx.GraphModule, tmp_path: Path) -> None:
    calls: list[Any] = []
    net.register_forward_hook(lambda *args: calls.append(None))
    net.norm.eval()
    flags = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    export_onnx(net, tmp_path / "net.onnx", EXAMPLE)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == flags
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert len(net._forward_hooks) == 1
    net(*(torch.cat([tensor, tensor]) for tensor in EXAMPLE))
    assert calls[-1:] == [None]


def test_networks_of_another_device_are_exported_on_the_cpu(tmp_path: Path) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    ones = graph.call_function(torch.ones, (4,), {"device": torch.device("cuda", 0)})
    graph.output(graph.call_function(torch.add, (x, ones)))
    network = fx.GraphModule(nn.Module(), graph)
    code = network.code
    export_onnx(network, tmp_path / "a.onnx", torch.randn(1, 4))
    assert network.code == code
    assert "cuda" in code


def test_fixed_batch(tmp_path: Path) -> None:
    path = export_onnx(Tiny(), tmp_path / "a.onnx", torch.randn(1, 4), dynamic_batch=False)
    assert session(path).get_inputs()[0].shape == [1, 4]


def test_the_recorded_example_is_the_default(tmp_path: Path) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 4)

        def forward(self, index: torch.Tensor, x: torch.Tensor, scale: float) -> Any:
            y = self.table(index) + x * scale
            return y, y.argmax(1) > 1

    network = fx.symbolic_trace(Lookup())
    with pytest.raises(InputError, match="example_inputs is missing"):
        export_onnx(network, tmp_path / "a.onnx")
    network.meta["halp_fx_example"] = (((1,), torch.int64), ((1, 4), torch.float32), 2.0)
    found = session(export_onnx(network, tmp_path / "a.onnx"))
    assert names(found.get_inputs()) == ["index", "x"]
    assert names(found.get_outputs()) == ["output_0", "output_1"]


def test_weights_in_a_second_file(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    path = export_onnx(model, tmp_path / "a.onnx", torch.randn(2, 64), external_data=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.onnx", "a.onnx.data"}
    x = torch.randn(3, 64)
    (theirs,) = session(path).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(theirs), model(x).detach())


def test_half_precision(tmp_path: Path) -> None:
    example = torch.randn(1, 4, dtype=torch.float16)
    found = session(export_onnx(Tiny().half(), tmp_path / "a.onnx", example))
    assert found.get_inputs()[0].type == "tensor(float16)"


def test_bfloat16_can_not_be_checked(tmp_path: Path) -> None:
    model, example = Tiny().bfloat16(), torch.randn(1, 4, dtype=torch.bfloat16)
    with pytest.raises(ExportError, match=r"bfloat16.*\.float\(\).*check=False"):
        export_onnx(model, tmp_path / "a.onnx", example)
    assert export_onnx(model, tmp_path / "a.onnx", example, check=False).exists()


def test_differences_are_errors_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"old")
    session_class = ort.InferenceSession

    class Wrong:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = session_class(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def run(self, *args: Any) -> Any:
            first, second = self.inner.run(*args)
            second[-1, -1] += 0.5 if len(second) == 3 else 0.0
            return [first, second]

    monkeypatch.setattr(ort, "InferenceSession", Wrong)

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"fine": x + 1, "wrong": x * 2}

    with pytest.raises(ExportError, match=r"output 'wrong' at batch size 3 differs.* up to 0\.5 "):
        export_onnx(Two(), path, torch.randn(1, 4))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    export_onnx(Two(), path, torch.randn(1, 4), atol=1.0)
    assert path.read_bytes() != b"old"


def test_networks_that_depend_on_the_batch_size(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] < 3 else x * 3

    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export_onnx(Branch(), tmp_path / "a.onnx", torch.randn(1, 4))
    export_onnx(Branch(), tmp_path / "a.onnx", torch.randn(1, 4), dynamic_batch=False)


def test_the_exporters_failure_names_the_network(tmp_path: Path) -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x @ x.mT)

    with pytest.raises(ExportError, match="Strange can't be exported to ONNX") as caught:
        export_onnx(Strange(), tmp_path / "a.onnx", torch.randn(2, 4, 4))
    assert caught.value.__cause__ is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, cast(Any, None))
    with pytest.raises(DependencyError, match=rf'{package}: pip install "halp_fx\[onnx\]"'):
        export_onnx(Tiny(), tmp_path / "a.onnx", torch.randn(1, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((torch.randn(2, 4), torch.randn(3, 4)), "no common batch"),
        (torch.randn(0, 4), "no common batch"),
        ((3,), "has no tensor"),
        ({"x": torch.randn(1, 4)}, "is a dict"),
    ],
)
def test_wrong_examples(tmp_path: Path, example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_onnx(Tiny(), tmp_path / "a.onnx", example)


def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="create it first"):
        export_onnx(Tiny(), tmp_path / "nowhere" / "a.onnx", torch.randn(1, 4))
    with pytest.raises(InputError, match="is a folder"):
        export_onnx(Tiny(), tmp_path, torch.randn(1, 4))
    with pytest.raises(InputError, match=r"nn\.Module"):
        export_onnx(cast(Any, None), tmp_path / "a.onnx", torch.randn(1, 4))


def test_variadic_and_nested_inputs(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, pair: Any, *rest: torch.Tensor) -> torch.Tensor:
            return pair["a"] + pair["b"] * rest[0] - rest[1]

    one = torch.randn(1, 4)
    path = export_onnx(Nested(), tmp_path / "a.onnx", ({"a": one, "b": one}, one, one))
    assert names(session(path).get_inputs()) == ["pair_a", "pair_b", "rest_0", "rest_1"]


def test_resnet18(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    network = fx.symbolic_trace(models.resnet18(weights=None))
    path = export_onnx(network, tmp_path / "a.onnx", torch.randn(1, 3, 32, 32))
    assert names(session(path).get_outputs()) == ["output"]
