"""Models as they come: in wrappers, pruned before, in any precision and mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import halp_fx
from halp_fx.errors import InputError
from halp_fx.passes.rules.wrappers import unwrapped
from tests import oracle
from tests.state import named_tensors

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body, self.drop = nn.Conv2d(16, 24, 3), nn.Dropout(0.2)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.body(torch.relu(self.norm(self.stem(x)))))
        return self.fc(self.drop(x.mean((2, 3))))


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = oracle.randomize(Net())
    assert isinstance(model, Net)
    return model.eval()


def compiled(model: nn.Module, budget: float = 0.5, inputs: Tensor = IMAGE) -> fx.GraphModule:
    return halp_fx.compile(model, budget, inputs, latency="analytic")


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process as a group of its own, which DistributedDataParallel asks for."""
    distributed: Any = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def held_to(model: nn.Module, wrapped: Any, attribute: str) -> None:
    """Pruning `wrapped` warns, and gives what pruning `model` gives."""
    with pytest.warns(UserWarning, match=rf"wrapped; what is in its `\.{attribute}`") as caught:
        pruned = halp_fx.compile(wrapped, 0.5, IMAGE, latency="analytic")
    assert {w.filename for w in caught} == {__file__}
    assert list(pruned.state_dict()) == list(model.state_dict())
    oracle.assert_exact(model, pruned, (IMAGE,))
    assert oracle.shrunk(model, pruned) < 0.8


def test_data_parallel() -> None:
    model = net()
    held_to(model, nn.DataParallel(model), "module")


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    model = net()
    held_to(model, nn.parallel.DistributedDataParallel(model), "module")


def test_torch_compile() -> None:
    model = net()
    held_to(model, torch.compile(model), "_orig_mod")


def test_wrappers_in_wrappers() -> None:
    model = net()
    with pytest.warns(UserWarning) as caught:
        assert unwrapped(torch.compile(nn.DataParallel(model))) is model
    assert len(caught) == 2


def test_compiled_in_place() -> None:
    model = net()
    model.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pruned = compiled(model)
    oracle.assert_exact(net(), pruned, (IMAGE,))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, IMAGE)])
def test_torch_script(script: Any) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.b(self.a(x))

    with pytest.raises(InputError, match=r"TorchScript module, .*: pass the original"):
        compiled(script(Small()))


def test_what_is_no_wrapper_stays() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unwrapped(model) is model
        assert unwrapped("net.pt") == "net.pt"


def test_pruned_before() -> None:
    """`kept` is of the network that was given, not of the first one."""
    model = net()
    once: Any = compiled(model, 0.6)
    twice: Any = compiled(once, 0.5)
    shapes = {name: tensor.shape for name, tensor in once.state_dict().items()}
    kept = halp_fx.plan_of(twice).kept
    assert list(kept) == list(named_tensors(once))
    for name, dims in kept.items():
        for index, size in zip(dims, shapes[name], strict=True):
            assert index is None or int(index.max()) < size
    assert twice.stem.out_channels < once.stem.out_channels < 16
    oracle.assert_exact(once, twice, (IMAGE,))
    assert halp_fx.plan_of(once).kept["fc.bias"] == (None,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype: torch.dtype) -> None:
    model, inputs = net().to(dtype), IMAGE.to(dtype)
    pruned = compiled(model, inputs=inputs)
    floats = [t for t in pruned.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {dtype}
    oracle.assert_exact(model, pruned, (inputs,))


def test_mixed_precision() -> None:
    """Norms in float32 within a network in bfloat16, as autocast leaves them."""
    model = net().to(torch.bfloat16)
    model.norm.float()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    pruned = compiled(model, inputs=IMAGE.bfloat16())
    assert {n: t.dtype for n, t in pruned.state_dict().items()} == dtypes


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool) -> None:
    model = net().train(training)
    model.norm.eval()
    pruned = compiled(model)
    modes = {name: module.training for name, module in model.named_modules()}
    assert {n: m.training for n, m in pruned.named_modules() if n in modes} == modes
    assert model.training is training
    oracle.assert_exact(model, pruned, (IMAGE,))
