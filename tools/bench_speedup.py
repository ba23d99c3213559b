"""`halp-fx bench speedup`: measured speed-ups of networks pruned on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

import halp_fx
from halp_fx.budget import parse_budget
from halp_fx.errors import HalpError, InputError, LatencyError
from halp_fx.latency import Source
from halp_fx.pipeline import Progress, prepare
from halp_fx.tools import profiler
from halp_fx.tools.bench_latency import rows_table, write_rows
from halp_fx.tools.console import DebugOption, err, out, progress_bars
from halp_fx.tools.models import load_model, parse_input

__all__ = ["Speedup", "add_command", "speedups"]


@dataclass(frozen=True)
class Speedup:
    """A network pruned to a share of its latency, measured in turn with the dense one."""

    model: str
    backend: str
    dtype: str
    batch: int
    budget: float  # share of the dense latency
    predicted: float | None  # share, by the table; None, as what follows: it can't be met
    measured: float | None  # share
    dense_ms: float | None
    pruned_ms: float | None
    speedup: float | None
    met: bool
    rounds: int | None  # how often it was chosen
    remark: str = ""  # why there are no figures


def speedups(
    model: str,
    budgets: list[float],
    image: torch.Tensor,
    batch: int,
    source: Source,
    dtype: str,
    progress: Progress,
) -> list[Speedup]:
    """One network at several budgets, from one table.

    Args:
        image: an input of batch size 1 for networks that bring none.

    Raises:
        HalpError: the network can't be pruned or measured.
    """
    network, own = load_model(model)
    image = image if own is None else own[0][:1]
    inputs = image.expand(batch, *image.shape[1:]).contiguous()
    kind = profiler.dtype_of(dtype)
    prepared = prepare(network.to(kind), inputs.to(kind), latency=source, progress=progress)
    rows = []
    for budget in budgets:
        fixed = (model, source.backend.name, dtype, batch, budget)
        try:
            plan = halp_fx.plan_of(prepared.prune(halp_fx.Budget(share=budget)))
        except (HalpError, RuntimeError) as error:  # cuDNN's and those of memory are no others
            rows.append(_without(*fixed, error))
            continue
        facts = plan.report
        dense, small = facts["measured_dense_ms"], facts["measured_ms"]
        rows.append(
            Speedup(
                *fixed,
                predicted=plan.predicted_ms / plan.dense_ms,
                measured=small / dense,
                dense_ms=dense,
                pruned_ms=small,
                speedup=dense / small,
                met=facts["met"],
                rounds=facts["measured_rounds"],
            )
        )
    return rows


def _without(
    model: str, backend: str, dtype: str, batch: int, budget: float, error: Exception
) -> Speedup:
    """A row without figures."""
    remark = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return Speedup(
        model, backend, dtype, batch, budget, None, None, None, None, None, False, None, remark
    )


def _share(text: str) -> float:
    found = parse_budget(text).share
    if found is None:
        raise InputError(f"--budgets {text}: pass shares of the dense latency, as 0.667,0.5")
    return found


def _batch(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise InputError(f"--batches {text}: pass whole numbers of at least 1, as 1,256")
    return int(text)


def add_command(app: typer.Typer) -> None:
    """Adds `speedup` to the group of benchmarks."""
    app.command(
        name="speedup",
        epilog="Examples:\n\n"
        "halp-fx bench speedup --models torchvision:resnet50 --backend onnxruntime\n\n"
        "halp-fx bench speedup --models torchvision:resnet50,torchvision:resnet101,"
        "halp_fx.tools.detectors:ssd300_tensors --backend torch --device cuda --batches 1,256 "
        "--dtypes float32,bfloat16 --budgets 0.625,0.526,0.515 -o speedup/",
    )(_command)


def _command(
    models: Annotated[str, typer.Option("--models", help="Comma-separated.")] = (
        "torchvision:resnet18,torchvision:resnet50,torchvision:mobilenet_v2"
    ),
    budgets: Annotated[str, typer.Option("--budgets", help="Shares, comma-separated.")] = (
        "0.667,0.5,0.333"
    ),
    backend: Annotated[
        str, typer.Option("--backend", help="onnxruntime, torch or torch.compile.")
    ] = "onnxruntime",
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda, for torch.")] = None,
    provider: Annotated[
        str | None, typer.Option("--provider", help="Execution provider, for onnxruntime.")
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Layout of images, for torch.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay CUDA graphs, for torch on a GPU.")
    ] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1)] = None,
    batches: Annotated[str, typer.Option("--batches", help="Comma-separated.")] = "1",
    dtypes: Annotated[str, typer.Option("--dtypes", help="float32, bfloat16 ...")] = "float32",
    shape: Annotated[
        str, typer.Option("--input", metavar="SHAPE", help="Of one image, where a model has none.")
    ] = "1x3x224x224",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="For tables and a CSV file.")
    ] = Path("speedup"),
    debug: DebugOption = False,
) -> None:
    """Prunes networks to shares of their latency and measures what came out."""
    del debug
    shares = [_share(text) for text in budgets.split(",")]
    sizes = [_batch(text) for text in batches.split(",")]
    kinds = [text.strip() for text in dtypes.split(",")]
    for kind in kinds:
        profiler.dtype_of(kind)
    names = [name.strip() for name in models.split(",") if name.strip()]
    if not names:
        raise InputError("--models is empty: name some, as torchvision:resnet50")
    source = profiler.source_of(
        backend,
        output / "table.sqlite",
        threads=threads,
        device=device,
        provider=provider,
        channels_last=channels_last,
        cuda_graphs=cuda_graphs,
    )
    rows: list[Speedup] = []
    with progress_bars() as progress:
        for name in names:
            for dtype in kinds:
                for batch in sizes:

                    def tell(
                        stage: str, done: int, total: int, run: str = f"{name} {dtype} {batch}"
                    ) -> None:
                        progress(f"{stage} {run}", done, total)

                    image = parse_input(shape)[:1]
                    try:
                        rows += speedups(name, shares, image, batch, source, dtype, tell)
                    except (LatencyError, RuntimeError) as error:
                        # One that the device can't hold is no reason to lose the others.
                        fixed = (name, source.backend.name, dtype, batch)
                        rows += [_without(*fixed, share, error) for share in shares]
                    write_rows(rows, output / "speedup.csv")
    out().print(rows_table(f"measured with {backend}", rows))
    err().print(f"wrote {escape(str(output / 'speedup.csv'))}")
