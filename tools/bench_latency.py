"""`halp-fx bench latency` and `halp-fx bench peer`: predicted latencies against measured ones."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import nn

import halp_fx
from halp_fx.errors import DependencyError, InputError
from halp_fx.latency import Backend, LatencyTable, OnnxRuntime, Source, Torch, measure_paired
from halp_fx.passes.latency import copies_views, measurements
from halp_fx.tools import profiler
from halp_fx.tools.console import DebugOption, err, out, progress_bars
from halp_fx.tools.models import load_model, parse_input

__all__ = [
    "Calibrated",
    "Compared",
    "add_commands",
    "calibrated",
    "compared",
    "rows_table",
    "write_rows",
]

DEFAULT_MODELS = "resnet18,resnet50,mobilenet_v2,vgg16_bn"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibrated:
    """How well a table foretells what a network takes."""

    model: str
    backend: str
    measurements: int
    profile_s: float  # what was not in the table yet
    dense_ms: float  # as the calibrated table says
    offset_ms: float
    scale: float
    weights_ms_per_mb: float
    networks: int
    held_out: int
    median_error: float  # relative, on networks held out
    worst_error: float
    rank_correlation: float


def calibrated(
    model: str, backend: Backend, inputs: Any, folder: Path, *, networks: int, progress: Progress
) -> Calibrated:
    """Profile a network into a table of its own and calibrate it, or go on where that stopped."""
    network, own = load_model(model)
    groups = profiler.groups_of(network, inputs if own is None else own)
    name = f"{model.replace(':', '-')}-{backend.name}"
    folder.mkdir(parents=True, exist_ok=True)
    with LatencyTable.open(folder / f"{name}.sqlite") as table:
        source = Source(backend, table)
        start = time.perf_counter()
        profiler.profile(groups, source, progress=progress)
        seconds = time.perf_counter() - start
        costs = profiler.profile(groups, source, calibrate_on=networks, progress=progress)
    found = costs.calibration
    return Calibrated(
        model=model,
        backend=backend.name,
        measurements=len(measurements(groups, backend.fuses, copies_views(backend))),
        profile_s=seconds,
        dense_ms=costs.dense_ms,
        offset_ms=found.offset_ms,
        scale=found.scale,
        weights_ms_per_mb=found.weights_ms_per_mb,
        networks=found.networks,
        held_out=found.held_out,
        median_error=found.median_error,
        worst_error=found.worst_error,
        rank_correlation=found.rank_correlation,
    )


@dataclass(frozen=True)
class Compared:
    """A pruned network, measured in turn with the dense one."""

    what: str
    params: int
    params_share: float
    macs_share: float
    dense_ms: float
    pruned_ms: float
    share: float  # measured latency, of the dense one's
    multiples_of_4: float  # share of the convolutions whose width is one


def compared(
    model: str, budget: float, backend: Backend, inputs: torch.Tensor, table: LatencyTable
) -> list[Compared]:
    """A network pruned to a budget, and by Torch-Pruning to as many parameters.

    Torch-Pruning removes the channels of least magnitude of all layers together; its ratio is
    found by bisection. Both results are measured in turn with the dense network.

    Raises:
        DependencyError: Torch-Pruning is not installed.
        HalpError: the network can't be pruned.
    """
    dense, _ = load_model(model)
    dense.eval()
    pruned = halp_fx.compile(dense, budget, inputs, latency=Source(backend, table))
    ours = sum(p.numel() for p in pruned.parameters())
    rows = [_compared("halp_fx", dense, pruned, backend, inputs)]
    for title, round_to in (
        ("Torch-Pruning, as many parameters", None),
        ("Torch-Pruning, the same, rounded to 8", 8),
    ):
        peer = _peer(dense, inputs, ours, round_to)
        rows.append(_compared(title, dense, peer, backend, inputs))
    return rows


def _compared(
    what: str, dense: nn.Module, pruned: nn.Module, backend: Backend, inputs: torch.Tensor
) -> Compared:
    before, after = measure_paired(dense, pruned, backend, (inputs,), (inputs,), rounds=16, bouts=2)
    counts = [sum(p.numel() for p in net.parameters()) for net in (dense, pruned)]
    widths = [m.out_channels for m in pruned.modules() if isinstance(m, nn.Conv2d)]
    return Compared(
        what=what,
        params=counts[1],
        params_share=counts[1] / counts[0],
        macs_share=_macs(pruned, inputs) / _macs(dense, inputs),
        dense_ms=before.median_ms,
        pruned_ms=after.median_ms,
        share=after.median_ms / before.median_ms,
        multiples_of_4=sum(w % 4 == 0 for w in widths) / max(len(widths), 1),
    )


def _macs(network: nn.Module, inputs: torch.Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(inputs)
    return counter.get_total_flops() / 2


def _peer(dense: nn.Module, inputs: torch.Tensor, params: int, round_to: int | None) -> nn.Module:
    """What Torch-Pruning makes of the network with about so many parameters."""
    low, high = 0.0, 0.95
    best: nn.Module | None = None
    nearest = math.inf
    for _ in range(12):
        ratio = (low + high) / 2
        found = _torch_pruned(dense, inputs, ratio, round_to)
        count = sum(p.numel() for p in found.parameters())
        if abs(count - params) < nearest:
            best, nearest = found, abs(count - params)
        low, high = (ratio, high) if count > params else (low, ratio)
    assert best is not None
    return best


def _torch_pruned(
    dense: nn.Module, inputs: torch.Tensor, ratio: float, round_to: int | None
) -> nn.Module:
    try:
        import torch_pruning as tp
    except ImportError as e:
        raise DependencyError(
            'the comparison needs the package torch_pruning: run pip install "halp-fx[peers]"'
        ) from e
    import copy

    network = copy.deepcopy(dense)
    heads = [m for m in network.modules() if isinstance(m, nn.Linear)][-1:]
    pruner = tp.pruner.MetaPruner(
        network,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        ignored_layers=heads,
        round_to=round_to,
    )
    pruner.step()
    for parameter in network.parameters():
        parameter.grad = None
    return network


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """A CSV file with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def rows_table(title: str, rows: Iterable[Any]) -> Table:
    """Dataclasses of one kind, one row each."""
    table = Table(title=title)
    listed = list(rows)
    for field in fields(listed[0]):
        table.add_column(field.name.replace("_", " "))
    for row in listed:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else escape(str(v))
                        for v in asdict(row).values()))  # fmt: skip
    return table


