"""The commands `halp-fx profile` and `halp-fx sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from halp_fx.errors import InputError
from halp_fx.latency import LatencyTable, OnnxRuntime, import_results
from halp_fx.latency.device import summary
from halp_fx.tools import advice, profiler
from halp_fx.tools import sweep as sweeper
from halp_fx.tools.console import DebugOption, err, out, progress_bars
from halp_fx.tools.options import (
    AlsoOption,
    BatchOption,
    CandidatesOption,
    ForeignOption,
    InputOption,
    LatencyOption,
    MacsOption,
    MemoryOption,
    ModelArgument,
    ParamsOption,
    PretrainedOption,
    ReconstructOption,
    SamplesOption,
    StepsOption,
    WeightsOption,
    by_samples,
    load,
)
from halp_fx.tools.prune import latencies_of

__all__ = ["add_commands"]

_CALIBRATED_ON = 12  # networks


def add_commands(app: typer.Typer) -> None:
    """Add `profile` and `sweep` to the command line."""
    app.command(
        epilog="Examples:\n\n"
        "halp-fx profile torchvision:resnet50 --backend onnxruntime --threads 1 -o table.sqlite\n\n"
        "halp-fx profile torchvision:resnet50 --advise\n\n"
        "halp-fx profile torchvision:resnet50 --backend torch --device cuda --batch 256 "
        "--dtype bfloat16 -o table.sqlite\n\n"
        "halp-fx prune torchvision:resnet50 --budget 0.5 --latency table.sqlite -o out/\n\n"
        "On a device without PyTorch:\n\n"
        "halp-fx profile torchvision:resnet50 --bundle bundle/\n\n"
        "(copy bundle/ there, run: python run.py -o results.jsonl, copy the results back)\n\n"
        "halp-fx profile torchvision:resnet50 --import results.jsonl -o board.sqlite"
    )(profile)
    app.command(
        epilog="Examples:\n\n"
        "halp-fx sweep torchvision:resnet18 --pretrained --budgets 0.9,0.7,0.5,0.3 -o sweep/\n\n"
        "halp-fx sweep torchvision:mobilenet_v2 --latency onnxruntime --budgets 0.8,0.6,0.4\n\n"
        "halp-fx sweep torchvision:resnet18 --params 0.6 --also board.sqlite=4ms"
    )(sweep)


def profile(
    model: ModelArgument,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="onnxruntime, torch, torch.compile, or analytic (shows, no table).",
        ),
    ] = "onnxruntime",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The table, made or completed; a run that was cut off goes on where it was. "
            "Default: the user's own table.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads of the back-end.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda, for torch and torch.compile.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16 or another type, for torch.")
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Channels last in memory, for torch.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Replay CUDA graphs, for torch on a GPU.")
    ] = False,
    provider: Annotated[
        str | None,
        typer.Option("--provider", help="Of ONNX Runtime, as CUDAExecutionProvider."),
    ] = None,
    calibrate: Annotated[
        int | None,
        typer.Option(
            "--calibrate",
            min=0,
            help="Networks of random widths to measure whole, to fit sums of kernels to; 0: none. "
            f"Default: {_CALIBRATED_ON}.",
        ),
    ] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Say where the time goes and whether pruning can help.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle", metavar="DIR", help="Write what to measure on a device without PyTorch."
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Take the results of a bundle."),
    ] = None,
    batch: BatchOption = None,
    shapes: InputOption = None,
    debug: DebugOption = False,
) -> None:
    """Measures what each width costs on this device; leaves a latency table."""
    del debug
    measured_here = {
        "--backend": backend != OnnxRuntime.name,
        "--threads": threads is not None,
        "--device": device is not None,
        "--dtype": dtype is not None,
        "--channels-last": channels_last,
        "--cuda-graphs": cuda_graphs,
        "--provider": provider is not None,
        "--advise": advise,
        "--calibrate": calibrate is not None,
    }
    of_network = {"--batch": batch is not None, "--input": shapes is not None}
    if results is not None:
        here = {**measured_here, **of_network, "--bundle": bundle is not None}
        _refuse("--import", here, "the results say how they were measured")
        _take(results, output)
        return
    if bundle is not None:
        _refuse(
            "--bundle",
            {**measured_here, "--output": output is not None},
            "a bundle is measured by ONNX Runtime, with the options of its run.py on the device "
            "(python run.py --help)",
        )
        _write_bundle(model, *load(model, shapes, batch=batch), bundle)
        return
    if advise:
        _refuse(
            "--advise",
            {"--calibrate": calibrate is not None},
            "it is wanted soon, and can be had without knowing the last few percent",
        )
    if calibrate in (1, 2):
        raise InputError(f"--calibrate {calibrate}: it takes at least 3 networks, or 0 for none")
    network, example = load(model, shapes, batch=batch)
    source = profiler.source_of(
        backend,
        output,
        threads=threads,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        cuda_graphs=cuda_graphs,
        provider=provider,
    )
    groups = profiler.groups_of(network, example)
    with progress_bars() as progress:
        asked = _CALIBRATED_ON if calibrate is None else calibrate
        priced = profiler.profile(
            groups, source, calibrate_on=0 if advise else asked, coarse=advise, progress=progress
        )
    out().print(profiler.kernel_table(priced))
    if advise:
        out().print(advice.advice_text(advice.advice_of(groups, priced, source)))
    if source.table is not None:
        err().print(f"wrote {escape(source.table.path)}")


def _refuse(option: str, given: Mapping[str, bool], reason: str) -> None:
    """Options that would have no effect are mistakes."""
    idle = [name for name, is_given in given.items() if is_given]
    if idle:
        raise InputError(f"{option} takes no {', '.join(idle)}: {reason}")


def _write_bundle(model: str, network: Any, example: Any, folder: Path) -> None:
    with progress_bars() as progress:
        count = profiler.write_bundle_of(network, example, folder, progress=progress)
    err().print(
        f"wrote {escape(str(folder))}: {count} kernels. Copy it to the device, run there "
        f"'python run.py -o results.jsonl', and here halp-fx profile {escape(model)} "
        "--import results.jsonl -o board.sqlite"
    )


def _take(results: Path, output: Path | None) -> None:
    if output is None:
        raise InputError(
            "--import takes -o FILE: a device that is elsewhere has a table of its own, as "
            "-o board.sqlite"
        )
    with LatencyTable.open(output) as table:
        device = import_results(results, table)
        count = len(table.entries(device))
        err().print(f"the table has {count} measurements of {escape(summary(device))}")
        err().print(f"wrote {escape(table.path)}")


def sweep(
    model: ModelArgument,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Comma-separated: shares (0.5) or times (4ms).")
    ] = "0.9,0.7,0.5,0.3",
    params: ParamsOption = None,
    macs: MacsOption = None,
    memory: MemoryOption = None,
    latency: LatencyOption = None,
    also: AlsoOption = None,
    foreign: ForeignOption = False,
    solver: Annotated[
        str, typer.Option("--solver", help="joint, or to compare with: halp, greedy, uniform.")
    ] = "joint",
    samples: SamplesOption = None,
    candidates: CandidatesOption = 1,
    steps: StepsOption = 1,
    reconstruct: ReconstructOption = False,
    save: Annotated[bool, typer.Option("--save", help="Also keep each network.")] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for what is written.")
    ] = Path("sweep"),
    pretrained: PretrainedOption = False,
    weights: WeightsOption = None,
    batch: BatchOption = None,
    shapes: InputOption = None,
    debug: DebugOption = False,
) -> None:
    """Prunes a network to several budgets; leaves a table and a chart.

    Limits other than the budgets hold at each of them.
    """
    del debug
    limits = {"params": params, "macs": macs, "memory": memory}
    asked = sweeper.parse_budgets(budgets, limits)
    source, further = latencies_of(latency, also or (), foreign)
    by_data = by_samples(samples, candidates, steps, reconstruct)
    network, example = load(model, shapes, batch=batch, pretrained=pretrained, weights=weights)
    with progress_bars() as progress:
        points = sweeper.sweep(
            network,
            asked,
            example,
            output,
            limits=limits,
            save=save,
            progress=progress,
            options={"latency": source, "also": further, "solver": solver, **by_data},
        )
    out().print(sweeper.point_table(points))
    for point in points:
        if point.remark:
            err().print(f"[yellow]{escape(point.budget)}: {escape(point.remark)}[/]")
    for path in sweeper.write_points(points, output, model):
        err().print(f"wrote {escape(str(path))}")
