"""Latency of nodes that nobody looks into, and of kernels that read tuples of tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halp_fx
from halp_fx.errors import DeviceMismatchError
from halp_fx.latency import Analytic, Job, LatencyTable, OnnxRuntime, Source, Timing, Torch
from halp_fx.latency.bundle import write_bundle
from halp_fx.passes.groups import find_groups
from halp_fx.passes.latency import measurements, price
from halp_fx.passes.rules.counts import mac_counts, total
from halp_fx.passes.rules.cut import cut, signature
from halp_fx.passes.trace import trace
from halp_fx.types import ChannelGroups, Kernel
from tests import oracle

__all__: list[str] = []

FLOPS = Analytic(peak_gflops=1e-6, bandwidth_gbs=1e30)  # one operation a millisecond
X = torch.rand(1, 3, 16, 16)


class ByData(nn.Module):
    """Can't be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x) if float(x.detach().sum()) < 1e9 else x


class Picky(nn.Module):
    """Can't be traced, and takes one image alone."""

    def forward(self, x: Tensor) -> Any:
        if float(x.detach().sum()) != float(self.total):  # type: ignore[arg-type]
            raise ValueError("another image")
        return x + 1.0


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.one, self.part = nn.Conv2d(3, 8, 3, padding=1), part
        self.two, self.three = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.three(torch.relu(self.two(torch.relu(self.part(self.one(x))))))


def groups_of(model: nn.Module, x: Tensor = X) -> ChannelGroups:
    return find_groups(trace(model, x))


def network(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return oracle.randomize(Net(part)).eval()


def picky() -> nn.Module:
    model: Any = network(Picky())
    with torch.no_grad():
        model.part.total = model.one(X).sum()
    found: nn.Module = model
    return found


def kernel_of(kernels: tuple[Kernel, ...], node: str) -> Kernel:
    return next(kernel for kernel in kernels if kernel.nodes == (node,))


def dense_ms(kernel: Kernel) -> float:
    return float(kernel.cost(*(axis.dense for axis in kernel.axes)))


def test_what_is_held_whole_is_in_the_sum_and_in_the_count() -> None:
    groups = groups_of(network(ByData()))
    kernels = price(groups, Source(FLOPS, None)).kernels
    assert dense_ms(kernel_of(kernels, "part")) == 2 * 8 * 8 * 9 * 256
    macs = 256 * (3 * 8 * 9 + 8 * 8 * 9 + 8 * 32 * 9 + 32 * 4)
    assert total(mac_counts(groups), groups.dense_units) == macs


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_in_the_sum(kind: type[nn.RNNBase]) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer: nn.Module = kind(6, 5, num_layers=2, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.layer(x)[0][:, -1])

    groups = groups_of(Sequence().eval(), torch.rand(2, 7, 6))
    weights = sum(p.numel() for n, p in Sequence().named_parameters() if "weight_" in n)
    layer = kernel_of(price(groups, Source(FLOPS, None)).kernels, "layer")
    assert dense_ms(layer) == 2 * weights * 2 * 7
    assert layer.op == kind.__name__


@pytest.mark.parametrize("backend", [Torch(threads=1, samples=2), OnnxRuntime(samples=2)])
def test_what_is_held_whole_is_measured(backend: Any) -> None:
    groups = groups_of(network(ByData()))
    table = LatencyTable.open(":memory:")
    kernels = price(groups, Source(backend, table)).kernels
    whole = kernel_of(kernels, "part")
    assert dense_ms(whole) > 0
    keys = [entry.key for entry in table.entries() if entry.key.startswith("ByData#")]
    assert keys == [signature(groups, ("part",), dict(enumerate(groups.dense_units)))]


def test_a_module_that_is_another_one_has_another_key() -> None:
    class Wider(ByData):
        def __init__(self) -> None:
            super().__init__()
            self.conv.dilation, self.conv.padding = (2, 2), (2, 2)

    first, second = (groups_of(network(part)) for part in (ByData(), Wider()))
    dense = dict(enumerate(first.dense_units))
    again = signature(groups_of(network(ByData())), ("part",), dense)
    assert signature(first, ("part",), dense) == again
    assert signature(second, ("part",), dense) != again.replace("ByData", "Wider")


def test_what_can_not_be_measured_alone_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = picky()
    backend, table = Torch(threads=1, samples=2), LatencyTable.open(":memory:")
    with pytest.warns(UserWarning, match=r"part of Net can't be measured alone"):
        found = price(groups_of(model), Source(backend, table))
    assert "another image" in caplog.text
    assert dense_ms(kernel_of(found.kernels, "part")) == 0
    assert found.dense_ms > 0
    with pytest.warns(UserWarning, match="can't be measured alone"):
        pruned = halp_fx.compile(
            model, halp_fx.Budget(params=0.8), X, latency=Source(backend, table), verify=False
        )
    assert halp_fx.plan_of(pruned).report["params"]["pruned"] < sum(
        p.numel() for p in model.parameters()
    )
    torch.testing.assert_close(pruned(X).shape, model(X).shape)


def test_a_table_of_another_device_may_lack_what_can_not_be_measured_alone() -> None:
    groups = groups_of(picky())
    table = LatencyTable.open(":memory:")
    text = json.dumps({**json.loads(OnnxRuntime().fingerprint()), "cpu": "another"})
    for job in measurements(groups, OnnxRuntime.fuses, OnnxRuntime.copies):
        if not job.optional:
            table.put(job.key, text, Timing(1.0, 0.1, 9))
    source = halp_fx.latency.resolve_backend(table, allow_foreign=True)
    with pytest.warns(UserWarning, match=r"part of Net can't be measured alone"):
        found = price(groups, source)
    assert found.dense_ms > 0


@pytest.mark.parametrize("missing", [0, 1])
def test_few_widths_are_enough_where_a_table_of_another_device_has_no_more(missing: int) -> None:
    """As where each measurement builds an engine."""
    groups = groups_of(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 5, 1)))
    few, table = LatencyTable.open(":memory:"), LatencyTable.open(":memory:")
    here = OnnxRuntime(samples=1, min_sample_ms=1e-3)
    dense_ms = price(groups, Source(here, few), coarse=True).dense_ms
    text = json.dumps({**json.loads(here.fingerprint()), "cpu": "another"})
    kept = few.entries()[missing:]
    table.put_all({entry.key: entry.timing for entry in kept}, text)
    source = halp_fx.latency.resolve_backend(table, allow_foreign=True)
    if missing:
        with pytest.raises(DeviceMismatchError, match="lacks this measurement"):
            price(groups, source)
    else:
        assert price(groups, source).dense_ms == pytest.approx(dense_ms)


