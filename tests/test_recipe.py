"""save and load: the same network from a file without code."""

from __future__ import annotations

import collections
import json
import math
import operator
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

from halp_fx.errors import InputError, RecipeError
from halp_fx.recipe import FORMAT_VERSION, load, save, save_weights
from halp_fx.recipe.names import function_name, resolve_function
from halp_fx.recipe.values import decode, encode
from halp_fx.types import ChannelGroups, Plan


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * F.gelu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Shape arithmetic, keyword arguments, nested results, ties, frozen and unused parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layer = nn.Sequential(Block(8), Block(8))
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.unused = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("secret", torch.arange(8.0), persistent=False)
        self.stem.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor, scale: float = 2.0, *, mask: Any = None) -> Any:
        y = self.layer(self.stem(x))
        y = torch.cat([y, F.interpolate(y[..., ::2, :], size=y.shape[2:], mode="nearest")], 1)
        halves = y.chunk(2, dim=1)
        flat = halves[0].mean((2, 3)).view(x.size(0), -1) + halves[1].amax(dim=(2, 3))
        out = self.second(self.first(flat) * scale + self.shift - self.secret)
        out = out.masked_fill(out > math.inf, float("-inf"))
        return {"out": out, "rest": [flat, (x.shape[0] // 1, None)]}


def traced(model: nn.Module) -> fx.GraphModule:
    graph = fx.symbolic_trace(model)
    # As the pipeline does: what the graph never reads keeps its keys.
    for name, child in model.named_children():
        if not hasattr(graph, name):
            graph.add_module(name, child)
    return graph


@pytest.fixture
def net() -> fx.GraphModule:
    torch.manual_seed(0)
    network = traced(Net())
    network._non_persistent_buffers_set.add("secret")  # torch 2.10 forgets it in a GraphModule
    return network


def roundtrip(network: fx.GraphModule, tmp_path: Path) -> fx.GraphModule:
    return load(save(network, tmp_path / "network.safetensors"))


def graph_module(build: Callable[[fx.Graph], None], **children: Any) -> fx.GraphModule:
    root = nn.Module()
    for name, child in children.items():
        setattr(root, name, child)
    graph = fx.Graph()
    build(graph)
    return fx.GraphModule(root, graph)


def assert_same(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert type(left) is type(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert type(left) is type(right)
        assert left == right


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].stride() == theirs[name].stride(), name
        assert_same(ours[name], theirs[name])


# --- the same network -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_state_are_bit_identical(
    net: fx.GraphModule, tmp_path: Path, training: bool
) -> None:
    net.train(training)
    loaded = roundtrip(net, tmp_path)
    assert_same_state(net, loaded)
    x = torch.randn(2, 3, 16, 16)
    assert_same(net(x, 0.5), loaded(x, 0.5))
    assert_same_state(net, loaded)  # the statistics of batch norm, where training
    assert loaded.training is training


def test_call_signature_is_kept(net: fx.GraphModule, tmp_path: Path) -> None:
    loaded = roundtrip(net, tmp_path)
    x = torch.randn(1, 3, 8, 8)
    loaded.eval(), net.eval()
    assert_same(net(x=x, mask=None, scale=1.0), loaded(x=x, mask=None, scale=1.0))
    assert_same(net(x), loaded(x))


def test_requires_grad_buffers_and_training_flags_are_kept(
    net: fx.GraphModule, tmp_path: Path
) -> None:
    net.train()
    net.get_submodule("layer.1.norm").eval()
    loaded = roundtrip(net, tmp_path)
    assert not loaded.stem.weight.requires_grad
    assert loaded.stem.bias.requires_grad
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(cast(torch.Tensor, loaded.secret), torch.arange(8.0))
    flags = {name: module.training for name, module in net.named_modules()}
    assert {name: module.training for name, module in loaded.named_modules()} == flags


def test_ties_are_kept_and_stored_once(net: fx.GraphModule, tmp_path: Path) -> None:
    path = save(net, tmp_path / "network.safetensors")
    assert "second.weight" not in load_file(path)
    loaded = load(path)
    assert loaded.first.weight is loaded.second.weight


def test_parameters_on_one_memory_stay_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    model[1].weight.requires_grad_(False)
    loaded = roundtrip(fx.symbolic_trace(model), tmp_path)
    one, other = loaded.get_parameter("0.weight"), loaded.get_parameter("1.weight")
    assert one is not other
    assert one.data_ptr() == other.data_ptr()
    assert (one.requires_grad, other.requires_grad) == (True, False)


def test_shared_modules_stay_shared(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    loaded = roundtrip(fx.symbolic_trace(nn.Sequential(layer, nn.ReLU(), layer)), tmp_path)
    network = graph_module(
        lambda g: g.output(g.call_module("b", (g.call_module("a", (g.placeholder("x"),)),))),
        a=layer,
        b=layer,
    )
    twice = roundtrip(network, tmp_path)
    assert twice.a is twice.b
    x = torch.randn(2, 3)
    assert torch.equal(network(x), twice(x))
    assert len(list(loaded.parameters())) == 2


def test_unused_modules_keep_their_keys(net: fx.GraphModule, tmp_path: Path) -> None:
    assert "unused.0.weight" in roundtrip(net, tmp_path).state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    network = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(dtype))
    assert_same_state(network, roundtrip(network, tmp_path))


def test_memory_layouts(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(
        memory_format=torch.channels_last
    )
    model.register_buffer("expanded", torch.ones(1).expand(3))
    model.register_buffer("slice", torch.arange(10.0)[2:6])
    model.register_buffer("empty", torch.empty(0, 3))
    network = fx.symbolic_trace(model)
    for name in ("expanded", "slice", "empty"):
        network.register_buffer(name, model.get_buffer(name))
    loaded = roundtrip(network, tmp_path)
    weight = loaded.get_parameter("1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(dict(network.state_dict()), dict(loaded.state_dict()))


def test_loaded_networks_can_be_trained_and_saved_again(
    net: fx.GraphModule, tmp_path: Path
) -> None:
    path = tmp_path / "network.safetensors"
    loaded = load(save(net, path))
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    before = loaded.get_parameter("layer.0.gamma").clone()
    loaded(torch.randn(2, 3, 8, 8))["out"].sum().backward()
    optimizer.step()
    assert not torch.equal(before, loaded.get_parameter("layer.0.gamma"))
    save(loaded, path)  # over the file that it came from
    again = load(path)
    assert_same_state(loaded, again)
    x = torch.randn(2, 3, 8, 8)
    assert_same(loaded.eval()(x), again.eval()(x))


def test_layers_with_parts_of_their_own(tmp_path: Path) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.recurrent = nn.LSTM(16, 4, bidirectional=True, batch_first=True)
            self.up = nn.Upsample(scale_factor=(2.0,), mode="nearest")

        def forward(self, x: torch.Tensor) -> Any:
            y = self.encoder(self.attention(x, x, x)[0])
            return self.recurrent(self.up(y)[:, :3])

    network = fx.symbolic_trace(Layers())
    loaded = roundtrip(network, tmp_path)
    x = torch.randn(2, 8, 8)
    assert_same(network(x), loaded(x))
    assert_same(network.eval()(x), loaded.eval()(x))
    loaded.double()(x.double())  # the recurrent layer's own lists follow


def test_attributes_that_the_graph_reads(tmp_path: Path) -> None:
    block = nn.Module()
    block.gamma = nn.Parameter(torch.tensor([2.0]))
    block.rate = 0.25

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        read = [graph.get_attr(name) for name in ("training", "layer1.0.gamma", "layer1.0.rate")]
        y = graph.call_function(F.dropout, (x,), {"p": read[2], "training": read[0]})
        graph.output(graph.call_function(torch.mul, (y, read[1])))

    network = graph_module(build, layer1=nn.Sequential(block))
    loaded = roundtrip(network, tmp_path)
    x = torch.ones(64)
    torch.manual_seed(1)
    expected = network(x)
    torch.manual_seed(1)
    assert torch.equal(loaded(x), expected)
    assert (expected == 0).any()
    assert torch.equal(loaded.eval()(x), 2 * x)
    assert type(loaded.get_submodule("layer1.0")) is nn.Module


def test_pytree_signature(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, x: Any, pair: Any) -> Any:
            return {"sum": x["a"] + pair[0], "pair": (pair[1], x["b"])}

    leaf = fx.PH
    example = {"x": {"a": leaf, "b": leaf}, "pair": (leaf, leaf)}
    network = fx.symbolic_trace(Nested(), concrete_args=example)
    loaded = roundtrip(network, tmp_path)
    one, two = torch.ones(2), torch.zeros(2)
    call = ({"a": one, "b": two}, (one, two))
    assert_same(network(*call), loaded(*call))


def test_exported_programs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    network = cast(fx.GraphModule, program.module(check_guards=False))
    loaded = roundtrip(network, tmp_path)
    assert_same_state(network, loaded)
    assert torch.equal(network(x), loaded(x))


def test_variadic_arguments(tmp_path: Path) -> None:
    def build(graph: fx.Graph) -> None:
        rest, options = graph.placeholder("*rest"), graph.placeholder("**options")
        graph.output((rest, options))

    loaded = roundtrip(graph_module(build), tmp_path)
    assert loaded(1, 2, k=3) == ((1, 2), {"k": 3})


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_torchvision(tmp_path: Path, name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    network = fx.symbolic_trace(models.get_model(name, weights=None).eval())
    loaded = roundtrip(network, tmp_path)
    assert_same_state(network, loaded)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x), loaded(x))


def test_named_tuples_of_torchvision(tmp_path: Path) -> None:
    inception = pytest.importorskip("torchvision.models.googlenet")

    def build(graph: fx.Graph) -> None:
        x = graph.placeholder("x")
        graph.output(graph.call_function(inception.GoogLeNetOutputs, (x, x, None)))

    loaded = roundtrip(graph_module(build), tmp_path)
    assert type(loaded(1)) is inception.GoogLeNetOutputs


# --- values and functions -------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(10**30), 1.0, -0.0, 0.1, 5e-324, math.inf, -math.inf, "ä\n\"'", ...,
        (1, [2, (3.0,)], {}), [], (), {"a": (1,), 2: None, (3, "x"): True},
        collections.OrderedDict([("b", 1), ("a", 2)]),
        slice(None, 3, None), slice(1, (2, 3), -1), range(3, 9, 2), 1 - 2j, torch.Size([2, 3]),
        torch.float32, torch.bfloat16, torch.bool, torch.strided, torch.sparse_coo,
        torch.channels_last, torch.preserve_format, torch.device("cuda", 1), torch.device("cpu"),
        F.relu, torch.cat, operator.getitem, math.sqrt,
    ],
)  # fmt: skip
def test_values_come_back_with_their_types(value: Any) -> None:
    found = decode(json.loads(json.dumps(encode(value, "here"))), "here")
    assert type(found) is type(value)
    assert found == value
    assert repr(found) == repr(value)


def test_nan_and_numpy_numbers() -> None:
    assert math.isnan(decode(encode(math.nan, ""), ""))
    assert encode(np.int64(5), "") == 5
    assert encode((np.float32(0.5), np.bool_(True)), "") == {"tuple": [0.5, True]}


@pytest.mark.parametrize(
    "function",
    [
        F.gelu, F.conv2d, F.linear, F.interpolate, F.max_pool2d, F.adaptive_avg_pool2d, F.pad,
        F.scaled_dot_product_attention, F.one_hot, F.logsigmoid, F.softplus, F.avg_pool2d, F.relu,
        F.layer_norm, F.group_norm, F.pixel_shuffle, F.grid_sample, F.silu, F.hardswish,
        torch.relu, torch.flatten, torch.einsum, torch.split, torch.meshgrid, torch.norm,
        torch.linalg.norm, torch.special.expit, torch.fft.fft, torch._assert, torch.sym_int,
        torch.arange, torch.zeros, torch.tensor, operator.add, operator.and_, operator.iadd,
        math.ceil, getattr, len, torch.ops.aten.conv2d.default, torch.ops.aten.sym_size.int,
        torch.ops.aten.relu,
    ],
)  # fmt: skip
def test_functions_are_found_by_name(function: Any) -> None:
    assert resolve_function(function_name(function, "here"), "here") is function


@pytest.mark.parametrize(
    "name",
    [
        "os:system", "builtins:eval", "builtins:exec", "builtins:__import__", "builtins:open",
        "torch:load", "torch:save", "torch:from_file", "torch:compile", "torch:hub",
        "torch:_import_dotted_name", "torch:PyTorchFileWriter", "torch.os:system",
        "torch.hub:load", "torch.serialization:load", "torch.nn.functional:importlib",
        "torch.nn.functional:handle_torch_function", "torch.nn.functional:__builtins__",
        "operator:attrgetter", "operator:call", "operator:methodcaller", "math:__loader__",
        "torch.ops:aten.save", "torch.ops:aten.save.default", "torch.ops:aten.from_file.default",
        "torch.ops:load_library", "torch.ops:aten.__class__", "torch.ops:higher_order.cond",
        "torchvision.ops:torch", "torchvision.ops._utils:torch", "torchvision.models:resnet18",
        "torchvision.models.resnet:resnet18", "torch", "torch:a:b", "torch:nn.functional", 3, None,
    ],
)  # fmt: skip
def test_functions_off_the_list_are_refused(name: Any) -> None:
    with pytest.raises(RecipeError, match="here"):
        resolve_function(name, "here")


# --- what can't be saved --------------------------------------------------------------------


class Custom(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def custom_function(x: Any) -> Any:
    return x


def test_leaves_of_other_classes_are_refused(tmp_path: Path) -> None:
    network = graph_module(
        lambda g: g.output(g.call_module("neck", (g.placeholder("x"),))), neck=Custom()
    )
    with pytest.raises(RecipeError, match=r"module 'neck' is of class .*test_recipe\.Custom.*onnx"):
        save(network, tmp_path / "x")
    network = graph_module(
        lambda g: g.output(g.call_module("a", (g.placeholder("x"),))),
        a=nn.Sequential(nn.ReLU(), Custom()),
    )
    with pytest.raises(RecipeError, match=r"module 'a\.1'"):
        save(network, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_containers_of_other_classes_become_shells(tmp_path: Path) -> None:
    shell = Custom()
    shell.weight = nn.Parameter(torch.ones(2))
    network = graph_module(lambda g: g.output(g.get_attr("shell.weight")), shell=shell)
    network.shell = shell  # GraphModule has copied its parameter only
    loaded = roundtrip(network, tmp_path)
    assert type(loaded.shell) is nn.Module
    assert torch.equal(loaded(), torch.ones(2))


def _calling(function: Any, *args: Any) -> fx.GraphModule:
    return graph_module(lambda g: g.output(g.call_function(function, (g.placeholder("x"), *args))))


def _with_argument(value: Any) -> fx.GraphModule:
    network = _calling(torch.add, 1)
    (node,) = network.graph.find_nodes(op="call_function", target=torch.add)
    node.args = (node.args[0], value)
    return network


def _with_attribute(value: Any) -> fx.GraphModule:
    network = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    network.get_submodule("0").extra = value
    return network


def _with_hook() -> fx.GraphModule:
    network = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    network.get_submodule("0").register_forward_hook(lambda *args: None)
    return network


def _with_plan(plan: Any) -> fx.GraphModule:
    network = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    network.meta["halp_fx"] = plan
    return network


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: _calling(custom_function), r"node 'custom_function'.*test_recipe\.custom_func"),
        (lambda: _calling(Custom), r"the class .*test_recipe\.Custom .*a tuple or a dict"),
        (lambda: _calling(getattr, "__class__"), "attribute '__class__'"),
        (lambda: _with_argument(object()), "value of class builtins.object"),
        (
            lambda: graph_module(lambda g: g.output(g.call_method("numpy", (g.placeholder("x"),)))),
            "method 'numpy'",
        ),
        (
            lambda: fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2, device="meta"))),
            "'0.weight' is on the meta device",
        ),
        (lambda: _with_attribute(object()), "module '0', attribute 'extra'"),
        (_with_hook, "module '0' has forward hooks"),
        (lambda: _with_plan({}), "a dict, not a halp_fx.types.Plan"),
    ],
)
def test_messages_of_what_can_not_be_saved(
    tmp_path: Path, network: Callable[[], fx.GraphModule], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        save(network(), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_parametrized_layers_are_refused_with_the_way_out(tmp_path: Path) -> None:
    network = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    layer = parametrizations.weight_norm(network.get_submodule("0"))
    with pytest.raises(
        RecipeError, match=r"module '0' computes 'weight' by .*remove_parametrizations .* before"
    ):
        save(network, tmp_path / "x")
    remove_parametrizations(layer, "weight")
    assert_same_state(network, roundtrip(network, tmp_path))


def test_other_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GraphModule"):
        save(cast(Any, nn.ReLU()), tmp_path / "x")


# --- the plan -------------------------------------------------------------------------------


def test_plan_comes_back(net: fx.GraphModule, tmp_path: Path) -> None:
    plan = Plan(
        kept={
            "stem.weight": (torch.tensor([0, 3, 5]), None, None, None),
            "gone.weight": (torch.empty(0, dtype=torch.int64), None),
            "empty": (),
        },
        units=(np.array([0, 3, 5]), np.array([], dtype=np.int64)),
        dense_ms=3.5,
        predicted_ms=1.75,
        budget_ms=1.76,
        gap=0.001,
        value=math.inf,
        dense_value=0.1,
        solver="exact",
        groups=cast(ChannelGroups, object()),
        report={"steps": [1, (2.0, None)], "table": np.arange(2), "other": Path("x")},
    )
    net.meta["halp_fx"] = plan
    net.meta["halp_fx_example"] = (((1, 3, 8, 8), torch.float32),)
    loaded = roundtrip(net, tmp_path)
    found = loaded.meta["halp_fx"]
    assert isinstance(found, Plan)
    assert found.groups is None
    assert list(found.kept) == list(plan.kept)
    for name, dims in plan.kept.items():
        assert_same(dims, found.kept[name])
    for ours, theirs in zip(plan.units, found.units, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert theirs.dtype == np.int64
    for name in ("dense_ms", "predicted_ms", "budget_ms", "gap", "value", "dense_value", "solver"):
        assert getattr(found, name) == getattr(plan, name)
    assert found.report == {"steps": [1, (2.0, None)], "table": [0, 1], "other": "x"}
    assert loaded.meta["halp_fx_example"] == net.meta["halp_fx_example"]
    assert roundtrip(loaded, tmp_path).meta["halp_fx"].report == found.report


def test_no_plan(net: fx.GraphModule, tmp_path: Path) -> None:
    assert "halp_fx" not in roundtrip(net, tmp_path).meta


# --- files ----------------------------------------------------------------------------------


def test_files_are_safetensors_with_names_of_the_state(net: fx.GraphModule, tmp_path: Path) -> None:
    path = save(net, tmp_path / "network.safetensors")
    stored, state = set(load_file(path)), set(net.state_dict())
    assert stored - {"secret"} == state - {"second.weight", "secret"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.safetensors"]


def test_weights_alone_have_every_name_of_the_state(net: fx.GraphModule, tmp_path: Path) -> None:
    net.layer = net.layer.to(memory_format=torch.channels_last)
    state = load_file(save_weights(net, tmp_path / "weights.safetensors"))
    twin = traced(Net())
    twin._non_persistent_buffers_set.add("secret")
    twin.load_state_dict(state)
    assert twin.second.weight is twin.first.weight
    for name, tensor in net.state_dict().items():
        assert_same(tensor, twin.state_dict()[name])
    with pytest.raises(RecipeError, match="has weights but no network"):
        load(tmp_path / "weights.safetensors")


def test_weights_alone_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'weight' is on the meta device"):
        save_weights(nn.Linear(2, 2, device="meta"), tmp_path / "x")
    with pytest.raises(RecipeError, match="create it first"):
        save_weights(nn.Linear(2, 2), tmp_path / "none" / "x")
    assert not list(tmp_path.iterdir())


def test_failed_saves_leave_the_old_file(
    net: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(net, tmp_path / "network.safetensors")
    before = path.read_bytes()

    def broken(tensors: Any, filename: Path, metadata: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("halp_fx.recipe.files.save_file", broken)
    with pytest.raises(RecipeError, match="disk full"):
        save(net, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["network.safetensors"]


def test_missing_places(net: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="create it first"):
        save(net, tmp_path / "nowhere" / "x")
    with pytest.raises(RecipeError, match="there is no file"):
        load(tmp_path / "x")


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        recipe = json.loads(file.metadata()["halp_fx"])
    change(recipe)
    text = json.dumps(recipe)
    metadata = {"halp_fx": text, "halp_fx.crc32": str(zlib.crc32(text.encode()))}
    save_file(load_file(path), path, metadata=metadata)


def test_newer_versions(net: fx.GraphModule, tmp_path: Path) -> None:
    path = save(net, tmp_path / "x")
    _rewrite(path, lambda recipe: recipe.update(version=FORMAT_VERSION + 1))
    with pytest.raises(RecipeError, match=r"format 2.*pip install -U halp_fx"):
        load(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(RecipeError, match="wasn't written by halp_fx"):
        load(path)
    path.write_bytes(b"PK\x03\x04 not this")
    with pytest.raises(RecipeError, match="not a file of halp_fx"):
        load(path)


def test_damage_anywhere_is_noticed(tmp_path: Path) -> None:
    network = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    path = save(network, tmp_path / "x")
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            loaded = load(path)
        except RecipeError:
            continue
        assert_same_state(network, loaded)  # a bit of the header's padding or of unread keys
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RecipeError, match="damaged"):
            load(path)


def _row(op: str, name: str, target: Any, args: Any = (), kwargs: Any = ()) -> list[Any]:
    return [op, name, target, list(args), list(kwargs)]


@pytest.mark.parametrize(
    "row",
    [
        _row("call_function", "a", "os:system", ["true"]),
        _row("call_function", "a", "builtins:getattr", [{"node": "x"}, "__class__"]),
        _row("call_function", "a", "builtins:getattr", [{"node": "x"}, {"node": "x"}]),
        _row("call_function", "a; import os", "torch:relu", [{"node": "x"}]),
        _row("call_function", "a", "torch:relu", [{"node": "x"}], [["y=print()", 1]]),
        _row("call_function", "a", "torch:relu", [{"node": "missing"}]),
        _row("call_function", "a", "torch:relu", [{"function": "torch:load"}]),
        _row("call_method", "a", "tofile", [{"node": "x"}]),
        _row("call_method", "a", "__reduce__", [{"node": "x"}]),
        _row("call_method", "a", "relu(); print", [{"node": "x"}]),
        _row("get_attr", "a", 'b"); print("'),
        _row("get_attr", "a", "__class__"),
        _row("get_attr", "a", "forward"),
        _row("get_attr", "a", "_modules"),
        _row("call_module", "a", "missing", [{"node": "x"}]),
        _row("placeholder", "a", "y=print()"),
        _row("placeholder", "x", "x"),
        _row("run", "a", "b"),
    ],
)
def test_graphs_of_strangers_run_no_code(tmp_path: Path, row: list[Any]) -> None:
    path = save(_calling(torch.relu), tmp_path / "x")
    _rewrite(path, lambda recipe: None)
    load(path)
    _rewrite(path, lambda recipe: recipe["network"]["graph"]["nodes"].insert(1, row))
    with pytest.raises(RecipeError):
        load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"class": "test_recipe:Custom"},
        {"class": "torch.nn.modules.module:sys"},
        {"class": "torch.nn.modules.conv:Parameter"},
        {"attributes": [["forward", {"function": "torch:relu"}]]},
        {"attributes": [["_forward_hooks", []]]},
        {"kind": "pickle"},
        {"parameters": [["weight", {"data": "missing", "requires_grad": True}]]},
        {"children": [["a.b", None]]},
    ],
)
def test_modules_of_strangers_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(fx.symbolic_trace(nn.Sequential(nn.ReLU())), tmp_path / "x")
    _rewrite(path, lambda recipe: recipe["network"]["children"][0][1].update(change))
    with pytest.raises(RecipeError):
        load(path)