def _backend(name: str, threads: int) -> Backend:
    if name == "onnxruntime":
        return OnnxRuntime(threads=threads)
    if name == "torch":
        return Torch(threads=threads)
    raise InputError(f"there is no back-end {name!r} for this; use onnxruntime or torch")


def add_commands(app: typer.Typer) -> None:
    """Adds `latency` and `peer` to the group of benchmarks."""
    app.command(
        name="latency",
        epilog="Examples:\n\nhalp-fx bench latency\n\n"
        "halp-fx bench latency --models mobilenet_v2 --backends onnxruntime -o latency/",
    )(_latency)
    app.command(
        name="peer",
        epilog="Examples:\n\nhalp-fx bench peer torchvision:mobilenet_v2 --budget 0.6",
    )(_peers)


def _latency(
    models: Annotated[
        str, typer.Option("--models", help="Of torchvision where no other source is named.")
    ] = (DEFAULT_MODELS),
    backends: Annotated[
        str, typer.Option("--backends", help="Of onnxruntime and torch.")
    ] = "onnxruntime,torch",
    networks: Annotated[
        int, typer.Option("--networks", min=3, help="Of random widths; a third checks the fit.")
    ] = 24,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    shape: Annotated[str, typer.Option("--input", metavar="SHAPE")] = "1x3x160x160",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="For tables and a CSV file.")
    ] = Path("latency"),
    debug: DebugOption = False,
) -> None:
    """How long profiling takes, and how well sums of kernels foretell whole networks."""
    del debug
    rows = []
    with progress_bars() as progress:
        for backend in (_backend(name.strip(), threads) for name in backends.split(",")):
            for name in (_full_name(m.strip()) for m in models.split(",")):

                def tell(stage: str, done: int, total: int, name: str = name) -> None:
                    progress(f"{stage} {name.partition(':')[2]}", done, total)

                inputs = (parse_input(shape),)
                rows.append(
                    calibrated(name, backend, inputs, output, networks=networks, progress=tell)
                )
                write_rows(rows, output / "latency.csv")
    out().print(rows_table("whole = offset + scale x kernels + rate x weights", rows))
    err().print(f"wrote {escape(str(output / 'latency.csv'))}")


def _full_name(model: str) -> str:
    return model if ":" in model else f"torchvision:{model}"


def _peers(
    model: Annotated[str, typer.Argument(metavar="MODEL")] = "torchvision:mobilenet_v2",
    budget: Annotated[float, typer.Option("--budget", help="Share of the latency.")] = 0.6,
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    shape: Annotated[str, typer.Option("--input", metavar="SHAPE")] = "1x3x160x160",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="For the table and a CSV file.")
    ] = Path("peer"),
    debug: DebugOption = False,
) -> None:
    """A network pruned to a latency in ONNX Runtime, next to Torch-Pruning's of the same size."""
    del debug
    output.mkdir(parents=True, exist_ok=True)
    with LatencyTable.open(output / "table.sqlite") as table:
        rows = compared(model, budget, _backend("onnxruntime", threads), parse_input(shape), table)
    write_rows(rows, output / "peer.csv")
    out().print(rows_table(f"{model}, budget {budget:g} of the latency in ONNX Runtime", rows))
    err().print(f"wrote {escape(str(output / 'peer.csv'))}")