def test_a_bundle_leaves_out_what_can_not_be_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = measurements(groups_of(picky()), fuses=True)
    assert [job.key.partition("#")[0] for job in jobs if job.optional] == ["Picky"]
    done: list[tuple[int, int]] = []
    write_bundle(jobs, tmp_path / "b", progress=lambda n, of, key: done.append((n, of)))
    assert len(list((tmp_path / "b" / "kernels").glob("*.onnx"))) == len(jobs) - 1
    assert done[-1] == (len(jobs), len(jobs))
    assert "left out of the bundle: kernel Picky#" in caplog.text
    needed = Job("needed", next(job.build for job in jobs if job.optional))
    with pytest.raises(halp_fx.errors.LatencyError, match="needed"):
        write_bundle([needed], tmp_path / "c")


class Backwards(nn.Module):
    """Reads what split gives as one value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.two(torch.cat(self.one(x).split(4, 1)[::-1], 1))


@pytest.mark.parametrize("backend", [Torch(threads=1, samples=2), OnnxRuntime(samples=2)])
def test_kernels_that_read_several_tensors_as_one_value(backend: Any) -> None:
    torch.manual_seed(0)
    model = oracle.randomize(Backwards()).eval()
    groups = groups_of(model)
    found = price(groups, Source(backend, LatencyTable.open(":memory:")))
    assert dense_ms(kernel_of(found.kernels, "cat")) > 0
    module, inputs = cut(groups, ("cat",), dict(enumerate(groups.dense_units)))
    assert torch.equal(module(*inputs), torch.cat(inputs, 1))


def test_a_branch_that_holds_a_module_whole_is_not_dropped() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
            self.outer, self.part = nn.Conv2d(16, 8, 3, padding=1), ByData()
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return self.head(x + self.part(self.outer(torch.relu(self.inner(x)))))

    torch.manual_seed(0)
    model = oracle.randomize(Residual()).eval()
    assert groups_of(model).branches == ()
    pruned = halp_fx.compile(model, 0.8, X, latency="analytic", round_to=1)
    oracle.assert_exact(model, pruned, (X,))


def test_large_inputs_repeat_what_one_sample_has() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval()
    groups = groups_of(model, torch.rand(64, 3, 96, 96))
    _, (x,) = cut(groups, ("_1",), dict(enumerate(groups.dense_units)))
    assert x.shape == (64, 8, 94, 94) and x.stride(0) == 0
    assert x[0].std() > 0.5
    seen: list[Tensor] = []
    probe = nn.Module()
    probe.forward = seen.append  # type: ignore[assignment]
    Torch(threads=1).prepare(probe.eval(), (x,))()
    assert seen[0].is_contiguous() and torch.equal(seen[0], x)


class Shuffled(nn.Module):
    """Turns and splits of activations, some for a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.one(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x, y = x.chunk(2, 1)
        z = x.flatten(2)
        scores = z @ y.flatten(2).transpose(1, 2)
        return self.two((scores @ z).view(x.shape)[:, :, 1:])


def test_views_that_onnx_copies_are_in_the_sum() -> None:
    torch.manual_seed(0)
    model = oracle.randomize(Shuffled()).eval()
    groups = groups_of(model)
    tables = [LatencyTable.open(":memory:") for _ in range(2)]
    backends = [OnnxRuntime(samples=2), Torch(threads=1, samples=2)]
    found = [
        price(groups, Source(backend, table))
        for backend, table in zip(backends, tables, strict=True)
    ]
    copied = {node for kernel in found[0].kernels for node in kernel.nodes} - {
        node for kernel in found[1].kernels for node in kernel.nodes
    }
    # The second transpose is a part of a product.
    assert copied == {"transpose", "chunk", "getitem_6"}
    assert all(dense_ms(kernel_of(found[0].kernels, node)) > 0 for node in copied)
    jobs = measurements(groups, fuses=True, copies=True)
    assert len(jobs) > len(measurements(groups, fuses=True))
    assert {job.key for job in jobs} <= {entry.key for entry in tables[0].entries()}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.GroupNorm(1, 64), nn.GroupNorm(32, 64)),
        (nn.AvgPool2d([3, 3], 1, 1), nn.AvgPool2d([5, 5], 1, 2)),
        (
            nn.LayerNorm(16, elementwise_affine=False),
            nn.LayerNorm((64, 16, 16), elementwise_affine=False),
        ),
    ],
)
def test_modules_that_do_other_work_have_other_keys(first: nn.Module, second: nn.Module) -> None:
    keys = []
    for part in (first, second):
        groups = groups_of(nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), part))
        (node,) = (n.name for n in groups.traced.module.graph.nodes if n.target == "1")
        keys.append(signature(groups, (node,), dict(enumerate(groups.dense_units))))
    assert keys[0] != keys[1]
