"""What a user may pass by mistake to the functions of training, and what is said then."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from halp_fx.errors import InputError, SaliencyError
from halp_fx.training import Distillation, GradualPruner, distillation_loss, fine_tune
from halp_fx.training.surgery import check_optimizer
from halp_fx.training.wrapping import wrapping_of
from tests.training_networks import batches, example, network


def _pruner(**options: Any) -> GradualPruner:
    settings = {"steps": 3, "every": 1, "latency": "analytic", **options}
    return GradualPruner(network(), 0.4, example(), **settings)


def _scored(**options: Any) -> GradualPruner:
    pruner, (images, classes) = _pruner(**options), batches(1)[0]
    nn.functional.cross_entropy(pruner.model(images), classes).backward()
    pruner.after_backward()
    return pruner


@pytest.mark.parametrize("smoothing", ["a", True, False, [0.5], -0.1])
def test_smoothing(smoothing: Any) -> None:
    with pytest.raises(InputError, match=r"smoothing is .*: pass None or a number from 0 to below"):
        _pruner(smoothing=smoothing)


@pytest.mark.parametrize("scale", ["a", True, -1, float("inf"), float("nan"), torch.ones(2)])
def test_scale(scale: Any) -> None:
    with pytest.raises(InputError, match=r"scale is .*: pass what the loss was multiplied by"):
        _pruner().after_backward(scale)


def test_a_scale_may_be_a_tensor_of_one() -> None:
    one, other = _pruner(), _pruner()
    images, classes = batches(1)[0]
    for pruner, factor in ((one, 1.0), (other, 8.0)):
        (nn.functional.cross_entropy(pruner.model(images), classes) * factor).backward()
        pruner.after_backward(torch.tensor(factor))  # type: ignore[arg-type]
    for a, b in zip(one._scores.totals, other._scores.totals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("model", ["net", None, torch.rand])
def test_a_model_that_is_none(model: Any) -> None:
    with pytest.raises(InputError, match=r"model is a .*: pass a torch\.nn\.Module"):
        GradualPruner(model, 0.5, example(), latency="analytic")
    with pytest.raises(InputError, match=r"model is a .*: pass a torch\.nn\.Module"):
        fine_tune(model, batches(1), nn.CrossEntropyLoss())


def test_something_else_than_an_optimiser() -> None:
    pruner = _scored()
    for wrong in (None, network(), [torch.optim.SGD(pruner.model.parameters(), 0.1), None]):
        with pytest.raises(
            InputError, match=r"optimizer is a (NoneType|Sequential): pass the torch"
        ):
            pruner.step(wrong)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(pruner.model.parameters(), 0.1), 1)
    with pytest.raises(InputError, match=r"optimizer is a StepLR: pass the torch\.optim\.Optim"):
        pruner.step(scheduler)  # type: ignore[arg-type]
    assert pruner.milestone == 0 and pruner.plan.units[0].size == 8


def test_an_optimiser_with_another_inside() -> None:
    class Shards(torch.optim.SGD):
        """As ZeroRedundancyOptimizer: what it holds, another one trains."""

        def __init__(self, parameters: Any) -> None:
            found = list(parameters)
            super().__init__(found, 0.1)
            self.optim = torch.optim.SGD(found, 0.1)

    class Shares(Shards):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters)
            self.param_groups = self.optim.param_groups

    pruner = _scored()
    with pytest.raises(InputError, match="Shards keeps parameters in a SGD inside, which would go"):
        pruner.step(Shards(pruner.model.parameters()))
    check_optimizer(Shares(pruner.model.parameters()), pruner.network)


def test_fine_tuning_with_the_optimiser_of_another_network() -> None:
    optimizer = torch.optim.SGD(network().parameters(), 0.1)
    for model in (network(), _pruner()):
        with pytest.raises(InputError, match="SGD has no parameter of the network that is trained"):
            fine_tune(model, batches(1), nn.CrossEntropyLoss(), optimizer=optimizer)


@pytest.mark.parametrize("clip_norm", [0, -1.0])
def test_clipping(clip_norm: float) -> None:
    with pytest.raises(InputError, match=r"clip_norm is .*: pass a number above 0, or None"):
        fine_tune(network(), batches(1), nn.CrossEntropyLoss(), clip_norm=clip_norm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "4"}, "temperature is '4': pass a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"alpha": None}, "alpha is None: pass the teacher's share"),
        ({"label_smoothing": 2.0}, r"label_smoothing is 2\.0: pass a number from 0 to 1"),
    ],
)
def test_settings_of_distillation(options: Any, message: str) -> None:
    logits = torch.rand(2, 3)
    with pytest.raises(InputError, match=message):
        distillation_loss(logits, logits, **options)
    with pytest.raises(InputError, match=message):
        Distillation(network(), **options)


def test_networks_with_several_outputs() -> None:
    logits = torch.rand(2, 3)
    with pytest.raises(InputError, match=r"student_logits are a dict: pass a tensor \(N, classes"):
        distillation_loss({"out": logits}, logits)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"teacher is a str: pass the dense network"):
        Distillation("resnet18")  # type: ignore[arg-type]


def test_a_network_that_is_run_by_other_code() -> None:
    pruner = _scored()
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    own = pruner.network.forward
    pruner.network.forward = own  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"the forward of pruner\.network was replaced, and would"):
        pruner.step(optimizer)
    del pruner.network.forward
    assert pruner.finish(optimizer)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_a_wrapper_from_before_a_cut(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            plain = DistributedDataParallel(network(), broadcast_buffers=False)
            assert not wrapping_of(plain, None)[1](network()).broadcast_buffers
        model = DistributedDataParallel(network())
        pruner = GradualPruner(model, 0.4, example(), steps=1, every=1, latency="analytic")
        compiled = torch.compile(DistributedDataParallel(network()))
        with pytest.warns(UserWarning, match="which is kept, but not compiled"):
            inner, wrap = wrapping_of(compiled, None)
        assert isinstance(inner, nn.Sequential)
        assert isinstance(wrap(network()), DistributedDataParallel)
        own = pruner.model
        own(example()).square().mean().backward()
        pruner.after_backward()
        assert pruner.step(torch.optim.SGD(own.parameters(), 0.1))
        with pytest.raises(InputError, match=r"from before a cut, .* call pruner\.model each time"):
            own(example())
        pruner.model(example()).square().mean().backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_options_of_a_wrapper(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    known = inspect.signature(DistributedDataParallel).parameters
    given = {
        "find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 3,
        "skip_all_reduce_unused_params": True, "batched_grad_copy": True,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if name in known}
    try:
        model = network()
        # Not declared, but what torch's own tutorials use.
        model._ddp_params_and_buffers_to_ignore = ["11.bias"]  # type: ignore[assignment]
        first = DistributedDataParallel(model, **given)
        again = wrapping_of(first, None)[1](network())
        assert isinstance(again, DistributedDataParallel)
        for name in ("bucket_bytes_cap", "process_group", *given):
            if name != "bucket_cap_mb":
                assert getattr(again, name) == getattr(first, name), name
        assert again.parameters_to_ignore == {"11.bias"}
        if "bucket_cap_mb_list" in known:
            listed = DistributedDataParallel(network(), bucket_cap_mb_list=[1, 4])
            again = wrapping_of(listed, None)[1](network())
            assert again.bucket_bytes_cap_list == listed.bucket_bytes_cap_list
        if "forward_sync_buffers" in known:
            still = DistributedDataParallel(network(), forward_sync_buffers=False)
            assert not wrapping_of(still, None)[1](network()).forward_sync_buffers

        first.register_comm_hook(None, lambda state, bucket: bucket.get_future())  # noqa: ARG005
        with pytest.raises(InputError, match="has communication hooks, which can't be carried"):
            wrapping_of(first, None)
        own = wrapping_of(first, DistributedDataParallel)
        assert own == (first.module, DistributedDataParallel)
        plain = DistributedDataParallel(network())
        plain._delay_all_reduce_params = [torch.zeros(1)]
        with pytest.raises(InputError, match="has delay_all_reduce_named_params, which can't be"):
            wrapping_of(plain, None)
        plain.mixed_precision = object()  # needs a GPU to be made
        with pytest.raises(InputError, match=r"has mixed_precision, .* in torch\.autocast"):
            wrapping_of(plain, None)
    finally:
        dist.destroy_process_group()


def test_gradients_that_were_set_to_zero() -> None:
    pruner = _pruner()
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    images, classes = batches(1)[0]
    nn.functional.cross_entropy(pruner.model(images), classes).backward()
    optimizer.zero_grad(set_to_none=False)
    pruner.after_backward()
    with pytest.raises(
        SaliencyError, match=r"all gradients were zero .* before optimizer\.zero_grad"
    ):
        pruner.step(optimizer)
